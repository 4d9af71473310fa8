"""Fisher sensitivity: what the loss says about each layer's widths, with labels and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.analysis.sensitivity import checked_widths
from mixbit.errors import MixbitError, check_choice
from mixbit.network import call_model, check_batches, check_eval_mode, check_truths, flatten_outputs, layers
from mixbit.quantizers import METHODS, first_images, fold_batchnorm_, input_statistics, weight_scales
from mixbit.recipe import GRANULARITIES
from mixbit.tables import SensitivityTable


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    precisions: Iterable[int] = (2, 3, 4, 5, 6, 7, 8),
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    ranges: str = "mse",
    granularity: str = "per_channel",
    narrow_range: bool = True,
) -> SensitivityTable:
    """How much quantizing each layer raises the loss, from squared gradients: a baseline that uses labels.

    The second-order rise is about 1/2 sum F d^2, with d the quantization error of every weight and input and F the
    diagonal of the Fisher matrix, the mean squared gradient over images (as in FIT, arXiv 2210.08502, for weights and
    activations). The rises of the two operands add. An entry of the table is -10 log10 of the rise in nats, so that
    `assign` adds and compares it like noise ratios; its decibels are not an SQNR of anything, and `target_sqnr_db` has
    no meaning for it: give a budget. Works on a copy with folded batch normalization, one image at a time.

    Args:
        model: Float, in eval mode.
        batches: Re-iterable (input, labels).
        precisions: Widths of both operands.
        loss: (output, item) -> scalar for one image; None is a detector's own `loss(outputs, boxes)`, else the cross
            entropy of logits and labels.
        ranges: How scales are chosen, as in `calibrate_`.
        granularity: "per_channel" or "per_tensor" weight scales.
        narrow_range: Symmetric weight grids.

    Returns:
        A SensitivityTable [L, A, W]; `act_sqnr_db` and `weight_sqnr_db` hold each operand's own share.

    Raises:
        MixbitError: The model is in training mode, data is empty, one-shot or has no labels, a layer is never reached,
            or an argument is out of range.
    """
    check_choice("ranges", ranges, METHODS)
    check_choice("granularity", granularity, GRANULARITIES)
    widths = checked_widths("precisions", precisions)
    check_eval_mode(model)
    check_batches(batches)
    first = next(iter(batches), None)
    if first is None:
        raise MixbitError("batches is empty; expected at least one batch of images")
    model = fold_batchnorm_(copy.deepcopy(model), first_images(first)).requires_grad_(False)
    loss = _default_loss(model) if loss is None else loss
    found = layers(model, first_images(first))
    modules: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in found}
    scales, signed = _ranges(model, batches, modules, widths, ranges)
    squares = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    acts = {name: torch.zeros(len(widths), dtype=torch.float64) for name in modules}
    images = 0

    def watch(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()

            def weigh(gradient: Tensor) -> None:
                for k, bits in enumerate(widths):
                    q = ops.fake_quantize(x.detach(), scales[name][k : k + 1], 0, bits, signed=signed[name])
                    acts[name][k] += (gradient * (q - x.detach())).double().square().sum()

            x.register_hook(weigh)
            return (x, *args[1:])

        return before

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    for module in modules.values():
        module.weight.requires_grad_(True)
    try:
        for item in batches:
            for image in _single(item):
                output = call_model(model, image)
                value = loss(output, image)
                value.backward()  # not autograd.grad of the weights, which would leave out the network's input
                for name, module in modules.items():
                    if module.weight.grad is not None:
                        squares[name] += module.weight.grad.square()
                        module.weight.grad = None
                images += 1
    finally:
        for handle in handles:
            handle.remove()
    act_rise = np.array([acts[layer.name].numpy() / (2 * images) for layer in found])
    weight_rise = np.zeros((len(found), len(widths)))
    for i, layer in enumerate(found):
        weight = modules[layer.name].weight.detach()
        per_channel = granularity == "per_channel"
        grids = weight_scales(weight, list(widths), per_channel=per_channel, narrow_range=narrow_range, method=ranges)
        for k, bits in enumerate(widths):
            axis = 0 if grids.shape[1] > 1 else None
            q = ops.fake_quantize(weight, grids[k], 0, bits, narrow_range=narrow_range, axis=axis)
            weight_rise[i, k] = float((squares[layer.name] * (q - weight).square()).double().sum()) / (2 * images)
    table = SensitivityTable.from_arrays(
        found.names,
        _decibels(act_rise[:, :, None] + weight_rise[:, None, :]),
        widths,
        widths,
        input_group=[layer.input_group for layer in found],
    )
    table.point = "fisher"
    table.options = {"ranges": ranges, "granularity": granularity, "narrow_range": narrow_range, "images": images}
    table.act_sqnr_db, table.weight_sqnr_db = _decibels(act_rise), _decibels(weight_rise)
    return table


def _decibels(rise: Any) -> Any:
    """-10 log10, +inf where nothing rises; non-decreasing along the widths, as noise is."""
    with np.errstate(divide="ignore"):
        found = -10 * np.log10(rise)
    for axis in range(1, found.ndim):
        found = np.maximum.accumulate(found, axis)
    return found


def _ranges(
    model: nn.Module, batches: Iterable[Any], modules: dict[str, Any], widths: tuple[int, ...], method: str
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Scales [K] of each layer's input and the sign of its grid."""
    seen = input_statistics(model, batches)
    for name in modules:
        if name not in seen:
            raise MixbitError(f"layer {name!r} was never reached by the data")
    seen = {name: seen[name] for name in modules}
    signed = {name: s.signed for name, s in seen.items()}
    scales = {
        name: s.scales(list(widths), signed=s.signed, narrow_range=False, method=method) for name, s in seen.items()
    }
    return scales, signed


def _single(item: Any) -> list[tuple[Tensor, Any]]:
    """The images of a batch, one by one, each with its labels."""
    if not (isinstance(item, (tuple, list)) and len(item) > 1 and isinstance(item[0], Tensor)):
        raise MixbitError("fisher needs items (input, labels) with a Tensor as input")
    x, labels = item[0], item[1]
    if len(labels) != len(x):
        raise MixbitError(f"a batch has {len(x)} images and {len(labels)} labels; expected as many")
    return [(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))]


def _default_loss(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    own = getattr(model, "loss", None)
    if callable(getattr(model, "decode", None)) and callable(own) and not isinstance(own, nn.Module):
        detector: Callable[[Any, Any], Tensor] = own
        classes = getattr(model, "label_classes", None)
        return lambda output, image: detector(output, check_truths(image[1], 1, classes))
    return _cross_entropy


def _cross_entropy(output: Any, image: tuple[Tensor, Any]) -> Tensor:
    logits = flatten_outputs(output)[0][1]
    labels = image[1]
    if logits.dim() != 2 or not isinstance(labels, Tensor):
        raise MixbitError("the cross entropy needs logits [N, classes] and a Tensor of labels; give loss= for others")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise MixbitError(f"labels run from {low} to {high}; expected classes from 0 to {logits.shape[1] - 1}")
    return F.cross_entropy(logits, labels, reduction="sum")
