"""The recipe that a search comes closest to among those that use their budgets well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixbit.assignment.ilp import checked, pressure, solve
from mixbit.assignment.prices import Price, priced
from mixbit.errors import MixbitError
from mixbit.recipe import LayerPrecision
from mixbit.tables import Array, CostTable

Choice = tuple[list[int], list[int]]

#: A landed recipe costs at least this share of the largest cost that can be reached within the budgets.
USED = 0.99


@dataclasses.dataclass
class Options:
    """What layers may choose from.

    Attributes:
        names: Layers that choose.
        acts: Bits of the act options.
        weights: Bits of the weight options.
        allowed: uint8 [layers, acts, weights].
        groups: Layers with the same number share their act option.
        preference: float64 like allowed: the larger, the rather.
        shares: float64 [layers]; where a layer stands in `names` once for each group of its channels, the group's share
            of its costs. None where every layer chooses as one.
    """

    names: list[str]
    acts: tuple[int, ...]
    weights: tuple[int, ...]
    allowed: np.ndarray[Any, np.dtype[np.uint8]]
    groups: list[int]
    preference: Array
    shares: Array | None = None


def reach(options: Options, table: CostTable, asked: float | None = None) -> tuple[float, float]:
    """The least and the largest total of a table among all choices.

    Of a table that is totalled by maximum these are bounds: layers that share an input may not reach them. With `asked`
    any two reached totals will do that have it between them: that saves the integer programs.
    """
    price = _priced(options, table, {})
    if price.maximum:
        each = [price.values[i][options.allowed[i] == 1] for i in range(len(options.names))]
        return max(float(v.min()) for v in each), max(float(v.max()) for v in each)
    # Where fewer bits are cheaper the corners are the ends, which the solver's tolerance could miss by a little.
    acts, weights = ([np.flatnonzero(own.any(axis)).tolist() for own in options.allowed] for axis in (1, 0))
    choices: list[Choice] = [([pick(own) for own in acts], [pick(own) for own in weights]) for pick in (min, max)]
    corners = sorted(price.total(choice) for choice in choices)
    if asked is not None and corners[0] <= asked <= corners[1]:
        return corners[0], corners[1]
    # Where every layer is at its own least (and most) there, no choice can do better: no integer program is needed.
    each = [price.values[i][options.allowed[i] == 1] for i in range(len(options.names))]
    ends = [math.fsum(float(pick(v)) for v in each) for pick in (np.min, np.max)]
    if all(math.isclose(corner, end, rel_tol=1e-12) for corner, end in zip(corners, ends, strict=True)):
        return corners[0], corners[1]
    for sign in (1, -1):
        found = solve(options, dataclasses.replace(price, values=sign * price.values), [])
        choices += [] if found is None else [found]
    totals = [price.total(choice) for choice in choices]
    return min(totals), max(totals)


def _priced(options: Options, table: CostTable, fixed: Mapping[str, LayerPrecision]) -> Price:
    def precision(act: int, weight: int) -> tuple[int, int]:
        return options.acts[act], options.weights[weight]

    price = priced(table, options.names, options.acts, len(options.weights), precision, fixed)
    # A maximum over layers is one over their groups as well: it does not depend on weights that choose by group.
    if options.shares is None or price.maximum:
        return price
    return dataclasses.replace(price, values=price.values * options.shares.reshape(-1, 1, 1))


def land(
    options: Options,
    budgets: Mapping[CostTable, float],
    fixed: Mapping[str, LayerPrecision],
    first: Choice,
) -> tuple[Choice, bool]:
    """Option indices (act, weight) of every layer, and whether the budgets can be kept.

    `first` is what the search itself decided: it is taken if it keeps the budgets and uses them. Else the choice of the
    largest summed preference that keeps the budgets and costs, summed in shares of the budgets, at least 99 % of the
    most that is possible. Where no choice keeps the budgets, the cheapest one.

    Raises:
        MixbitError: Some layer has no allowed width.
    """
    prices = [_priced(options, table, fixed) for table in budgets]
    limits = [b if p.maximum else b - p.fixed for p, b in zip(prices, budgets.values(), strict=True)]
    allowed = options.allowed.copy()
    rows: list[tuple[Price, float]] = []
    for price, limit in zip(prices, limits, strict=True):
        if price.maximum:
            allowed[price.values > limit * (1 + 1e-12)] = 0
        else:
            rows.append((price, limit))

    def cheapest() -> tuple[Choice, bool]:
        found = solve(options, pressure(prices, limits), [])
        if found is None:
            raise MixbitError("budget: some layer has no allowed width")
        return found, False

    over = any(p.maximum and p.fixed > limit * (1 + 1e-12) for p, limit in zip(prices, limits, strict=True))
    if over or any(limit <= 0 for _, limit in rows) or not allowed.reshape(len(options.names), -1).any(1).all():
        return cheapest()
    fits = all(price.total(first) <= limit * (1 + 1e-12) for price, limit in rows)
    fits = fits and all(allowed[i, a, w] for i, (a, w) in enumerate(zip(*first, strict=True)))
    preferred = Price(-options.preference, False)
    if not rows:
        found = first if fits else checked(options, preferred, [], allowed)
        return (found, True) if found is not None else cheapest()
    used = pressure(*(list(column) for column in zip(*rows, strict=True)))
    unused = dataclasses.replace(used, values=-used.values)
    # With many layers nearly all of the budget can be used; only where it cannot is the most that can be computed.
    for floor in (USED * len(rows), None):
        if floor is None:
            fullest = checked(options, unused, rows, allowed)
            if fullest is None:
                return cheapest()
            floor = USED * used.total(fullest)
        if fits and used.total(first) >= floor:
            return first, True
        found = checked(options, preferred, [*rows, (unused, -floor)], allowed)
        if found is not None:
            return found, True
    return cheapest()
