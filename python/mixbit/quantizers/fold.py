"""Folds batch normalization into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.network import batchnorm_pairs
from mixbit.quantizers.modules import QuantizedLayer
from mixbit.quantizers.quantizer import TQT


def fold_batchnorm_(model: nn.Module, example: Any) -> nn.Module:
    """Folds each batch normalization into the convolution or linear layer that alone feeds it, in place.

    weight := weight * g, bias := (bias - mean) * g + beta with g = gamma / sqrt(var + eps), in double; the
    normalization becomes an Identity. A prepared layer's weight scales are multiplied by |g|, so that its codes stay:
    but for ties of the rounding exactly with a narrow range; else the lowest code of a channel whose g is negative is
    clipped. Pairs are found by following the tensors of one forward pass, so functional
    residuals and shared modules are safe: what is called twice, or read by something else too, stays.

    Args:
        model: Float, or prepared and calibrated, in eval mode.
        example: An item of `batches`.

    Returns:
        The model.

    Raises:
        MixbitError: The model is in training mode, or a layer to fold into is prepared with weight scales that cannot
            take up a factor for each channel. The model is then unchanged.
    """
    modules = dict(model.named_modules())
    pairs = batchnorm_pairs(model, example)
    for layer_name, _ in pairs:
        _check_scales(layer_name, modules[layer_name])
    every = list(model.named_modules(remove_duplicate=False))
    for layer_name, norm_name in pairs:
        layer, norm = modules[layer_name], modules[norm_name]
        _fold(layer, norm)
        for path, module in every:
            if module is norm:
                parent_name, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent_name), child, nn.Identity())
    return model


def _check_scales(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, QuantizedLayer) or layer.weight_quantizer is None:
        return
    quantizer = layer.weight_quantizer
    reason = (
        "one weight scale for all its channels"
        if quantizer.channels != layer.weight.shape[0]
        else "scales that are powers of two"
        if isinstance(quantizer, TQT) and quantizer.power_of_two
        else None
    )
    if reason is not None:
        raise MixbitError(f"layer {name!r} is prepared already, with {reason}; call fold_batchnorm_ before prepare_")


@torch.no_grad()
def _fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> None:
    def wide(tensor: torch.Tensor | None, default: float) -> torch.Tensor:
        like = norm.running_mean
        assert like is not None
        return torch.full_like(like, default, dtype=torch.float64) if tensor is None else tensor.double()

    gain = wide(norm.weight, 1.0) / torch.sqrt(wide(norm.running_var, 1.0) + norm.eps)
    shift = wide(norm.bias, 0.0)
    mean = wide(norm.running_mean, 0.0)
    bias = wide(layer.bias, 0.0)
    weight = layer.weight.double() * gain.reshape([-1] + [1] * (layer.weight.dim() - 1))
    layer.weight.copy_(weight)
    folded = ((bias - mean) * gain + shift).to(layer.weight.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(folded)
    if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
        # A channel whose gain is 0 has no weights left, and any scale does.
        factor = torch.where(gain == 0, 1.0, gain.abs()).float()
        layer.weight_quantizer.set_(layer.weight_quantizer.effective_scale() * factor)
