"""The integer network as data: grids, codes of weights and biases, multipliers, and how large accumulators can get."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.export.grid import Grid, captured, layer_grid, tensor_grids, weight_codes, weight_grid
from mixbit.network import LAYER_OPS, Graph, Node
from mixbit.quantizers.tensors import grid_source

#: fp32 represents every integer up to here: sums of products below it are exact in any order.
EXACT_FP32 = 2**24
INT32_MAX = 2**31 - 1
#: Largest bias, in steps of the accumulator, that a channel keeps which is dead but for it.
BIAS_MAX = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A convolution or linear layer: `q_y = clamp(rne(fp32(fp32(sum (q_x - z_x) q_w + bias) multiplier)) + z_y)`.

    Attributes:
        act: Grid on which the layer reads its input.
        weight: Codes of the weight in its shape; int8, above 8 bits int16.
        weight_range: Lowest and highest code of the weight's grid, of the widest channel where they differ.
        weight_scale: float32 [out].
        bias: Codes of the bias on the accumulator's grid, float64 [out] of whole numbers.
        product: Scale of the accumulator, fp32(s_x s_w), float32 [out].
        multiplier: fp32(product / s_y), float32 [out].
        products_reach: Largest possible sum of |q_w| max |q_x - z_x| over the outputs.
        weight_bits: Widths of the weight's output channels, ascending; one where all share it.
        reach: The same with the bias: no partial sum of an accumulator exceeds it, in any order; a whole number, or
            infinite where a bias cannot be held at all.
    """

    act: Grid
    weight: Tensor
    weight_range: tuple[int, int]
    weight_scale: Tensor
    bias: Tensor
    product: Tensor
    multiplier: Tensor
    products_reach: int
    reach: float
    weight_bits: tuple[int, ...] = ()

    @property
    def engine(self) -> str:
        """The type in which products of codes are summed exactly: "float32" below 2^24, else "float64"."""
        return "float32" if self.products_reach < EXACT_FP32 else "float64"


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """What a prepared and calibrated model computes on integers.

    Attributes:
        graph: The operations in order.
        grids: Grid of every value by name.
        layers: By name of the value that the layer makes.
    """

    graph: Graph
    grids: dict[str, Grid]
    layers: dict[str, IntegerLayer]

    def widest_stored(self) -> str | None:
        """A sentence for forms that hold one width a tensor, where some layer's channels have bits of their own."""
        modules = {node.name: str(node.module) for node in self.graph.nodes}
        mixed = {modules[name]: layer for name, layer in self.layers.items() if len(layer.weight_bits) > 1}
        if not mixed:
            return None
        name, layer = next(iter(mixed.items()))
        return (
            f"the channels of {len(mixed)} layer(s) have bits of their own (the first is {name!r} with "
            f"{list(layer.weight_bits)}); each layer is stored at its widest, with the same values"
        )


def lower(model: nn.Module, example: Any, *, check_overflow: bool = True) -> IntegerNetwork:
    """Reads the integer network off a prepared and calibrated model, on the CPU.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.
        check_overflow: Refuse layers whose accumulator or bias can exceed 32 bits.

    Raises:
        MixbitError: A step is missing, the network holds an operation that integer networks do not have, or an
            accumulator can overflow.
    """
    graph, modules = captured(model, example)
    own = tensor_grids(model, graph)
    grids: dict[str, Grid] = {}
    for node in graph.nodes:
        kind, name = grid_source(graph, modules, node.name)
        if kind == "layer":
            grids[node.name] = layer_grid(modules[name].act_quantizer)
        elif name in own:
            grids[node.name] = own[name]
        else:
            raise MixbitError(
                f"tensor {name!r} has no range; call mixbit.calibrate_(model, batches, example=example) again"
            )
    layers = {
        node.name: _layer(node, modules[str(node.module)], grids[node.name], check_overflow)
        for node in graph.nodes
        if node.op in LAYER_OPS
    }
    return IntegerNetwork(graph, grids, layers)


@torch.no_grad()
def _layer(node: Node, module: Any, grid: Grid, check_overflow: bool) -> IntegerLayer:
    act, quantizer = layer_grid(module.act_quantizer), module.weight_quantizer
    weight = module.weight.float().cpu()
    real_bias = torch.zeros(len(weight)) if module.bias is None else module.bias.float().cpu()
    steps = weight_grid(quantizer)
    scale = quantizer.effective_scale().float().cpu().expand(len(weight)) / steps.parts
    largest = max(act.high - act.zero_point, act.zero_point - act.low)

    def quantized() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes of weight and bias, the accumulator's scale, and the reach of the products."""
        codes = weight_codes(quantizer, steps, weight, scale)
        product = torch.tensor(act.scale) * scale
        bias = torch.where(real_bias == 0, 0.0, torch.round(real_bias / product))
        sums = [part.abs().double().flatten(1).sum(1) for part in codes.split(64)]
        return codes, bias, product, torch.cat(sums) * largest

    codes, bias, product, products = quantized()
    # Channels that are dead but for their bias, which would not fit: coarser steps for weights that hardly matter.
    dead = (bias.abs() > BIAS_MAX) & (256 * products < bias.abs().double())
    while bool((over := dead & (bias.abs() > BIAS_MAX)).any()):
        scale[over] *= 2
        codes, bias, product, products = quantized()
    reach = float((products + bias.double().abs()).max())
    if check_overflow and reach > INT32_MAX:
        raise MixbitError(f"layer {node.module!r}: its accumulator or bias can exceed 32 bits (up to {reach:.0f})")
    return IntegerLayer(
        act,
        codes.to(torch.int8 if steps.low >= -128 and steps.high <= 127 else torch.int16),
        (steps.low, steps.high),
        scale,
        bias.double(),
        product,
        product / torch.tensor(grid.scale),
        int(products.max()),
        reach,
        quantizer.widths,
    )
