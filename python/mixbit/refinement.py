"""Free bits: precision raised wherever the target is not slower for it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction

from mixbit.errors import MixbitError, check_choice
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.tables import OUTPUT_BITS, CostTable

__all__ = ["REFINE_MODES", "refine"]

REFINE_MODES = ("strict", "no_slower")
#: A recipe's widest width; a table's 32 stands for float.
_WIDEST = 16

#: Of each layer (act, weight).
_Widths = dict[str, tuple[int, int]]
#: What is made least: the latency, exact (rounded sums would tell equal ones apart), then two numbers that break ties.
_Key = tuple[Fraction, int, int]
#: A part of the sum that is made least: the groups it depends on, and its value at each of their act widths.
_Factor = tuple[tuple[int, ...], dict[tuple[int, ...], _Key]]


def refine(recipe: Recipe, latency_costs: CostTable, mode: str = "strict") -> Recipe:
    """Raises precisions where the target is faster for it, or no slower: the second step of Free Bits.

    Of all recipes that lower no width, the one of least total latency (Rutishauser et al., arXiv 2307.02894: a layer
    takes the fastest of the pairs of widths that dominate its own). It is exact where layers depend on each other, too:
    layers that read one tensor (`input_group`) get one act width, and where a latency depends on the output's width
    (`values_out`), an act width counts at the layer that makes the tensor as well. Layers that read the network input
    keep their act width. Widths are those of the table, up to 16 bits.

    Args:
        recipe: Bits of every layer of the table, which has all of these widths. Layers that read one tensor at
            different widths are taken to the widest of these in any case.
        latency_costs: Latencies in any unit, totalled by sum.
        mode: "strict" changes only what makes the network faster, and takes the first of ascending (act, weight) among
            the fastest; "no_slower" takes the most bits among the fastest (act + weight, then weight).

    Returns:
        A copy with the new widths and all else as it was; if a width changed, without the predicted SQNR and the costs
        beside the latency, which were those of the old widths. `.report` holds method, mode, cost, budget (None),
        feasible, misses_by, latency_before, latency_after, saved, latency_8bit (uniform 8/8; None where the table lacks
        these widths), latency_minimum (at any widths, that of the network input aside), raised (layer, from, to, saved;
        from and to are {act, weight}) and layers (layer, before, after).

    Raises:
        MixbitError: The mode or a layer of the recipe is unknown, a layer is float or has extra levels or bits by
            channel, or the table's total is a maximum.
        KeyError: The table lacks a width of the recipe; the message names layer and width.
    """
    costs = latency_costs
    check_choice("mode", mode, REFINE_MODES)
    if costs.reduce != "sum":
        raise MixbitError(f"latency_costs are totalled by {costs.reduce!r}; expected latencies, which add up")
    recipe.check_names(costs.layers)
    if recipe.extra_maps:
        raise MixbitError(
            f"recipe: layer {next(iter(recipe.extra_maps))!r} has extra levels, which belong to its bits; refine the "
            "recipe before they are given"
        )
    if recipe.channel_maps:
        raise MixbitError(
            f"recipe: the channels of layer {next(iter(recipe.channel_maps))!r} have bits of their own, but latencies "
            "are those of one width a layer; expected a recipe with one width for all channels"
        )
    now: _Widths = {}
    for name in costs.layers:
        act, weight = recipe[name].act, recipe[name].weight
        if act is None or weight is None:
            raise MixbitError(
                f"recipe: layer {name!r} has act={act}, weight={weight} (None is float); expected bits of both for "
                "every layer of latency_costs"
            )
        now[name] = (act, weight)
    before = costs.per_layer(recipe)
    new = _fastest(costs, now, mode)
    changed = {n: dataclasses.replace(recipe[n], act=a, weight=w) for n, (a, w) in new.items() if (a, w) != now[n]}
    refined = copy.deepcopy(recipe)
    refined.layers |= changed
    after = costs.per_layer(refined)
    total = costs.combine(after)
    if changed:
        refined.cost, refined.sqnr_db = {}, None
        refined.made_by = {"verb": "refine", "mode": mode, "of": refined.made_by}
    refined.cost[costs.unit or "cost"] = total
    refined.report = {
        "method": "refine",
        "mode": mode,
        "cost": dict(refined.cost),
        "budget": None,
        "feasible": True,
        "misses_by": 0.0,
        "latency_before": costs.combine(before),
        "latency_after": total,
        "saved": costs.combine(before) - total,
        "latency_8bit": _uniform8(costs),
        "latency_minimum": _minimum(costs, now),
        "raised": [
            {
                "layer": name,
                "from": dict(zip(("act", "weight"), now[name], strict=True)),
                "to": dict(zip(("act", "weight"), new[name], strict=True)),
                "saved": float(old - after[i]),
            }
            for i, (name, old) in enumerate(zip(costs.layers, before, strict=True))
            if name in changed
        ],
        "layers": [
            {"layer": name, "before": float(old), "after": float(later)}
            for name, old, later in zip(costs.layers, before, after, strict=True)
        ],
    }
    return refined


def _uniform8(costs: CostTable) -> float | None:
    try:
        return costs.uniform(8, 8)
    except KeyError:
        return None


def _minimum(costs: CostTable, now: _Widths) -> float:
    """The least latency of all widths; the network input keeps its own."""
    narrowest = min(costs.act_bits), min(costs.weight_bits)
    groups = zip(costs.layers, costs.input_group, strict=True)
    best = _fastest(costs, {n: (now[n][0] if g == 0 else narrowest[0], narrowest[1]) for n, g in groups}, "strict")
    return costs.total({n: LayerPrecision(act=a, weight=w, narrow_range=False) for n, (a, w) in best.items()})


def _fastest(costs: CostTable, least: _Widths, mode: str) -> _Widths:
    """Of all widths that are at least `least` in every layer, those of least latency; ties as the mode says."""
    group = dict(zip(costs.layers, costs.input_group, strict=True))
    floor: dict[int, int] = {}
    for name, g in group.items():
        floor[g] = max(floor.get(g, 0), least[name][0])
    acts = {g: [a for a in costs.act_bits if a == low or (g and low < a <= _WIDEST)] for g, low in floor.items()}

    readers: dict[str, str | int | None] = dict.fromkeys(costs.layers)
    if costs.values_out is not None and costs.consumer is not None:
        readers = dict(zip(costs.layers, costs.consumer, strict=True))

    def best(name: str, chosen: Mapping[int, int]) -> tuple[_Key, int]:
        """The least key of a layer at act widths of groups, and the weight width that has it."""
        act, reader = chosen[group[name]], readers[name]
        out = chosen[group[reader]] if isinstance(reader, str) else OUTPUT_BITS if reader is None else reader
        found = []
        for weight in costs.weight_bits:
            if least[name][1] <= weight <= _WIDEST:
                ties = (act, weight) if mode == "strict" else (-act - weight, -weight)
                found.append(((Fraction(costs.entry(name, act, weight, out)), *ties), weight))
        return min(found)

    factors: list[_Factor] = []  # one a layer
    for name, own in group.items():
        reader = readers[name]
        scope = tuple({own, group[reader] if isinstance(reader, str) else own})
        combinations = itertools.product(*(acts[g] for g in scope))
        factors.append((scope, {c: best(name, dict(zip(scope, c, strict=True)))[0] for c in combinations}))
    chosen = _eliminate(acts, factors)
    return {name: (chosen[g], best(name, chosen)[1]) for name, g in group.items()}


def _eliminate(domains: Mapping[int, Sequence[int]], factors: list[_Factor]) -> dict[int, int]:
    """The values of variables that make a sum of factors least, by eliminating one variable after the other.

    Exact for any factors; where a tensor is made by one layer, the groups are a forest, and no table is ever larger
    than that of a pair.
    """
    steps = []
    waiting = set(domains)
    while waiting:
        around = {v: {u for scope, _ in factors if v in scope for u in scope} - {v} for v in waiting}
        variable = min(waiting, key=lambda v: (len(around[v]), v))
        waiting.remove(variable)
        scope = tuple(sorted(around[variable]))
        mine = [factor for factor in factors if variable in factor[0]]
        table, choice = {}, {}
        for values in itertools.product(*(domains[v] for v in scope)):
            given = dict(zip(scope, values, strict=True))
            table[values], choice[values] = min(
                (_sum([t[tuple({**given, variable: value}[v] for v in s)] for s, t in mine]), value)
                for value in domains[variable]
            )
        factors = [*(factor for factor in factors if variable not in factor[0]), (scope, table)]
        steps.append((variable, scope, choice))
    chosen: dict[int, int] = {}
    for variable, scope, choice in reversed(steps):
        chosen[variable] = choice[tuple(chosen[v] for v in scope)]
    return chosen


def _sum(keys: Sequence[_Key]) -> _Key:
    return sum((k[0] for k in keys), Fraction(0)), sum(k[1] for k in keys), sum(k[2] for k in keys)
