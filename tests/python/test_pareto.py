"""The Pareto front: written-out cases, its definition, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbit import pareto
from mixbit.errors import MixbitError
from mixbit.pareto import pareto_front, pareto_indices, pareto_sums


def test_written_out_cases() -> None:
    # Cost down, figure up. The third costs more for less, the fourth as much as the second for less.
    values = [(1, 10), (2, 20), (3, 15), (2, 19), (4, 30)]
    assert pareto_front(values, (False, True)).tolist() == [True, True, False, False, True]
    assert pareto_front(values, (False, False)).tolist() == [True, False, False, False, False]
    # Equal points stand together; infinities are values.
    assert pareto_front([(1, 1), (1, 1), (2, 1)], (False, True)).tolist() == [True, True, False]
    assert pareto_front([(1, np.inf), (0, -np.inf), (2, np.inf)], (False, True)).tolist() == [True, True, False]
    assert pareto_front([], (False, True)).tolist() == []
    assert pareto_front([(3,), (5,), (5,)], (True,)).tolist() == [False, True, True]


@given(
    st.integers(1, 4).flatmap(
        lambda m: st.tuples(
            st.lists(st.tuples(*[st.integers(0, 6)] * m), max_size=40), st.lists(st.booleans(), min_size=m, max_size=m)
        )
    )
)
def test_the_front_is_what_nothing_dominates(case) -> None:
    values, maximize = case
    less = [tuple(-v if up else v for v, up in zip(point, maximize, strict=True)) for point in values]

    def dominates(a: tuple, b: tuple) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [not any(dominates(other, point) for other in less) for point in less]
    assert pareto_front(values, maximize).tolist() == expected


def staircase(random: np.random.Generator, size: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """A Pareto set: costs rise, noises fall; whole numbers have sums that tie."""
    if whole:
        cost, noise = (np.sort(random.choice(3 * size, size, replace=False)).astype(float) for _ in range(2))
    else:
        cost, noise = np.cumsum(random.exponential(1, size)), np.sort(random.lognormal(0, 3, size))
    return cost, noise[::-1].copy()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 60), st.booleans(), st.booleans())
def test_sums_are_those_of_all_pairs(seed: int, n: int, m: int, whole: bool, infinite: bool) -> None:
    random = np.random.default_rng(seed)
    a, b = staircase(random, n, whole), staircase(random, m, whole)
    if infinite:
        a[1][0] = np.inf
    cost, noise = np.add.outer(a[0], b[0]).ravel(), np.add.outer(a[1], b[1]).ravel()
    # The definition: nothing is as good in both and better in one.
    expected = sorted(
        {(c, e) for c, e in zip(cost, noise) if not ((cost <= c) & (noise <= e) & ((cost < c) | (noise < e))).any()}
    )
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 1 << 20):  # by buckets, and all of them sorted
            patch.setattr(pareto, "_FEW", few)
            i, j = pareto_sums(a, b)
            assert list(zip((a[0][i] + b[0][j]).tolist(), (a[1][i] + b[1][j]).tolist())) == expected


def test_indices_are_cheapest_first_and_one_of_equals() -> None:
    cost, noise = np.array([3.0, 1, 1, 2, 2, 4]), np.array([1.0, 5, 5, 5, 2, 1])
    assert pareto_indices(cost, noise).tolist() == [1, 4, 0]
    assert pareto_indices(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize(
    ("values", "maximize", "complaint"),
    [
        ([(1, 2)], (True,), r"shape \(1, 2\) and maximize 1 flags"),
        ([1, 2], (True, False), r"shape \(2,\)"),
        ([[]], (), "at least one"),
        ([(1, 2), (float("nan"), 1)], (True, False), "NaN in point 1"),
    ],
)
def test_bad_input_is_named(values, maximize, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        pareto_front(values, maximize)
