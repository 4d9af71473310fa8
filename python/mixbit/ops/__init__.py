"""The ops of mixbit: thin, checked wrappers of `torch.ops.mixbit.*`.

All of them work on float32, float16 and bfloat16 of any layout and compute in float32. Parameters (`scale`,
`zero_point`, `bit_width`) are float32 tensors of shape [1] or [size of axis], so that they can change without a
recompile; a plain number stands for a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixbit.errors import check_choice
from mixbit.ops import _loader

_loader.load_library()

from mixbit.ops import _fakes  # noqa: E402, F401  (registers the fakes once the schemas exist)

__all__ = [
    "COST_FORMS",
    "GATE_FORMS",
    "GRADIENTS",
    "MAX_EXTRA_BITS",
    "ROUNDINGS",
    "STEP_SHAPES",
    "SWITCH_SCORES",
    "expected_cost",
    "extra_level_fake_quantize",
    "fake_quantize",
    "fake_quantize_foreach",
    "freeze_oscillating_",
    "gated_fake_quantize",
    "int_conv2d",
    "int_linear",
    "mixture_fake_quantize",
    "mse_scales",
    "mse_scales_from_histogram",
    "noise_power",
    "observe",
    "optimize_rounding",
    "pack_bits",
    "quantization_noise",
    "quantization_noise_foreach",
    "quantization_noise_from_histogram",
    "quantized_conv2d",
    "quantized_linear",
    "requantize",
    "sample_gates",
    "scale_updates_",
    "threshold_aware_adam_step_",
    "threshold_aware_step_",
    "threshold_multipliers",
    "unpack_bits",
    "update_level_switches_",
]

_ops = torch.ops.mixbit
_fake_quantize = _ops.fake_quantize.default

#: Rounding names and their numbers in the op schemas.
ROUNDINGS = {"half_even": 0, "half_up": 1}
#: What the backward of `fake_quantize` computes, and the numbers in the op schemas.
GRADIENTS = {"learned_step": 0, "clip": 1}
#: How `gated_fake_quantize` builds its levels, and the numbers in the op schema.
GATE_FORMS = {"difference": 0, "residual": 1}
#: What `expected_cost` adds up, and the numbers in the op schema.
COST_FORMS = {"expected": 0, "separate": 1, "joint": 2}
#: What `update_level_switches_` counts, and the numbers in the op schema.
SWITCH_SCORES = {"adj": 0, "pair": 1, "osc": 2, "ema": 3}


#: Most extra bits of an element in `extra_level_fake_quantize`.
MAX_EXTRA_BITS = 2
#: How steps shrink towards a decision threshold, and the numbers in the op schemas.
STEP_SHAPES = {"off": 0, "step": 1, "linear": 2, "gauss": 3}


def _rounding(name: str) -> int:
    return ROUNDINGS[check_choice("rounding", name, ROUNDINGS)]


def _gradients(**names: str) -> dict[str, int]:
    """Arguments of the ops; what equals the schema's default is left out, since each costs part of a microsecond."""
    return {
        argument: GRADIENTS[check_choice(argument, name, GRADIENTS)]
        for argument, name in names.items()
        if name != "learned_step"
    }


def _parameter(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), float(value), dtype=torch.float32, device=like.device)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    bit_width: Tensor | float,
    *,
    signed: bool = True,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_even",
    group_size: int | None = None,
    gradient: str = "learned_step",
) -> Tensor:
    """Rounds x to a grid and back.

    `q = clamp(rne(x / scale) + rne(zero_point), lo, hi)`, `y = (q - zero_point) * scale`.

    Signed: lo = -2^(b-1) (+1 with narrow_range), hi = 2^(b-1) - 1; unsigned: 0 ... 2^b - 1. NaN stays NaN, infinities
    saturate. Gradients are those of learned-step quantization (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576): with
    v = x / scale + zero_point, inside (lo <= v <= hi) dx = g, dscale = sum g (q - v), dzero_point = 0; outside dx = 0,
    dscale = sum g (q - zero_point), dzero_point = -sum g scale. Sums are plain and the same for any number of threads.

    Parametrized clipping (PACT, arXiv 1805.06085, eq. 3) leaves out the rounding: `gradient="clip"`. With lower and
    upper the values of lo and hi, (lo - zero_point) * scale and (hi - zero_point) * scale: for lower <= x < upper
    dx = g, dscale = dzero_point = 0; beyond dx = 0, dscale = sum g (end - zero_point), end the nearer one of lo and hi,
    dzero_point = -sum g scale. x at the upper end counts as clipped, as published.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        scale: Step of the grid, > 0; float32 [1] or [x.shape[axis]].
        zero_point: Code of zero, rounded in the forward; number or float32 [1] or [x.shape[axis]].
        bit_width: Whole number 1 ... 16; number or float32 [1] or [x.shape[axis]].
        signed: Signed or unsigned grid.
        narrow_range: Leaves out the lowest signed code, so that the grid is symmetric.
        axis: Dimension of the channels; None is per tensor.
        rounding: "half_even", or "half_up" = floor(x / scale + 1/2).
        group_size: Reserved; must be None.
        gradient: "learned_step", or "clip".

    Returns:
        Like x (shape, dtype, layout).

    Raises:
        ValueError: A parameter has a wrong dtype or shape, a scale is not positive, a bit-width is out of range; an
            unknown rounding or gradient.

    Example:
        >>> fake_quantize(torch.tensor([0.3, -1.0, 9.0]), torch.tensor([0.5]), 0, 4)
        tensor([ 0.5000, -1.0000,  3.5000])
    """
    options: dict[str, Any] = {}
    # What equals the schema's default is left out: each argument costs a fraction of a microsecond.
    if not signed:
        options["signed"] = False
    if narrow_range:
        options["narrow_range"] = True
    if axis is not None:
        options["axis"] = axis
    if rounding != "half_even":
        options["rounding"] = _rounding(rounding)
    if group_size is not None:
        options["group_size"] = group_size
    if gradient != "learned_step":
        options |= _gradients(gradient=gradient)
    return _fake_quantize(x, scale, _parameter(zero_point, x), _parameter(bit_width, x), **options)


def fake_quantize_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | float],
    bit_widths: Sequence[Tensor | float],
    *,
    signed: bool = True,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_even",
    group_size: int | None = None,
    gradient: str = "learned_step",
) -> list[Tensor]:
    """`fake_quantize` of many tensors at once, such as all weights of a model: one parallel region, one launch a dtype.

    Differentiable like `fake_quantize`, and bit for bit the same; the backward is one call, too. For what a training
    loop does outside the modules' forward: penalties on the distance to the grid, averages of quantized weights.
    Shards of DTensors (FSDP2): pass `x.to_local()` of both a weight and its per-channel scale.

    Args:
        xs: Tensors of any shapes; float32, float16 or bfloat16, one dtype and device each.
        scales: One for each x: float32 [1] or [x.shape[axis]].
        zero_points: One for each x: number or tensor.
        bit_widths: One for each x: number or tensor.
        signed: As in `fake_quantize`, for all.
        narrow_range: As in `fake_quantize`, for all.
        axis: As in `fake_quantize`, for all.
        rounding: As in `fake_quantize`, for all.
        group_size: Reserved; must be None.
        gradient: As in `fake_quantize`, for all.

    Returns:
        One tensor like each x.

    Raises:
        ValueError: As `fake_quantize`, with the position in the list; lists of different lengths.
    """
    if not xs:
        return []
    return _ops.fake_quantize_foreach.default(
        list(xs),
        list(scales),
        [_parameter(z, x) for z, x in zip(zero_points, xs, strict=True)],
        [_parameter(b, x) for b, x in zip(bit_widths, xs, strict=True)],
        signed=signed,
        narrow_range=narrow_range,
        axis=axis,
        rounding=_rounding(rounding),
        group_size=group_size,
        **_gradients(gradient=gradient),
    )


def extra_level_fake_quantize(
    x: Tensor,
    scale: Tensor,
    bit_width: Tensor | float,
    extra_bits: Tensor,
    *,
    axis: int | None = None,
    narrow_range: bool = False,
    rounding: str = "half_up",
) -> Tensor:
    """Rounds x to a signed grid and back that is finer for the elements that extra bits are given to.

    With n = bit_width and e = extra_bits of the element: step = scale / 2^e, `c = clamp(round(x / step), lo, hi)`,
    `y = c * step`, lo = -2^(n+e-1) (+1 with narrow_range), hi = 2^(n+e-1) - 1. All levels of the base grid stay, and
    2^e - 1 appear between each two neighbours: for e = 1 the one in the middle, where the threshold was. The construct
    is our reading of Kim et al. (IEEE TNNLS 32(7), 2021, doi 10.1109/TNNLS.2020.3008996), who give weights that keep
    switching between two levels one more level.

    Gradients are those of `fake_quantize` on the element's own grid: with v = x / step, inside (lo <= v <= hi) dx = g,
    dscale = sum g (q - v) / 2^e; outside dx = 0, dscale = sum g q / 2^e. Without extra bits all of it has the bits of
    `fake_quantize(x, scale, 0, bit_width, ...)`. The backward needs x and extra_bits, of which no copies are made.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        scale: Step of the base grid, > 0; float32 [1] or [x.shape[axis]].
        bit_width: n, a whole number 1 ... 16; number or float32 [1] or [x.shape[axis]].
        extra_bits: e, uint8 like x, each 0, 1 or 2; n + e at most 16.
        axis: Dimension of the channels; None is per tensor.
        narrow_range: Leaves out the lowest code, so that the grid is symmetric.
        rounding: "half_up" = floor(x / step + 1/2), or "half_even".

    Returns:
        Like x (shape, dtype, layout).

    Raises:
        ValueError: A parameter has a wrong dtype or shape, a scale is not positive, a width is out of range.

    Example:
        >>> extra = torch.tensor([0, 1, 2], dtype=torch.uint8)
        >>> extra_level_fake_quantize(torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.5]), 4, extra)
        tensor([0.5000, 0.2500, 0.2500])
    """
    return _ops.extra_level_fake_quantize.default(
        x,
        scale,
        _parameter(bit_width, x),
        extra_bits,
        axis=axis,
        narrow_range=narrow_range,
        rounding=_rounding(rounding),
    )


def quantized_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor | float,
    x_bits: Tensor | float,
    w_scale: Tensor,
    w_bits: Tensor | float,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: str = "half_even",
    group_size: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
    x_gradient: str = "learned_step",
    w_gradient: str = "learned_step",
) -> Tensor:
    """`conv2d(fake_quantize(x), fake_quantize(weight), bias)` that saves no quantized copy for the backward.

    Args:
        x: [N, C, H, W]; float32, float16 or bfloat16.
        weight: [O, C / groups, KH, KW], dtype of x; quantized signed with zero_point 0.
        bias: [O] or None.
        x_scale: float32 [1].
        x_zero_point: Number or float32 [1].
        x_bits: Number or float32 [1].
        w_scale: float32 [1] (per tensor) or [O] (per output channel).
        w_bits: Number or float32 [1] or [O].
        signed_x: Whether x's grid is signed.
        w_narrow_range: Leaves out the lowest code of the weights.
        rounding: As in `fake_quantize`, for both operands.
        group_size: Reserved; must be None.
        stride: As in `torch.nn.functional.conv2d`.
        padding: As in `torch.nn.functional.conv2d`; padding adds exact zeros.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`.
        out_dtype: Type in which the quantized operands are multiplied, which may then differ in dtype; None: their own.
            Autocast sets it.
        x_gradient: `gradient` of `fake_quantize` for x.
        w_gradient: `gradient` of `fake_quantize` for the weight.

    Returns:
        [N, O, H', W'], out_dtype or the dtype of x. Gradients: those of `fake_quantize` behind the convolution's.

    Raises:
        ValueError: As `fake_quantize`.
    """

    return _ops.quantized_conv2d.default(
        x,
        weight,
        bias,
        x_scale,
        _parameter(x_zero_point, x),
        _parameter(x_bits, x),
        w_scale,
        _parameter(w_bits, x),
        signed_x=signed_x,
        w_narrow_range=w_narrow_range,
        rounding=_rounding(rounding),
        group_size=group_size,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        out_dtype=out_dtype,
        **_gradients(x_gradient=x_gradient, w_gradient=w_gradient),
    )


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor | float,
    x_bits: Tensor | float,
    w_scale: Tensor,
    w_bits: Tensor | float,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: str = "half_even",
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    x_gradient: str = "learned_step",
    w_gradient: str = "learned_step",
) -> Tensor:
    """`linear(fake_quantize(x), fake_quantize(weight), bias)` that saves no quantized copy for the backward.

    Args:
        x: [..., I].
        weight: [O, I], dtype of x; quantized signed with zero_point 0.
        bias: [O] or None.
        x_scale: float32 [1].
        x_zero_point: Number or float32 [1].
        x_bits: Number or float32 [1].
        w_scale: float32 [1] or [O].
        w_bits: Number or float32 [1] or [O].
        signed_x: Whether x's grid is signed.
        w_narrow_range: Leaves out the lowest code of the weights.
        rounding: As in `fake_quantize`, for both operands.
        group_size: Reserved; must be None.
        out_dtype: As in `quantized_conv2d`.
        x_gradient: As in `quantized_conv2d`.
        w_gradient: As in `quantized_conv2d`.

    Returns:
        [..., O], out_dtype or the dtype of x.

    Raises:
        ValueError: As `fake_quantize`.
    """
    return _ops.quantized_linear.default(
        x,
        weight,
        bias,
        x_scale,
        _parameter(x_zero_point, x),
        _parameter(x_bits, x),
        w_scale,
        _parameter(w_bits, x),
        signed_x=signed_x,
        w_narrow_range=w_narrow_range,
        rounding=_rounding(rounding),
        group_size=group_size,
        out_dtype=out_dtype,
        **_gradients(x_gradient=x_gradient, w_gradient=w_gradient),
    )


def quantization_noise(
    x: Tensor, scales: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Signal and noise power of x under K grids at once: x is read one time.

    `signal = sum x^2`, `noise[k] = sum (x - fake_quantize(x, scales[k], 0, bit_widths[k]))^2`, in fp32 lanes inside
    blocks of 16 Ki elements and in double across them; the same bits for any number of threads. NaN in x makes both
    NaN.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        scales: float32 [K], or [K, C] with C = x.shape[axis].
        bit_widths: float32 [K], whole numbers 1 ... 16.
        signed: Signed or unsigned grids.
        narrow_range: Symmetric signed grids.
        axis: Dimension of the channels; None is per tensor.

    Returns:
        signal: float64 [] or [C]; noise: float64 [K] or [K, C].

    Raises:
        ValueError: Wrong dtype or shape, a scale that is not positive, a bit-width out of range.
    """
    signal, noise = _ops.quantization_noise.default(
        x, scales, bit_widths, signed=signed, narrow_range=narrow_range, axis=axis
    )
    return signal, noise


def quantization_noise_foreach(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`quantization_noise` of many tensors at once: one parallel region, one launch a dtype.

    Args:
        xs: Tensors of any shapes.
        scales: One for each x: float32 [K], or [K, C] with C = x.shape[axis]; K may differ from x to x.
        bit_widths: One for each x: float32 [K].
        signed: As in `quantization_noise`, for all.
        narrow_range: As in `quantization_noise`, for all.
        axis: As in `quantization_noise`, for all.

    Returns:
        signals and noises, one for each x.

    Raises:
        ValueError: As `quantization_noise`, with the position in the list; lists of different lengths.
    """
    if not xs:
        return [], []
    signals, noises = _ops.quantization_noise_foreach.default(
        list(xs), list(scales), list(bit_widths), signed=signed, narrow_range=narrow_range, axis=axis
    )
    return signals, noises


def noise_power(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum reference^2, sum (x - reference)^2)` as float64 []: the SQNR of x against its reference is their ratio.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        reference: Shape and dtype of x.

    Returns:
        signal, noise: float64 [].
    """
    signal, noise = _ops.noise_power.default(x, reference)
    return signal, noise


def observe(x: Tensor, *, axis: int | None = None, bins: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Minimum, maximum, sum, sum of squares, and a histogram with moments.

    The histogram spans [-r, r), r the smallest power of two above max |x| (1 if x is all zero): ranges nest, so that
    histograms of several batches merge without error by adding neighbouring bins of the narrower one.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        axis: Dimension of the channels; None is per tensor.
        bins: Even number of bins, 0 for no histogram.

    Returns:
        min, max, sum, sum_sq: float64 [] or [C] (inf, -inf, 0, 0 for no elements; NaN in x makes min and max NaN);
        histogram: float64 [3, bins] or [C, 3, bins] with rows count, sum, sum of squares (zeros where x is not finite).
    """
    return _ops.observe.default(x, axis=axis, bins=bins)


def mse_scales(x: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool, axis: int | None = None) -> Tensor:
    """The scale of least squared error for each bit-width, among k * largest / hi with k in {0.20, 0.21, ..., 1.00}.

    `largest` is max |x| for signed grids and max x for unsigned ones. Exact on the elements of x (sorted prefix sums
    instead of 81 reads); of equal candidates the largest. All-zero channels get 1, channels with NaN or Inf NaN.

    Args:
        x: Any shape.
        bit_widths: float32 [K]; at least 2 for signed grids.
        signed: Signed or unsigned grids.
        narrow_range: Symmetric signed grids.
        axis: Dimension of the channels; None is per tensor.

    Returns:
        float32 [K] or [K, C].
    """
    return _ops.mse_scales.default(x, bit_widths, signed=signed, narrow_range=narrow_range, axis=axis)


def mse_scales_from_histogram(
    histogram: Tensor, min: Tensor, max: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool
) -> Tensor:
    """`mse_scales` from the histogram of `observe`: bins are split linearly where a rounding threshold crosses them.

    Args:
        histogram: float64 [3, bins], over the range that belongs to `min` and `max`.
        min: float64 [].
        max: float64 [].
        bit_widths: float32 [K]; at least 2 for signed grids.
        signed: Signed or unsigned grids.
        narrow_range: Symmetric signed grids.

    Returns:
        float32 [K].
    """
    return _ops.mse_scales_from_histogram.default(
        histogram, min, max, bit_widths, signed=signed, narrow_range=narrow_range
    )


def quantization_noise_from_histogram(
    histogram: Tensor, min: Tensor, max: Tensor, scales: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool
) -> Tensor:
    """The noise of `quantization_noise`, estimated from the histogram of `observe` without reading the data again.

    Args:
        histogram: float64 [3, bins], over the range that belongs to `min` and `max`.
        min: float64 [].
        max: float64 [].
        scales: float32 [K].
        bit_widths: float32 [K].
        signed: Signed or unsigned grids.
        narrow_range: Symmetric signed grids.

    Returns:
        float64 [K].
    """
    return _ops.quantization_noise_from_histogram.default(
        histogram, min, max, scales, bit_widths, signed=signed, narrow_range=narrow_range
    )


def optimize_rounding(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    bit_width: Tensor | float,
    *,
    narrow_range: bool = True,
    damping: float = 0.01,
    sweeps: int = 20,
) -> Tensor:
    """Rounds each weight up or down so that the outputs change least, instead of to the nearest level.

    With e the rounding errors of a row and M the second moments of its inputs, e' M e is the mean squared error of the
    output: AdaRound's objective (arXiv 2004.10568, eq. 13). It is descended from the nearest levels, one weight after
    the other, until no move lowers it (as QuIP's greedy updates, arXiv 2307.13304); deterministic, rows independent.
    Weights outside the grid go to its end.

    Args:
        weight: float32 [O, K], one row for each output.
        moments: float32 [G, K, K], symmetric: mean of x x' over the inputs x of the rows of each of G equal groups.
        scale: float32 [1] or [O].
        bit_width: Of the signed grid; float32 [1] or [O], or a number.
        narrow_range: Symmetric grid.
        damping: Share of the mean diagonal of M that is added to its diagonal: how much plain distance counts beside
            the data.
        sweeps: Passes over each row at most.

    Returns:
        float32 [O, K], levels of the grid; on any device computed by the CPU.

    Raises:
        ValueError: Shapes, dtypes or values do not fit; weight or moments hold NaN or infinity.
    """
    return _ops.optimize_rounding.default(
        weight, moments, scale, _parameter(bit_width, weight), narrow_range=narrow_range, damping=damping, sweeps=sweeps
    )


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes along the last dimension, little end first.

    Code i of a row takes its bits i * bits ... i * bits + bits - 1; bit k of a row is bit k % 8 of byte k // 8. Rows
    start at a byte, unused bits are 0, signed codes are two's complement.

    Args:
        codes: [..., n], uint8, int8, int16, int32 or int64; all of them signed or all unsigned.
        bits: Whole number 1 ... 16.

    Returns:
        uint8 [..., ceil(n * bits / 8)].

    Raises:
        ValueError: A wrong dtype or width, or a code that does not fit (on the CPU; on CUDA its low bits count, since a
            check would synchronize).

    Example:
        >>> pack_bits(torch.tensor([-8, 7, 3]), 4)
        tensor([120,   3], dtype=torch.uint8)
    """
    return _ops.pack_bits.default(codes, bits)


def unpack_bits(packed: Tensor, bits: int, n: int, signed: bool) -> Tensor:
    """Undoes `pack_bits`.

    Args:
        packed: uint8 [..., ceil(n * bits / 8)].
        bits: Whole number 1 ... 16.
        n: Codes of a row.
        signed: Whether the codes are two's complement.

    Returns:
        [..., n]: int8 (signed) or uint8 up to 8 bits, above that int16, and int32 for 16 unsigned bits.

    Raises:
        ValueError: A wrong dtype or width, or rows of another length than n codes take.

    Example:
        >>> unpack_bits(torch.tensor([120, 3], dtype=torch.uint8), 4, 3, True)
        tensor([-8,  7,  3], dtype=torch.int8)
    """
    return _ops.unpack_bits.default(packed, bits, n, signed)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def int_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    x_zero_point: int = 0,
    y_zero_point: int = 0,
    y_low: int = 0,
    y_high: int = 255,
    weight_bits: int = 8,
) -> Tensor:
    """A convolution on integer codes by the kernels of the integer runtime, on the CPU.

    `y = clamp(rne(fp32(total) * multiplier) + y_zero_point, y_low, y_high)` with
    `total = sum (x - x_zero_point) * weight + bias` in 32 bits (docs/integer_semantics.md): the bits of
    `mixbit.export.reference`. Weights are laid out anew in each call; `mixbit.runtime.Network` does that once.

    Args:
        x: Codes, int8 or uint8 [N, C, H, W], any layout.
        weight: Codes, int8 [O, C / groups, kh, kw].
        bias: int32 [O] at the scale of x times that of the weight, or None.
        multiplier: float32 [O], finite: scale of x times scale of the weight over scale of y.
        stride: Of the kernel, one number or (vertical, horizontal); like padding and dilation.
        padding: On each side, with the code x_zero_point.
        dilation: Of the kernel.
        groups: Of the channels.
        x_zero_point: The code of 0, a code of x's dtype.
        y_zero_point: y_low to y_high.
        y_low: Least code; below 0 the result is int8.
        y_high: Largest code.
        weight_bits: 1 to 8, what all codes of the weight fit; fewer bits may run in faster kernels.

    Returns:
        int8 or uint8 [N, O, H', W'], channels_last.

    Raises:
        ValueError: Shapes, dtypes or values do not fit, a total could exceed 32 bits, or tensors are on a GPU.
    """
    return _ops.int_conv2d.default(
        x,
        weight,
        bias,
        multiplier,
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
        x_zero_point=x_zero_point,
        y_zero_point=y_zero_point,
        y_low=y_low,
        y_high=y_high,
        weight_bits=weight_bits,
    )


def int_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    *,
    x_zero_point: int = 0,
    y_zero_point: int = 0,
    y_low: int = 0,
    y_high: int = 255,
    weight_bits: int = 8,
) -> Tensor:
    """A linear layer on integer codes by the kernels of the integer runtime, on the CPU; see `int_conv2d`.

    Args:
        x: Codes, int8 or uint8 [..., I].
        weight: Codes, int8 [O, I].
        bias: int32 [O], or None.
        multiplier: float32 [O], finite.
        x_zero_point: The code of 0, a code of x's dtype.
        y_zero_point: y_low to y_high.
        y_low: Least code; below 0 the result is int8.
        y_high: Largest code.
        weight_bits: 1 to 8, what all codes of the weight fit.

    Returns:
        int8 or uint8 [..., O].

    Raises:
        ValueError: As of `int_conv2d`.
    """
    return _ops.int_linear.default(
        x,
        weight,
        bias,
        multiplier,
        x_zero_point=x_zero_point,
        y_zero_point=y_zero_point,
        y_low=y_low,
        y_high=y_high,
        weight_bits=weight_bits,
    )


def requantize(
    total: Tensor,
    multiplier: Tensor,
    *,
    zero_point: int = 0,
    low: int = 0,
    high: int = 255,
    axis: int | None = None,
) -> Tensor:
    """`clamp(rne(fp32(total) * multiplier) + zero_point, low, high)`: codes of a layer's totals, on the CPU.

    Args:
        total: int32, any shape and layout.
        multiplier: float32 [1] or [size of axis], finite.
        zero_point: low to high.
        low: Least code; below 0 the result is int8.
        high: Largest code.
        axis: Along which multipliers lie; None: one for all.

    Returns:
        int8 or uint8 of total's shape.

    Raises:
        ValueError: Shapes, dtypes or values do not fit, or tensors are on a GPU.

    Example:
        >>> requantize(torch.tensor([-3, 5, 900], dtype=torch.int32), torch.tensor([0.5]))
        tensor([  0,   2, 255], dtype=torch.uint8)
    """
    return _ops.requantize.default(total, multiplier, zero_point=zero_point, low=low, high=high, axis=axis)


def sample_gates(gate_logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Hard-concrete gates (arXiv 1712.01312, eq. 10-12) stretched to -0.1 ... 1.1, differentiable to the logits.

    `s = sigmoid((ln(u / (1 - u)) + logit) / temperature)`, `z = clamp(1.2 s - 0.1, 0, 1)`. A gate between 0 and 1 has
    the gradient `1.2 s (1 - s) / temperature`, one at 0 or 1 none.

    Args:
        gate_logits: [K - 1], float32.
        noise: u in 0 ... 1, float32: [K - 1], or [K - 1, N] for one draw a sample.
        temperature: Above 0; Free Bits takes 0.5, Bayesian Bits 2/3.

    Returns:
        Gates in 0 ... 1, shape of noise.

    Raises:
        ValueError: Shapes or dtypes do not fit, temperature is not positive.

    Example:
        >>> sample_gates(torch.tensor([2.0, 0.2]), torch.tensor([0.1, 0.3]), 0.5)
        tensor([0.3832, 0.1581])
    """
    return _ops.sample_gates.default(gate_logits, noise, temperature)


def gated_fake_quantize(
    x: Tensor,
    scale_range: Tensor,
    gates: Tensor,
    precisions: Sequence[int],
    *,
    signed: bool,
    axis: int | None = None,
    form: str = "difference",
) -> Tensor:
    """x on nested grids that gates open one after the other (Free Bits, arXiv 2307.02894; Bayesian Bits, 2005.07093).

    `Q_0 + sum_j z_1 ... z_j (Q_j - Q_(j-1))`, Q_j being x on the grid of `precisions[j]` over `scale_range`: unsigned
    step range / (2^b - 1) and codes 0 ... 2^b - 1, signed (two's complement) step range / 2^(b-1) and codes
    -2^(b-1) ... 2^(b-1) - 1. Gates of 0 and 1 give one Q_j exactly: what `fake_quantize` gives at that step and width.

    form="difference" rounds x on every grid. "residual" rounds on each grid what the grids before have left over, so
    that Q_j differs from rounding x only where x lies between two levels; its unsigned grids must nest, each width
    being a multiple of the one before.

    Gradients: dx = g inside the widest grid (lowest code <= x / step <= highest, before rounding) whatever the gates,
    0 outside; gates exactly, sum g (Q_j - Q_(j-1)) times the other gates. scale_range gets none in "difference"; in
    "residual" that of a learned step (LSQ, arXiv 1902.08153) on the widest grid, times d step / d range. Sums are plain
    and the same for any number of threads.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        scale_range: Largest value of the unsigned, -lowest of the signed grids, > 0; float32 [1] or [x.shape[axis]].
        gates: z in 0 ... 1, float32 [K - 1], or [K - 1, x.shape[0]] for gates of each sample; beside axis 0 those are
            the gates of each channel.
        precisions: K >= 2 widths 1 ... 16, ascending.
        signed: Signed or unsigned grids.
        axis: Dimension of the channels; None is per tensor.
        form: "difference" or "residual".

    Returns:
        Like x (shape, dtype, layout).

    Raises:
        ValueError: A shape, dtype or value does not fit; the message names the argument.

    Example:
        >>> x = torch.tensor([0.3, 2.7, 7.5])
        >>> gated_fake_quantize(x, torch.tensor([6.0]), torch.tensor([1.0, 0.0]), (2, 4, 8), signed=False)
        tensor([0.4000, 2.8000, 6.0000])
    """
    number = GATE_FORMS[check_choice("form", form, GATE_FORMS)]
    return _ops.gated_fake_quantize.default(
        x, scale_range, gates, list(precisions), signed=signed, axis=axis, form=number
    )


def mixture_fake_quantize(
    x: Tensor, scales: Tensor, weights: Tensor, bit_widths: Tensor, *, signed: bool, axis: int | None = None
) -> Tensor:
    """`sum_k weights[k] fake_quantize(x, scales[k], 0, bit_widths[k])`, x read once (EdMIPS, arXiv 2004.05795).

    A fractional width is a mixture of its floor and ceil (FracBits, arXiv 2007.02017). Gradients, exactly: dx = g times
    the weights of the grids in which x lies; dweights[k] = sum g fake_quantize_k(x); dscales[k] = weights[k] times the
    gradient of `fake_quantize`. Sums are plain and the same for any number of threads.

    Args:
        x: Any shape; float32, float16 or bfloat16.
        scales: float32 [K] or [K, x.shape[axis]], > 0.
        weights: float32 [K], such as a softmax.
        bit_widths: float32 [K], whole numbers 1 ... 16.
        signed: Signed (two's complement) or unsigned grids.
        axis: Dimension of the channels; None is per tensor.

    Returns:
        Like x (shape, dtype, layout).

    Raises:
        ValueError: A shape, dtype or value does not fit; the message names the argument.
    """
    return _ops.mixture_fake_quantize.default(x, scales, weights, bit_widths, signed=signed, axis=axis)


def expected_cost(
    act_logits: Tensor, weight_logits: Tensor, values: Tensor, form: str, temperature: float = 0.5
) -> Tensor:
    """The penalty of all gates of a model in one differentiable call, computed in double.

    A gate is open with probability c = sigmoid(logit + temperature ln 11) (stretch -0.1 ... 1.1), the first j gates
    with C_j = c_1 ... c_j; the width is number k with p_k = C_k (1 - c_(k+1)). With a over the widths of a layer's
    input, w over those of its weights, and sums over all layers:

    * "expected": sum p_a p_w values[l, a, w], the expected value of a cost table.
    * "separate" (Free Bits): sum_(a>=1) C_a values[l, a, 0] + sum_(w>=1) C_w values[l, 0, w]; BOPs: values[l, k, 0] =
      values[l, 0, k] = MACs_l / max MACs * precision k, or 0 for an operand that is not searched.
    * "joint" (Free Bits): sum_(a>=1, w>=1) C_a C_w values[l, a, w]; BOPs: MACs_l / max MACs * both precisions.

    What a form does not read of `values` is ignored. A width that is not searched has the logits +inf (all gates open).

    Args:
        act_logits: [L, Ka - 1], float32.
        weight_logits: [L, Kw - 1], float32.
        values: [L, Ka, Kw], float32 or float64.
        form: "expected", "separate" or "joint".
        temperature: That of `sample_gates`.

    Returns:
        The sum, dtype of act_logits, shape []. Gradients to both logits.

    Raises:
        ValueError: Shapes or dtypes do not fit, temperature is not positive.
    """
    number = COST_FORMS[check_choice("form", form, COST_FORMS)]
    return _ops.expected_cost.default(act_logits, weight_logits, values, number, temperature)


def update_level_switches_(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor],
    codes: Sequence[Tensor],
    marks: Sequence[Tensor],
    counts: Sequence[Tensor],
    runs: Sequence[Tensor],
    *,
    score: str = "adj",
    momentum: float = 0.01,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_up",
) -> Tensor:
    """Counts how often the weights of a model change their quantization level: one call after each optimizer step.

    The code of a weight with e extra bits is `clamp(round(w / (scale / 2^e)))` on the signed grid of bit_width + e
    bits; it is compared with that of the call before. A weight that is NaN keeps its code. Scores (retraining after
    Kim et al., IEEE TNNLS 32(7), 2021; oscillations after Nagel et al., arXiv 2203.11086):

    * "adj": switches between contiguous levels.
    * "pair": the longest run of such switches between the same two levels.
    * "osc": switches in the direction opposite to the weight's switch before.
    * "ema": the exponential average `f = momentum [oscillates] + (1 - momentum) f` (0 below 2^-100).

    State of each weight, in its shape and updated in place (zeros at first; call once to take in the first codes, then
    set all but `codes` to zero): 3 bytes for "adj", 4 for "osc", 6 for "pair" and "ema". Counts saturate at 32767.

    Args:
        weights: Tensors of any shapes; float32, float16 or bfloat16.
        scales: One for each weight: float32 [1] or [weight.shape[axis]].
        bit_widths: One for each weight: number, or float32 [1] or [weight.shape[axis]]; with extra bits at most 8.
        extra_bits: One for each weight: uint8 of its shape, values 0 ... 2, or an empty tensor for none.
        codes: int8; the codes of the call before.
        marks: int8; "adj": empty tensors.
        counts: int16; "ema": float32.
        runs: int16; other scores than "pair": empty tensors.
        score: What to count.
        momentum: Of "ema", above 0 and at most 1.
        narrow_range: Of the weights' grids, for all.
        axis: Dimension of the channels, for all; None is per tensor. Scales of one element fit any axis.
        rounding: Of the weights' grids, for all.

    Returns:
        How many weights switched in this call, int64 [len(weights)], on the weights' device.

    Raises:
        ValueError: A shape, dtype or value does not fit; the message names argument and position. Where extra bits are
            out of range, the state is not to be used any more. On CUDA such weights are left out instead.
    """
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    number = SWITCH_SCORES[check_choice("score", score, SWITCH_SCORES)]
    return _ops.update_level_switches_.default(
        list(weights),
        list(scales),
        [_parameter(b, w) for b, w in zip(bit_widths, weights, strict=True)],
        list(extra_bits),
        list(codes),
        list(marks),
        list(counts),
        list(runs),
        score=number,
        momentum=momentum,
        narrow_range=narrow_range,
        axis=axis,
        rounding=_rounding(rounding),
    )


@torch.no_grad()
def freeze_oscillating_(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor],
    codes: Sequence[Tensor],
    marks: Sequence[Tensor],
    frequencies: Sequence[Tensor],
    averages: Sequence[Tensor],
    *,
    threshold: float,
    momentum: float = 0.01,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: str = "half_up",
) -> Tensor:
    """Iterative weight freezing (Nagel et al., arXiv 2203.11086, algorithm 1): one call after each optimizer step.

    The frequency of oscillations of a weight is their exponential average, `f = momentum o + (1 - momentum) f`, o being
    1 where its code changed in the direction opposite to the change before. Once it is above `threshold`, the weight is
    held at the level next to the exponential average of its codes (of the steps before: the code of this step has no
    part in it): `weight = code * scale`, set anew in every call, so that it follows a learned scale.

    State of each weight, in its shape and updated in place (zeros at first; one call with momentum 1 and threshold 0,
    after which marks are set to zero, takes in the first codes): 10 bytes. Codes and their averages are in units of
    scale / 4, so that extra levels given on the way change none.

    Args:
        weights: As in `update_level_switches_`; changed in place, without a gradient.
        scales: As there.
        bit_widths: As there; at most 6.
        extra_bits: As there.
        codes: int8.
        marks: int8; the last direction -1, 0 or 1, or 2 of a frozen weight.
        frequencies: float32.
        averages: float32.
        threshold: Frequency above which a weight is frozen, at most 1; 0 freezes none that is still free.
        momentum: Above 0, at most 1.
        narrow_range: As there.
        axis: As there.
        rounding: As there.

    Returns:
        How many weights are frozen, int64 [len(weights)], on the weights' device.

    Raises:
        ValueError: As `update_level_switches_`.
    """
    if not weights:
        return torch.zeros(0, dtype=torch.int64)
    return _ops.freeze_oscillating_.default(
        list(weights),
        list(scales),
        [_parameter(b, w) for b, w in zip(bit_widths, weights, strict=True)],
        list(extra_bits),
        list(codes),
        list(marks),
        list(frequencies),
        list(averages),
        threshold=threshold,
        momentum=momentum,
        narrow_range=narrow_range,
        axis=axis,
        rounding=_rounding(rounding),
    )


def threshold_aware_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor | None] | None = None,
    *,
    lr: Tensor | float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    shape: str = "step",
    alpha: float = 0.1,
    rho: float = 0.125,
    on_grad: bool = False,
    narrow_range: bool | Sequence[bool] = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of SGD that is smaller near decision thresholds, on all weights of a model in one call, in place.

    `w -= lr g(d(w)) update`, the update being that of `torch.optim.SGD` (momentum and weight decay included), so that
    momentum does not carry a weight across a threshold (the idea: Kim et al., IEEE TNNLS 32(7), 2021; the formulas are
    ours). d is the distance of w from the nearest threshold between two levels of its own grid, in units of the grid's
    step scale / 2^extra_bits, 0 to 1/2; beyond the outermost thresholds that from the outermost one. With r = d / rho:

    - "step": alpha if r < 1, else 1
    - "linear": alpha + (1 - alpha) min(1, r)
    - "gauss": 1 - (1 - alpha) exp(-r^2)
    - "off": 1, which gives the bits of torch's SGD in float32 on the CPU

    Each weight is read and written once, in one parallel region or one launch a dtype; computed in float32. On CUDA
    nothing synchronizes. Shards of DTensors: pass `to_local()` of everything that is sharded.

    Args:
        weights: Tensors of any shapes and layouts; float32, float16 or bfloat16.
        grads: One for each weight, of its shape and dtype.
        momenta: Momentum of each weight, of its shape and dtype; [] where `momentum` is 0.
        scales: Step of each weight's base grid: float32 [1], or [size of dimension 0].
        bit_widths: Of each signed base grid: number, or float32 [1] or [size of dimension 0].
        extra_bits: Extra bits of each weight, uint8 of its shape with values 0 ... 2 (which are not checked here), or
            None; None for no extra bits at all.
        lr: Number, or a tensor of one element (on the CPU or the weights' device), which may change without a
            recompile.
        momentum: As in `torch.optim.SGD`.
        dampening: As in `torch.optim.SGD`.
        weight_decay: As in `torch.optim.SGD`.
        nesterov: As in `torch.optim.SGD`.
        maximize: As in `torch.optim.SGD`.
        first_step: The momenta hold nothing yet and become the gradients, undampened.
        shape: "step", "linear", "gauss" or "off".
        alpha: Multiplier at a threshold, 0 ... 1.
        rho: Reach of a threshold in steps of the grid, above 0, up to 1/2.
        on_grad: g multiplies the gradient, before decay and momentum, instead of the update.
        narrow_range: Whether the grids leave out their lowest code: for all, or one for each.
        grad_scale: One number that gradients were multiplied with; they are divided by it, in place.
        found_inf: One number; the step is left out unless it is 0.

    Raises:
        ValueError: Lists of different lengths; a shape, dtype or value that does not fit.
    """
    if not weights:
        return
    _ops.threshold_aware_step_.default(
        list(weights),
        list(grads),
        list(momenta),
        *_step_grids(weights, scales, bit_widths, extra_bits),
        _number(lr),
        **_step_options(weights, narrow_range, shape, alpha, rho),
        on_grad=on_grad,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first_step=first_step,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def threshold_aware_adam_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor | None] | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    shape: str = "step",
    alpha: float = 0.1,
    rho: float = 0.125,
    on_grad: bool = False,
    narrow_range: bool | Sequence[bool] = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of Adam or AdamW that is smaller near decision thresholds: `threshold_aware_step_` with their update.

    `w += g(d(w)) (w_adam - w)`, w_adam being the result of `torch.optim.AdamW` (decoupled) or `torch.optim.Adam`: a
    decoupled decay is part of the scaled update.

    Args:
        weights: As in `threshold_aware_step_`.
        grads: One for each weight, of its shape and dtype.
        exp_avgs: First moments, as `grads`.
        exp_avg_sqs: Second moments, as `grads`.
        max_exp_avg_sqs: Their largest values, as `grads`; [] without `amsgrad`.
        state_steps: Steps of each weight, this one included: a tensor of one element each.
        scales: As in `threshold_aware_step_`.
        bit_widths: As in `threshold_aware_step_`.
        extra_bits: As in `threshold_aware_step_`.
        lr: As in `threshold_aware_step_`.
        betas: As in `torch.optim.Adam`.
        eps: As in `torch.optim.Adam`.
        weight_decay: As in `torch.optim.Adam`.
        decoupled: Whether the decay is AdamW's.
        amsgrad: As in `torch.optim.Adam`.
        maximize: As in `torch.optim.Adam`.
        shape: As in `threshold_aware_step_`.
        alpha: As in `threshold_aware_step_`.
        rho: As in `threshold_aware_step_`.
        on_grad: As in `threshold_aware_step_`.
        narrow_range: As in `threshold_aware_step_`.
        grad_scale: As in `threshold_aware_step_`.
        found_inf: As in `threshold_aware_step_`.

    Raises:
        ValueError: As `threshold_aware_step_`.
    """
    if not weights:
        return
    _ops.threshold_aware_adam_step_.default(
        list(weights),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(state_steps),
        *_step_grids(weights, scales, bit_widths, extra_bits),
        _number(lr),
        **_step_options(weights, narrow_range, shape, alpha, rho),
        on_grad=on_grad,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def scale_updates_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor | None] | None = None,
    *,
    shape: str = "step",
    alpha: float = 0.1,
    rho: float = 0.125,
    narrow_range: bool | Sequence[bool] = False,
) -> None:
    """Shrinks the step that any optimizer has taken: `weight = before + g(d(before)) (weight - before)`, in place.

    All weights of a model in one call; g as in `threshold_aware_step_`.

    Args:
        weights: After the step.
        before: Copies of the weights before the step.
        scales: As in `threshold_aware_step_`.
        bit_widths: As in `threshold_aware_step_`.
        extra_bits: As in `threshold_aware_step_`.
        shape: As in `threshold_aware_step_`.
        alpha: As in `threshold_aware_step_`.
        rho: As in `threshold_aware_step_`.
        narrow_range: As in `threshold_aware_step_`.

    Raises:
        ValueError: As `threshold_aware_step_`.
    """
    if weights:
        _ops.scale_updates_.default(
            list(weights),
            list(before),
            *_step_grids(weights, scales, bit_widths, extra_bits),
            **_step_options(weights, narrow_range, shape, alpha, rho),
        )


def threshold_multipliers(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor | None] | None = None,
    *,
    shape: str = "step",
    alpha: float = 0.1,
    rho: float = 0.125,
    narrow_range: bool | Sequence[bool] = False,
) -> list[Tensor]:
    """The multiplier g(d(w)) of every weight's step; see `threshold_aware_step_`.

    With shape "linear", alpha 0 and rho 1/2 this is 2 d: twice the distance from the nearest threshold.

    Args:
        weights: As in `threshold_aware_step_`.
        scales: As in `threshold_aware_step_`.
        bit_widths: As in `threshold_aware_step_`.
        extra_bits: As in `threshold_aware_step_`.
        shape: As in `threshold_aware_step_`.
        alpha: As in `threshold_aware_step_`.
        rho: As in `threshold_aware_step_`.
        narrow_range: As in `threshold_aware_step_`.

    Returns:
        One tensor like each weight.

    Raises:
        ValueError: As `threshold_aware_step_`.

    Example:
        >>> threshold_multipliers([torch.tensor([0.25, 0.3, 0.5])], [torch.tensor([0.5])], [4])
        [tensor([0.1000, 0.1000, 1.0000])]
    """
    if not weights:
        return []
    return _ops.threshold_multipliers.default(
        list(weights),
        *_step_grids(weights, scales, bit_widths, extra_bits),
        **_step_options(weights, narrow_range, shape, alpha, rho),
    )


def _number(value: Tensor | float) -> Tensor:
    """One number as a tensor; float64, since optimizers compute with Python's numbers."""
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _step_grids(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor | float],
    extra_bits: Sequence[Tensor | None] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists of grids as the schemas have them: an empty tensor where there are no extra bits."""
    none = torch.empty(0, dtype=torch.uint8, device=weights[0].device)
    extra = [none] * len(weights) if extra_bits is None else [none if e is None else e for e in extra_bits]
    bits = [b if isinstance(b, Tensor) else _parameter(b, weights[0]) for b in bit_widths]
    return list(scales), bits, extra


def _step_options(
    weights: Sequence[Tensor], narrow_range: bool | Sequence[bool], shape: str, alpha: float, rho: float
) -> dict[str, Any]:
    narrow = [narrow_range] * len(weights) if isinstance(narrow_range, bool) else list(narrow_range)
    number = STEP_SHAPES[check_choice("shape", shape, STEP_SHAPES)]
    return {"narrow_range": narrow, "shape": number, "alpha": alpha, "rho": rho}
