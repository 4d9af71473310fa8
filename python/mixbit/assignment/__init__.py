"""Training-free bit allocation from a sensitivity table and cost tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mixbit import _C
from mixbit.assignment.ilp import solve_budget, solve_target
from mixbit.assignment.prices import Price, priced
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.recipe import FLOAT, LayerPrecision, Recipe, match_name
from mixbit.tables import FLOAT_BITS, Array, CostTable, SensitivityTable, unit_names

__all__ = ["METHODS", "MODES", "assign"]

METHODS = ("greedy", "threshold", "ilp", "aimet")
MODES = ("sqnr", "ops", "weight_memory")
#: Bisection steps on a metric: the range of a table in dB halves seven times.
METRIC_EVALUATIONS = 7
_SLACK = 1e-12


@dataclasses.dataclass
class Problem:
    """Tables as arrays over the options of free layers; `joint`: one width for both operands, one weight option."""

    names: list[str]
    acts: tuple[int, ...]
    weights: tuple[int, ...]
    joint: bool
    nsr: Array
    allowed: np.ndarray[Any, np.dtype[np.uint8]]
    groups: list[int]
    costs: list[Price]

    def precision(self, act: int, weight: int) -> tuple[int, int]:
        """(act bits, weight bits) of option indices."""
        return (self.acts[act], self.acts[act]) if self.joint else (self.acts[act], self.weights[weight])


Choice = tuple[list[int], list[int]]


def assign(
    table: SensitivityTable,
    costs: CostTable,
    target_sqnr_db: float | None = None,
    *,
    budget: float | Mapping[CostTable, float] | None = None,
    method: str = "greedy",
    mode: str = "sqnr",
    metric: Callable[[Recipe], float] | None = None,
    max_drop: float = 1.0,
    reference: float | None = None,
    first_last_min: int | None = None,
    depthwise: Iterable[str] = (),
    depthwise_min: int | None = None,
    frozen: Mapping[str, LayerPrecision | None] | Iterable[str] = (),
) -> Recipe:
    """Chooses the bits of every layer without training.

    Exactly one of `target_sqnr_db`, `budget` and `metric` says what is asked: the cheapest recipe whose predicted SQNR
    (an estimate: noise ratios added up) reaches the target; the recipe of least predicted noise within the budget; or
    the cheapest one, by bisection on the target with about seven evaluations, that keeps a metric.

    Methods: "greedy" steps down from the widest options, most saved cost per added noise first. "threshold" gives each
    layer its share of the target's noise (Lin et al., arXiv 1511.06393, with the shares of `mode`) and needs one width
    per layer, so it works on the joint table or the diagonal. "ilp" is exact (mixed-integer program, HiGHS). "aimet"
    flips layers in order of their SQNR (arXiv 2302.05397), joint or diagonal too.

    Args:
        table: Sensitivity; layers of one input_group get one act width.
        costs: What the steps save; same layers as `table`. For "threshold" with mode "ops" or "weight_memory" also the
            source of the shares.
        target_sqnr_db: Predicted network SQNR to reach, in dB.
        budget: Largest total of `costs`, or {table: largest total} for one or several tables.
        method: "greedy", "threshold", "ilp" or "aimet".
        mode: Shares of the threshold rule: "sqnr" (equal), "ops" or "weight_memory" (in proportion to the cost).
        metric: Callable from a recipe to a figure where more is better, e.g. top-1 in percent.
        max_drop: Largest loss of the metric against `reference`.
        reference: The metric without quantization; None takes that of the widest recipe.
        first_last_min: Least bits of both operands of the first and last layer.
        depthwise: Names of depthwise layers, for `depthwise_min`.
        depthwise_min: Least bits of both operands of those layers.
        frozen: Layers that are not chosen: {name or glob: precision}, or names or globs of layers that stay float.

    Returns:
        A Recipe; `.report` holds method, mode, cost, budget or target, feasible, misses_by, predicted_sqnr_db and
        evaluations. An infeasible wish gives the nearest feasible recipe and says by how much it misses.

    Raises:
        MixbitError: Arguments contradict each other, or tables, budgets or names do not fit.
    """
    check_choice("method", method, METHODS)
    check_choice("mode", mode, MODES)
    asked = [
        n for n, v in (("target_sqnr_db", target_sqnr_db), ("budget", budget), ("metric", metric)) if v is not None
    ]
    if len(asked) != 1:
        raise MixbitError(f"{' and '.join(asked) or 'nothing'} given; expected one of target_sqnr_db, budget or metric")
    budgets = _budgets(costs, budget)
    tables = [costs, *(t for t in budgets if t is not costs)]
    fixed = _fixed(table, frozen)
    narrow = table.diagonal() if method in ("threshold", "aimet") else table
    problem = _problem(narrow, tables, fixed, first_last_min, set(depthwise), depthwise_min)
    options = {"method": method, "mode": mode}

    def at_target(target: float) -> Recipe:
        choice, order = _solve_target(problem, narrow, costs, fixed, method, mode, target)
        recipe = _recipe(table, tables, fixed, problem, choice)
        reached = recipe.sqnr_db if recipe.sqnr_db is not None else float("inf")
        # The threshold rule divides the target among the layers; their least widths can miss it only at the widest.
        short = target - reached
        feasible = short <= 1e-9
        recipe.report |= {
            **options,
            "target_sqnr_db": target,
            "feasible": feasible,
            "misses_by": 0.0 if feasible else short,
            "order": order,
            "evaluations": 0,
        }
        return recipe

    if target_sqnr_db is not None:
        recipe = at_target(_finite("target_sqnr_db", target_sqnr_db))
    elif budget is not None:
        recipe = _within_budget(problem, narrow, table, tables, fixed, method, mode, costs, budgets, at_target)
        recipe.report = options | recipe.report
    else:
        assert metric is not None
        recipe = _keep_metric(problem, metric, max_drop, reference, at_target)
    recipe.made_by = {
        "verb": "assign",
        **{k: recipe.report[k] for k in ("method", "mode", "target_sqnr_db", "budget") if k in recipe.report},
    }
    return recipe


def _finite(argument: str, value: float) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise MixbitError(f"{argument}={value}: expected a finite number")
    return number


def _budgets(costs: CostTable, budget: float | Mapping[CostTable, float] | None) -> dict[CostTable, float]:
    if budget is None:
        return {}
    given = budget if isinstance(budget, Mapping) else {costs: budget}
    if not given:
        raise MixbitError("budget is empty; expected a number or {cost table: number}")
    found = {}
    for table, limit in given.items():
        if not isinstance(table, CostTable):
            raise MixbitError(f"budget has the key {table!r}; expected cost tables")
        found[table] = _finite("budget", limit)
        if found[table] < 0:
            raise MixbitError(f"budget={limit}: expected a number >= 0")
    return found


def _fixed(
    table: SensitivityTable, frozen: Mapping[str, LayerPrecision | None] | Iterable[str]
) -> dict[str, LayerPrecision]:
    """Precision of each frozen layer."""
    given = dict(frozen) if isinstance(frozen, Mapping) else {str(name): None for name in frozen}
    fixed = {}
    used = set()
    for name in table.layers:
        pattern = match_name(name, given)
        if pattern is not None:
            used.add(pattern)
            precision = given[pattern]
            fixed[name] = FLOAT if precision is None else precision
    for pattern in given:
        if pattern not in used:
            raise MixbitError(f"frozen: no layer matches {pattern!r}{did_you_mean(pattern, table.layers)}")
    if len(fixed) == len(table.layers):
        raise MixbitError("frozen holds every layer; nothing is left to choose")
    return fixed


def _problem(
    table: SensitivityTable,
    tables: list[CostTable],
    fixed: dict[str, LayerPrecision],
    first_last_min: int | None,
    depthwise: set[str],
    depthwise_min: int | None,
) -> Problem:
    for cost in tables:
        missing = [n for n in table.layers if n not in cost.layers]
        extra = [n for n in cost.layers if n not in table.layers]
        if missing or extra:
            name = (missing or extra)[0]
            where = "costs have" if missing else "table has"
            other = cost.layers if missing else table.layers
            raise MixbitError(
                f"table and costs are of different models: the {where} no layer {name!r}{did_you_mean(name, other)}"
            )
    for name in depthwise:
        if name not in table.layers:
            raise MixbitError(f"depthwise: no layer {name!r}{did_you_mean(name, table.layers)}")
    free = [n for n in table.layers if n not in fixed]
    rows = [table.layers.index(n) for n in free]
    joint = table.joint
    nsr = table.nsr[rows][:, :, None] if joint else table.nsr[rows]
    acts = table.act_bits
    weights = (0,) if joint else table.weight_bits
    problem = Problem(free, acts, weights, joint, nsr, np.ones(nsr.shape, np.uint8), [], [])
    problem.groups = [table.input_group[r] for r in rows]
    # A frozen neighbour that reads the same tensor fixes the act width of its group.
    act_of_group = {table.input_group[table.layers.index(n)]: p.act for n, p in fixed.items() if p.act is not None}
    for i, name in enumerate(free):
        least = 1
        if first_last_min is not None and name in (table.layers[0], table.layers[-1]):
            least = max(least, first_last_min)
        if depthwise_min is not None and name in depthwise:
            least = max(least, depthwise_min)
        for j in range(len(acts)):
            for k in range(len(weights)):
                act, weight = problem.precision(j, k)
                given = act_of_group.get(problem.groups[i])
                if min(act, weight) < least or (given is not None and act != given):
                    problem.allowed[i, j, k] = 0
        if not problem.allowed[i].any():
            raise MixbitError(
                f"layer {name!r}: no width of the table satisfies first_last_min, depthwise_min and the frozen layers "
                f"that read the same tensor; the table has act {list(acts)}"
            )
    problem.costs = [priced(cost, free, acts, len(weights), problem.precision, fixed) for cost in tables]
    return problem


def _fixed_nsr(table: SensitivityTable, fixed: dict[str, LayerPrecision]) -> float:
    """Noise ratio of the frozen layers that are not float."""
    return sum(
        10.0 ** (-table.entry(n, p.act, p.weight) / 10.0)
        for n, p in fixed.items()
        if p.act is not None or p.weight is not None
    )


def _solve_target(
    problem: Problem,
    table: SensitivityTable,
    costs: CostTable,
    fixed: dict[str, LayerPrecision],
    method: str,
    mode: str,
    target: float,
) -> tuple[Choice, list[str]]:
    limit = 10.0 ** (-target / 10.0) - _fixed_nsr(table, fixed)
    if method == "greedy":
        price = problem.costs[0]
        act, weight, _, steps = _C.greedy_target(
            problem.nsr, problem.allowed, problem.groups, price.values, price.maximum, limit, price.reader
        )
        return (act, weight), [problem.names[layer] for layer, _ in steps]
    if method == "ilp":
        return solve_target(problem, limit), []
    gamma = _gamma(problem)
    if method == "threshold":
        widths = _C.threshold(gamma, _shares(problem, costs, mode), problem.groups, target)
        return _lifted(problem, widths), []
    order = _C.aimet_order(gamma)
    return _flip(problem, order, lambda choice: _nsr(problem, choice) <= limit * (1 + _SLACK))


def _gamma(problem: Problem) -> Array:
    """dB of a joint problem, [layers, widths]; widths that are not allowed are out of reach."""
    with np.errstate(divide="ignore"):
        gamma = -10.0 * np.log10(problem.nsr[:, :, 0])
    return np.where(problem.allowed[:, :, 0] == 1, gamma, -np.inf)


def _lifted(problem: Problem, widths: list[int]) -> Choice:
    """Width indices as a choice; a width that is not allowed becomes the next allowed one."""
    chosen = []
    for i, width in enumerate(widths):
        allowed = np.flatnonzero(problem.allowed[i, :, 0])
        above = allowed[allowed >= width]
        chosen.append(int(above[0] if above.size else allowed[-1]))
    return chosen, [0] * len(chosen)


def _shares(problem: Problem, costs: CostTable, mode: str) -> list[float]:
    if mode == "sqnr":
        return [1.0] * len(problem.names)
    other = {"ops": ("bits",), "weight_memory": ("ops", "bops")}[mode]
    if costs.unit in other:
        wanted = "costs.ops or costs.bops" if mode == "ops" else "costs.weight_memory"
        raise MixbitError(
            f"mode={mode!r} takes the shares from costs, but costs are in {costs.unit!r}; expected {wanted}"
        )
    widest = max(b for b in costs.act_bits if b in costs.weight_bits and b < FLOAT_BITS)
    return [costs.entry(name, widest, widest) for name in problem.names]


def _flip(
    problem: Problem, order: list[tuple[int, int]], keep_going: Callable[[Choice], bool], until: bool = False
) -> tuple[Choice, list[str]]:
    """Flips layers down in an order while the result keeps (or, `until`, until it first has) a property."""
    widest = [int(np.flatnonzero(problem.allowed[i, :, 0])[-1]) for i in range(len(problem.names))]
    choice: Choice = (widest, [0] * len(widest))
    flipped: list[str] = []
    if until and keep_going(choice):
        return choice, flipped
    for layer, width in order:
        members = [i for i, g in enumerate(problem.groups) if g == problem.groups[layer]]
        if not all(problem.allowed[i, width, 0] for i in members) or width >= choice[0][layer]:
            continue
        acts = list(choice[0])
        for i in members:
            acts[i] = width
        tried: Choice = (acts, choice[1])
        if until:
            choice = tried
            flipped.append(problem.names[layer])
            if keep_going(choice):
                break
        elif keep_going(tried):
            choice = tried
            flipped.append(problem.names[layer])
        else:
            break
    return choice, flipped


def _nsr(problem: Problem, choice: Choice) -> float:
    return float(sum(problem.nsr[i, a, w] for i, (a, w) in enumerate(zip(*choice, strict=True))))


def _recipe(
    table: SensitivityTable,
    tables: list[CostTable],
    fixed: dict[str, LayerPrecision],
    problem: Problem,
    choice: Choice,
) -> Recipe:
    layers = {}
    for name in table.layers:
        if name in fixed:
            layers[name] = fixed[name]
        else:
            i = problem.names.index(name)
            act, weight = problem.precision(choice[0][i], choice[1][i])
            layers[name] = LayerPrecision(weight=weight, act=act)
    recipe = Recipe(layers=layers)
    predicted = table.predicted_sqnr_db(recipe)
    recipe.sqnr_db = predicted if np.isfinite(predicted) else None
    recipe.cost = {name: cost.total(recipe) for cost, name in unit_names(tables).items()}
    recipe.report = {"cost": dict(recipe.cost), "predicted_sqnr_db": predicted}
    return recipe


def _within_budget(
    problem: Problem,
    narrow: SensitivityTable,
    table: SensitivityTable,
    tables: list[CostTable],
    fixed: dict[str, LayerPrecision],
    method: str,
    mode: str,
    costs: CostTable,
    budgets: dict[CostTable, float],
    at_target: Callable[[float], Recipe],
) -> Recipe:
    prices = [problem.costs[tables.index(t)] for t in budgets]
    # What is frozen has spent its part of a sum; of a maximum it only may not exceed the budget.
    limits = [b - (0.0 if p.maximum else p.fixed) for p, b in zip(prices, budgets.values(), strict=True)]

    def fits(recipe: Recipe) -> bool:
        return all(t.total(recipe) <= limit + _SLACK * abs(limit) for t, limit in budgets.items())

    if method == "greedy":
        act, weight, _, _ = _C.greedy_budget(
            problem.nsr,
            problem.allowed,
            problem.groups,
            [p.values for p in prices],
            [p.maximum for p in prices],
            limits,
            [p.reader for p in prices],
        )
        recipe = _recipe(table, tables, fixed, problem, (act, weight))
    elif method == "ilp":
        recipe = _recipe(table, tables, fixed, problem, solve_budget(problem, prices, limits))
    elif method == "aimet":
        choice, _ = _flip(
            problem,
            _C.aimet_order(_gamma(problem)),
            lambda c: fits(_recipe(table, tables, fixed, problem, c)),
            until=True,
        )
        recipe = _recipe(table, tables, fixed, problem, choice)
    else:
        # Raising the target never lowers a bit, so the cost is monotone in it: the highest target that fits.
        low, high = _target_range(problem)
        recipe = at_target(low)
        for _ in range(60):
            middle = 0.5 * (low + high)
            tried = at_target(middle)
            if fits(tried):
                low, recipe = middle, tried
            else:
                high = middle
    feasible = fits(recipe)
    misses = [max(0.0, t.total(recipe) - limit) for t, limit in budgets.items()]
    names = unit_names(tables)
    recipe.report = {
        "cost": dict(recipe.cost),
        "predicted_sqnr_db": recipe.report["predicted_sqnr_db"],
        "budget": {names[t]: limit for t, limit in budgets.items()},
        "feasible": feasible,
        "misses_by": 0.0 if feasible else max(misses),
        "evaluations": 0,
    }
    return recipe


def _target_range(problem: Problem) -> tuple[float, float]:
    """Targets from below what the narrowest options give to above what the widest ones give, in dB."""
    allowed = np.where(problem.allowed == 1, problem.nsr, np.nan)
    finite = allowed[np.isfinite(allowed) & (allowed > 0)]
    if not finite.size:
        return 0.0, 1.0
    count = len(problem.names)
    return float(-10 * np.log10(finite.max() * count)) - 60.0, float(-10 * np.log10(finite.min() / count)) + 1.0


def _keep_metric(
    problem: Problem,
    metric: Callable[[Recipe], float],
    max_drop: float,
    reference: float | None,
    at_target: Callable[[float], Recipe],
) -> Recipe:
    evaluations: list[dict[str, float]] = []
    known: dict[str, float] = {}

    def measured(recipe: Recipe) -> float:
        key = repr(recipe.layers)
        if key not in known:
            known[key] = float(metric(recipe))
            if not np.isfinite(known[key]):
                raise MixbitError(f"metric returned {known[key]} at {recipe.sqnr_db} dB; expected a finite number")
            evaluations.append({"predicted_sqnr_db": recipe.report["predicted_sqnr_db"], "metric": known[key]})
        return known[key]

    widest = _nsr(problem, _lifted_widest(problem))
    narrowest = float(np.where(problem.allowed == 1, problem.nsr, -np.inf).max(axis=(1, 2)).sum())
    low = float(-10 * np.log10(narrowest)) if 0 < narrowest < np.inf else 0.0
    high = float(-10 * np.log10(widest)) if widest > 0 else 60.0
    best = at_target(high)
    start = measured(best) if reference is None else float(reference)
    least = start - max_drop
    feasible = reference is None
    for _ in range(METRIC_EVALUATIONS):
        middle = 0.5 * (low + high)
        recipe = at_target(middle)
        if measured(recipe) >= least:
            high, best, feasible = middle, recipe, True
        else:
            low = middle
    if not feasible:
        feasible = measured(best) >= least
    best.report |= {
        "metric": measured(best),
        "metric_reference": start,
        "max_drop": max_drop,
        "feasible": feasible,
        "misses_by": 0.0 if feasible else least - measured(best),
        "evaluations": len(evaluations),
        "tried": evaluations,
    }
    return best


def _lifted_widest(problem: Problem) -> Choice:
    """The option of least noise of each layer, whatever it costs (ties of groups aside)."""
    masked = np.where(problem.allowed == 1, problem.nsr, np.inf)
    flat = masked.reshape(len(problem.names), -1).argmin(axis=1)
    acts, weights = np.unravel_index(flat, masked.shape[1:])
    return [int(a) for a in acts], [int(w) for w in weights]
