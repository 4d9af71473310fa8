"""Training-free corrections of a network at low precision: equalized channels, corrected biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.network import LAYER_OPS, Graph, Node, call_model, capture, check_batches, check_eval_mode
from mixbit.quantizers.modules import QuantizedLayer
from mixbit.quantizers.prepare import bypass, quantized_layers


def equalize_(model: nn.Module, example: Any, *, rounds: int = 20) -> nn.Module:
    """Cross-layer equalization, in place: neighbouring layers get weights of similar range in every channel.

    Between a layer and the only layer that reads it, through nothing or a ReLU, channel i may be divided by s and
    multiplied back behind: the network computes the same. s = sqrt(r1 r2) / r2 with r1, r2 the largest weights of the
    channel on both sides (r1 with the bias) makes the ranges equal (Nagel et al., arXiv 1906.04721, eq. 11). One scale
    per tensor then fits all channels; with scales per channel the second layer gains. Pairs with anything else between
    them (ReLU6, adds, pools) stay; zero padding of the picture is no obstacle.

    Args:
        model: Float, in eval mode, batch normalization folded.
        example: An item of `batches`.
        rounds: Passes over all pairs at most; a layer that is in two pairs needs several.

    Returns:
        The model.

    Raises:
        MixbitError: The model is in training mode, prepared already, or cannot be captured.
    """
    check_eval_mode(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, QuantizedLayer):
            raise MixbitError(f"layer {name!r} is prepared already; call equalize_ before prepare_")
    if rounds < 1:
        raise MixbitError(f"rounds={rounds}: expected at least 1")
    pairs = [(modules[a], modules[b]) for a, b in equalizable_pairs(capture(model, example))]
    with torch.no_grad():
        for _ in range(rounds):
            change = max((_equalize(first, second) for first, second in pairs), default=0.0)
            if change < 1e-3:
                break
    return model


def equalizable_pairs(graph: Graph) -> list[tuple[str, str]]:
    """Modules of neighbouring layers that may trade scales, in order of execution."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in LAYER_OPS:
            calls[str(node.module)] = calls.get(str(node.module), 0) + 1
    pairs = []
    for node in graph.nodes:
        if node.op not in LAYER_OPS or calls[str(node.module)] > 1 or node.name in graph.outputs:
            continue
        readers = graph.consumers(node.name)
        while len(readers) == 1 and _keeps_channels(readers[0]) and readers[0].name not in graph.outputs:
            readers = graph.consumers(readers[0].name)
        # A linear layer behind a convolution reads flattened channels, which are left alone.
        if len(readers) == 1 and readers[0].op == node.op and calls[str(readers[0].module)] == 1:
            pairs.append((str(node.module), str(readers[0].module)))
    return pairs


def _keeps_channels(node: Node) -> bool:
    """Whether scaling a channel before the operation is scaling it behind: ReLU, and zeros around the picture."""
    return node.op in ("relu", "identity") or (node.op == "pad" and len(node.options["amounts"]) <= 4)


def _equalize(first: nn.Module, second: nn.Module) -> float:
    """Moves one pair; returns the largest relative change."""
    assert isinstance(first, (nn.Conv2d, nn.Linear)) and isinstance(second, (nn.Conv2d, nn.Linear))
    ranges = first.weight.abs().flatten(1).amax(1)
    if first.bias is not None:
        # A channel that is nearly constant (tiny weights, a bias) must not be blown up: its activation would be, too.
        ranges = torch.where(ranges > 0, torch.maximum(ranges, first.bias.abs()), ranges)
    groups = second.groups if isinstance(second, nn.Conv2d) else 1
    channels = ranges.numel()
    # The second weight seen as [groups, outputs of a group, inputs of a group, ...].
    own = second.weight.reshape(groups, second.weight.shape[0] // groups, channels // groups, -1)
    behind = own.abs().amax((1, 3)).reshape(channels)
    usable = (ranges > 0) & (behind > 0)
    scale = torch.where(usable, torch.sqrt(ranges / behind.clamp(min=1e-30)), 1.0)
    first.weight.div_(scale.reshape(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(scale)
    # By each output's inputs, whatever the strides of the weight (`own` may be a copy).
    inputs = scale.reshape(groups, 1, -1).expand(-1, own.shape[1], -1).reshape(*second.weight.shape[:2])
    second.weight.mul_(inputs.reshape(*inputs.shape, *[1] * (second.weight.dim() - 2)))
    return float((scale - 1).abs().max()) if channels else 0.0


def correct_bias_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Takes the mean error that quantization adds to each output channel off the biases, in place.

    Rounding shifts the mean of a layer's output, most of all where few values make a sum, as in depthwise layers
    (Nagel et al., arXiv 1906.04721, section 4.2). One float pass over the data: every layer also runs quantized on the
    very input that it gets, and the mean difference per output channel is subtracted from its bias. Layers without a
    bias are left alone: fold batch normalization first, which gives them one.

    Args:
        model: Prepared and calibrated, in eval mode.
        batches: Re-iterable batches (see the data conventions).

    Returns:
        The model.

    Raises:
        MixbitError: The model is not prepared, has no biases, is in training mode, or the data is empty or one-shot.
    """
    check_batches(batches)
    check_eval_mode(model)
    modules = {n: m for n, m in quantized_layers(model).items() if m.bias is not None}
    if not quantized_layers(model):
        raise MixbitError("model has no prepared layers; call mixbit.prepare_ and mixbit.calibrate_ first")
    if not modules:
        raise MixbitError("no prepared layer has a bias; fold batch normalization first (mixbit.fold_batchnorm_)")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def compare(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            module.bypassed = False
            try:
                shifted = type(module).forward(module, *args)
            finally:
                module.bypassed = True
            # Channels are dimension 1 of a convolution's output, the last of a linear layer's.
            axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1
            error = (shifted.double() - output.double()).movedim(axis, 0).flatten(1)
            sums[name] = sums.get(name, torch.zeros(())) + error.sum(1)
            counts[name] = counts.get(name, 0) + error.shape[1]

        return compare

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        with torch.no_grad(), bypass(model):
            for item in batches:
                call_model(model, item)
    finally:
        for handle in handles:
            handle.remove()
    if not counts:
        raise MixbitError("batches is empty; expected at least one batch of images")
    with torch.no_grad():
        for name, count in counts.items():
            modules[name].bias.sub_((sums[name] / max(count, 1)).to(modules[name].bias.dtype))
    return model
