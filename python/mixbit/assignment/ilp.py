"""Exact allocation as a mixed-integer program, solved by HiGHS through scipy and rechecked in float64."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from mixbit.assignment.prices import Price
from mixbit.errors import MixbitError
from mixbit.tables import Array

if TYPE_CHECKING:
    from mixbit.assignment import Choice, Problem

#: HiGHS accepts a row that is violated by about 1e-6 of its scale: the right-hand side is drawn in by this share, and
#: again if the answer, rechecked exactly, breaks it all the same.
_MARGINS = (0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4)


class Options(Protocol):
    """Layers that choose: names, act options, what is allowed [layers, acts, weights], and who shares an act."""

    names: list[str]
    acts: tuple[int, ...]
    allowed: np.ndarray[Any, np.dtype[np.uint8]]
    groups: list[int]


def solve_target(problem: Problem, limit: float) -> Choice:
    """The cheapest choice whose noise ratios sum to at most `limit`; if there is none, the one of least noise."""
    noise = _finite_nsr(problem)
    least = solve(problem, noise, [])
    if least is None or noise.total(least) > limit * (1 + 1e-12):
        return least if least is not None else _fail()
    if problem.costs[0].maximum:
        return _least_maximum(problem, limit)
    found = checked(problem, problem.costs[0], [(noise, limit)])
    return found if found is not None else least


def solve_budget(problem: Problem, prices: list[Price], limits: list[float]) -> Choice:
    """The choice of least noise within all budgets; if there is none, the cheapest in shares of the budgets."""
    allowed = problem.allowed.copy()
    rows = []
    for price, limit in zip(prices, limits, strict=True):
        if price.maximum:
            allowed[price.values > limit * (1 + 1e-12)] = 0
        else:
            rows.append((price, limit))
    found = checked(problem, _finite_nsr(problem), rows, allowed)
    if found is not None:
        return found
    cheapest = solve(problem, pressure(prices, limits), [])
    return cheapest if cheapest is not None else _fail()


def pressure(prices: list[Price], limits: list[float]) -> Price:
    """Costs in shares of their limits, summed."""
    shares = [p.values / max(abs(b), 1e-300) for p, b in zip(prices, limits, strict=True)]
    readers = {p.reader for p in prices if p.reader}
    if not readers:
        return Price(np.asarray(sum(shares)), False)
    if len(readers) > 1:
        raise MixbitError("budget: the tables say differently which layer reads which output; expected one network")
    wide = [s if p.reader else s[..., None] for s, p in zip(shares, prices, strict=True)]
    return Price(np.asarray(sum(wide)), False, readers.pop())


def _fail() -> Any:
    raise MixbitError("the integer program has no solution: some layer has no allowed width")


def _finite_nsr(problem: Problem) -> Price:
    """Noise ratios with infinity as a number that no finite choice reaches."""
    finite = problem.nsr[np.isfinite(problem.nsr)]
    top = float(finite.max()) * len(problem.names) if finite.size else 1.0
    return Price(np.where(np.isfinite(problem.nsr), problem.nsr, 10.0 * max(top, 1.0)), False)


def _least_maximum(problem: Problem, limit: float) -> Choice:
    """Of a cost that is totalled by maximum: the least largest entry, by bisection over the entries there are."""
    cost = problem.costs[0].values
    levels = np.unique(cost[problem.allowed == 1])
    low, high = 0, len(levels) - 1
    best: Choice | None = None
    while low <= high:
        middle = (low + high) // 2
        allowed = np.where(cost <= levels[middle], problem.allowed, 0).astype(np.uint8)
        found = checked(problem, _finite_nsr(problem), [(_finite_nsr(problem), limit)], allowed)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return best if best is not None else _fail()


def checked(problem: Options, objective: Price, rows: list[tuple[Price, float]], allowed: Any = None) -> Choice | None:
    """Solves, and rechecks every row with exact sums; a row that the solver's tolerance let through is drawn in."""
    for margin in _MARGINS:
        drawn = [(price, limit - margin * abs(limit)) for price, limit in rows]
        choice = solve(problem, objective, drawn, allowed)
        if choice is None:
            return None
        if all(price.total(choice) <= limit * (1 + 1e-12) for price, limit in rows):
            return choice
    return None


def solve(problem: Options, objective: Price, rows: list[tuple[Price, float]], allowed: Any = None) -> Choice | None:
    """min sum objective z, with one option z[l, a, w] per layer, one act per group, each row's sum within its limit.

    A cost that depends on the output's width is a sum over y[l, a, w, o] = z[l, a, w] * (act of l's reader is o). The
    products need no integrality of their own: with z whole, the sums of y over o and over (a, w) leave one choice.
    """
    allowed = problem.allowed if allowed is None else allowed
    index = np.argwhere(allowed == 1)
    if len({int(i) for i in index[:, 0]}) < len(problem.names):
        return None
    count = len(index)
    groups = sorted(set(problem.groups))
    acts = len(problem.acts)
    shared = [g for g in groups if problem.groups.count(g) > 1]
    first_output = count + len(shared) * acts
    # Columns of y for each pair of a layer and its reader.
    outputs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    columns = first_output
    for layer, reader in dict.fromkeys(
        (i, r) for price in (objective, *(p for p, _ in rows)) for i, r in enumerate(price.reader) if r >= 0
    ):
        outputs[layer, reader] = []
        for column in np.flatnonzero(index[:, 0] == layer).tolist():
            outputs[layer, reader] += [(column, out) for out in range(acts)]
        columns += len(outputs[layer, reader])
    start = dict(zip(outputs, np.cumsum([first_output, *(len(v) for v in outputs.values())]).tolist(), strict=False))
    constraints = []

    def matrix(entries: list[tuple[int, int, float]], height: int) -> Any:
        r, c, v = zip(*entries, strict=True) if entries else ((), (), ())
        return coo_array((np.asarray(v, float), (np.asarray(r, int), np.asarray(c, int))), shape=(height, columns))

    one = [(int(layer), column, 1.0) for column, (layer, _, _) in enumerate(index)]
    constraints.append(LinearConstraint(matrix(one, len(problem.names)).tocsr(), 1.0, 1.0))
    # For shared inputs: the options of a layer at an act sum to the group's indicator of that act.
    couple: list[tuple[int, int, float]] = []
    height = 0
    at: dict[tuple[int, int], list[int]] = {}
    for column, (layer, act, _) in enumerate(index.tolist()):
        at.setdefault((layer, act), []).append(column)
    for s, group in enumerate(shared):
        for layer in (i for i, g in enumerate(problem.groups) if g == group):
            for act in range(acts):
                couple += [(height, column, 1.0) for column in at.get((layer, act), ())]
                couple.append((height, count + s * acts + act, -1.0))
                height += 1
    for (layer, reader), pairs in outputs.items():
        for place, (column, out) in enumerate(pairs, start[layer, reader]):
            couple.append((height + column, place, 1.0))
            couple.append((height + count + out, place, 1.0))
        # The rows of z, then those of the reader's acts; empty rows of other layers hold anyway.
        couple += [(height + column, column, -1.0) for column in np.flatnonzero(index[:, 0] == layer).tolist()]
        couple += [
            (height + count + int(index[column, 1]), column, -1.0)
            for column in np.flatnonzero(index[:, 0] == reader).tolist()
        ]
        height += count + acts
    if height:
        constraints.append(LinearConstraint(matrix(couple, height).tocsr(), 0.0, 0.0))

    def coefficients(price: Price) -> Array:
        found = np.zeros(columns)
        if not price.reader:
            found[:count] = price.values[index[:, 0], index[:, 1], index[:, 2]]
            return found
        found[:count] = price.values[index[:, 0], index[:, 1], index[:, 2], 0]
        for layer, reader in enumerate(price.reader):
            if reader >= 0:
                found[:count][index[:, 0] == layer] = 0.0
                for place, (column, out) in enumerate(outputs[layer, reader], start[layer, reader]):
                    found[place] = price.values[layer, index[column, 1], index[column, 2], out]
        return found

    for price, limit in rows:
        row = coefficients(price)
        # Scaled so that the limit is 1: HiGHS' tolerances are absolute.
        scale = abs(limit) if limit != 0 else max(float(row.max()), 1e-300)
        constraints.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale))
    cost = coefficients(objective)
    top = float(np.abs(cost).max())
    with _silent():
        result = milp(
            cost / (top if top > 0 else 1.0),
            integrality=np.arange(columns) < first_output,
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    act_choice = [0] * len(problem.names)
    weight_choice = [0] * len(problem.names)
    for column in np.flatnonzero(np.round(result.x[:count]) == 1).tolist():
        layer, act, weight = (int(v) for v in index[column])
        act_choice[layer], weight_choice[layer] = act, weight
    return act_choice, weight_choice


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps what HiGHS prints although it is told not to (some releases name a solver there) off standard output."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to keep clean
        yield
        return
    library = ctypes.CDLL(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)  # HiGHS prints through the C library, whose buffer must go nowhere, too
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
