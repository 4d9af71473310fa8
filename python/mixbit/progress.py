"""How far long work has come: a callable of the user's, or a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

#: Called as (done, total, text); a total of 0 is not known.
Progress = Callable[[int, int, str], None]


class reporter:
    """A context that gives a `Progress`: the user's, a bar on a terminal, or one that does nothing.

    Args:
        progress: True for bars on a terminal (standard error), a callable, or None.
        verb: What the bars' texts start with.
    """

    def __init__(self, progress: bool | Progress | None, verb: str) -> None:
        self.progress = progress
        self.verb = verb
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if callable(self.progress):
            return self.progress
        if self.progress is True and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
            tasks: dict[str, Any] = {}

            def show(done: int, total: int, text: str) -> None:
                if text not in tasks:
                    tasks[text] = self.bar.add_task(f"{self.verb}: {text}", total=total or None)
                self.bar.update(tasks[text], completed=done)

            return show
        return lambda done, total, text: None

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
