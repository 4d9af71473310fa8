"""Weights rounded for the layer's output instead of each for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.network import call_model, check_batches, check_eval_mode
from mixbit.quantizers.modules import QuantizedLayer, pad_input
from mixbit.quantizers.prepare import bypass, quantized_layers

#: Second moments that are gathered in one pass over the data, in bytes; larger networks take several passes.
MEMORY = 2**30


def optimize_rounding_(
    model: nn.Module, batches: Iterable[Any], *, damping: float = 0.01, max_bits: int = 4, sweeps: int = 20
) -> nn.Module:
    """Rounds the weights of low-bit layers up or down so that the layers' outputs change least, in place.

    At four bits and less, the nearest level is a poor choice for many weights: their errors add up in the output. This
    takes, for each layer, the second moments of its quantized input (from float passes over the data) and descends the
    mean squared error of the output over all choices of the two neighbouring levels (`ops.optimize_rounding`:
    AdaRound's objective, arXiv 2004.10568, eq. 13, by greedy moves as in QuIP, arXiv 2307.13304). The weights become
    levels of their grids, so that everything that quantizes them afterwards finds these levels. Deterministic; labels
    are not used.

    Args:
        model: Prepared and calibrated, in eval mode.
        batches: Re-iterable batches (see the data conventions); some hundred images do.
        damping: As in `ops.optimize_rounding`; larger values trust the data less.
        max_bits: Layers with weights of more bits are left alone.
        sweeps: Passes over the weights of a layer at most.

    Returns:
        The model.

    Raises:
        MixbitError: The model is not prepared or in training mode, a layer is not calibrated, never reached or has
            extra levels, or the data is empty, one-shot or not finite.
    """
    check_batches(batches)
    check_eval_mode(model)
    modules = quantized_layers(model)
    if not modules:
        raise MixbitError("model has no prepared layers; call mixbit.prepare_ and mixbit.calibrate_ first")
    wanted: dict[str, Any] = {}
    for name, module in modules.items():
        quantizer = module.weight_quantizer
        if quantizer is not None and quantizer.enabled and quantizer.check_bit_width() <= max_bits:
            quantizer.check_calibrated()
            if quantizer.extra_bits is not None:
                raise MixbitError(f"layer {name!r} has extra levels; call optimize_rounding_ before they are given")
            wanted[name] = module
    rounded: dict[str, Tensor] = {}  # written at the end: every pass sees the float network
    for part in _parts(wanted):
        moments = _second_moments(model, {name: wanted[name] for name in part}, batches)
        for name in part:
            module = wanted[name]
            quantizer = module.weight_quantizer
            rounded[name] = ops.optimize_rounding(
                module.weight.detach().flatten(1).float(),
                moments[name],
                quantizer.grid(module.weight)[0].detach(),
                quantizer.bit_width,
                narrow_range=quantizer.narrow_range,
                damping=damping,
                sweeps=sweeps,
            )
    with torch.no_grad():
        for name, levels in rounded.items():
            wanted[name].weight.copy_(levels.reshape(wanted[name].weight.shape))
    return model


def _parts(modules: dict[str, Any]) -> Iterator[list[str]]:
    """Names of layers whose second moments fit into memory together."""
    part: list[str] = []
    used = 0
    for name, module in modules.items():
        size = 4 * _groups(module) * module.weight[0].numel() ** 2
        if part and used + size > MEMORY:
            yield part
            part, used = [], 0
        part.append(name)
        used += size
    if part:
        yield part


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def _second_moments(model: nn.Module, modules: dict[str, Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean of x x' over everything that the rows of each group of each layer see: float32 [groups, K, K]."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def watch(name: str) -> Any:
        def add(module: QuantizedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            quantizer = module.act_quantizer
            if quantizer is not None and quantizer.enabled:
                x = quantizer(x)
            for columns in _columns(module, x.float()):
                own = columns @ columns.mT
                sums[name] = sums[name] + own if name in sums else own
                counts[name] += columns.shape[-1]

        return add

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with torch.no_grad(), bypass(model):
            for item in batches:
                call_model(model, item)
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        if counts[name] == 0:
            raise MixbitError(f"layer {name!r} was never reached by the data; leave it float in the recipe")
        sums[name] /= counts[name]
    return sums


def _columns(module: Any, x: Tensor) -> Iterator[Tensor]:
    """The inputs of a layer's rows, image by image: [groups, K, positions]."""
    if not isinstance(module, nn.Conv2d):
        yield x.reshape(-1, x.shape[-1]).t()[None]
        return
    x, padding = pad_input(module, x)
    for image in x:
        patches = F.unfold(image[None], module.kernel_size, module.dilation, padding, module.stride)
        yield patches.reshape(module.groups, -1, patches.shape[-1])
