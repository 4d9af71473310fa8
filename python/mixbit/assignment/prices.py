"""Costs over the options of the layers that are chosen, those of frozen layers folded in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixbit.errors import MixbitError
from mixbit.recipe import LayerPrecision
from mixbit.tables import Array, CostTable

if TYPE_CHECKING:
    from mixbit.assignment import Choice


@dataclasses.dataclass(frozen=True)
class Price:
    """One cost of every option.

    Attributes:
        values: [layers, acts, weights], or with readers [layers, acts, weights, acts of the reader].
        maximum: Whether layers make a total by their maximum instead of their sum.
        reader: Of each layer the one that reads its output, -1 where the output's width is fixed; empty where no cost
            depends on it.
        fixed: What frozen layers cost whatever is chosen.
    """

    values: Array
    maximum: bool
    reader: tuple[int, ...] = ()
    fixed: float = 0.0

    def total(self, choice: Choice) -> float:
        """The sum of a choice's costs, without `fixed`."""
        acts, weights = choice
        found = 0.0
        for i, (a, w) in enumerate(zip(acts, weights, strict=True)):
            if self.reader:
                found += self.values[i, a, w, acts[self.reader[i]] if self.reader[i] >= 0 else 0]
            else:
                found += self.values[i, a, w]
        return float(found)


def priced(
    cost: CostTable,
    names: Sequence[str],
    acts: Sequence[int],
    weights: int,
    precision: Callable[[int, int], tuple[int, int]],
    fixed: Mapping[str, LayerPrecision],
) -> Price:
    """A table's costs over the options of `names`.

    A frozen layer whose output a free one reads costs what that one's act makes it cost: that is added to the reader.

    Args:
        cost: The table.
        names: Layers that are chosen.
        acts: Bits of the act options.
        weights: How many weight options there are.
        precision: (act bits, weight bits) of option indices.
        fixed: Precision of the frozen layers.

    Raises:
        MixbitError: A cost that is totalled by maximum depends on the widths of outputs.
        KeyError: The table lacks a width.
    """
    consumer = dict(zip(cost.layers, cost.consumer or (None,) * len(cost.layers), strict=True))
    follows = cost.values_out is not None
    reader = [_index(names, consumer[n]) if follows else -1 for n in names]
    if cost.reduce == "max" and (any(r >= 0 for r in reader) or (follows and fixed)):
        raise MixbitError(
            f"costs in {cost.unit!r} are totalled by maximum and depend on the widths of outputs; expected one or the "
            "other"
        )
    outs = len(acts) if any(r >= 0 for r in reader) else 1
    values = np.zeros((len(names), len(acts), weights, outs))
    for i, name in enumerate(names):
        own = cost.output_width(name, fixed) if follows and reader[i] < 0 else None
        for j in range(len(acts)):
            for k in range(weights):
                act, weight = precision(j, k)
                if reader[i] >= 0:
                    values[i, j, k] = [cost.entry(name, act, weight, precision(o, 0)[0]) for o in range(len(acts))]
                else:
                    values[i, j, k] = cost.entry(name, act, weight, own)
    constant = []
    for name, chosen in fixed.items():
        at = _index(names, consumer[name]) if follows else -1
        if at < 0:
            out = cost.output_width(name, fixed) if follows else None
            constant.append(cost.entry(name, chosen.act, chosen.weight, out))
            continue
        for j in range(len(acts)):
            values[at, j] += cost.entry(name, chosen.act, chosen.weight, precision(j, 0)[0])
    frozen = cost.combine(np.asarray(constant)) if constant else 0.0
    if outs == 1:
        return Price(values[..., 0], cost.reduce == "max", (), frozen)
    return Price(values, False, tuple(reader), frozen)


def _index(names: Sequence[str], consumer: str | int | None) -> int:
    return names.index(consumer) if isinstance(consumer, str) and consumer in names else -1
