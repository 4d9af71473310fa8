"""The Pareto front: written-out cases, its definition, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbit.errors import MixbitError
from mixbit.pareto import pareto_front


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
