"""Free bits: hand cases, brute force over everything that dominates a recipe, what a refined recipe keeps and says."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixbit
from mixbit.errors import MixbitError
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.tables import CostTable

WIDTHS = (2, 4, 8)
#: One layer: rows are act 2, 4, 8, columns weight 2, 4, 8.
HAND = [[100, 140, 220], [180, 150, 230], [400, 380, 300]]


def recipe_of(**layers: tuple[int, int]) -> Recipe:
    return Recipe(layers={n: LayerPrecision(act=a, weight=w) for n, (a, w) in layers.items()})


def widths_of(recipe: Recipe, costs: CostTable) -> list[tuple[int, int]]:
    return [(recipe[n].act, recipe[n].weight) for n in costs.layers]


def one_layer(values=HAND) -> CostTable:
    return CostTable.from_arrays(["l"], [values], WIDTHS, WIDTHS, unit="cycles")


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ((2, 2), (2, 2)),
        ((2, 4), (2, 4)),
        ((2, 8), (2, 8)),
        ((4, 2), (4, 4)),
        ((4, 4), (4, 4)),
        ((4, 8), (4, 8)),
        ((8, 2), (8, 8)),
        ((8, 4), (8, 8)),
        ((8, 8), (8, 8)),
    ],
)
def test_one_layer_by_hand(start: tuple[int, int], end: tuple[int, int]) -> None:
    costs = one_layer()
    for mode in ("strict", "no_slower"):
        refined = mixbit.refine(recipe_of(l=start), costs, mode)
        assert widths_of(refined, costs) == [end]


def test_equal_latencies() -> None:
    tie = [[100, 140, 220], [180, 150, 230], [400, 380, 380]]
    assert widths_of(mixbit.refine(recipe_of(l=(8, 4)), one_layer(tie)), one_layer()) == [(8, 4)]
    assert widths_of(mixbit.refine(recipe_of(l=(8, 4)), one_layer(tie), "no_slower"), one_layer()) == [(8, 8)]
    # Three are fastest: strict takes the first of ascending (act, weight), no_slower the most bits, then the weight's.
    tie = [[9, 9, 5], [9, 9, 9], [9, 5, 9]]
    assert widths_of(mixbit.refine(recipe_of(l=(2, 2)), one_layer(tie)), one_layer()) == [(2, 8)]
    tie = [[9, 9, 9], [9, 9, 5], [9, 5, 9]]
    assert widths_of(mixbit.refine(recipe_of(l=(2, 2)), one_layer(tie)), one_layer()) == [(4, 8)]
    assert widths_of(mixbit.refine(recipe_of(l=(2, 2)), one_layer(tie), "no_slower"), one_layer()) == [(4, 8)]


def test_a_shared_input_is_solved_for_all_its_readers() -> None:
    # Alone, a would take act 8 (10 -> 1) and b would stay (10 -> 30): together act 8 costs 31, act 4 costs 12.
    a = [[10, 10, 10], [5, 5, 5], [1, 1, 1]]
    b = [[10, 10, 10], [9, 9, 7], [30, 30, 30]]
    costs = CostTable.from_arrays(["a", "b"], [a, b], WIDTHS, WIDTHS, input_group=[3, 3])
    refined = mixbit.refine(recipe_of(a=(2, 2), b=(2, 4)), costs)
    assert widths_of(refined, costs) == [(4, 2), (4, 8)]
    assert refined.report["latency_after"] == costs.total(refined) == 12
    assert refined.report["latency_minimum"] == 12
    # Readers that disagree are taken to the widest of their acts: one tensor has one width.
    assert widths_of(mixbit.refine(recipe_of(a=(2, 2), b=(8, 2)), costs), costs) == [(8, 2), (8, 2)]


def test_the_network_input_keeps_its_width() -> None:
    fast_at_16 = [[[9, 9, 9], [5, 5, 4], [1, 1, 1]]]
    costs = CostTable.from_arrays(["first"], fast_at_16, (4, 8, 16), WIDTHS, input_group=[0])
    refined = mixbit.refine(recipe_of(first=(8, 2)), costs)
    assert widths_of(refined, costs) == [(8, 8)]
    assert refined.report["latency_minimum"] == 4


def test_an_output_width_counts_where_the_tensor_is_made() -> None:
    # Act 8 saves b 3 cycles, but costs a, whose output it is, 5.
    values_out = np.zeros((2, 3, 3, 3))
    values_out[0] = [10, 10, 15]
    values_out[1] = np.array([20, 20, 17])[:, None, None]
    costs = CostTable.from_arrays(
        ["a", "b"], values_out[..., 2], WIDTHS, WIDTHS, values_out=values_out, consumer=["b", None], input_group=[0, 1]
    )
    start = recipe_of(a=(8, 4), b=(4, 4))
    assert widths_of(mixbit.refine(start, costs), costs) == [(8, 4), (4, 4)]
    values_out[0, ..., 2] = 12
    costs = CostTable.from_arrays(
        ["a", "b"], values_out[..., 2], WIDTHS, WIDTHS, values_out=values_out, consumer=["b", None], input_group=[0, 1]
    )
    refined = mixbit.refine(start, costs)
    assert widths_of(refined, costs) == [(8, 4), (8, 4)]
    assert refined.report["layers"] == [
        {"layer": "a", "before": 10.0, "after": 12.0},
        {"layer": "b", "before": 20.0, "after": 17.0},
    ]
    assert refined.report["raised"] == [
        {"layer": "b", "from": {"act": 4, "weight": 4}, "to": {"act": 8, "weight": 4}, "saved": 3.0}
    ]
    assert (refined.report["latency_before"], refined.report["latency_after"], refined.report["saved"]) == (30, 29, 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[CostTable, Recipe]:
    """Tables full of ties, tensors with several readers, outputs that are priced at any reader, loops included."""
    count = draw(st.integers(1, 3))
    names = [f"l{i}" for i in range(count)]
    bits = draw(st.sampled_from([(2, 4), (2, 4, 8), (4, 8, 16)]))
    groups = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    n = len(bits)
    value = st.integers(0, 6).map(lambda v: v / 10)
    follows = draw(st.booleans())
    size = count * n**2 * (n if follows else 1)
    values = np.array(draw(st.lists(value, min_size=size, max_size=size))).reshape(count, n, n, -1)
    given = {}
    if follows:
        width = st.sampled_from([*names, None, *bits]) if 8 in bits else st.sampled_from([*names, *bits])
        consumer = draw(st.lists(width, min_size=count, max_size=count))
        given = {"values_out": values, "consumer": consumer}
    costs = CostTable.from_arrays(names, values[..., -1], bits, bits, input_group=groups, **given)
    acts = {g: draw(st.sampled_from(bits)) for g in set(groups)}
    weights = draw(st.lists(st.sampled_from(bits), min_size=count, max_size=count))
    layers = {n: LayerPrecision(act=acts[g], weight=w) for n, g, w in zip(names, groups, weights, strict=True)}
    return costs, Recipe(layers=layers)


def exact(costs: CostTable, recipe: Recipe) -> Fraction:
    return sum((Fraction(v) for v in costs.per_layer(recipe).tolist()), Fraction(0))


def dominating(costs: CostTable, recipe: Recipe):
    """Every recipe that lowers nothing, gives readers of one tensor one act, and leaves the network input."""
    groups = sorted(set(costs.input_group))
    floors = {g: recipe[n].act for n, g in zip(costs.layers, costs.input_group, strict=True)}
    acts = [[a for a in costs.act_bits if a == floors[g] or (g and a > floors[g])] for g in groups]
    weights = [[w for w in costs.weight_bits if w >= recipe[n].weight] for n in costs.layers]
    for chosen in itertools.product(*acts):
        act = dict(zip(groups, chosen, strict=True))
        for w in itertools.product(*weights):
            yield [(act[g], b) for g, b in zip(costs.input_group, w, strict=True)]


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["strict", "no_slower"]))
def test_nothing_that_dominates_is_faster(case: tuple[CostTable, Recipe], mode: str) -> None:
    costs, start = case
    refined = mixbit.refine(start, costs, mode)
    found = widths_of(refined, costs)

    def key(widths: list[tuple[int, int]]) -> tuple:
        recipe = Recipe(layers={n: LayerPrecision(act=a, weight=w) for n, (a, w) in zip(costs.layers, widths)})
        acts, weights = sum(a for a, _ in widths), sum(w for _, w in widths)
        return (exact(costs, recipe), *((acts, weights) if mode == "strict" else (-acts - weights, -weights)))

    everything = list(dominating(costs, start))
    assert found in everything
    assert key(found) == min(key(widths) for widths in everything)
    report = refined.report
    assert report["latency_after"] == costs.total(refined) <= costs.total(start) == report["latency_before"]
    assert report["latency_minimum"] <= report["latency_after"]
    if mode == "strict" and exact(costs, refined) == exact(costs, start):
        assert not report["raised"]
    again = mixbit.refine(refined, costs, mode)
    assert again == refined
    assert again.report["raised"] == []


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=27, max_size=27), st.lists(st.sampled_from(WIDTHS), min_size=6, max_size=6)
)
def test_independent_layers_take_the_published_rule(values: list[int], bits: list[int]) -> None:
    table = np.array(values, dtype=float).reshape(3, 3, 3)
    costs = CostTable.from_arrays("abc", table, WIDTHS, WIDTHS)
    start = {n: (bits[2 * i], bits[2 * i + 1]) for i, n in enumerate("abc")}
    expected = []
    for name, (act, weight) in start.items():
        faster = [
            (costs.entry(name, a, w), (a, w))
            for a in WIDTHS
            for w in WIDTHS
            if a >= act and w >= weight and costs.entry(name, a, w) < costs.entry(name, act, weight)
        ]
        expected.append(min(faster)[1] if faster else (act, weight))
    assert widths_of(mixbit.refine(recipe_of(**start), costs), costs) == expected


def test_what_a_refined_recipe_keeps() -> None:
    costs = CostTable.from_arrays("ab", [HAND, HAND], WIDTHS, WIDTHS, unit="cycles")
    start = Recipe(
        layers={
            "a": LayerPrecision(act=8, weight=2, granularity="per_tensor", rounding="half_up", extra_levels="a.bin"),
            "*": LayerPrecision(act=2, weight=2, narrow_range=False, signed_act=True),
        },
        default=LayerPrecision(),
        tensors={"default": {"act": 6}},
        made_by={"verb": "assign"},
        cost={"bops": 5.0},
        sqnr_db=20.0,
    )
    refined = mixbit.refine(start, costs)
    assert refined["a"] == LayerPrecision(
        act=8, weight=8, granularity="per_tensor", rounding="half_up", extra_levels="a.bin"
    )
    assert list(refined.layers) == ["a", "*"]
    assert refined["b"] == start["b"]
    assert refined.tensors == start.tensors
    assert refined.tensors is not start.tensors
    assert (refined.default, refined.sqnr_db) == (start.default, None)
    assert refined.cost == {"cycles": 400.0} == refined.report["cost"]
    assert refined.made_by == {"verb": "refine", "mode": "strict", "of": {"verb": "assign"}}
    expected = {"method": "refine", "mode": "strict", "budget": None, "feasible": True, "misses_by": 0.0}
    assert expected.items() <= refined.report.items()
    assert refined.report["latency_8bit"] == 600
    assert start["a"].weight == 2
    # A glob's layers get entries of their own where they change; the glob stays for the others.
    slow = CostTable.from_arrays("ab", [HAND, [[9, 9, 9], [9, 9, 9], [9, 9, 1]]], WIDTHS, WIDTHS, unit="cycles")
    assert mixbit.refine(start, slow)["b"] == LayerPrecision(act=8, weight=8, narrow_range=False, signed_act=True)
    assert mixbit.refine(start, slow).layers["*"] == start.layers["*"]
    # Where nothing changes, what was said of the recipe stays true.
    same = mixbit.refine(
        recipe := Recipe(layers=start.layers | {"a": start["b"]}, cost={"bops": 5.0}, sqnr_db=1.0), costs
    )
    assert same.cost == {"bops": 5.0, "cycles": 200.0}
    assert (same.sqnr_db, same.made_by, same.layers) == (1.0, {}, recipe.layers)


def test_widths_beyond_those_of_recipes_and_without_8_bits() -> None:
    values = [[[9.0, 8, 1], [7, 6, 1], [1, 1, 1]]]
    costs = CostTable.from_arrays(["l"], values, (4, 16, 32), (4, 16, 32))
    refined = mixbit.refine(recipe_of(l=(4, 4)), costs)
    assert widths_of(refined, costs) == [(16, 16)]
    assert refined.report["latency_8bit"] is None
    assert refined.cost == {"cost": 6.0}


@pytest.mark.parametrize(
    ("recipe", "options", "error", "complaint"),
    [
        (recipe_of(l=(2, 2)), {"mode": "stirct"}, MixbitError, "mode='stirct'.*'strict', 'no_slower'.*'strict'"),
        (recipe_of(l=(3, 2)), {}, KeyError, "layer 'l': no act width 3"),
        (recipe_of(l=(2, 5)), {}, KeyError, "layer 'l': no weight width 5"),
        (recipe_of(k=(2, 2)), {}, MixbitError, "no layer 'k'"),
        (Recipe(), {}, MixbitError, "layer 'l' has act=None, weight=None"),
        (Recipe(layers={"l": LayerPrecision(act=None, weight=4)}), {}, MixbitError, "act=None, weight=4"),
    ],
)
def test_bad_input_is_named(recipe: Recipe, options: dict, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        mixbit.refine(recipe, one_layer(), **options)


def test_a_maximum_is_no_latency() -> None:
    peak = CostTable.from_arrays(["l"], [HAND], WIDTHS, WIDTHS, reduce="max")
    with pytest.raises(MixbitError, match="totalled by 'max'"):
        mixbit.refine(recipe_of(l=(2, 2)), peak)
