"""Layers and joins with quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.quantizers.quantizer import Quantizer
from mixbit.recipe import LayerPrecision


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

    def _multiplied(self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """multiply(x, weight), each fake-quantized where a quantizer is on.

        Autograd keeps both operands for the backward. Where a quantizer can repeat what it did, its result is not kept
        but made again: the memory of a training step stays what it is in float.
        """
        again: list[tuple[Tensor, Callable[[], Tensor]]] = []
        operands = []
        for value, quantizer in ((x, self.act_quantizer), (self.weight, self.weight_quantizer)):
            quantized = value if quantizer is None else quantizer(value)
            repeat = None if quantizer is None else quantizer.repeat(value)
            if repeat is not None and quantized is not value:
                # What autocast would keep is the lower copy, so that is what is made, and made again.
                quantized, repeat = _lowered(quantized, repeat)
                again.append((quantized, repeat))
            operands.append(quantized)
        if not again or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return multiply(*operands)

        def pack(tensor: Tensor) -> Any:
            for quantized, repeat in again:
                same = tensor.data_ptr() == quantized.data_ptr() and tensor.dtype == quantized.dtype
                if same and tensor.shape == quantized.shape and tensor.stride() == quantized.stride():
                    return repeat
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept() if callable(kept) else kept):
            y = multiply(*operands)
        again.clear()  # the graph keeps `pack`, which must not keep the operands
        return y

    def _both(self) -> tuple[Quantizer, Quantizer] | None:
        """The two quantizers if both are on and the fused ops know their gradients."""
        act, weight = self.act_quantizer, self.weight_quantizer
        if act is None or weight is None or not act.enabled or not weight.enabled or not (act.fused and weight.fused):
            return None
        if weight.extra_bits is not None:
            return None
        act.check_calibrated()
        weight.check_calibrated()
        return act, weight


def _lowered(quantized: Tensor, repeat: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """Both in the type that autocast multiplies in, where it is on."""
    kind = quantized.device.type
    if not torch.is_autocast_enabled(kind):
        return quantized, repeat
    dtype = torch.get_autocast_dtype(kind)
    return quantized.to(dtype), lambda: repeat().to(dtype)


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
        """Convolves the fake-quantized input with the fake-quantized weight; [N, C, H, W] -> [N, O, H', W'].

        An input without a batch, [C, H, W], is one of one image.

        Raises:
            MixbitError: x has another rank or number of channels.
        """
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise MixbitError(f"x has shape {tuple(x.shape)}; expected [N, {self.in_channels}, H, W] of a convolution")
        if self.bypassed:
            return nn.Conv2d.forward(self, x)
        x, padding = pad_input(self, x)
        both = self._both()
        if both is None:
            return self._multiplied(
                x, lambda a, w: F.conv2d(a, w, self.bias, self.stride, padding, self.dilation, self.groups)
            )
        act_quantizer, weight_quantizer = both
        scale, zero_point = act_quantizer.grid(x)
        return ops.quantized_conv2d(
            x,
            self.weight,
            self.bias,
            scale,
            zero_point,
            act_quantizer.bit_width,
            weight_quantizer.grid(self.weight)[0],
            weight_quantizer.bit_width,
            signed_x=act_quantizer.signed,
            w_narrow_range=weight_quantizer.narrow_range,
            rounding=weight_quantizer.rounding,
            x_gradient=act_quantizer.gradient,
            w_gradient=weight_quantizer.gradient,
            stride=self.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
        )


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the fake-quantized input with the fake-quantized weight; [..., I] -> [..., O].

        An input [I] is a batch of one.

        Raises:
            MixbitError: x has no dimension, or the last one another size.
        """
        if x.dim() == 1:
            return self.forward(x[None])[0]
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise MixbitError(f"x has shape {tuple(x.shape)}; expected [..., {self.in_features}] of a linear layer")
        if self.bypassed:
            return nn.Linear.forward(self, x)
        both = self._both()
        if both is None:
            return self._multiplied(x, lambda a, w: F.linear(a, w, self.bias))
        act_quantizer, weight_quantizer = both
        scale, zero_point = act_quantizer.grid(x)
        return ops.quantized_linear(
            x,
            self.weight,
            self.bias,
            scale,
            zero_point,
            act_quantizer.bit_width,
            weight_quantizer.grid(self.weight)[0],
            weight_quantizer.bit_width,
            signed_x=act_quantizer.signed,
            w_narrow_range=weight_quantizer.narrow_range,
            rounding=weight_quantizer.rounding,
            x_gradient=act_quantizer.gradient,
            w_gradient=weight_quantizer.gradient,
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
