"""The integer network in PyTorch: codes held in float, convolved by the float engine where that is exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.export.grid import Grid, captured, layer_grid, tensor_grids
from mixbit.network import LAYER_OPS, PASS_OPS, Node, input_of, run_pass
from mixbit.quantizers.tensors import grid_source

#: fp32 represents every integer up to here: sums of products below it are exact in any order.
EXACT_FP32 = 2**24
INT32_MAX = 2**31 - 1


class IntegerLayer(NamedTuple):
    """What a layer of the integer network computes with.

    Attributes:
        act: Grid of the codes that enter.
        codes: Weight codes, int64 in the shape of the weight.
        scale: Of the weight codes, float32 [1] or [output channels].
        bias: Bias codes on the scale fp32(act scale * weight scale), int64 [output channels].
        multiplier: From accumulator to output codes, float32 [output channels].
    """

    act: Grid
    codes: Tensor
    scale: Tensor
    bias: Tensor
    multiplier: Tensor


class IntegerSimulation:
    """Runs the integer network of a prepared and calibrated model in PyTorch.

    Attributes:
        grids: Grid of every value by name.
        engine: For each layer "float32" or "float64": the type in which its codes are multiplied exactly.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        graph, modules = captured(model, example)
        self.graph = graph
        own = tensor_grids(model, graph)
        self.grids: dict[str, Grid] = {}
        self.engine: dict[str, str] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        for node in graph.nodes:
            kind, name = grid_source(graph, modules, node.name)
            if kind == "layer":
                self.grids[node.name] = layer_grid(modules[name].act_quantizer)
            elif name in own:
                self.grids[node.name] = own[name]
            else:
                raise MixbitError(
                    f"tensor {name!r} has no range; call mixbit.calibrate_(model, batches, example=example) again"
                )
        for node in graph.nodes:
            if node.op in LAYER_OPS:
                self._layers[node.name] = self._lowered(node, modules[str(node.module)])

    @torch.no_grad()
    def _lowered(self, node: Node, module: Any) -> dict[str, Any]:
        """Codes, multipliers and the engine of a layer."""
        act, weight = layer_grid(module.act_quantizer), module.weight_quantizer
        scale = weight.effective_scale()
        columns = [-1] + [1] * (module.weight.dim() - 1)
        ratio = module.weight.float() / scale.reshape(columns)
        low, high = weight.quant_range()
        codes = (torch.round(ratio) if weight.rounding == "half_even" else torch.floor(ratio + 0.5)).clamp(low, high)
        product = (torch.tensor(act.scale) * scale).expand(module.weight.shape[0])
        bias = torch.zeros(len(codes)) if module.bias is None else torch.round(module.bias.float() / product)
        largest = max(act.high - act.zero_point, act.zero_point - act.low)
        reach = codes.abs().double().flatten(1).sum(1) * largest
        if float((reach + bias.double().abs()).max()) > INT32_MAX:
            raise MixbitError(f"layer {node.module!r}: its accumulator or bias can exceed 32 bits")
        exact = float(reach.max()) < EXACT_FP32
        self.engine[str(node.module)] = "float32" if exact else "float64"
        return {
            "act": act,
            "codes": codes if exact else codes.double(),
            "bias": bias.double(),
            "multiplier": product / self.grids[node.name].scale,
            "scale": scale,
        }

    def layer(self, name: str) -> IntegerLayer:
        """What the layer that makes a value computes with; exporters write it down."""
        own = self._layers[name]
        return IntegerLayer(own["act"], own["codes"].long(), own["scale"], own["bias"].long(), own["multiplier"])

    @torch.no_grad()
    def tensors(self, x: Any) -> dict[str, Tensor]:
        """Codes of every value for an input, as float32 tensors of whole numbers."""
        values: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            values[node.name] = self._run(node, input_of(x), values)
        return values

    @torch.no_grad()
    def __call__(self, x: Any) -> list[Tensor]:
        """The network's outputs, dequantized."""
        last = {name: i for i, node in enumerate(self.graph.nodes) for name in node.inputs}
        values: dict[str, Tensor] = {}
        for i, node in enumerate(self.graph.nodes):
            values[node.name] = self._run(node, input_of(x), values)
            for name in node.inputs:
                if last[name] == i and name not in self.graph.outputs:
                    values.pop(name, None)
        return [self._reals(name, values[name]) for name in self.graph.outputs]

    def _reals(self, name: str, codes: Tensor) -> Tensor:
        grid = self.grids[name]
        return (codes - grid.zero_point) * torch.tensor(grid.scale)

    @staticmethod
    def _to_grid(values: Tensor, multiplier: Tensor, grid: Grid) -> Tensor:
        """Rounds whole numbers times fp32 multipliers to codes."""
        return (torch.round(values.float() * multiplier) + grid.zero_point).clamp(grid.low, grid.high)

    def _read(self, name: str, values: dict[str, Tensor], grid: Grid) -> Tensor:
        """Codes of a value on the grid that the reader wants."""
        old = self.grids[name]
        if old == grid:
            return values[name]
        return self._to_grid(values[name] - old.zero_point, torch.tensor(old.scale) / torch.tensor(grid.scale), grid)

    def _run(self, node: Node, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        grid = self.grids[node.name]
        if node.op == "input":
            codes = torch.round(x.float() / torch.tensor(grid.scale)) + grid.zero_point
            return codes.clamp(grid.low, grid.high)
        if node.op in LAYER_OPS:
            return self._layer(node, self._layers[node.name], values, grid)
        if node.op == "add":
            a, b = (self._reals(name, values[name]) for name in node.inputs)
            return (torch.round((a + b) / torch.tensor(grid.scale)) + grid.zero_point).clamp(grid.low, grid.high)
        if node.op == "cat":
            return torch.cat([self._read(name, values, grid) for name in node.inputs], 1)
        name = node.inputs[0]
        if node.op == "avg_pool2d":
            return self._average(node, values[name] - self.grids[name].zero_point, self.grids[name], grid)
        codes = self._read(name, values, grid)
        if node.op in PASS_OPS:
            return run_pass(node, codes, float(grid.zero_point))
        codes = codes.clamp(min=grid.zero_point)
        if node.op == "relu6":
            codes = codes.clamp(max=float(torch.round(torch.tensor(6.0) / torch.tensor(grid.scale))) + grid.zero_point)
        return codes

    def _layer(self, node: Node, layer: dict[str, Any], values: dict[str, Tensor], grid: Grid) -> Tensor:
        act, weight = layer["act"], layer["codes"]
        x = (self._read(node.inputs[0], values, act) - act.zero_point).to(weight.dtype)
        if node.op == "linear":
            total = F.linear(x, weight).double() + layer["bias"]
            return self._to_grid(total, layer["multiplier"], grid)
        o = node.options
        acc = F.conv2d(x, weight, None, o["stride"], o["padding"], o["dilation"], o["groups"])
        column = (-1, 1, 1)
        # The bias is added in double: the sum may pass 2^24, and is rounded to fp32 once.
        total = acc.double() + layer["bias"].reshape(column)
        return self._to_grid(total, layer["multiplier"].reshape(column), grid)

    def _average(self, node: Node, x: Tensor, old: Grid, grid: Grid) -> Tensor:
        o = node.options
        kernel, stride, padding = o["kernel"], o["stride"], o.get("padding", (0, 0))
        if kernel is None:
            kernel = stride = tuple(x.shape[2:])
        sums = F.avg_pool2d(x.double(), kernel, stride, padding, divisor_override=1)
        count = torch.tensor(float(kernel[0] * kernel[1]))
        if not o.get("count_include_pad", True):
            count = F.avg_pool2d(torch.ones(1, 1, *x.shape[2:]), kernel, stride, padding, divisor_override=1)
        multiplier = torch.tensor(old.scale) / (count * torch.tensor(grid.scale))
        pooled = self._to_grid(sums, multiplier, grid)
        return pooled if node.options.get("keepdim", True) else pooled.flatten(1)
