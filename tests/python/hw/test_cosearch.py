"""Co-search: the genetic front against brute force and against the exact front; failures, resume, executors."""

from __future__ import annotations

import concurrent.futures
import itertools
from pathlib import Path

import numpy as np
import pytest

from mixbit.errors import MixbitError
from mixbit.hw import ENGINES, Front, Point, cosearch, exact_front
from mixbit.hw.front import TableIndex
from mixbit.pareto import pareto_indices
from mixbit.recipe import Recipe
from mixbit.tables import CostTable, SensitivityTable

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def toy(layers: int = 3, widths=WIDTHS, seed: int = 0, groups=None, consumer="chain"):
    """Tables with costs that depend on the consumer's act, and noise that falls by about 6 dB a bit."""
    random = np.random.default_rng(seed)
    n = len(widths)
    b = np.array(widths, dtype=float)
    names = [f"l{i}" for i in range(layers)]
    size = random.uniform(1, 10, (layers, 4))
    values_out = (
        size[:, 0, None, None, None] * b[:, None, None]
        + size[:, 1, None, None, None] * b[:, None]
        + size[:, 2, None, None, None] * b
        + random.uniform(0, 2, (layers, n, n, n))
    )
    noise = random.uniform(0.5, 5, (layers, 2))
    nsr = noise[:, 0, None, None] * 4.0 ** -b[:, None] + noise[:, 1, None, None] * 4.0**-b
    sqnr = -10 * np.log10(nsr) + random.uniform(-1, 1, (layers, n, n))
    reader = [*names[1:], None] if consumer == "chain" else consumer
    costs = CostTable.from_arrays(
        names,
        values_out[..., -1],
        widths,
        widths,
        unit="pJ",
        values_out=values_out,
        consumer=reader,
        input_group=groups,
    )
    return costs, SensitivityTable.from_arrays(names, sqnr, widths, widths, input_group=groups)


def brute(costs: CostTable, table: SensitivityTable, widths=WIDTHS) -> list[tuple[float, float]]:
    """(cost, accuracy) of the whole front, by trying everything."""
    index = TableIndex(costs, widths, table)
    genomes = np.array(list(itertools.product(range(len(widths)), repeat=2 * len(costs.layers))))
    genomes = np.unique(index.tied(genomes), axis=0)
    accuracy, cost = index.predicted_sqnr_db(genomes), index.totals(genomes)
    return [(cost[i], accuracy[i]) for i in pareto_indices(cost, -accuracy)]


def flat(front: Front) -> list[tuple[float, float]]:
    return [(p.cost, p.accuracy) for p in front.points]


def test_index_equals_the_tables_own_audit() -> None:
    costs, table = toy(3, (2, 4, 8), groups=[1, 2, 2], consumer=["l1", 4, None])
    index = TableIndex(costs, (2, 4, 8), table)
    genomes = index.tied(np.random.default_rng(1).integers(0, 3, (50, 6)))
    for genome, cost, accuracy in zip(genomes, index.totals(genomes), index.predicted_sqnr_db(genomes), strict=True):
        front = Front(index.layers, "pJ", "predicted_sqnr_db", ())
        recipe = front.recipe(Point(index.genome(genome), float(accuracy), float(cost)))
        assert costs.total(recipe) == cost
        assert table.predicted_sqnr_db(recipe) == pytest.approx(accuracy, abs=1e-9)
        assert recipe["l1"].act == recipe["l2"].act


@pytest.mark.parametrize(
    ("groups", "consumer"),
    [
        (None, "chain"),
        ([1, 2, 2], ["l1", None, None]),
        (None, ["l2", "l2", 4]),
        ([1, 1, 2], ["l0", "l2", None]),
    ],
)
def test_the_exact_front_is_brute_force(groups, consumer) -> None:
    widths = (2, 3, 5, 8)
    costs, table = toy(3, (2, 3, 4, 5, 8), 3, groups, consumer)
    expected = brute(costs, table, widths)
    found = exact_front(costs, table, widths=widths)
    assert len(expected) > 20
    assert flat(found) == [pytest.approx(e, rel=1e-12) for e in expected]
    assert [p.genome for p in found.uniform] == [(b,) * 6 for b in widths]


def test_the_exact_front_without_output_widths() -> None:
    costs, table = toy(3, (2, 4, 8))
    plain = CostTable.from_arrays(costs.layers, costs.values, (2, 4, 8), (2, 4, 8), unit="bops")
    assert flat(exact_front(plain, table, widths=(2, 4, 8))) == [
        pytest.approx(e, rel=1e-12) for e in brute(plain, table, (2, 4, 8))
    ]


def test_a_tolerance_keeps_its_promise_with_fewer_points() -> None:
    costs, table = toy(5)
    exact = exact_front(costs, table)
    near = exact_front(costs, table, tolerance=0.01)
    assert len(near.points) < len(exact.points)
    for point in exact.points:
        assert any(q.accuracy >= point.accuracy - 1e-9 and q.cost <= point.cost * 1.01 for q in near.points)


def test_the_genetic_front_contains_the_brute_force_front() -> None:
    """Three layers, 49^3 genomes: every point of the true front is found."""
    costs, table = toy(3)
    expected = brute(costs, table)
    front = cosearch(None, None, table, 150, costs=costs, parents=120, offspring=120)
    assert front.measure == "predicted_sqnr_db"
    assert len(expected) > 50
    assert front.evaluations < 49**3 / 4
    found = flat(front)
    missing = [e for e in expected if not any(f == pytest.approx(e, rel=1e-12) for f in found)]
    assert not missing


def accuracy_of(recipe: Recipe) -> float:
    """A callable that travels to other processes."""
    return sum(p.act + 2 * p.weight for p in recipe.layers.values() if p.act and p.weight) / 100


@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_are_deterministic_and_start_with_uniform_points(engine: str) -> None:
    costs, _ = toy(4)
    first, second = (cosearch(None, None, lambda r: accuracy_of(r), 5, costs=costs, engine=engine) for _ in range(2))
    assert first == second
    assert [p.genome for p in first.uniform] == [(b,) * 8 for b in WIDTHS]
    other = cosearch(None, None, lambda r: accuracy_of(r), 5, costs=costs, engine=engine, seed=1)
    assert other.points != first.points


def test_the_published_engine_keeps_its_numbers() -> None:
    """7 uniform parents, then 10 offspring a generation, repeated genomes not evaluated again."""
    costs, _ = toy(6)
    seen: list[Recipe] = []

    def measure(recipe: Recipe) -> float:
        seen.append(recipe)
        return accuracy_of(recipe)

    front = cosearch(None, None, measure, 25, costs=costs, engine="published")
    assert front.evaluations == len(seen) <= 7 + 250
    assert [set(r.layers.values()) for r in seen[:7]] == [{r.layers["l0"]} for r in seen[:7]]
    assert front.made_by["parents"] == front.made_by["offspring"] == 10


@pytest.mark.parametrize("kind", [None, concurrent.futures.ThreadPoolExecutor])
def test_executors_give_the_same_front(kind) -> None:
    costs, _ = toy(3)
    serial = cosearch(None, None, lambda r: accuracy_of(r), 3, costs=costs, parents=8, offspring=8)
    if kind is None:
        # A function of a module goes to processes by itself.
        pooled = cosearch(None, None, accuracy_of, 3, costs=costs, parents=8, offspring=8)
    else:
        with kind(3) as executor:
            pooled = cosearch(None, None, accuracy_of, 3, executor, costs=costs, parents=8, offspring=8)
    assert pooled == serial


def test_dask_executor() -> None:
    """Threads of this process; no limit on memory, of which other tests of the process hold some."""
    import distributed

    costs, _ = toy(3)
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "memory_limit": 0}
    with (
        distributed.LocalCluster(**options, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        found = cosearch(None, None, accuracy_of, 2, executor, costs=costs, parents=6, offspring=6)
    assert found == cosearch(None, None, lambda r: accuracy_of(r), 2, costs=costs, parents=6, offspring=6)


def test_an_executor_that_breaks_is_no_failure_of_the_accuracy(tmp_path: Path) -> None:
    class Broken(concurrent.futures.ThreadPoolExecutor):
        """Loses what it is given after ten submissions."""

        given = 0

        def submit(self, *arguments, **options):
            self.given += 1
            future = super().submit(*arguments, **options)
            if self.given > 10:
                future = concurrent.futures.Future()
                future.set_exception(concurrent.futures.BrokenExecutor("gone"))
            return future

    costs, _ = toy(3)
    state = tmp_path / "state"
    with Broken(1) as executor, pytest.raises(MixbitError, match="an evaluation was lost .BrokenExecutor: gone"):
        cosearch(None, None, accuracy_of, 2, executor, costs=costs, state=state)
    assert cosearch(None, None, lambda r: accuracy_of(r), 2, costs=costs, state=state).failures == ()


def test_failures_are_recorded_and_the_search_goes_on() -> None:
    costs, _ = toy(3)

    def measure(recipe: Recipe) -> float:
        weight = recipe["l0"].weight
        if weight == 8:
            raise RuntimeError("no\nconvergence")
        return float("nan") if weight == 2 else accuracy_of(recipe)

    front = cosearch(None, None, measure, 10, costs=costs)
    reasons = {genome[1]: reason for genome, reason in front.failures}
    assert reasons == {8: "RuntimeError: no convergence", 2: "returned nan"}
    assert {p.genome[1] for p in front.points} <= {3, 4, 5, 6, 7}
    assert len(front.points) > 5
    with pytest.raises(MixbitError, match="failed for all 80 choices; the first says: returned inf"):
        cosearch(None, None, lambda r: float("inf"), 1, costs=costs)


def test_a_table_of_accuracies() -> None:
    costs, _ = toy(1, (2, 4, 8))
    table = {(a, w): float(a + w) for a in (2, 4) for w in (2, 4) if (a, w) != (2, 4)}
    front = cosearch(None, None, table, 10, costs=costs, widths=(2, 4))
    assert front.failures == (((2, 4), "not in the table"),)
    assert {p.genome for p in front.points} == set(table)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_killed_search_resumes_to_the_same_bytes(tmp_path: Path, engine: str) -> None:
    costs, _ = toy(4)
    whole = cosearch(None, None, lambda r: accuracy_of(r), 6, costs=costs, engine=engine, state=tmp_path / "whole")
    calls = 0

    def dies(recipe: Recipe) -> float:
        nonlocal calls
        calls += 1
        if calls == 35:
            raise KeyboardInterrupt
        return accuracy_of(recipe)

    options = {"costs": costs, "engine": engine, "state": tmp_path / "part"}
    with pytest.raises(KeyboardInterrupt):
        cosearch(None, None, dies, 6, **options)
    assert calls == 35
    resumed = cosearch(None, None, dies, 6, **options)
    # Nothing is measured twice, but what was lost since the last writing of the state.
    assert calls <= whole.evaluations + 35
    assert resumed == whole
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    before = calls
    cosearch(None, None, dies, 6, **options)
    assert calls == before
    resumed.save(tmp_path / "a.json")
    whole.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Front.load(tmp_path / "a.json").points == whole.points
    # Other settings start with what is known; another network does not.
    more = cosearch(None, None, dies, 9, **options)
    assert calls - before == more.evaluations - whole.evaluations
    with pytest.raises(MixbitError, match="belongs to another network or another kind of accuracy"):
        cosearch(None, None, dies, 6, **(options | {"costs": toy(3)[0]}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"engine": "standart"}, "did you mean 'standard'"),
        ({"parents": 1}, "parents=1: expected a whole number of at least 2"),
        ({"generations": -1}, "generations=-1"),
        ({"initial": [(8, 8)]}, "genome has 2 numbers; expected 6: act and weight bits of each of 3 layers"),
        ({"initial": [(8, 8, 8, 8, 8, 9)]}, r"genome holds 9; expected some of the widths \[2, 3"),
        ({"widths": (2, 9)}, "the costs have no width 9"),
        ({"widths": ()}, "widths is empty"),
        ({"accuracy": 3}, "accuracy is a int; expected a callable"),
        ({"executor": 4}, "executor is a int; expected a concurrent.futures.Executor"),
        ({"costs": None}, "arch and net are needed"),
    ],
)
def test_bad_arguments(change: dict, complaint: str) -> None:
    costs, table = toy(3)
    arguments = {"accuracy": table, "costs": costs} | change
    with pytest.raises(MixbitError, match=complaint):
        cosearch(None, None, **arguments)


def test_tables_that_do_not_fit() -> None:
    costs, table = toy(3)
    other = SensitivityTable.from_arrays(["l0", "l1", "l3"], table.sqnr_db, WIDTHS, WIDTHS)
    with pytest.raises(MixbitError, match=r"accuracy has no layer 'l2'; did you mean 'l."):
        exact_front(costs, other)
    with pytest.raises(MixbitError, match="joint table"):
        exact_front(costs, table.diagonal())
    peak = CostTable.from_arrays(costs.layers, costs.values, WIDTHS, WIDTHS, reduce="max")
    with pytest.raises(MixbitError, match="totalled by maximum"):
        exact_front(peak, table)
    with pytest.raises(MixbitError, match="more than limit=10"):
        exact_front(costs, table, limit=10)
    with pytest.raises(MixbitError, match="tolerance=-1"):
        exact_front(costs, table, tolerance=-1)


def test_a_damaged_front_is_named(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    path.write_text('{"format": "mixbit-front", "version": 1, "layers": ["a"]}')
    with pytest.raises(MixbitError, match="front.json"):
        Front.load(path)
