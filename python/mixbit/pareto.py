"""Pareto fronts: which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.errors import MixbitError

__all__ = ["pareto_front"]


def pareto_front(values: npt.ArrayLike, maximize: Sequence[bool]) -> npt.NDArray[np.bool_]:
    """Marks the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one; equal points do not
    dominate each other, so all of them are on the front or none. Dominance as in NSGA-II (Deb et al., IEEE Transactions
    on Evolutionary Computation 6(2), 2002); O(N log N + N F) for F points on the front.

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
    front = np.empty((0, less.shape[1]))
    # In lexicographic order nothing that comes later dominates, so a look at the front so far decides.
    for index in np.lexsort(less.T[::-1]):
        point = less[index]
        dominated = (front <= point).all(1) & (front < point).any(1)
        if not dominated.any():
            marked[index] = True
            front = np.vstack([front, point])
    return marked
