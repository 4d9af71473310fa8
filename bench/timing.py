"""Side by side timing: candidates take turns in one process, the minimum of each counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


def side_by_side(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3
) -> dict[str, float]:
    """Least seconds of each candidate.

    Args:
        candidates: Functions without arguments; they run in turn, `repeats` rounds.
        repeats: Rounds that count.
        warmup: Rounds that do not.
    """
    least = {name: float("inf") for name in candidates}
    for round_ in range(warmup + repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_ >= warmup:
                least[name] = min(least[name], elapsed)
    return least
