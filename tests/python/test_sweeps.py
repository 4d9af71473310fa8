"""sweep: a golden table, the definition of its points and fronts, the CSV, bad input."""

from __future__ import annotations

import csv
import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mixbit
from mixbit.errors import MixbitError
from mixbit.sweeps import points_as_csv, sweep
from mixbit.tables import CostTable, SensitivityTable

BITS = (2, 4, 8)
LAYERS = "AB"
MACS, WEIGHTS, C = (100.0, 10.0), (5.0, 50.0), (1.0, 4.0)


def tables(groups: tuple[int, int] = (1, 2)) -> tuple[SensitivityTable, dict[str, CostTable]]:
    """Noise c (4^-act + 4^-weight); bops, ops and weight memory of two layers."""
    bits = np.array(BITS, float)
    noise = np.array(C)[:, None, None] * (4.0 ** -bits[:, None] + 4.0 ** -bits[None, :])
    table = SensitivityTable.from_arrays(LAYERS, -10 * np.log10(noise), BITS, BITS, input_group=groups)

    def cost(each: tuple[float, float], form: np.ndarray, unit: str) -> CostTable:
        values = np.array(each)[:, None, None] * form
        return CostTable.from_arrays(LAYERS, values, BITS, BITS, unit=unit, input_group=groups)

    act, weight = np.meshgrid(bits, bits, indexing="ij")
    return table, {
        "bops": cost(MACS, act * weight, "bops"),
        "ops": cost(MACS, np.maximum(act, weight), "ops"),
        "weight_memory": cost(WEIGHTS, weight, "bits"),
    }


def test_golden() -> None:
    table, costs = tables()
    asked: list[mixbit.Recipe] = []

    def metric(recipe: mixbit.Recipe) -> float:
        asked.append(recipe)
        return 90.0 + sum(recipe[name].weight for name in LAYERS)

    points = sweep(table, costs, shares=(0.5, 0.25, 0.05), methods=("ilp",), metric=metric)
    by_name = {point.name: point for point in points}
    assert list(by_name) == ["uniform-8", "uniform-4", "uniform-2", "bops-ilp-0.5", "bops-ilp-0.25", "bops-ilp-0.05"]
    assert [p.costs["bops"] for p in points] == [7040, 1760, 440, 2240, 1760, 440]
    assert [p.shares["bops"] for p in points] == pytest.approx([1, 1 / 4, 1 / 16, 7 / 22, 1 / 4, 1 / 16])
    assert [p.costs["weight_memory"] for p in points] == [440, 220, 110, 420, 220, 110]
    # 10 log10 of 256 / 10 at 4 bits; A at 4 and B at 8 bits: 2 / 256 + 8 / 65536.
    expected = [38.16480, 14.08240, 2.04120, 21.00477, 14.08240, 2.04120]
    assert [p.predicted_sqnr_db for p in points] == pytest.approx(expected, abs=1e-4)
    assert [p.feasible for p in points] == [True] * 5 + [False]
    assert by_name["bops-ilp-0.05"].misses_by == pytest.approx(440 - 352)
    assert by_name["bops-ilp-0.5"].recipe["B"].weight == 8
    assert [p.measured for p in points] == [106, 98, 94, 102, 98, 94]
    assert len(asked) == 4  # two budgets end in uniform recipes
    flags = [tuple(p.on_front["bops"].values()) for p in points]
    assert flags == [(True, True)] * 5 + [(False, False)]
    made = by_name["bops-ilp-0.25"].recipe
    assert made.made_by == {"verb": "sweep", "method": "ilp", "cost": "bops", "share": 0.25}
    assert made.cost == by_name["bops-ilp-0.25"].costs


@given(
    st.lists(st.sampled_from([1.5, 1.0, 0.7, 0.4, 0.3, 0.2, 0.1, 0.01]), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["greedy", "threshold", "ilp", "aimet"]), min_size=1, unique=True),
    st.sampled_from([("bops",), ("weight_memory",), ("weight_memory", "bops")]),
)
def test_points_are_what_they_say(shares, methods, over) -> None:
    table, costs = tables()
    modes = ("sqnr", "ops", "weight_memory")
    points = sweep(table, costs, over=over, shares=shares, methods=methods, modes=modes)
    variants = len(methods) + 2 * ("threshold" in methods)
    assert len(points) == len({p.name for p in points}) == len(BITS) + len(over) * variants * len(shares)
    choices = [
        mixbit.Recipe(
            layers={n: mixbit.LayerPrecision(act=a, weight=w) for n, (a, w) in zip(LAYERS, pair, strict=True)}
        )
        for pair in itertools.product(itertools.product(BITS, BITS), repeat=2)
    ]
    for point in points:
        assert point.costs == {name: cost.total(point.recipe) for name, cost in costs.items()}
        assert point.predicted_sqnr_db == table.predicted_sqnr_db(point.recipe)
        assert point.measured is None
        if point.cost is None:
            assert point.costs == {name: cost.uniform(point.bits, point.bits) for name, cost in costs.items()}
            continue
        assert point.budget == point.share * costs[point.cost].uniform(8, 8)
        assert point.feasible == (point.costs[point.cost] <= point.budget * (1 + 1e-9))
        within = [r for r in choices if costs[point.cost].total(r) <= point.budget]
        assert point.feasible == bool(within)
        if within and point.method == "ilp":
            best = max(table.predicted_sqnr_db(r) for r in within)
            assert point.predicted_sqnr_db == pytest.approx(best, abs=1e-9)
    for cost in over:
        for point in points:
            beaten = any(
                other.feasible
                and other.costs[cost] <= point.costs[cost]
                and other.predicted_sqnr_db >= point.predicted_sqnr_db
                and (other.costs[cost], other.predicted_sqnr_db) != (point.costs[cost], point.predicted_sqnr_db)
                for other in points
            )
            assert point.on_front[cost] == {"predicted_sqnr_db": point.feasible and not beaten, "measured": None}


def test_uniform_points_read_the_network_input_with_eight_bits() -> None:
    table, costs = tables(groups=(0, 1))
    points = sweep(table, costs, shares=(1.0,), methods=("greedy",))
    assert [p.recipe["A"].act for p in points if p.method == "uniform"] == [8, 8, 8]
    assert points[1].costs["bops"] == costs["bops"].uniform(4, 4)
    joint = sweep(table.diagonal(), costs, shares=(1.0,), methods=("greedy",))
    # The joint table has no act 8 with weight 4: nothing is predicted rather than something made up.
    assert [p.predicted_sqnr_db is None for p in joint] == [False, True, True, False]
    assert joint[1].on_front == {"bops": {"predicted_sqnr_db": None, "measured": None}}
    assert joint[1].recipe.sqnr_db is None


def test_least_widths_and_progress() -> None:
    table, costs = tables()
    told: list[tuple[int, int, str]] = []
    options = {"shares": (0.3, 0.2), "methods": ("greedy",), "metric": lambda recipe: 1.0}
    points = sweep(table, costs, **options, depthwise=["B"], depthwise_min=8, progress=lambda *a: told.append(a))
    assert {p.recipe["B"].weight for p in points if p.cost} == {8}
    assert told[:2] == [(1, 2, "recipes"), (2, 2, "recipes")]
    assert told[-1][0] == told[-1][1] == len({repr(p.recipe.layers) for p in points})
    wide = sweep(table, costs, **options, first_last_min=8)
    assert not any(p.feasible for p in wide if p.cost)


def test_csv_has_a_row_for_each_point() -> None:
    table, costs = tables()
    points = sweep(table, costs, shares=(0.5,), methods=("threshold",), metric=lambda recipe: 50.0)
    rows = list(csv.DictReader(io.StringIO(points_as_csv(points))))
    assert [row["name"] for row in rows] == [p.name for p in points]
    assert rows[-1]["mode"] == "sqnr"
    assert rows[0]["mode"] == ""
    for row, point in zip(rows, points, strict=True):
        assert float(row["cost_weight_memory"]) == point.costs["weight_memory"]
        assert float(row["share_bops"]) == point.shares["bops"]
        assert row["front_bops_measured"] == str(point.on_front["bops"]["measured"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"over": ("bop",)}, "over='bop'.*did you mean 'bops'"),
        ({"over": "bops"}, "over='bops': expected a list"),
        ({"over": ()}, "at least one"),
        ({"methods": ("ipl",)}, "methods='ipl'.*did you mean 'ilp'"),
        ({"methods": ("ilp", "ilp")}, "methods holds 'ilp' twice"),
        ({"modes": ("snr",)}, "modes='snr'.*did you mean 'sqnr'"),
        ({"shares": (0.5, 0)}, "shares holds 0: expected finite numbers above 0"),
        ({"shares": (float("inf"),)}, "shares holds inf"),
        ({"shares": ("half",)}, "shares holds 'half'"),
        ({"metric": lambda recipe: float("nan")}, "metric returned nan for 'uniform-8'"),
        ({"depthwise": ["C"], "depthwise_min": 8}, "depthwise: no layer 'C'"),
    ],
)
def test_bad_input_is_named(options: dict, complaint: str) -> None:
    table, costs = tables()
    with pytest.raises(MixbitError, match=complaint):
        sweep(table, costs, **options)


def test_a_mode_without_its_cost_is_named() -> None:
    table, costs = tables()
    with pytest.raises(MixbitError, match="modes holds 'ops', which takes its shares from the cost 'ops'"):
        sweep(table, {"bops": costs["bops"]}, modes=("ops",))
