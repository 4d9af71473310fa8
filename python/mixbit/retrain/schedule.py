"""Numbers that change over a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mixbit.errors import MixbitError, check_choice

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `first` to `last` in the course of a run; called with a step, it gives the value there.

    Args:
        first: Value at the step `begin * steps`.
        last: Value at the step `steps` and after it.
        steps: Steps of the run.
        begin: Share of the run before the number starts to move.
        before: Value until then.
        shape: "cosine" (half a period) or "linear".

    Raises:
        MixbitError: A number is not finite, `steps` or `begin` is out of range, or the shape is unknown.

    Example:
        >>> threshold = Schedule(0.1, 0.01, steps=1000, begin=0.25)
        >>> [round(threshold(step), 3) for step in (100, 250, 625, 1000)]
        [0.0, 0.1, 0.055, 0.01]
    """

    first: float
    last: float
    steps: int
    begin: float = 0.25
    before: float = 0.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("first", "last", "before"):
            if not math.isfinite(getattr(self, name)):
                raise MixbitError(f"{name}={getattr(self, name)!r}: expected a finite number")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise MixbitError(f"steps={self.steps!r}: expected a whole number above 0")
        if not 0 <= self.begin < 1:
            raise MixbitError(f"begin={self.begin!r}: expected a share from 0, below 1")
        check_choice("shape", self.shape, SHAPES)

    def __call__(self, step: int) -> float:
        """The value after `step` steps."""
        begin = self.begin * self.steps
        if step < begin:
            return self.before
        share = min((step - begin) / (self.steps - begin), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.first + (self.last - self.first) * share


def value_at(schedule: Schedule | float, step: int) -> float:
    """The value of a schedule, or of a number that stays."""
    return schedule(step) if isinstance(schedule, Schedule) else float(schedule)


def range_of(schedule: Schedule | float) -> tuple[float, float]:
    """Smallest and largest value."""
    if isinstance(schedule, Schedule):
        values = (schedule.first, schedule.last, schedule.before)
        return min(values), max(values)
    return float(schedule), float(schedule)
