"""The integer network in the form of PyTorch 2 export quantization: float operations between standard Q/DQ ops."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.export.codes import Constants
from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork
from mixbit.export.naming import making
from mixbit.network import LAYER_OPS, PASS_OPS, Node, run_node, run_pass


def register_standard_ops() -> None:
    """Makes torch register `torch.ops.quantized_decomposed`.

    Raises:
        MixbitError: This torch has them no more.
    """
    # A private module of torch; it has held these ops since 2.0, and programs that were saved with them name it.
    try:
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    except ImportError as error:
        raise MixbitError(
            f"torch {torch.__version__} does not register torch.ops.quantized_decomposed any more ({error}); expected "
            "a torch with torch.ao.quantization.fx._decomposed for the dialect 'pt2e'"
        ) from error


def stored_type(low: int, high: int) -> torch.dtype:
    """The smallest type of the standard ops that holds codes from low to high."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype
    return torch.int32


class StandardNetwork(nn.Module):
    """Every value as float on its grid; a layer multiplies dequantized operands.

    Args:
        network: What to compute.
    """

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        register_standard_ops()
        self.network = network
        self.layers = Constants()
        graph = network.graph
        # An activation that alone reads a value is fused: the value before it is not quantized.
        self._fused = {
            node.name
            for node in graph.nodes
            if node.name not in graph.outputs
            and node.op in (*LAYER_OPS, "add", "avg_pool2d")
            and [n.op for n in graph.consumers(node.name)] in (["relu"], ["relu6"])
        }
        for node in graph.nodes:
            if node.op in LAYER_OPS:
                layer = network.layers[node.name]
                self.layers.hold(
                    node,
                    {
                        "weight": layer.weight,
                        "scale": layer.weight_scale,
                        "zero_point": torch.zeros(len(layer.weight), dtype=torch.int64),
                        # The bias as the integer network has it: a whole number of steps of the accumulator.
                        "bias": layer.bias.float() * layer.product,
                    },
                )
        self.eval()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A single output by itself, several as a tuple."""
        graph = self.network.graph
        held: dict[str, Tensor] = {}
        codes: dict[str, Tensor] = {}
        for node in graph.nodes:
            real = self._run(node, x, held, codes)
            if node.name not in self._fused:
                with making(node.name):
                    codes[node.name] = quantized(real, self.network.grids[node.name])
                real = dequantized(codes[node.name], self.network.grids[node.name])
            held[node.name] = real
        outputs = [held[name] for name in graph.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _read(self, name: str, held: dict[str, Tensor], codes: dict[str, Tensor], grid: Grid) -> Tensor:
        """A value on the grid that the reader wants."""
        old = self.network.grids[name]
        if old == grid:
            return held[name]
        # The codes move exactly, by one product and one rounding: one that is off would be more behind the layer.
        ratio = float(torch.tensor(old.scale) / torch.tensor(grid.scale))
        steps = dequantized(codes[name], old._replace(scale=ratio))
        return dequantized(quantized(steps, grid._replace(scale=1.0)), grid)

    def _run(self, node: Node, x: Tensor, held: dict[str, Tensor], codes: dict[str, Tensor]) -> Tensor:
        """A value before it is quantized."""
        if node.op == "input":
            return x if x.dtype == torch.float32 else x.float()
        if node.op in PASS_OPS:
            return run_pass(node, self._read(node.inputs[0], held, codes, self.network.grids[node.name]), 0.0)
        if node.op in LAYER_OPS:
            layer = self.network.layers[node.name]
            return self._layer(node, self._read(node.inputs[0], held, codes, layer.act))
        return run_node(node, [held[name] for name in node.inputs], {})

    def _layer(self, node: Node, x: Tensor) -> Tensor:
        layer = self.network.layers[node.name]
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            *(self.layers.of(node, name) for name in ("weight", "scale", "zero_point")),
            0,
            *layer.weight_range,
            layer.weight.dtype,
        )
        bias = self.layers.of(node, "bias")
        if node.op == "linear":
            return F.linear(x, weight, bias)
        o = node.options
        return F.conv2d(x, weight, bias, o["stride"], o["padding"], o["dilation"], o["groups"])


def quantized(real: Tensor, grid: Grid) -> Tensor:
    """Codes on a grid, in the smallest type."""
    codes: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor(real, *_arguments(grid))
    return codes


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """What codes mean, float32."""
    real: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *_arguments(grid))
    return real


def _arguments(grid: Grid) -> tuple[float, int, int, int, torch.dtype]:
    return (grid.scale, grid.zero_point, grid.low, grid.high, stored_type(grid.low, grid.high))
