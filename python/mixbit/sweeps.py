"""Sweeps: recipes of several methods at many budgets, what they cost and keep, and which of them nothing beats."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mixbit.assignment import METHODS, MODES, assign
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.pareto import pareto_front
from mixbit.progress import Progress, reporter
from mixbit.recipe import Recipe
from mixbit.tables import CostTable, SensitivityTable

__all__ = ["SHARES", "Maker", "Point", "mark_fronts", "points_as_csv", "sweep"]

#: Budgets as shares of what uniform 8/8 costs.
SHARES = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
#: The cost table from which the threshold rule takes the shares of a mode; "sqnr" needs none.
_MODE_COSTS = {"ops": "ops", "weight_memory": "weight_memory"}
#: Figures of a point that a front may hold against its cost; more is better in both.
_FIGURES = ("predicted_sqnr_db", "measured")


#: Another way to a recipe: (cost table, budget, name of the point) -> the recipe, whose report says feasible and
#: misses_by, and its figure if it comes with one (of weights that were trained for it).
Maker = Callable[[CostTable, float, str], tuple[Recipe, float | None]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One recipe of a sweep.

    Attributes:
        name: Distinct in its sweep, and a file name: "uniform-4", "bops-greedy-0.5", "bops-threshold-ops-0.5".
        method: "uniform", a method of `assign`, or the name of a maker.
        mode: Mode of the threshold rule, else None.
        bits: Bits of a uniform point, else None.
        cost: Name of the cost that had a budget; None of a uniform point.
        share: The budget as a share of what uniform 8/8 costs; None of a uniform point.
        budget: The budget in the cost's unit; None of a uniform point.
        feasible: Whether the recipe is within the budget.
        misses_by: By how much it is not, in the cost's unit.
        costs: Audited cost of the recipe by cost name.
        shares: The same as shares of uniform 8/8.
        predicted_sqnr_db: An estimate, see `SensitivityTable.predicted_sqnr_db`; None where the table lacks a width of
            the recipe (a joint table and a uniform point whose first layer reads 8 bits).
        measured: The metric, or None if nothing was measured.
        on_front: {cost name: {"predicted_sqnr_db": ..., "measured": ...}}: whether no feasible point has as little of
            the cost and as much of the figure, and less or more of one. None where the point lacks the figure.
        recipe: The bits.
    """

    name: str
    method: str
    mode: str | None
    bits: int | None
    cost: str | None
    share: float | None
    budget: float | None
    feasible: bool
    misses_by: float
    costs: dict[str, float]
    shares: dict[str, float]
    predicted_sqnr_db: float | None
    measured: float | None
    on_front: dict[str, dict[str, bool | None]]
    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        """Every attribute but the recipe."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "recipe"}


def sweep(
    table: SensitivityTable,
    costs: Mapping[str, CostTable],
    *,
    over: Sequence[str] = ("bops",),
    shares: Sequence[float] = SHARES,
    methods: Sequence[str] = METHODS,
    modes: Sequence[str] = ("sqnr",),
    metric: Callable[[Recipe], float] | None = None,
    makers: Mapping[str, Maker] | None = None,
    first_last_min: int | None = None,
    depthwise: Iterable[str] = (),
    depthwise_min: int | None = None,
    progress: bool | Progress | None = None,
) -> list[Point]:
    """Assigns bits by several methods at several budgets, beside uniform bits, and marks the Pareto fronts.

    Uniform points come first, one for each width that both axes of the table have (layers that read the network input
    have at least 8 act bits, as in `CostTable.uniform`); then for each cost, method and mode the shares in their order.
    A budget that cannot be met is a point that says so: its recipe is the nearest one, and it is on no front.

    Args:
        table: Sensitivity.
        costs: Cost tables by name, of the same layers; every recipe is audited under all of them.
        over: Names of the costs that get budgets.
        shares: Budgets, as shares (> 0) of what uniform 8/8 costs.
        methods: Methods of `assign`.
        modes: Modes of the threshold rule. "ops" takes its shares from `costs["ops"]`, "weight_memory" from
            `costs["weight_memory"]`.
        metric: Callable from a recipe to a figure where more is better, called once for each distinct recipe that does
            not bring a figure of its own.
        makers: Further methods by name, at the same budgets, e.g. a search that trains.
        first_last_min: As in `assign`; uniform points are not raised.
        depthwise: As in `assign`.
        depthwise_min: As in `assign`; uniform points are not raised.
        progress: True for a progress bar on a terminal, or a callable (done, total, text).

    Returns:
        The points, fronts marked among all of them.

    Raises:
        MixbitError: A name, share or mode is unknown, appears twice or does not fit, or the metric is not finite.
    """
    for argument, given, options in (("over", over, costs), ("methods", methods, METHODS), ("modes", modes, MODES)):
        for value in _distinct(argument, given):
            check_choice(argument, value, options)
    for share in _distinct("shares", shares):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < float("inf"):
            raise MixbitError(f"shares holds {share!r}: expected finite numbers above 0")
    variants: list[tuple[str, str | None]] = []
    for method in methods:
        variants += [(method, mode) for mode in (modes if method == "threshold" else (None,))]
    for _, mode in variants:
        if mode in _MODE_COSTS and _MODE_COSTS[mode] not in costs:
            raise MixbitError(
                f"modes holds {mode!r}, which takes its shares from the cost {_MODE_COSTS[mode]!r}; costs hold "
                f"{list(costs)}{did_you_mean(_MODE_COSTS[mode], costs)}"
            )
    makers = dict(makers or {})
    for name in makers:
        if name in METHODS or name == "uniform":
            raise MixbitError(f"makers holds {name!r}, which is a method already; expected another name")
    variants += [(name, None) for name in makers]
    depthwise = list(depthwise)
    baseline = {name: cost.uniform(8, 8) for name, cost in costs.items()}
    points = [_uniform(table, costs, baseline, bits) for bits in _widths(table)]
    wishes = [(name, *variant, share) for name in over for variant in variants for share in shares]
    with reporter(progress, "sweep") as report:
        for done, (name, method, mode, share) in enumerate(wishes, 1):
            budget = share * baseline[name]
            label = "-".join(str(v) for v in (name, method, mode, float(share)) if v is not None)
            measured = None
            if method in makers:
                recipe, measured = makers[method](costs[name], budget, label)
            else:
                recipe = assign(
                    table,
                    costs[_MODE_COSTS.get(str(mode), name)],
                    budget={costs[name]: budget},
                    method=method,
                    mode=mode or "sqnr",
                    first_last_min=first_last_min,
                    depthwise=depthwise,
                    depthwise_min=depthwise_min,
                )
            about = {"method": method, "mode": mode, "bits": None, "cost": name, "share": float(share)}
            about |= {"budget": budget, **{key: recipe.report[key] for key in ("feasible", "misses_by")}}
            points.append(_point(label, about, table, costs, baseline, recipe, measured))
            report(done, len(wishes), "recipes")
        if metric is not None:
            points = _measured(points, metric, report)
    return mark_fronts(points, over)


def _distinct(argument: str, given: Sequence[Any]) -> Sequence[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise MixbitError(f"{argument}={given!r}: expected a list of at least one entry")
    twice = [v for v in given if list(given).count(v) > 1]
    if twice:
        raise MixbitError(f"{argument} holds {twice[0]!r} twice; expected distinct entries")
    return given


def _widths(table: SensitivityTable) -> list[int]:
    """Widths of uniform recipes, widest first: those that both operands have; one bit has no symmetric grid."""
    return [b for b in reversed(table.act_bits) if b in table.weight_bits and 2 <= b <= 16]


def _uniform(
    table: SensitivityTable, costs: Mapping[str, CostTable], baseline: Mapping[str, float], bits: int
) -> Point:
    recipe = next(iter(costs.values())).uniform_recipe(bits, bits)
    about = {"method": "uniform", "mode": None, "bits": bits, "cost": None, "share": None}
    return _point(
        f"uniform-{bits}", about | {"budget": None, "feasible": True, "misses_by": 0.0}, table, costs, baseline, recipe
    )


def _point(
    name: str,
    about: dict[str, Any],
    table: SensitivityTable,
    costs: Mapping[str, CostTable],
    baseline: Mapping[str, float],
    recipe: Recipe,
    measured: float | None = None,
) -> Point:
    audited = {key: cost.total(recipe) for key, cost in costs.items()}
    try:
        predicted: float | None = table.predicted_sqnr_db(recipe)
    except KeyError:
        predicted = None
    said = {key: value for key in ("method", "mode", "bits", "cost", "share") if (value := about[key]) is not None}
    recipe = dataclasses.replace(
        recipe,
        made_by={"verb": "sweep", **said},
        cost=audited,
        sqnr_db=None if predicted is None or predicted == float("inf") else predicted,
    )
    return Point(
        name=name,
        **about,
        costs=audited,
        shares={key: value / baseline[key] if baseline[key] else 0.0 for key, value in audited.items()},
        predicted_sqnr_db=predicted,
        measured=measured,
        on_front={},
        recipe=recipe,
    )


def _measured(points: Sequence[Point], metric: Callable[[Recipe], float], report: Progress) -> list[Point]:
    keys = {i: repr(point.recipe.layers) for i, point in enumerate(points) if point.measured is None}
    known: dict[str, float] = {}
    for i, key in keys.items():
        if key in known:
            continue
        known[key] = float(metric(points[i].recipe))
        if not abs(known[key]) < float("inf"):
            raise MixbitError(f"metric returned {known[key]} for {points[i].name!r}; expected a finite number")
        report(len(known), len({*keys.values()}), "measured recipes")
    return [dataclasses.replace(p, measured=known[keys[i]]) if i in keys else p for i, p in enumerate(points)]


def mark_fronts(points: Sequence[Point], over: Sequence[str]) -> list[Point]:
    """The points with `on_front` set for each cost in `over`, as the class says.

    Args:
        points: Points of one sweep, or of several whose figures may be compared.
        over: Names of costs that every point has.
    """
    fronts: list[dict[str, dict[str, bool | None]]] = [{cost: {} for cost in over} for _ in points]
    for cost in over:
        for figure in _FIGURES:
            shown = [i for i, p in enumerate(points) if getattr(p, figure) is not None]
            fit = [i for i in shown if points[i].feasible]
            marked = pareto_front([(points[i].costs[cost], getattr(points[i], figure)) for i in fit], (False, True))
            best = {i for i, on in zip(fit, marked.tolist(), strict=True) if on}
            for i, front in enumerate(fronts):
                front[cost][figure] = i in best if i in shown else None
    return [dataclasses.replace(point, on_front=front) for point, front in zip(points, fronts, strict=True)]


def points_as_csv(points: Sequence[Point]) -> str:
    """One row a point; dictionaries become columns such as `share_bops` and `front_bops_measured`."""
    rows = []
    for point in points:
        row = point.to_dict()
        nested = {prefix: row.pop(key) for key, prefix in (("costs", "cost"), ("shares", "share"), ("on_front", ""))}
        fronts = nested.pop("")
        row |= {f"{prefix}_{name}": value for prefix, own in nested.items() for name, value in own.items()}
        row |= {f"front_{cost}_{figure}": on for cost, own in fronts.items() for figure, on in own.items()}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
