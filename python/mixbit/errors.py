"""The library's error type and the helpers that make its messages useful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixbitError(ValueError):
    """Bad input: the message names the argument, what came and what was expected."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Returns the option most like `name`, or None where nothing is similar."""
    found = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.4)
    return found[0] if found else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest option, or an empty string."""
    found = nearest(name, options)
    return f"; did you mean {found!r}?" if found is not None else ""


def check_choice(argument: str, value: object, options: Iterable[str]) -> str:
    """Returns `value` if it is one of `options`, else raises a MixbitError that names argument, value and options."""
    options = list(options)
    if value in options:
        return str(value)
    expected = ", ".join(repr(o) for o in options)
    hint = did_you_mean(str(value), options)
    raise MixbitError(f"{argument}={value!r} is not known: expected one of {expected}{hint}")
