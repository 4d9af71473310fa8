"""Quantizer modules and the layers that use them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.recipe import LayerPrecision

#: The forward uses at least this share of the calibrated scale, so that no optimizer step drives a scale through zero.
SCALE_FLOOR = 2.0**-20


class Quantizer(nn.Module):
    """Fake-quantizes one tensor with a learned scale.

    State: Parameter `scale` [1] or [channels]; buffers `zero_point` [1], `bit_width` [1], `calibrated_scale` (like
    scale), `signed_flag` and `calibrated` (uint8 [1]); shapes are fixed from construction.

    Attributes:
        signed: Whether the grid is signed.
        narrow_range: Whether the lowest signed code is left out.
        axis: Dimension of the channels, None per tensor.
        rounding: "half_even" or "half_up".
        enabled: A disabled quantizer returns its input.
    """

    zero_point: Tensor
    bit_width: Tensor
    calibrated_scale: Tensor
    signed_flag: Tensor
    calibrated: Tensor

    def __init__(
        self,
        bit_width: int,
        *,
        channels: int = 1,
        signed: bool = True,
        narrow_range: bool = False,
        axis: int | None = None,
        rounding: str = "half_even",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, device=device))
        self.register_buffer("zero_point", torch.zeros(1, device=device))
        self.register_buffer("bit_width", torch.full((1,), float(bit_width), device=device))
        self.register_buffer("calibrated_scale", torch.ones(channels, device=device))
        self.register_buffer("signed_flag", torch.tensor([int(signed)], dtype=torch.uint8, device=device))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.uint8, device=device))
        self.signed = signed
        self.is_calibrated = False
        self.narrow_range = narrow_range
        self.axis = axis
        self.rounding = rounding
        self.enabled = True
        self.register_load_state_dict_pre_hook(_fill_missing)
        self.register_load_state_dict_post_hook(_follow_buffers)

    def set_(self, scale: Tensor, *, signed: bool | None = None) -> Quantizer:
        """Takes over a calibrated scale ([1] or [channels], > 0) and optionally the sign of the grid."""
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise MixbitError("scale: expected positive finite numbers")
        with torch.no_grad():
            self.scale.copy_(scale)
            self.calibrated_scale.copy_(scale)
            self.calibrated.fill_(1)
            if signed is not None:
                self.signed_flag.fill_(int(signed))
        _follow_buffers(self, None)
        return self

    def set_bit_width_(self, bit_width: int) -> Quantizer:
        """Moves to another width at the same range: each scale is multiplied by hi_old / hi_new."""
        old = int(self.bit_width)
        if old != bit_width:
            ratio = self._range_steps(old) / self._range_steps(bit_width)
            with torch.no_grad():
                self.bit_width.fill_(float(bit_width))
                self.scale.mul_(ratio)
                self.calibrated_scale.mul_(ratio)
        return self

    def _range_steps(self, bit_width: int) -> float:
        if not self.signed:
            return 2.0**bit_width - 1
        return 2.0 ** (bit_width - 1) - 1 if self.narrow_range else 2.0 ** (bit_width - 1)

    def quant_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        bits = int(self.bit_width)
        if self.signed:
            return -(2 ** (bits - 1)) + int(self.narrow_range), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1

    def effective_scale(self) -> Tensor:
        """max(scale, 2^-20 of the calibrated scale), with the gradient kept below the floor."""
        floor = self.calibrated_scale * SCALE_FLOOR
        # Below the floor the value is the floor's and the gradient the scale's own.
        return torch.where(self.scale >= floor, self.scale, floor + (self.scale - self.scale.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes x to the grid and back."""
        if not self.enabled:
            return x
        self.check_calibrated()
        return ops.fake_quantize(
            x,
            self.effective_scale(),
            self.zero_point,
            self.bit_width,
            signed=self.signed,
            narrow_range=self.narrow_range,
            axis=self.axis,
            rounding=self.rounding,
        )

    def check_calibrated(self) -> None:
        """Refuses to run before `calibrate_`.

        Raises:
            MixbitError: No scale has been set.
        """
        if not self.is_calibrated:
            raise MixbitError("a prepared layer has no scales yet; call mixbit.calibrate_(model, batches) first")

    def extra_repr(self) -> str:
        """Bits, sign and granularity."""
        sign = "signed" if self.signed else "unsigned"
        return (
            f"bit_width={int(self.bit_width)}, {sign}, channels={self.scale.numel()}, calibrated={self.is_calibrated}"
        )


def _fill_missing(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A float checkpoint has no quantizer keys: they keep their present values, so that it loads strictly."""
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    for name, value in own.items():
        state_dict.setdefault(prefix + name, value.detach())


def _follow_buffers(module: nn.Module, _: Any) -> None:
    """Python flags follow the buffers: reading a buffer in the forward would break a compiled graph."""
    assert isinstance(module, Quantizer)
    module.signed = bool(module.signed_flag.item())
    module.is_calibrated = bool(module.calibrated.item())


class QuantizedLayer(nn.Module):
    """What prepared layers share: the quantizers of weight and activation (None is float) and the precision asked for.

    Not built but put on an existing module by `prepare_`, which changes its class; Parameters, hooks and aliases stay.
    """

    mixbit_layer = True
    weight: Any
    bias: Any
    weight_quantizer: Quantizer | None
    act_quantizer: Quantizer | None
    precision: LayerPrecision
    float_class: type[nn.Module]
    bypassed: bool

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and weight, fake-quantized where a quantizer is on."""
        act = x if self.act_quantizer is None else self.act_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return act, weight

    def _both(self) -> tuple[Quantizer, Quantizer] | None:
        """The two quantizers if both are on."""
        act, weight = self.act_quantizer, self.weight_quantizer
        if act is None or weight is None or not act.enabled or not weight.enabled:
            return None
        act.check_calibrated()
        weight.check_calibrated()
        return act, weight


def pad_input(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x padded by hand where symmetric zero padding does not do; the padding that is left to the convolution."""
    if isinstance(conv.padding, str):
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "valid":
            totals = [0, 0]
        (top, left), (bottom, right) = ([t // 2 for t in totals], [t - t // 2 for t in totals])
    else:
        top, left = (int(p) for p in conv.padding)
        bottom, right = top, left
    if conv.padding_mode == "zeros" and top == bottom and left == right:
        return x, (top, left)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


def apply_layer(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """A layer's own operation with another weight; its hooks are not called."""
    if isinstance(layer, nn.Conv2d):
        x, padding = pad_input(layer, x)
        return F.conv2d(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    return F.linear(x, weight, layer.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves the fake-quantized input with the fake-quantized weight; [N, C, H, W] -> [N, O, H', W']."""
        if self.bypassed:
            return nn.Conv2d.forward(self, x)
        x, padding = pad_input(self, x)
        both = self._both()
        if both is None:
            act, weight = self._operands(x)
            return F.conv2d(act, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        act_quantizer, weight_quantizer = both
        return ops.quantized_conv2d(
            x,
            self.weight,
            self.bias,
            act_quantizer.effective_scale(),
            act_quantizer.zero_point,
            act_quantizer.bit_width,
            weight_quantizer.effective_scale(),
            weight_quantizer.bit_width,
            signed_x=act_quantizer.signed,
            w_narrow_range=weight_quantizer.narrow_range,
            rounding=weight_quantizer.rounding,
            stride=self.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
        )


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the fake-quantized input with the fake-quantized weight; [..., I] -> [..., O]."""
        if self.bypassed:
            return nn.Linear.forward(self, x)
        both = self._both()
        if both is None:
            act, weight = self._operands(x)
            return F.linear(act, weight, self.bias)
        act_quantizer, weight_quantizer = both
        return ops.quantized_linear(
            x,
            self.weight,
            self.bias,
            act_quantizer.effective_scale(),
            act_quantizer.zero_point,
            act_quantizer.bit_width,
            weight_quantizer.effective_scale(),
            weight_quantizer.bit_width,
            signed_x=act_quantizer.signed,
            w_narrow_range=weight_quantizer.narrow_range,
            rounding=weight_quantizer.rounding,
        )


class JoinedTensors(nn.Module):
    """What Add and Cat share: a quantizer of the result, put on by `prepare_`, given its scale by `calibrate_`.

    The integer network holds sums and concatenations on grids of their own. Models built with these modules see those
    grids while they train; where the result goes straight into a layer, that layer's act_quantizer is the grid, and
    this module leaves its result alone. A model without these modules has the same grids in its integer network, but
    not in its float forward.

    Attributes:
        output_quantizer: None before `prepare_`; without effect until `calibrate_(..., example=...)` sets its scale.
        tensor_name: Name of the result among the tensors of the integer network, once `calibrate_` knows it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output_quantizer: Quantizer | None = None
        self.tensor_name: str | None = None
        self.bypassed = False

    def _quantized(self, y: Tensor) -> Tensor:
        quantizer = self.output_quantizer
        if quantizer is None or self.bypassed or not quantizer.is_calibrated:
            return y
        return quantizer(y)


class Add(JoinedTensors):
    """a + b as a module: its result has a quantizer of its own in a prepared model."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Adds two tensors of one shape."""
        return self._quantized(a + b)


class Cat(JoinedTensors):
    """Concatenation along dimension 1 as a module: its result has a quantizer of its own in a prepared model."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Concatenates [N, C_i, ...] along the channels."""
        return self._quantized(torch.cat(tensors, 1))
