"""Streaming statistics of a tensor over batches, and the scales that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError, check_choice
from mixbit.network import call_model, check_batches, check_eval_mode
from mixbit.quantizers.prepare import bypass

#: How a scale is chosen: least squared error, largest value, the best power of two, or the largest value but for a
#: share of outliers (activations only; weights then take the least squared error).
METHODS = ("mse", "maxabs", "qformat", "percentile")
BINS = 8192


class TensorStatistics:
    """Minimum, maximum, moments and histogram of everything shown to `update`.

    Histograms of batches merge exactly: their ranges are powers of two, so the bins of a narrower one nest in those of
    a wider one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.min = torch.tensor(float("inf"), dtype=torch.float64)
        self.max = torch.tensor(float("-inf"), dtype=torch.float64)
        self.histogram = torch.zeros(3, BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Adds a batch.

        Raises:
            MixbitError: x holds NaN or infinity.
        """
        low, high, _, _, histogram = (t.cpu() for t in ops.observe(x.detach(), bins=BINS))
        if x.numel() == 0:
            return
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise MixbitError("holds NaN or infinity; expected finite numbers")
        self._add(x.numel(), low, high, histogram)

    def merge(self, other: TensorStatistics) -> None:
        """Adds everything that was shown to another one."""
        if other.count:
            self._add(other.count, other.min, other.max, other.histogram)

    def _add(self, count: int, low: Tensor, high: Tensor, histogram: Tensor) -> None:
        before = self._range()
        had_data = self.count > 0
        self.count += count
        incoming = float(max(abs(low), abs(high)))
        self.min = torch.minimum(self.min, low)
        self.max = torch.maximum(self.max, high)
        after = self._range()
        old = _widen(self.histogram, before, after) if had_data else self.histogram
        self.histogram = old + _widen(histogram, _power_above(incoming), after)

    def _range(self) -> float:
        return _power_above(float(max(abs(self.min), abs(self.max)))) if self.count else 0.0

    @property
    def signed(self) -> bool:
        """Whether any negative value was seen."""
        return bool(self.min < 0)

    def quantile(self, percentile: float, *, signed: bool) -> float:
        """The value that `percentile` percent of |x| (signed) or x stay below, linear inside a bin of the histogram.

        Raises:
            MixbitError: percentile is not in (0, 100].
        """
        if not 0 < percentile <= 100:
            raise MixbitError(f"percentile={percentile}: expected a number above 0, at most 100")
        low, high = float(self.min), float(self.max)
        largest = max(abs(low), abs(high)) if signed else high
        if percentile == 100 or largest <= 0:
            return largest
        half = BINS // 2
        positive = self.histogram[0, half:]
        counts = positive + self.histogram[0, :half].flip(0) if signed else positive
        below = 0.0 if signed else float(self.histogram[0, :half].sum())
        cumulative = counts.cumsum(0) + below
        wanted = percentile / 100 * float(cumulative[-1])
        bin_ = int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64)))
        before = float(cumulative[bin_ - 1]) if bin_ else below
        share = (wanted - before) / max(float(counts[bin_]), 1.0)
        value = (bin_ + min(max(share, 0.0), 1.0)) * self._range() / half
        return min(value, largest) if value > 0 else largest

    def scales(
        self,
        bit_widths: list[int],
        *,
        signed: bool,
        narrow_range: bool,
        method: str = "mse",
        percentile: float = 99.99,
    ) -> Tensor:
        """One scale per bit-width, float32 [K]."""
        check_choice("method", method, METHODS)
        bits = torch.tensor(bit_widths, dtype=torch.float32)
        if method == "mse":
            return ops.mse_scales_from_histogram(
                self.histogram, self.min, self.max, bits, signed=signed, narrow_range=narrow_range
            )
        largest = float(max(abs(self.min), abs(self.max)) if signed else self.max)
        if method == "percentile":
            largest = self.quantile(percentile, signed=signed)
        if largest <= 0:
            return torch.ones(len(bit_widths))
        if method in ("maxabs", "percentile"):
            return torch.tensor([largest / _hi(b, signed) for b in bit_widths], dtype=torch.float32)

        def noise(candidates: Tensor, bit_width: int) -> Tensor:
            widths = torch.full_like(candidates, float(bit_width))
            return ops.quantization_noise_from_histogram(
                self.histogram, self.min, self.max, candidates, widths, signed=signed, narrow_range=narrow_range
            )

        return torch.stack([_best_power(largest, b, signed, noise) for b in bit_widths])

    def offset_grid(self, bit_width: int, *, method: str = "mse") -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 [1] each, of an unsigned grid that covers negative values by an offset.

        "maxabs" takes the whole range (which includes 0), "mse" the best of the ranges k [min, max] with k in
        {0.20, 0.21, ..., 1.00}, each bin of the histogram taken at its mean.

        Raises:
            MixbitError: method is "qformat", whose grids have no offset.
        """
        check_choice("method", method, METHODS)
        if method == "qformat":
            raise MixbitError(
                'method="qformat": a grid with an offset has no fraction bits; expected "mse" or "maxabs"'
            )
        low, high = self.min.clamp(max=0.0), self.max.clamp(min=0.0)
        if not high > low:
            return torch.ones(1), torch.zeros(1)
        steps = 2.0**bit_width - 1
        shares = torch.ones(1, dtype=torch.float64) if method == "maxabs" else torch.arange(20, 101) / 100.0
        scales = (shares * (high - low) / steps).float()
        zero_points = torch.round(-low / (high - low) * steps).float().expand(len(scales))
        count, total, _ = self.histogram
        filled = count > 0
        mean = (total[filled] / count[filled]).float()
        codes = (torch.round(mean / scales[:, None]) + zero_points[:, None]).clamp(0, steps)
        error = (codes - zero_points[:, None]) * scales[:, None] - mean
        best = int((error.double().square() * count[filled]).sum(1).flip(0).argmin())
        chosen = len(scales) - 1 - best  # of equal ones the widest range
        return scales[chosen : chosen + 1], zero_points[chosen : chosen + 1]

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {
            "count": torch.tensor(self.count),
            "min": self.min,
            "max": self.max,
            "histogram": self.histogram,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        self.count = int(state["count"])
        self.min, self.max, self.histogram = state["min"], state["max"], state["histogram"]


def input_statistics(model: nn.Module, batches: Iterable[Any]) -> dict[str, TensorStatistics]:
    """What every layer's input looks like, from one float pass over the data.

    Given to `calibrate_(..., statistics=...)` as often as wanted, the pass is made once for many recipes.

    Args:
        model: Float or prepared, in eval mode; batch normalization folded or not as it will be calibrated.
        batches: Re-iterable batches (see the data conventions).

    Returns:
        Statistics of each convolution and linear layer that was reached, by module path.

    Raises:
        MixbitError: The data is one-shot, or an input is not finite (the layer is named).
    """
    check_batches(batches)
    check_eval_mode(model)
    found: dict[str, TensorStatistics] = {}

    def watch(name: str) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            try:
                found.setdefault(name, TensorStatistics()).update(x)
            except MixbitError as error:
                raise MixbitError(f"layer {name!r}: its input {error}") from error

        return observe

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with torch.no_grad(), bypass(model):
            for item in batches:
                call_model(model, item)
    finally:
        for handle in handles:
            handle.remove()
    return found


def weight_scales(
    weight: Tensor, bit_widths: list[int], *, per_channel: bool, narrow_range: bool, method: str = "mse"
) -> Tensor:
    """Scales of a weight for several bit-widths: float32 [K, O] (per output channel) or [K, 1].

    Raises:
        MixbitError: The weight holds NaN or infinity.
    """
    check_choice("method", method, METHODS)
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise MixbitError("weight holds NaN or infinity; expected finite numbers")
    axis = 0 if per_channel else None
    count = len(bit_widths)
    if method in ("mse", "percentile"):
        bits = torch.tensor(bit_widths, dtype=torch.float32, device=weight.device)
        return ops.mse_scales(weight, bits, signed=True, narrow_range=narrow_range, axis=axis).reshape(count, -1)
    rows = weight.float().reshape(weight.shape[0], -1) if per_channel else weight.float().reshape(1, -1)
    largest = rows.abs().amax(dim=1)
    if method == "maxabs":
        found = torch.stack([largest / _hi(b, True) for b in bit_widths])
        return torch.where(found > 0, found, torch.ones_like(found))
    found = torch.ones(count, rows.shape[0])
    for channel, row in enumerate(rows):
        if largest[channel] > 0:
            for k, bit_width in enumerate(bit_widths):

                def noise(candidates: Tensor, b: int, data: Tensor = row) -> Tensor:
                    widths = torch.full_like(candidates, float(b))
                    return ops.quantization_noise(data, candidates, widths, signed=True, narrow_range=narrow_range)[1]

                found[k, channel] = _best_power(float(largest[channel]), bit_width, True, noise)
    return found.to(weight.device)


def _best_power(largest: float, bit_width: int, signed: bool, noise: Any) -> Tensor:
    """The power of two with the least noise; of equal ones the smallest (most fraction bits)."""
    top = _power_above(largest / _hi(bit_width, signed))
    # Coarser steps than the one that covers the largest value only add noise; finer ones clip more and more.
    candidates = torch.tensor([top * 2.0**-i for i in range(-1, 12)], dtype=torch.float32)
    powers = noise(candidates, bit_width)
    best = max(i for i in range(len(candidates)) if powers[i] == powers.min())
    return candidates[best]


def _hi(bit_width: int, signed: bool) -> float:
    """The largest code; 1 for one signed bit, whose only level beside zero is -1."""
    return float(max(2 ** (bit_width - 1) - 1, 1) if signed else 2**bit_width - 1)


def _power_above(value: float) -> float:
    """The smallest power of two above value; 1 for zero. The range of `observe`'s histograms."""
    if value <= 0:
        return 1.0
    mantissa_exponent = torch.frexp(torch.tensor(value, dtype=torch.float64))
    return float(2.0 ** int(mantissa_exponent.exponent))


def _widen(histogram: Tensor, old: float, new: float) -> Tensor:
    """A histogram over [-old, old) as one over [-new, new); both powers of two, new >= old."""
    bins = histogram.shape[1]
    while old < new:
        inner = histogram.view(3, bins // 2, 2).sum(-1)
        histogram = torch.zeros_like(histogram)
        histogram[:, bins // 4 : bins // 4 + bins // 2] = inner
        old *= 2
    return histogram
