"""Pareto fronts: which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.errors import MixbitError

__all__ = ["pareto_front", "pareto_indices", "pareto_sums"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

#: Sums up to which `pareto_sums` sorts all of them: what its passes cost is more there.
_FEW = 4096


def pareto_front(values: npt.ArrayLike, maximize: Sequence[bool]) -> npt.NDArray[np.bool_]:
    """Marks the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one; equal points do not
    dominate each other, so all of them are on the front or none. Dominance as in NSGA-II (Deb et al., IEEE Transactions
    on Evolutionary Computation 6(2), 2002); O(N log N) for two objectives, else O(N log N + N F) for F points on the
    front.

    Args:
        values: float [N, M], N points by M objectives; infinities are values like others. N may be 0.
        maximize: M flags: whether more of the objective is better.

    Returns:
        bool [N].

    Raises:
        MixbitError: `values` has another shape or holds NaN.
    """
    array: npt.NDArray[Any] = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, len(maximize))
    if array.ndim != 2 or array.shape[1] != len(maximize) or not len(maximize):
        raise MixbitError(
            f"values has shape {array.shape} and maximize {len(maximize)} flags; expected (points, objectives) and a "
            "flag for each objective, at least one"
        )
    if np.isnan(array).any():
        raise MixbitError(f"values holds NaN in point {int(np.argwhere(np.isnan(array))[0, 0])}; expected numbers")
    less = np.where(np.asarray(maximize, dtype=bool), -array, array)
    marked = np.zeros(len(less), dtype=bool)
    if less.shape[1] == 2:
        order, rises = _staircase(less[:, 0], less[:, 1])
        if len(order):
            # Points between two steps are on the front where they equal the lower step.
            step = order[rises][np.cumsum(rises) - 1]
            marked[order] = (less[order] == less[step]).all(1)
        return marked
    front = np.empty((0, less.shape[1]))
    # In lexicographic order nothing that comes later dominates, so a look at the front so far decides.
    for index in np.lexsort(less.T[::-1]):
        point = less[index]
        dominated = (front <= point).all(1) & (front < point).any(1)
        if not dominated.any():
            marked[index] = True
            front = np.vstack([front, point])
    return marked


def _staircase(first: Array, second: Array) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """Points by ascending objectives, less is better, and which of them go below all before them in the second."""
    order = np.lexsort((second, first))
    best = np.minimum.accumulate(second[order])
    return order, np.r_[True, best[1:] < best[:-1]][: len(order)]


def pareto_indices(cost: Array, noise: Array) -> Indices:
    """Indices of the points that no other dominates, cheapest first; of equal points the first.

    Args:
        cost: [N], less is better.
        noise: [N], less is better.
    """
    order, rises = _staircase(cost, noise)
    return np.asarray(order[rises], dtype=np.int64)


def pareto_sums(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Indices, Indices]:
    """The Pareto set of all sums of a point of one set and a point of another, exactly.

    Costs are cut into buckets. A first pass over all sums finds the least noise of every bucket; a second one leaves
    out each sum that is not below the least of all cheaper buckets, and only what is left is sorted.

    Args:
        a: Costs and noises of N points, each one less than the one before in noise and more in cost.
        b: The same of M points.

    Returns:
        Indices into `a` and `b` of the set's points, cheapest first; one pair where several have equal sums. Memory for
        what is left, time for N M sums.
    """
    if len(a[0]) > len(b[0]):
        j, i = pareto_sums(b, a)
        return i, j
    (a_cost, a_noise), (b_cost, b_noise) = a, b
    rows, columns = len(a_cost), len(b_cost)
    if rows * columns <= _FEW:
        found = pareto_indices(np.add.outer(a_cost, b_cost).ravel(), np.add.outer(a_noise, b_noise).ravel())
        i, j = np.divmod(found, columns)
        return i, j
    low, high = a_cost[0] + b_cost[0], a_cost[-1] + b_cost[-1]
    count = 8 * (rows + columns)
    # Rounding is monotonic: a sum in an earlier bucket is cheaper.
    scale = count / (high - low) if high > low else 0.0
    least = np.full(count + 2, np.nan)  # which fmin passes over: noise may be infinite

    def sums(row: int) -> tuple[Indices, Array]:
        return ((b_cost + a_cost[row] - low) * scale).astype(np.int64), b_noise + a_noise[row]

    for row in range(rows):
        bucket, noise = sums(row)
        # Of several sums in one bucket the last one stays, which has the least noise.
        least[bucket + 1] = np.fmin(least[bucket + 1], noise)
    least = np.fmin.accumulate(least)
    left = []
    for row in range(rows):
        bucket, noise = sums(row)
        left.append(np.flatnonzero(~(noise >= least[bucket])))
    i = np.repeat(np.arange(rows), [len(kept) for kept in left])
    j = np.concatenate(left)
    found = pareto_indices(a_cost[i] + b_cost[j], a_noise[i] + b_noise[j])
    return i[found], j[found]
