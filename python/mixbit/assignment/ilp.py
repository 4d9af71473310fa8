"""Exact allocation as a mixed-integer program, solved by HiGHS through scipy and rechecked in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from mixbit.errors import MixbitError
from mixbit.tables import Array

if TYPE_CHECKING:
    from mixbit.assignment import Choice, Problem

#: HiGHS accepts a row that is violated by about 1e-6 of its scale: the right-hand side is drawn in by this share, and
#: again if the answer, rechecked exactly, breaks it all the same.
_MARGINS = (0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4)


def solve_target(problem: Problem, limit: float) -> Choice:
    """The cheapest choice whose noise ratios sum to at most `limit`; if there is none, the one of least noise."""
    least = _solve(problem, _finite_nsr(problem), [])
    if least is None or _total(problem.nsr, least) > limit * (1 + 1e-12):
        return least if least is not None else _fail()
    if problem.maximum[0]:
        return _least_maximum(problem, limit)
    found = _checked(problem, problem.costs[0], [(_finite_nsr(problem), limit)])
    return found if found is not None else least


def solve_budget(problem: Problem, costs: list[Array], maximum: list[bool], limits: list[float]) -> Choice:
    """The choice of least noise within all budgets; if there is none, the cheapest in shares of the budgets."""
    allowed = problem.allowed.copy()
    rows = []
    for cost, largest, limit in zip(costs, maximum, limits, strict=True):
        if largest:
            allowed[cost > limit * (1 + 1e-12)] = 0
        else:
            rows.append((cost, limit))
    found = _checked(problem, _finite_nsr(problem), rows, allowed)
    if found is not None:
        return found
    pressure = sum(c / max(abs(b), 1e-300) for c, b in zip(costs, limits, strict=True))
    cheapest = _solve(problem, np.asarray(pressure), [])
    return cheapest if cheapest is not None else _fail()


def _fail() -> Any:
    raise MixbitError("the integer program has no solution: some layer has no allowed width")


def _finite_nsr(problem: Problem) -> Array:
    """Noise ratios with infinity as a number that no finite choice reaches."""
    finite = problem.nsr[np.isfinite(problem.nsr)]
    top = float(finite.max()) * len(problem.names) if finite.size else 1.0
    return np.where(np.isfinite(problem.nsr), problem.nsr, 10.0 * max(top, 1.0))


def _total(values: Array, choice: Choice) -> float:
    return float(sum(values[i, a, w] for i, (a, w) in enumerate(zip(*choice, strict=True))))


def _least_maximum(problem: Problem, limit: float) -> Choice:
    """Of a cost that is totalled by maximum: the least largest entry, by bisection over the entries there are."""
    cost = problem.costs[0]
    levels = np.unique(cost[problem.allowed == 1])
    low, high = 0, len(levels) - 1
    best: Choice | None = None
    while low <= high:
        middle = (low + high) // 2
        allowed = np.where(cost <= levels[middle], problem.allowed, 0).astype(np.uint8)
        found = _checked(problem, _finite_nsr(problem), [(_finite_nsr(problem), limit)], allowed)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return best if best is not None else _fail()


def _checked(problem: Problem, objective: Array, rows: list[tuple[Array, float]], allowed: Any = None) -> Choice | None:
    """Solves, and rechecks every row with exact sums; a row that the solver's tolerance let through is drawn in."""
    for margin in _MARGINS:
        drawn = [(values, limit - margin * abs(limit)) for values, limit in rows]
        choice = _solve(problem, objective, drawn, allowed)
        if choice is None:
            return None
        if all(_total(values, choice) <= limit * (1 + 1e-12) for values, limit in rows):
            return choice
    return None


def _solve(problem: Problem, objective: Array, rows: list[tuple[Array, float]], allowed: Any = None) -> Choice | None:
    """min sum objective z, with one option z[l, a, w] per layer, one act per group, each row's sum within its limit."""
    allowed = problem.allowed if allowed is None else allowed
    index = np.argwhere(allowed == 1)
    if len({int(i) for i in index[:, 0]}) < len(problem.names):
        return None
    count = len(index)
    groups = sorted(set(problem.groups))
    acts = len(problem.acts)
    shared = [g for g in groups if problem.groups.count(g) > 1]
    columns = count + len(shared) * acts
    constraints = []

    def matrix(entries: list[tuple[int, int, float]], height: int) -> Any:
        r, c, v = zip(*entries, strict=True) if entries else ((), (), ())
        return coo_array((np.asarray(v, float), (np.asarray(r, int), np.asarray(c, int))), shape=(height, columns))

    one = [(int(layer), column, 1.0) for column, (layer, _, _) in enumerate(index)]
    constraints.append(LinearConstraint(matrix(one, len(problem.names)).tocsr(), 1.0, 1.0))
    # For shared inputs: the options of a layer at an act sum to the group's indicator of that act.
    couple: list[tuple[int, int, float]] = []
    height = 0
    for s, group in enumerate(shared):
        for layer in (i for i, g in enumerate(problem.groups) if g == group):
            for act in range(acts):
                couple += [(height, column, 1.0) for column, (i, a, _) in enumerate(index) if i == layer and a == act]
                couple.append((height, count + s * acts + act, -1.0))
                height += 1
    if height:
        constraints.append(LinearConstraint(matrix(couple, height).tocsr(), 0.0, 0.0))
    for values, limit in rows:
        picked = values[index[:, 0], index[:, 1], index[:, 2]]
        # Scaled so that the limit is 1: HiGHS' tolerances are absolute.
        scale = abs(limit) if limit != 0 else max(float(picked.max()), 1e-300)
        row = np.zeros((1, columns))
        row[0, :count] = picked / scale
        constraints.append(LinearConstraint(row, -np.inf, limit / scale))
    cost = np.zeros(columns)
    cost[:count] = objective[index[:, 0], index[:, 1], index[:, 2]]
    top = float(np.abs(cost).max())
    result = milp(
        cost / (top if top > 0 else 1.0),
        integrality=np.ones(columns),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    act_choice = [0] * len(problem.names)
    weight_choice = [0] * len(problem.names)
    for column in np.flatnonzero(np.round(result.x[:count]) == 1):
        layer, act, weight = (int(v) for v in index[column])
        act_choice[layer], weight_choice[layer] = act, weight
    return act_choice, weight_choice
