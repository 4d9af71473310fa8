"""Signal and noise power, and the SQNR that follows from their sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixbit.tables import Array


def sqnr_db(signal: Any, noise: Any) -> Array:
    """10 log10(signal / noise) of sums over all images (ratio of sums, not mean of ratios).

    No noise gives +inf, whatever the signal; noise without signal -inf.
    """
    signal, noise = np.broadcast_arrays(np.asarray(signal, np.float64), np.asarray(noise, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10.0 * np.log10(signal / noise)  # the ratio first: a common power of two cancels exactly
    return np.asarray(np.where(noise == 0.0, np.inf, np.where(signal == 0.0, -np.inf, ratio)))


def monotone(values: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """Values made non-decreasing along axes by running maxima, and how many entries that moved."""
    result = values
    for axis in axes:
        result = np.maximum.accumulate(result, axis=axis)
    return result, int((result != values).sum())
