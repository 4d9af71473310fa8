"""The grid of an integer tensor, and reading it off a calibrated model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.network import LAYER_OPS, Graph, UnsupportedOperation, capture, check_eval_mode
from mixbit.quantizers import Quantizer, bypass, quantized_layers
from mixbit.quantizers.tensors import joined_owners


class Grid(NamedTuple):
    """value = (code - zero_point) * scale, codes from low to high."""

    scale: float
    zero_point: int
    low: int
    high: int


def layer_grid(quantizer: Quantizer) -> Grid:
    """The grid of a per-tensor quantizer."""
    low, high = quantizer.quant_range()
    with torch.no_grad():
        scale = float(quantizer.effective_scale())
        return Grid(scale, int(torch.round(quantizer.zero_point)), low, high)


class WeightGrid(NamedTuple):
    """The grid that the codes of all weights of a layer are on: the finest that any of them has.

    Attributes:
        parts: Its steps in one of the base grid: 2^e of the largest number e of extra bits.
        own: Its steps in one of each weight's own grid, on the CPU.
        low: Lowest code; of the widest channel, where channels have bits of their own.
        high: Highest code, likewise.
        ends: Lowest and highest code in steps of the own grid, float32: [1], [output channels] where these have bits of
            their own, or of the weight's shape where weights have extra levels.
    """

    parts: int
    own: Tensor
    low: int
    high: int
    ends: tuple[Tensor, Tensor]


def weight_grid(quantizer: Quantizer) -> WeightGrid:
    """Of a layer's weight, whose weights may have extra levels or whose channels bits of their own."""
    low, high = quantizer.quant_range()
    narrow = int(quantizer.narrow_range)
    if quantizer.extra_bits is None:
        half = torch.exp2(quantizer.bit_width.detach().cpu() - 1)
        return WeightGrid(1, torch.ones((), dtype=torch.int32), low, high, (narrow - half, half - 1))
    extra = quantizer.extra_bits.to("cpu", torch.int32)
    parts = 1 << int(extra.max())
    own, low, high = parts >> extra, (low - narrow) * parts + narrow, (high + 1) * parts - 1
    ends = (low - 1) // own + 1, (high + 1) // own - 1
    return WeightGrid(parts, own, low, high, (ends[0].float(), ends[1].float()))


def weight_codes(quantizer: Quantizer, grid: WeightGrid, weight: Tensor, scale: Tensor) -> Tensor:
    """Codes of a weight, float32 of whole numbers.

    Args:
        quantizer: Of the weight.
        grid: Its grid.
        weight: float32 on the CPU.
        scale: One step of the grid, float32 [output channels].
    """
    # In place: a large layer's weight is held no more than once beside itself.
    ratio = weight / (scale.reshape([-1] + [1] * (weight.dim() - 1)) * grid.own)
    codes = ratio.round_() if quantizer.rounding == "half_even" else ratio.add_(0.5).floor_()
    low, high = (end.reshape([-1] + [1] * (weight.dim() - 1)) if end.dim() == 1 else end for end in grid.ends)
    torch.maximum(codes, low, out=codes)
    return torch.minimum(codes, high, out=codes).mul_(grid.own)


def tensor_grids(model: nn.Module, graph: Graph) -> dict[str, Grid]:
    """Grids of the network's own tensors, by name: as recorded, or as an Add or Cat module has trained them since.

    Raises:
        MixbitError: None are recorded.
    """
    names = getattr(model, "mixbit_tensor_names", None)
    if names is None:
        raise MixbitError(
            "the tensors of the integer network have no ranges yet; call "
            "mixbit.calibrate_(model, batches, example=example)"
        )
    grids = {}
    scales, signs, widths = (getattr(model, f"mixbit_tensor_{k}") for k in ("scales", "signed", "bits"))
    for name, scale, signed, bits in zip(names, scales.tolist(), signs.tolist(), widths.tolist(), strict=True):
        b = int(bits)
        grids[name] = Grid(scale, 0, -(2 ** (b - 1)), 2 ** (b - 1) - 1) if signed else Grid(scale, 0, 0, 2**b - 1)
    for name, owner in joined_owners(graph, model).items():
        if name in grids and owner.output_quantizer is not None and owner.output_quantizer.is_calibrated:
            grids[name] = layer_grid(owner.output_quantizer)
    return grids


def captured(model: nn.Module, example: Any) -> tuple[Graph, dict[str, Any]]:
    """The float graph and the prepared layers of a model that is ready for integers.

    Raises:
        MixbitError: The model is not prepared or calibrated, under search or drops out values in training mode, a layer
            is float or has weights that are not finite, or the graph cannot be captured.
    """
    modules: dict[str, Any] = dict(quantized_layers(model))
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.searching:
            raise MixbitError(
                f"model is under search ({name!r}); call mixbit.prepare_(model, mixbit.search.extract(model)) first"
            )
    if not modules:
        raise MixbitError("model has no prepared layers; call mixbit.prepare_ and mixbit.calibrate_ first")
    try:
        with bypass(model):
            graph = capture(model, example)
    except UnsupportedOperation:
        check_eval_mode(model)  # dropout, for one, is an operation in training mode alone
        raise
    for node in graph.nodes:
        if node.op not in LAYER_OPS:
            continue
        module = modules.get(str(node.module))
        if module is None or module.act_quantizer is None or module.weight_quantizer is None:
            raise MixbitError(
                f"layer {node.module!r} is (partly) float in the recipe; an integer network needs bits for its weight "
                "and its input"
            )
        module.act_quantizer.check_calibrated()
        module.weight_quantizer.check_calibrated()
        for what, tensor in (("weight", module.weight), ("bias", module.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise MixbitError(f"layer {node.module!r}: its {what} has values that are not finite")
    return graph, modules
