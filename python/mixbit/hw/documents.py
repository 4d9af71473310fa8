"""Checks of what a person writes into dicts and files: keys, numbers, names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike

# Within these, which csrc/hw has too, no count and no sum of the cost model overflows.
MOST = 1 << 48
MOST_IN_A_ROW = 1 << 24
LEAST_BANDWIDTH = 1e-6  # words a cycle
_MOST_NUMBER = 1e15  # pJ, words a cycle, bits


def known(where: str, values: Any, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping as a dict; an unknown or missing key is an error that names the nearest valid one."""
    if not isinstance(values, Mapping):
        raise MixbitError(f"{where} is {values!r}; expected keys and values")
    required = list(required)
    names = required + list(optional)
    for key in values:
        if key not in names:
            raise MixbitError(f"{where}: unknown key {key!r}; expected some of {names}{did_you_mean(str(key), names)}")
    for key in required:
        if key not in values:
            raise MixbitError(f"{where} has no {key!r}; expected {required}")
    return dict(values)


def whole(where: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """A whole number of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise MixbitError(f"{where} is {value!r}; expected a whole number of at least {least} and at most {most}")
    return value


def number(where: str, value: Any, least: float = 0.0, most: float = _MOST_NUMBER) -> float:
    """A finite number of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise MixbitError(f"{where} is {value!r}; expected a finite number of at least {least:g} and at most {most:g}")
    return value


def names(where: str, values: Any, options: Iterable[str] | None = None) -> list[str]:
    """A list of strings, each once, each one of `options`."""
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise MixbitError(f"{where} is {values!r}; expected a list of names")
    if len(set(values)) < len(values):
        raise MixbitError(f"{where} is {list(values)}; expected each name once")
    if options is not None:
        allowed = list(options)
        for value in values:
            if value not in allowed:
                raise MixbitError(
                    f"{where}: unknown {value!r}; expected some of {allowed}{did_you_mean(value, allowed)}"
                )
    return list(values)


def pairs(where: str, values: Any, what: str) -> tuple[tuple[str, int], ...]:
    """A list of (name, whole number of at least 1); `what` says what they are."""
    if not isinstance(values, (list, tuple)):
        raise MixbitError(f"{where} is {values!r}; expected a list of {what}")
    found = []
    for pair in values:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise MixbitError(f"{where} holds {pair!r}; expected {what}")
        found.append((pair[0], whole(f"{where}: {pair[0]}", pair[1])))
    return tuple(found)


def read_yaml(what: str, path: PathLike) -> Any:
    """A YAML or JSON document.

    Raises:
        MixbitError: The file cannot be read or is no document.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MixbitError(f"cannot read the {what} {str(source)!r}: {error}") from error
    try:
        return json.loads(text) if source.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise MixbitError(f"{str(source)!r} is no YAML or JSON document: {' '.join(str(error).split())}") from error
