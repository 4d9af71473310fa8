"""Chooses the scales of a prepared model from its weights and a few batches of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError, check_choice
from mixbit.network import check_batches, check_eval_mode, input_of, layers
from mixbit.quantizers.prepare import bypass, check_groups, quantized_layers, tie_groups_
from mixbit.quantizers.quantizer import LSQPlus, Quantizer
from mixbit.quantizers.statistics import METHODS, TensorStatistics, input_statistics, weight_scales


def first_images(item: Any, count: int = 2) -> Any:
    """An item with only its first images, where its input is a tensor or a dict of tensors of one batch size."""
    value = input_of(item)
    if isinstance(value, Tensor) and value.dim() > 0:
        return value[:count]
    if isinstance(value, Mapping):
        tensors = all(isinstance(v, Tensor) and v.dim() > 0 for v in value.values())
        if tensors and len({v.shape[0] for v in value.values()}) == 1:
            return {k: v[:count] for k, v in value.items()}
    return item


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "mse",
    example: Any = None,
    *,
    percentile: float = 99.99,
    statistics: Mapping[str, TensorStatistics] | None = None,
) -> nn.Module:
    """Sets the scales of a prepared model, in place: weights from themselves, activations from float passes over data.

    One pass over `batches`; memory is bounded by the largest layer. Layers that read the same tensor are tied to one
    act_quantizer. Where the recipe leaves `signed_act` open, any negative value seen makes the grid signed. All-zero
    tensors and channels get the scale 1.

    Args:
        model: Prepared, in eval mode.
        batches: Re-iterable batches (see the data conventions).
        method: "mse" (least squared error among 81 candidates), "maxabs", "qformat" (best power of two), or
            "percentile" (the activations' largest value but for outliers; weights by least squared error).
        example: An item; if given, the tensors of the integer network that no layer reads (adds, concatenations, pools,
            outputs) are calibrated too, which integer evaluation and export need.
        percentile: Share of the activations' magnitudes inside the range, in percent, for method "percentile".
        statistics: What `mixbit.quantizers.input_statistics` found for this network on this data: saves the pass where
            many recipes are tried.

    Returns:
        The model.

    Raises:
        MixbitError: The model is not prepared or in training mode, the data is empty, one-shot or not finite, a weight
            is not finite, or a layer is never reached.
    """
    check_choice("method", method, METHODS)
    check_batches(batches)
    check_eval_mode(model)
    modules = quantized_layers(model)
    if not modules:
        raise MixbitError("model has no prepared layers; call mixbit.prepare_(model, recipe) first")
    first = next(iter(batches), None)
    if first is None:
        raise MixbitError("batches is empty; expected at least one batch of images")
    with bypass(model):
        found = layers(model, first_images(first))
    check_groups(found, {name: module.precision for name, module in modules.items()})
    tie_groups_(model, found)
    for name, module in modules.items():
        if module.weight_quantizer is not None:
            _calibrate_weight(name, module.weight_quantizer, module.weight, method)
    _calibrate_acts(model, input_statistics(model, batches) if statistics is None else statistics, method, percentile)
    if example is not None:
        from mixbit.quantizers.tensors import record_tensors_

        record_tensors_(model, batches, example, "maxabs" if method == "percentile" else method)
    return model


def _calibrate_weight(name: str, quantizer: Quantizer, weight: Tensor, method: str) -> None:
    quantizer.check_bit_width()
    per_channel = quantizer.axis == 0

    def scales(bits: int) -> Tensor:
        if bits == 1:
            # One two's complement bit has the levels -scale and 0: nothing but the largest value bounds it.
            return weight_scales(weight, [2], per_channel=per_channel, narrow_range=True, method="maxabs")
        narrow = quantizer.narrow_range
        return weight_scales(weight, [bits], per_channel=per_channel, narrow_range=narrow, method=method)

    try:
        found = torch.cat([scales(bits) for bits in quantizer.widths])
        if quantizer.by_channel and not quantizer.searching:
            # Each channel at its own width.
            widths = torch.tensor(quantizer.widths, device=found.device)
            found = found.gather(0, torch.searchsorted(widths, quantizer.bit_width.to(widths.dtype))[None])
        quantizer.set_(found.squeeze(0))
    except MixbitError as error:
        raise MixbitError(f"layer {name!r}: {error}") from error


def _calibrate_acts(
    model: nn.Module, statistics: Mapping[str, TensorStatistics], method: str, percentile: float
) -> None:
    # Layers that share a quantizer are calibrated on what all of them see.
    names: dict[int, list[str]] = {}
    modules = {n: m for n, m in quantized_layers(model).items() if m.act_quantizer is not None}
    for name, module in modules.items():
        names.setdefault(id(module.act_quantizer), []).append(name)
    for sharing in names.values():
        quantizer = modules[sharing[0]].act_quantizer
        assert quantizer is not None
        seen = TensorStatistics()
        for name in sharing:
            if name in statistics:
                seen.merge(statistics[name])
        if seen.count == 0:
            raise MixbitError(f"layer {sharing[0]!r} was never reached by the data; leave it float in the recipe")
        asked = [sign for n in sharing if (sign := modules[n].precision.signed_act) is not None]
        signed = asked[-1] if asked else seen.signed
        bits = quantizer.check_bit_width()
        if isinstance(quantizer, LSQPlus):
            scale, zero_point = seen.offset_grid(bits, method=method)
            quantizer.set_(scale, signed=False, zero_point=zero_point)
            continue
        found = []
        for width in quantizer.widths:
            if signed and width == 1:
                found.append(seen.scales([2], signed=True, narrow_range=True, method="maxabs"))
            else:
                found.append(
                    seen.scales([width], signed=signed, narrow_range=False, method=method, percentile=percentile)
                )
        quantizer.set_(torch.cat(found), signed=signed)
