"""Fake (meta) implementations of the ops: shapes and dtypes for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_register = torch.library.register_fake
_SHORT_ROW = 16  # kShortRow of csrc/ops/parallel.h


def _none(like: Tensor) -> Tensor:
    """The gradient that nobody asked for."""
    return like.new_empty((0,))


def _check_parameter(parameter: Tensor, name: str, x: Tensor) -> None:
    torch._check_value(
        parameter.dim() == 1, lambda: f"{name} has {parameter.dim()} dimensions: expected [1] or [channels]"
    )
    _check_device(parameter, name, x)


def _check_device(parameter: Tensor, name: str, x: Tensor) -> None:
    torch._check_value(
        parameter.device == x.device,
        lambda: f"{name} is on {parameter.device} and x on {x.device}: expected one device",
    )


@_register("mixbit::fake_quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    *,
    signed: bool = True,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: int = 0,
    group_size: int | None = None,
    gradient: int = 0,
) -> Tensor:
    _check_parameter(scale, "scale", x)
    _check_parameter(zero_point, "zero_point", x)
    _check_parameter(bit_width, "bit_width", x)
    return torch.empty_like(x)


@_register("mixbit::_fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None,
    rounding: int,
    group_size: int | None,
    output_mask: Sequence[bool],
    gradient: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if output_mask[0] else _none(x),
        torch.empty_like(scale) if output_mask[1] else _none(scale),
        torch.empty_like(zero_point) if output_mask[2] else _none(scale),
    )


@_register("mixbit::_fake_quantize_backward_")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None,
    rounding: int,
    group_size: int | None,
    output_mask: Sequence[bool],
    gradient: int = 0,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(scale) if output_mask[0] else _none(scale),
        torch.empty_like(zero_point) if output_mask[1] else _none(scale),
    )


@_register("mixbit::fake_quantize_foreach")
def _(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    *,
    signed: bool = True,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: int = 0,
    group_size: int | None = None,
    gradient: int = 0,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


@_register("mixbit::_fake_quantize_backward_foreach")
def _(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None,
    rounding: int,
    group_size: int | None,
    output_mask: Sequence[bool],
    gradient: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [torch.empty_like(x) if output_mask[0] else _none(x) for x in xs],
        [torch.empty_like(s) if output_mask[1] else _none(s) for s in scales],
        [torch.empty_like(z) if output_mask[2] else _none(s) for z, s in zip(zero_points, scales, strict=True)],
    )


def _mask_bytes(dense: Tensor, axis: int | None) -> Any:
    """Rows start at a byte of their own; short rows are walked channel by channel (csrc/ops/parallel.h)."""
    if axis is None or dense.shape[axis] <= 1:
        return (dense.numel() + 7) // 8
    channels = dense.shape[axis]
    inner = dense.stride(axis)
    if dense.numel() == 0:
        return 0
    outer = dense.numel() // (channels * inner)
    if outer > 1 and inner < _SHORT_ROW:
        inner, outer = inner * outer, 1
    return outer * channels * ((inner + 7) // 8)


@_register("mixbit::_fake_quantize_mask")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bit_width: Tensor,
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None,
    rounding: int,
    group_size: int | None,
    gradient: int = 0,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, x.new_empty((_mask_bytes(y, axis),), dtype=torch.uint8)


@_register("mixbit::_fake_quantize_mask_backward")
def _(grad: Tensor, mask: Tensor, strides: Sequence[int], *, axis: int | None) -> Tensor:
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)


@_register("mixbit::extra_level_fake_quantize")
def _(
    x: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    extra_bits: Tensor,
    *,
    axis: int | None = None,
    narrow_range: bool = False,
    rounding: int = 1,
) -> Tensor:
    _check_parameter(scale, "scale", x)
    _check_parameter(bit_width, "bit_width", x)
    _check_device(extra_bits, "extra_bits", x)
    return torch.empty_like(x)


@_register("mixbit::_extra_level_fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    extra_bits: Tensor,
    *,
    axis: int | None,
    narrow_range: bool,
    rounding: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if output_mask[0] else _none(x),
        torch.empty_like(scale) if output_mask[1] else _none(scale),
    )


@_register("mixbit::quantized_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: int = 0,
    group_size: int | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
    x_gradient: int = 0,
    w_gradient: int = 0,
) -> Tensor:
    # The quantized operands keep the layout of x and weight, so the layout of the output is the convolution's own.
    dtype = out_dtype or x.dtype
    xq, wq = torch.empty_like(x, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    bias = None if bias is None else torch.empty_like(bias, dtype=dtype)
    return torch.ops.aten.convolution(xq, wq, bias, stride, padding, dilation, False, [0, 0], groups)


def _six(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w_scale: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if output_mask[0] else _none(x),
        torch.empty_like(weight) if output_mask[1] else _none(weight),
        weight.new_empty((weight.shape[0],)) if output_mask[2] else _none(weight),
        torch.empty_like(x_scale) if output_mask[3] else _none(x_scale),
        torch.empty_like(x_zero_point) if output_mask[4] else _none(x_scale),
        torch.empty_like(w_scale) if output_mask[5] else _none(w_scale),
    )


@_register("mixbit::_quantized_conv2d_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool,
    rounding: int,
    group_size: int | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    x_gradient: int = 0,
    w_gradient: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _six(x, weight, x_scale, x_zero_point, w_scale, output_mask)


@_register("mixbit::quantized_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool = True,
    rounding: int = 0,
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    x_gradient: int = 0,
    w_gradient: int = 0,
) -> Tensor:
    dtype = out_dtype or x.dtype
    bias = None if bias is None else torch.empty_like(bias, dtype=dtype)
    return torch.nn.functional.linear(torch.empty_like(x, dtype=dtype), torch.empty_like(weight, dtype=dtype), bias)


@_register("mixbit::_quantized_linear_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    x_bits: Tensor,
    w_scale: Tensor,
    w_bits: Tensor,
    *,
    signed_x: bool,
    w_narrow_range: bool,
    rounding: int,
    group_size: int | None,
    output_mask: Sequence[bool],
    x_gradient: int = 0,
    w_gradient: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _six(x, weight, x_scale, x_zero_point, w_scale, output_mask)


def _channels(x: Tensor, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else (x.shape[axis],)


def _double(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(tuple(shape), dtype=torch.float64)


@_register("mixbit::quantization_noise")
def _(
    x: Tensor, scales: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    channels = _channels(x, axis)
    return _double(x, channels), _double(x, (bit_widths.shape[0], *channels))


@_register("mixbit::quantization_noise_foreach")
def _(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    *,
    signed: bool,
    narrow_range: bool,
    axis: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    signals = [_double(x, _channels(x, axis)) for x in xs]
    noises = [_double(x, (b.shape[0], *_channels(x, axis))) for x, b in zip(xs, bit_widths, strict=True)]
    return signals, noises


@_register("mixbit::noise_power")
def _(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return _double(x, ()), _double(x, ())


@_register("mixbit::observe")
def _(x: Tensor, *, axis: int | None = None, bins: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = _channels(x, axis)
    first, second, third, fourth = (_double(x, channels) for _ in range(4))
    return first, second, third, fourth, _double(x, (*channels, 3, bins))


@_register("mixbit::mse_scales")
def _(x: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool, axis: int | None = None) -> Tensor:
    return x.new_empty((bit_widths.shape[0], *_channels(x, axis)), dtype=torch.float32)


@_register("mixbit::mse_scales_from_histogram")
def _(histogram: Tensor, min: Tensor, max: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool) -> Tensor:
    return histogram.new_empty((bit_widths.shape[0],), dtype=torch.float32)


@_register("mixbit::quantization_noise_from_histogram")
def _(
    histogram: Tensor, min: Tensor, max: Tensor, scales: Tensor, bit_widths: Tensor, *, signed: bool, narrow_range: bool
) -> Tensor:
    return histogram.new_empty((bit_widths.shape[0],))


@_register("mixbit::optimize_rounding")
def _(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    bit_width: Tensor,
    *,
    narrow_range: bool = True,
    damping: float = 0.01,
    sweeps: int = 20,
) -> Tensor:
    return weight.new_empty(weight.shape)


@_register("mixbit::pack_bits")
def _(codes: Tensor, bits: int) -> Tensor:
    torch._check_value(codes.dim() >= 1, lambda: "codes has no dimension: expected at least one to pack along")
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] * bits + 7) // 8), dtype=torch.uint8)


@_register("mixbit::unpack_bits")
def _(packed: Tensor, bits: int, n: int, signed: bool) -> Tensor:
    torch._check_value(packed.dim() >= 1, lambda: "packed has no dimension: expected what pack_bits returned")
    if bits <= 8:
        dtype = torch.int8 if signed else torch.uint8
    else:
        dtype = torch.int16 if signed or bits < 16 else torch.int32
    return packed.new_empty((*packed.shape[:-1], n), dtype=dtype)


@_register("mixbit::int_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *,
    x_zero_point: int = 0,
    y_zero_point: int = 0,
    y_low: int = 0,
    y_high: int = 255,
    weight_bits: int = 8,
) -> Tensor:
    torch._check_value(x.dim() == 4, lambda: f"x has shape {list(x.shape)}: expected [N, C, H, W]")
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    y = x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=torch.int8 if y_low < 0 else torch.uint8)
    return y.contiguous(memory_format=torch.channels_last)


@_register("mixbit::int_linear")
def _(
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
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int8 if y_low < 0 else torch.uint8)


@_register("mixbit::requantize")
def _(
    total: Tensor,
    multiplier: Tensor,
    *,
    zero_point: int = 0,
    low: int = 0,
    high: int = 255,
    axis: int | None = None,
) -> Tensor:
    return torch.empty_like(total, dtype=torch.int8 if low < 0 else torch.uint8)


@_register("mixbit::sample_gates")
def _(gate_logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    return noise.new_empty(noise.shape)


@_register("mixbit::_sample_gates_backward")
def _(grad: Tensor, gate_logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(gate_logits)


@_register("mixbit::gated_fake_quantize")
def _(
    x: Tensor,
    scale_range: Tensor,
    gates: Tensor,
    precisions: Sequence[int],
    *,
    signed: bool,
    axis: int | None = None,
    form: int = 0,
) -> Tensor:
    _check_parameter(scale_range, "scale_range", x)
    _check_device(gates, "gates", x)
    return torch.empty_like(x)


def _three(x: Tensor, second: Tensor, third: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if output_mask[0] else _none(x),
        second.new_empty(second.shape) if output_mask[1] else _none(second),
        third.new_empty(third.shape) if output_mask[2] else _none(third),
    )


@_register("mixbit::_gated_fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scale_range: Tensor,
    gates: Tensor,
    precisions: Sequence[int],
    *,
    signed: bool,
    axis: int | None,
    form: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _three(x, scale_range, gates, output_mask)


@_register("mixbit::mixture_fake_quantize")
def _(
    x: Tensor, scales: Tensor, weights: Tensor, bit_widths: Tensor, *, signed: bool, axis: int | None = None
) -> Tensor:
    for parameter, name in ((scales, "scales"), (weights, "weights"), (bit_widths, "bit_widths")):
        _check_device(parameter, name, x)
    return torch.empty_like(x)


@_register("mixbit::_mixture_fake_quantize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    scales: Tensor,
    weights: Tensor,
    bit_widths: Tensor,
    *,
    signed: bool,
    axis: int | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _three(x, scales, weights, output_mask)


@_register("mixbit::expected_cost")
def _(act_logits: Tensor, weight_logits: Tensor, values: Tensor, form: int, temperature: float = 0.5) -> Tensor:
    return act_logits.new_empty(())


@_register("mixbit::_expected_cost_backward")
def _(
    grad: Tensor, act_logits: Tensor, weight_logits: Tensor, values: Tensor, form: int, temperature: float
) -> tuple[Tensor, Tensor]:
    return act_logits.new_empty(act_logits.shape), weight_logits.new_empty(weight_logits.shape)


@_register("mixbit::update_level_switches_")
def _(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    extra_bits: Sequence[Tensor],
    codes: Sequence[Tensor],
    marks: Sequence[Tensor],
    counts: Sequence[Tensor],
    runs: Sequence[Tensor],
    *,
    score: int = 0,
    momentum: float = 0.01,
    narrow_range: bool = False,
    axis: int | None = None,
    rounding: int = 1,
) -> Tensor:
    return weights[0].new_empty((len(weights),), dtype=torch.int64)


@_register("mixbit::freeze_oscillating_")
def _(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
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
    rounding: int = 1,
) -> Tensor:
    return weights[0].new_empty((len(weights),), dtype=torch.int64)


def _check_step_lists(weights: Sequence[Tensor], **lists: Sequence[Any]) -> None:
    for name, entries in lists.items():
        message = f"{name} has {len(entries)} entries and weights {len(weights)}: expected one for each"
        torch._check_value(len(entries) == len(weights), message.__str__)


@_register("mixbit::threshold_aware_step_")
def _(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    extra_bits: Sequence[Tensor],
    lr: Tensor,
    **options: Any,
) -> None:
    _check_step_lists(weights, grads=grads, scales=scales, bit_widths=bit_widths, extra_bits=extra_bits)


@_register("mixbit::threshold_aware_adam_step_")
def _(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    extra_bits: Sequence[Tensor],
    lr: Tensor,
    **options: Any,
) -> None:
    _check_step_lists(weights, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, scales=scales)


@_register("mixbit::scale_updates_")
def _(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    extra_bits: Sequence[Tensor],
    **options: Any,
) -> None:
    _check_step_lists(weights, before=before, scales=scales, bit_widths=bit_widths, extra_bits=extra_bits)


@_register("mixbit::threshold_multipliers")
def _(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    bit_widths: Sequence[Tensor],
    extra_bits: Sequence[Tensor],
    **options: Any,
) -> list[Tensor]:
    _check_step_lists(weights, scales=scales, bit_widths=bit_widths, extra_bits=extra_bits)
    return [torch.empty_like(w) for w in weights]
