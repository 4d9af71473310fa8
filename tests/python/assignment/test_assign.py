"""Bit allocation: golden toy, exactness against brute force, budgets, groups, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixbit
from mixbit.errors import MixbitError
from mixbit.tables import CostTable, SensitivityTable

BITS = tuple(range(2, 9))
LAYERS = "ABCD"
OPS = np.array([1000.0, 200.0, 50.0, 10.0])
WEIGHTS = np.array([10.0, 100.0, 1000.0, 20.0])
C = np.array([1.0, 4.0, 0.25, 16.0])


def toy() -> SensitivityTable:
    """NSR_l(b) = c_l 4^-b."""
    nsr = C[:, None] * 4.0 ** -np.array(BITS, float)
    return SensitivityTable.from_arrays(LAYERS, -10 * np.log10(nsr), BITS, BITS)


def linear_costs(per_bit: np.ndarray, unit: str) -> CostTable:
    """per_bit * b on the diagonal (the wider operand off it)."""
    bits = np.array(BITS, float)
    return CostTable.from_arrays(
        LAYERS, per_bit[:, None, None] * np.maximum(bits[:, None], bits[None, :]), BITS, BITS, unit=unit
    )


def bits_of(recipe: mixbit.Recipe) -> list[int | None]:
    return [recipe[name].weight for name in LAYERS]


def achieved(bits: list[int]) -> float:
    return float(-10 * np.log10((C * 4.0 ** -np.array(bits, float)).sum()))


@pytest.mark.parametrize(
    ("mode", "bits", "db", "ops", "memory"),
    [
        ("sqnr", [5, 6, 4, 7], 24.082, 6470, 4790),
        ("ops", [4, 6, 5, 8], 22.699, 5530, 5800),
        ("weight_memory", [7, 7, 3, 8], 23.511, 8630, 3930),
    ],
)
def test_threshold_rule_golden(mode: str, bits: list[int], db: float, ops: float, memory: float) -> None:
    costs = linear_costs(WEIGHTS, "bits") if mode == "weight_memory" else linear_costs(OPS, "ops")
    recipe = mixbit.assign(toy(), costs, target_sqnr_db=20.0, method="threshold", mode=mode)
    assert bits_of(recipe) == bits
    assert recipe.sqnr_db == pytest.approx(db, abs=5e-4)
    assert linear_costs(OPS, "ops").total(recipe) == ops
    assert linear_costs(WEIGHTS, "bits").total(recipe) == memory


@pytest.mark.parametrize(
    ("target", "unit", "bits", "order", "db", "ops", "memory"),
    [
        (20, "ops", [4, 5, 4, 7], "AACABCABCBCD", 20.103, 5270, 4680),
        (20, "bits", [5, 5, 3, 7], "CCCCBCABABDA", 20.103, 6220, 3690),
        (15, "ops", [3, 5, 3, 6], None, 15.631, 4210, 3650),
        (15, "bits", [4, 5, 2, 6], None, 15.631, 5160, 2660),
        (25, "ops", [5, 6, 5, 8], None, 26.124, 6530, 5810),
        (25, "bits", [6, 6, 4, 8], None, 26.124, 7480, 4820),
    ],
)
def test_greedy_golden(
    target: float, unit: str, bits: list[int], order: str | None, db: float, ops: float, memory: float
) -> None:
    costs = linear_costs(OPS if unit == "ops" else WEIGHTS, unit)
    recipe = mixbit.assign(toy(), costs, target_sqnr_db=target, method="greedy")
    assert bits_of(recipe) == bits
    if order is not None:
        assert "".join(recipe.report["order"]) == order
    assert recipe.sqnr_db == pytest.approx(db, abs=5e-4)
    assert linear_costs(OPS, "ops").total(recipe) == ops
    assert linear_costs(WEIGHTS, "bits").total(recipe) == memory


@pytest.mark.parametrize(("target", "ops", "memory"), [(15, 4180, 2630), (20, 5270, 3690), (25, 6530, 4810)])
def test_ilp_is_the_brute_force_optimum_of_the_toy(target: float, ops: float, memory: float) -> None:
    for unit, per_bit, best in (("ops", OPS, ops), ("bits", WEIGHTS, memory)):
        recipe = mixbit.assign(toy(), linear_costs(per_bit, unit), target_sqnr_db=target, method="ilp")
        assert recipe.cost[unit] == best
        assert achieved(bits_of(recipe)) >= target  # type: ignore[arg-type]


def random_instance(seed: int, layers: int = 3, widths: int = 3) -> tuple[SensitivityTable, CostTable, CostTable]:
    rng = np.random.default_rng(seed)
    bits = tuple(range(2, 2 + widths))
    names = [f"l{i}" for i in range(layers)]
    # Two layers share an input in most instances.
    groups = [0, 1, 1, 2][:layers] if seed % 3 else list(range(layers))
    noise = rng.uniform(0.2, 4, (layers, 1, 1)) * (
        4.0 ** -np.array(bits, float)[None, :, None]
        + rng.uniform(0.1, 1) * 4.0 ** -np.array(bits, float)[None, None, :]
    )
    table = SensitivityTable.from_arrays(names, -10 * np.log10(noise), bits, bits, input_group=groups)
    b = np.array(bits, float)
    macs = rng.integers(1, 50, layers).astype(float)
    one = CostTable.from_arrays(names, macs[:, None, None] * b[:, None] * b[None, :], bits, bits, unit="bops")
    memory = rng.integers(1, 50, layers).astype(float)
    values = np.broadcast_to(memory[:, None, None] * b[None, None, :], one.values.shape)
    two = CostTable.from_arrays(names, values, bits, bits, unit="bits")
    return table, one, two


def choices(table: SensitivityTable):
    """All recipes that respect the groups."""
    groups = sorted(set(table.input_group))
    for acts in itertools.product(table.act_bits, repeat=len(groups)):
        for weights in itertools.product(table.weight_bits, repeat=len(table.layers)):
            yield mixbit.Recipe(
                layers={
                    n: mixbit.LayerPrecision(weight=w, act=acts[groups.index(g)])
                    for n, w, g in zip(table.layers, weights, table.input_group, strict=True)
                }
            )


@pytest.mark.parametrize("seed", range(8))
def test_ilp_equals_brute_force(seed: int) -> None:
    table, one, two = random_instance(seed)
    every = [(table.predicted_sqnr_db(r), one.total(r), two.total(r)) for r in choices(table)]
    sqnrs = sorted(e[0] for e in every)
    target = sqnrs[len(sqnrs) // 2] - 1e-6
    best = min(cost for db, cost, _ in every if db >= target)
    recipe = mixbit.assign(table, one, target_sqnr_db=target, method="ilp")
    assert recipe.report["feasible"]
    assert recipe.cost["bops"] == best
    greedy = mixbit.assign(table, one, target_sqnr_db=target, method="greedy")
    assert greedy.report["feasible"]
    assert greedy.cost["bops"] >= best

    costs = sorted(e[1] for e in every)
    memories = sorted(e[2] for e in every)
    limits = {one: costs[len(costs) // 3], two: memories[len(memories) // 2]}
    possible = [db for db, a, b in every if a <= limits[one] and b <= limits[two]]
    recipe = mixbit.assign(table, one, budget=limits, method="ilp")
    assert recipe.sqnr_db == pytest.approx(max(possible), abs=1e-9)
    for method in ("ilp", "greedy"):
        recipe = mixbit.assign(table, one, budget=limits, method=method)
        assert recipe.report["feasible"]
        assert one.total(recipe) <= limits[one]
        assert two.total(recipe) <= limits[two]


@given(st.integers(0, 10_000), st.floats(-5, 30), st.sampled_from(["greedy", "threshold", "ilp", "aimet"]))
def test_layers_that_read_one_tensor_get_one_act_width(seed: int, target: float, method: str) -> None:
    table, costs, _ = random_instance(seed % 97 * 3 + 1)
    recipe = mixbit.assign(table, costs, target_sqnr_db=target, method=method)
    assert recipe["l1"].act == recipe["l2"].act
    assert recipe.report["feasible"] == (recipe.report["predicted_sqnr_db"] >= target - 1e-9)


@given(st.integers(0, 96), st.floats(0, 20), st.floats(0, 5))
def test_raising_the_target_never_lowers_a_bit_of_the_threshold_rule(seed: int, target: float, more: float) -> None:
    table, costs, _ = random_instance(seed)
    low = mixbit.assign(table, costs, target_sqnr_db=target, method="threshold", mode="ops")
    high = mixbit.assign(table, costs, target_sqnr_db=target + more, method="threshold", mode="ops")
    assert all(low[n].weight <= high[n].weight for n in table.layers)  # type: ignore[operator]


@pytest.mark.parametrize("method", ["greedy", "threshold", "ilp", "aimet"])
def test_a_budget_is_kept_and_an_impossible_one_is_missed_by_what_it_says(method: str) -> None:
    costs = linear_costs(OPS, "ops")
    recipe = mixbit.assign(toy(), costs, budget=5000.0, method=method, mode="ops")
    assert recipe.report["feasible"]
    assert costs.total(recipe) <= 5000
    recipe = mixbit.assign(toy(), costs, budget=1000.0, method=method, mode="ops")
    assert not recipe.report["feasible"]
    assert bits_of(recipe) == [2, 2, 2, 2]
    assert recipe.report["misses_by"] == costs.total(recipe) - 1000


@pytest.mark.parametrize("method", ["greedy", "threshold", "ilp", "aimet"])
def test_an_impossible_target_gives_the_widest_and_says_by_how_much(method: str) -> None:
    recipe = mixbit.assign(toy(), linear_costs(OPS, "ops"), target_sqnr_db=60, method=method)
    assert bits_of(recipe) == [8, 8, 8, 8]
    assert not recipe.report["feasible"]
    assert recipe.report["misses_by"] == pytest.approx(60 - achieved([8, 8, 8, 8]))


def test_a_maximum_cost_bounds_every_layer() -> None:
    table, one, _ = random_instance(4)
    peak = CostTable.from_arrays(one.layers, one.values, one.act_bits, one.weight_bits, unit="peak", reduce="max")
    for method in ("greedy", "ilp"):
        limit = float(np.median(peak.values))
        recipe = mixbit.assign(table, one, budget={peak: limit}, method=method)
        assert recipe.report["feasible"] == (peak.total(recipe) <= limit)
    cheapest = mixbit.assign(table, peak, target_sqnr_db=0.0, method="ilp")
    best = min(peak.total(r) for r in choices(table) if table.predicted_sqnr_db(r) >= 0.0)
    assert peak.total(cheapest) == best


def test_metric_bisection_uses_about_seven_evaluations() -> None:
    calls = []

    def metric(recipe: mixbit.Recipe) -> float:
        calls.append(recipe)
        return 90.0 - 100.0 * 10 ** (-toy().predicted_sqnr_db(recipe) / 10)

    recipe = mixbit.assign(toy(), linear_costs(OPS, "ops"), metric=metric, max_drop=1.0, reference=90.0)
    assert len(calls) <= 8
    assert recipe.report["evaluations"] == len(calls)
    assert recipe.report["metric"] >= 89.0
    assert recipe.report["feasible"]
    # A recipe two dB below the one found would break the metric.
    assert metric(mixbit.assign(toy(), linear_costs(OPS, "ops"), target_sqnr_db=recipe.sqnr_db - 2)) < 89.0  # type: ignore[operator]


def test_first_last_frozen_and_depthwise_are_kept() -> None:
    costs = linear_costs(OPS, "ops")
    recipe = mixbit.assign(
        toy(), costs, target_sqnr_db=5, first_last_min=8, depthwise=["B"], depthwise_min=6,
        frozen={"C": mixbit.LayerPrecision(weight=3, act=3)},
    )  # fmt: skip
    assert bits_of(recipe)[0] == bits_of(recipe)[3] == 8
    assert recipe["B"].weight >= 6  # type: ignore[operator]
    assert recipe["C"].weight == 3
    wide = [*BITS, 32]
    b = np.array(wide, float)
    costs32 = CostTable.from_arrays(
        LAYERS, OPS[:, None, None] * np.maximum(b[:, None], b[None]), wide, wide, unit="ops"
    )
    recipe = mixbit.assign(toy(), costs32, target_sqnr_db=15, frozen=["A"])
    assert recipe["A"].weight is None
    assert recipe["A"].act is None


def test_exact_layers_cost_nothing_in_noise() -> None:
    table = SensitivityTable.from_arrays(["a", "b"], [[np.inf, np.inf], [10.0, 20.0]], [2, 4], [2, 4])
    costs = CostTable.from_arrays(["a", "b"], np.ones((2, 2, 2)) * [[[2, 4], [4, 4]]], [2, 4], [2, 4], unit="ops")
    for method in ("greedy", "ilp", "threshold", "aimet"):
        recipe = mixbit.assign(table, costs, target_sqnr_db=15, method=method)
        assert [recipe["a"].weight, recipe["b"].weight] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "nothing given; expected one of"),
        ({"target_sqnr_db": 20, "budget": 3}, "target_sqnr_db and budget given"),
        ({"target_sqnr_db": 20, "method": "gredy"}, "did you mean 'greedy'"),
        ({"target_sqnr_db": 20, "mode": "memory"}, "did you mean 'weight_memory'"),
        ({"target_sqnr_db": float("nan")}, "target_sqnr_db=nan"),
        ({"budget": -1.0}, "expected a number >= 0"),
        ({"budget": {}}, "budget is empty"),
        ({"target_sqnr_db": 9, "frozen": ["Z"]}, "no layer matches 'Z'"),
        ({"target_sqnr_db": 9, "frozen": ["*"]}, "nothing is left to choose"),
        ({"target_sqnr_db": 9, "first_last_min": 16}, "no width of the table satisfies"),
        ({"target_sqnr_db": 9, "method": "threshold", "mode": "weight_memory"}, "expected costs.weight_memory"),
        ({"metric": lambda recipe: float("nan")}, "metric returned nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        mixbit.assign(toy(), linear_costs(OPS, "ops"), **arguments)


def test_tables_of_different_models_are_refused() -> None:
    other = CostTable.from_arrays(["A", "B", "C", "E"], np.ones((4, 7, 7)), BITS, BITS)
    with pytest.raises(MixbitError, match="costs have no layer 'D'"):
        mixbit.assign(toy(), other, target_sqnr_db=20)


def output_instance(seed: int) -> tuple[SensitivityTable, CostTable, CostTable]:
    """As random_instance, with a cost that depends on the consumer's act: a chain, a fixed width, a branch."""
    table, plain, _ = random_instance(seed)
    rng = np.random.default_rng(seed + 1000)
    bits = table.act_bits
    values_out = plain.values[..., None] + rng.uniform(0, 60, (*plain.values.shape, len(bits)))
    consumer: list[str | int | None] = [["l1", "l2", None], ["l2", "l2", bits[0]], ["l1", "l1", "l0"]][seed % 3]
    # The outputs of the network have 8 bits, which the table therefore needs.
    costs = CostTable.from_arrays(
        table.layers,
        np.pad(values_out[..., -1], ((0, 0), (0, 1), (0, 1)), mode="edge"),
        [*bits, 8],
        [*bits, 8],
        unit="pJ",
        input_group=table.input_group,
        values_out=np.pad(values_out, ((0, 0), (0, 1), (0, 1), (0, 1)), mode="edge"),
        consumer=consumer,
    )
    return table, costs, plain


@pytest.mark.parametrize("seed", range(9))
def test_costs_that_depend_on_the_output_width(seed: int) -> None:
    """ilp is the brute-force optimum of `costs.total`; greedy keeps its promises and is never better."""
    table, costs, plain = output_instance(seed)
    assert costs.values_out is not None
    every = [(costs.total(r), table.predicted_sqnr_db(r), plain.total(r)) for r in choices(table)]
    target = float(np.median([s for _, s, _ in every]))
    best = min(c for c, s, _ in every if s >= target - 1e-9)
    exact = mixbit.assign(table, costs, target_sqnr_db=target, method="ilp")
    assert exact.cost["pJ"] == pytest.approx(best, rel=1e-9)
    assert exact.cost["pJ"] == costs.total(exact)
    greedy = mixbit.assign(table, costs, target_sqnr_db=target, method="greedy")
    assert greedy.report["feasible"] and greedy.sqnr_db >= target - 1e-9
    assert best - 1e-9 <= greedy.cost["pJ"] < max(c for c, _, _ in every)
    budget = float(np.median([c for c, _, _ in every]))
    limit = float(np.quantile([p for _, _, p in every], 0.7))
    for budgets in ({costs: budget}, {costs: budget, plain: limit}):
        inside = [s for c, s, p in every if c <= budget and (plain not in budgets or p <= limit)]
        exact = mixbit.assign(table, costs, budget=budgets, method="ilp")
        assert exact.sqnr_db == pytest.approx(max(inside), abs=1e-9)
        greedy = mixbit.assign(table, costs, budget=budgets, method="greedy")
        assert greedy.report["feasible"] and costs.total(greedy) <= budget * (1 + 1e-9)
        assert greedy.sqnr_db <= exact.sqnr_db + 1e-9


@pytest.mark.parametrize("frozen", ["l0", "l1", "l2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_frozen_layer_writes_at_its_readers_width(seed: int, frozen: str) -> None:
    table, costs, _ = output_instance(seed)
    kept = mixbit.LayerPrecision(weight=table.weight_bits[1], act=table.act_bits[1])
    every = [r for r in choices(table) if r[frozen] == kept]
    target = float(np.median([table.predicted_sqnr_db(r) for r in every]))
    best = min(costs.total(r) for r in every if table.predicted_sqnr_db(r) >= target - 1e-9)
    exact = mixbit.assign(table, costs, target_sqnr_db=target, method="ilp", frozen={frozen: kept})
    assert exact.cost["pJ"] == pytest.approx(best, rel=1e-9)
    budget = float(np.median([costs.total(r) for r in every]))
    best = max(table.predicted_sqnr_db(r) for r in every if costs.total(r) <= budget)
    exact = mixbit.assign(table, costs, budget=budget, method="ilp", frozen={frozen: kept})
    assert exact.sqnr_db == pytest.approx(best, abs=1e-9)
    greedy = mixbit.assign(table, costs, budget=budget, method="greedy", frozen={frozen: kept})
    assert greedy.report["feasible"] and costs.total(greedy) <= budget * (1 + 1e-9)


def test_every_method_prices_output_widths() -> None:
    table, costs, _ = output_instance(0)
    for method in ("threshold", "aimet"):
        recipe = mixbit.assign(table, costs, budget=0.8 * costs.uniform(8, 8), method=method)
        assert recipe.cost["pJ"] == costs.total(recipe)


def test_a_maximum_cannot_depend_on_output_widths() -> None:
    table, costs, _ = output_instance(0)
    peak = CostTable.from_arrays(
        costs.layers,
        costs.values,
        costs.act_bits,
        costs.weight_bits,
        values_out=costs.values_out,
        consumer=costs.consumer,
        reduce="max",
    )
    with pytest.raises(MixbitError, match="totalled by maximum and depend on the widths of outputs"):
        mixbit.assign(table, peak, target_sqnr_db=10)
