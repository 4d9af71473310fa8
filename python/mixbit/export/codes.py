"""The integer network as a module: codes held in float, convolved by the float engine where that is exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.export.grid import Grid
from mixbit.export.lowering import EXACT_FP32, IntegerNetwork
from mixbit.export.naming import making
from mixbit.network import LAYER_OPS, PASS_OPS, Node, run_lookup, run_pass


class Constants(nn.Module):
    """Buffers of a network's nodes, named by the path of the layer or the name of the value."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, nn.Module] = {}

    def hold(self, node: Node, tensors: dict[str, Tensor]) -> None:
        """Registers what a node needs; a module that is called twice has constants for each call."""
        path = node.module if node.op in LAYER_OPS and node.module else node.name
        holder: nn.Module = self
        for part in path.split("."):
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if holder._buffers:
            holder.add_module(node.name, nn.Module())
            holder = holder.get_submodule(node.name)
        for name, tensor in tensors.items():
            holder.register_buffer(name, tensor)
        self._held[node.name] = holder

    def of(self, node: Node, name: str) -> Tensor:
        """A buffer of a node."""
        return self._held[node.name].get_buffer(name)


class CodeNetwork(nn.Module):
    """Computes every value of an integer network as codes: float32 tensors of whole numbers.

    Products are summed in float32 where every possible sum is below 2^24, which makes them exact in any order, else in
    float64. Everything else is one fp32 operation at a time, as docs/integer_semantics.md has it.

    Args:
        network: What to compute.
        stored: Type of the weights' codes: None keeps integers (small files), which each forward converts.
    """

    def __init__(self, network: IntegerNetwork, stored: torch.dtype | None = None) -> None:
        super().__init__()
        self.network = network
        self.layers, self.tensors = Constants(), Constants()
        for node in network.graph.nodes:
            if node.op in LAYER_OPS:
                layer = network.layers[node.name]
                weight = layer.weight
                if stored is not None:
                    weight = weight.to(torch.float64 if layer.engine == "float64" else stored)
                # Where even the sum with the bias stays below 2^24, the engine adds the bias exactly.
                bias = layer.bias.float() if layer.reach < EXACT_FP32 else layer.bias
                self.layers.hold(node, {"weight": weight, "bias": bias, "multiplier": layer.multiplier})
                continue
            grid = network.grids[node.name]
            own: dict[str, Tensor] = {}
            if node.op in ("input", "add", "softmax"):
                # A tensor, not a number: devices divide by a number through its inverse, which rounds apart.
                own["scale"] = torch.tensor([grid.scale])
            if node.op == "lookup":
                own["table"] = lookup_table(node, network.grids[node.inputs[0]], grid)
            elif node.op == "softmax":
                own["table"] = exponentials(network.grids[node.inputs[0]])
            if own:
                self.tensors.hold(node, own)
        self.eval()

    def values(self, x: Tensor) -> Iterator[tuple[Node, Tensor]]:
        """Every node with its codes, in order; a value is let go after its last reader."""
        graph = self.network.graph
        last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        held: dict[str, Tensor] = {}
        for i, node in enumerate(graph.nodes):
            with making(node.name):
                codes = self._run(node, x, held)
            yield node, codes
            held[node.name] = codes
            for name in node.inputs:
                if last[name] == i:
                    held.pop(name, None)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The network's outputs, dequantized to float32, in the order in which the model returns them."""
        found = {
            node.name: self._reals(node.name, codes)
            for node, codes in self.values(x)
            if node.name in self.network.graph.outputs
        }
        return [found[name] for name in self.network.graph.outputs]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A single output by itself, several as a tuple."""
        outputs = self.outputs(x)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    # ------------------------------------------------------------------------------------------------------ operations

    def _reals(self, name: str, codes: Tensor) -> Tensor:
        """(code - zero_point) * scale."""
        grid = self.network.grids[name]
        return _centered(codes, grid) * grid.scale

    def _read(self, name: str, held: dict[str, Tensor], grid: Grid) -> Tensor:
        """Codes of a value on the grid that the reader wants."""
        old = self.network.grids[name]
        if old == grid:
            return held[name]
        multiplier = float(torch.tensor(old.scale) / torch.tensor(grid.scale))
        return _on_grid(_centered(held[name], old) * multiplier, grid)

    def _run(self, node: Node, x: Tensor, held: dict[str, Tensor]) -> Tensor:
        grid = self.network.grids[node.name]
        if node.op == "input":
            return _on_grid(_as(x, torch.float32) / self.tensors.of(node, "scale"), grid)
        if node.op in LAYER_OPS:
            return self._layer(node, held, grid)
        if node.op == "add":
            a, b = (self._reals(name, held[name]) for name in node.inputs)
            return _on_grid((a + b) / self.tensors.of(node, "scale"), grid)
        if node.op == "mul":
            return self._product(node, held, grid)
        if node.op == "cat":
            return torch.cat([self._read(name, held, grid) for name in node.inputs], 1)
        name = node.inputs[0]
        if node.op == "avg_pool2d":
            return self._average(node, held[name], self.network.grids[name], grid)
        if node.op == "lookup":
            return self.tensors.of(node, "table")[(held[name] - self.network.grids[name].low).long()]
        if node.op == "softmax":
            codes, dim = held[name], node.options["dim"]
            powers = self.tensors.of(node, "table")[(codes.amax(dim, keepdim=True) - codes).long()]
            shares = powers / powers.double().sum(dim, keepdim=True).float()
            return _on_grid(shares / self.tensors.of(node, "scale"), grid)
        codes = self._read(name, held, grid)
        if node.op in PASS_OPS:
            return run_pass(node, codes, float(grid.zero_point))
        codes = codes.clamp(min=grid.zero_point)
        if node.op == "relu6":
            codes = codes.clamp(max=float(torch.round(torch.tensor(6.0) / torch.tensor(grid.scale))) + grid.zero_point)
        return codes

    def _layer(self, node: Node, held: dict[str, Tensor], grid: Grid) -> Tensor:
        layer = self.network.layers[node.name]
        engine = torch.float64 if layer.engine == "float64" else torch.float32
        x = _as(_centered(self._read(node.inputs[0], held, layer.act), layer.act), engine)
        weight, bias, multiplier = (self.layers.of(node, name) for name in ("weight", "bias", "multiplier"))
        weight = _as(weight, engine)
        inside = bias if layer.reach < EXACT_FP32 else None
        if node.op == "linear":
            total = F.linear(x, weight, inside)
        else:
            o = node.options
            total = F.conv2d(x, weight, inside, o["stride"], o["padding"], o["dilation"], o["groups"])
            bias, multiplier = bias.reshape(-1, 1, 1), multiplier.reshape(-1, 1, 1)
        if inside is None:
            # The bias is added in double: the sum may pass 2^24, and is rounded to fp32 once.
            total = (total.double() + bias).float()
        return _on_grid(total * multiplier, grid)

    def _product(self, node: Node, held: dict[str, Tensor], grid: Grid) -> Tensor:
        (a, x), (b, y) = ((held[name], self.network.grids[name]) for name in node.inputs)
        scale = torch.tensor(x.scale) * torch.tensor(y.scale)
        product = _centered(a, x).double() * _centered(b, y).double()
        return _on_grid(product.float() * float(scale / torch.tensor(grid.scale)), grid)

    @staticmethod
    def _average(node: Node, codes: Tensor, old: Grid, grid: Grid) -> Tensor:
        o = node.options
        kernel, stride, padding = o["kernel"], o["stride"], o.get("padding", (0, 0))
        if kernel is None:
            kernel = stride = tuple(codes.shape[2:])
        sums = F.avg_pool2d(_centered(codes, old).double(), kernel, stride, padding, divisor_override=1)
        count = torch.full((1, 1, 1, 1), float(kernel[0] * kernel[1]), device=codes.device)
        if not o.get("count_include_pad", True):
            ones = torch.ones(1, 1, *codes.shape[2:], device=codes.device)
            count = F.avg_pool2d(ones, kernel, stride, padding, divisor_override=1)
        multiplier = torch.full_like(count, old.scale) / (count * grid.scale)
        pooled = _on_grid(sums.float() * multiplier, grid)
        return pooled if o.get("keepdim", True) else pooled.flatten(1)


def lookup_table(node: Node, old: Grid, grid: Grid) -> Tensor:
    """Codes on `grid` of a function of every code of `old`, float32 [codes]; computed in double, rounded to fp32."""
    reals = _reals_of(old).double()
    results = run_lookup(node, reals).float()
    return _on_grid(results / torch.tensor(grid.scale), grid)


def exponentials(grid: Grid) -> Tensor:
    """rne(2^16 exp(-d s)) for every distance d of two codes of a grid, float32 [codes]."""
    distances = torch.arange(grid.high - grid.low + 1, dtype=torch.float64)
    return torch.round(65536 * torch.exp(-distances * grid.scale)).float()


def _reals_of(grid: Grid) -> Tensor:
    """The values of a grid, from its lowest code to its highest."""
    codes = torch.arange(grid.low, grid.high + 1, dtype=torch.float32)
    return _centered(codes, grid) * torch.tensor(grid.scale)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type; exported programs hold no conversions that do nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def _centered(codes: Tensor, grid: Grid) -> Tensor:
    """code - zero_point."""
    return codes - grid.zero_point if grid.zero_point else codes


def _on_grid(steps: Tensor, grid: Grid) -> Tensor:
    """clamp(rne(steps) + zero_point)."""
    codes = torch.round(steps)
    return (codes + grid.zero_point if grid.zero_point else codes).clamp(grid.low, grid.high)
