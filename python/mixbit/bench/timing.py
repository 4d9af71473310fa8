"""Round-robin timing in one process: every candidate meets the same disturbances of a shared machine."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: A sample lasts at least this long, so that the clock's own cost does not count.
SAMPLE_SECONDS = 2e-4


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the least and the median of the samples; the number of calls and the page faults of one."""

    least: float
    median: float
    calls: int
    page_faults: float


def side_by_side(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Times the candidates in turn, `repeats` rounds; a short one is called several times a sample.

    Args:
        candidates: Functions without arguments.
        repeats: Rounds that count.
        warmup: Rounds that do not.

    Returns:
        A Timing for each candidate, in its order.
    """
    calls = {name: _calls(run, warmup) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    faults = dict.fromkeys(candidates, 0)
    for _ in range(repeats):
        for name, run in candidates.items():
            count = calls[name]
            before = _page_faults()
            start = time.perf_counter()
            for _ in range(count):
                run()
            samples[name].append((time.perf_counter() - start) / count)
            faults[name] += _page_faults() - before
    return {
        name: Timing(min(s), statistics.median(s), calls[name] * repeats, faults[name] / (calls[name] * repeats))
        for name, s in samples.items()
    }


def _page_faults() -> int:
    """Pages that the system has handed to this process so far: what fresh memory costs."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _calls(run: Callable[[], Any], warmup: int) -> int:
    for _ in range(max(warmup, 1)):
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
    return max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))
