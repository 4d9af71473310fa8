"""The integer network as ONNX with QuantizeLinear and DequantizeLinear.

Activations are uint8: codes of a signed grid are stored 128 higher, since x86 runtimes fuse integer kernels around
uint8 alone; codes of fewer than 8 bits are clipped between quantize and dequantize ("QCDQ"). Weights are packed int2,
int4 or int8 initializers.

The exact form is made of patterns for which ONNX Runtime computes docs/integer_semantics.md bit for bit, whether it
fuses them or not:

* A layer is dequantize, Conv or Gemm, quantize: fused into QLinearConv or QGemm, whose int32 accumulator, fp32
  multiplier and rounding are ours. Narrow weights are cast to int8 first, since no integer kernel takes them packed.
* An add is a Sum of dequantized operands: QLinearAdd, which an Add would become, rounds apart.
* Moving codes from scale s to s' dequantizes with fp32(s / s') and quantizes with 1: one product and one rounding.
* An average pool sums dequantized-by-1 codes, multiplies by fp32(s / (n s')) and quantizes with 1.
* Everything that only moves codes (max pool, concatenation, reshape, ...) works on the codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.export.codes import CodeNetwork
from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork
from mixbit.export.onnx_graph import GraphBuilder
from mixbit.network import LAYER_OPS, Node, UnsupportedOperation, input_of

#: The least opset that holds weights of so many bits.
OPSETS = {8: 13, 4: 21, 2: 25}


class Value(NamedTuple):
    """Codes in the file: `name` holds code + offset of a grid."""

    name: str
    grid: Grid
    offset: int

    @property
    def zero_point(self) -> int:
        """Of the codes in the file."""
        return self.grid.zero_point + self.offset


@dataclasses.dataclass(frozen=True)
class Containers:
    """Bits in which each layer's weights are stored, beside the bits that they have.

    Attributes:
        bits: Of the codes, by module path.
        stored: Likewise.
        opset: The least that holds them.
    """

    bits: dict[str, int]
    stored: dict[str, int]
    opset: int


def offset_of(grid: Grid) -> int:
    """What is added to the codes of a grid in the file: nothing, or 128 where they are negative."""
    return 128 if min(grid.low, grid.zero_point) < 0 else 0


def containers(network: IntegerNetwork, opset: int | None) -> Containers:
    """The narrowest of 2, 4 and 8 bits for each layer's weight codes that an opset has.

    Raises:
        MixbitError: A layer has wider weights, or the opset is too old for any.
    """
    known = [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
    if opset is not None and opset not in known:
        raise MixbitError(f"opset={opset!r}: expected one from {known[0]} to {known[-1]}")
    holds = [b for b, least in sorted(OPSETS.items()) if opset is None or opset >= least]
    bits, stored = {}, {}
    for node in network.graph.nodes:
        if node.op not in LAYER_OPS:
            continue
        width = network.layers[node.name].weight_range[1].bit_length() + 1
        if width > 8:
            raise MixbitError(
                f"layer {node.module!r} has weights of {width} bits; the dialect 'qdq' holds at most 8, the "
                "nearest width that can be expressed is 8 (dialect 'qonnx' holds any)"
            )
        path = str(node.module)
        bits[path], stored[path] = width, min(b for b in holds if b >= width)
    needed = max([OPSETS[b] for b in stored.values()], default=13)
    return Containers(bits, stored, needed if opset is None else opset)


class QDQ:
    """Writes an integer network as QDQ nodes.

    Args:
        network: The lowered network.
        example: An item of `batches`; sizes but the batch are fixed to it.
        opset: None for the least that holds the weights packed.
        exact: The forms of this module's head; else the plain patterns that most runtimes look for.
    """

    def __init__(self, network: IntegerNetwork, example: Any, opset: int | None, exact: bool) -> None:
        self.network = network
        self.exact = exact
        self.containers = containers(network, opset)
        self.build = GraphBuilder(self.containers.opset)
        x = input_of(example)
        codes = CodeNetwork(network, torch.float32).values(x[:1].detach().float().cpu())
        self.shapes = {node.name: tuple(value.shape) for node, value in codes}
        self._values: dict[str, Value] = {}
        self._moves: dict[tuple[str, Grid], Value] = {}
        self._reals: dict[tuple[str, float], str] = {}
        self.input = ""
        for node in network.graph.nodes:
            write = getattr(self, f"_{node.op}", None)
            if write is None:
                raise UnsupportedOperation(
                    f"ONNX export has no {node.op} (module {node.module or ''!r}, {node.name!r})"
                )
            self._values[node.name] = write(node, network.grids[node.name])
        self.outputs = self._finish()

    def _finish(self) -> list[str]:
        names = []
        for i, output in enumerate(self.network.graph.outputs):
            name = output if output not in names and output != self.input else f"{output}_{i}"
            self._dequantize(self._values[output], output=name)
            names.append(name)
        return names

    # ----------------------------------------------------------------------------------------------------------- grids

    def _value(self, what: str, name: str, grid: Grid) -> Value:
        """Where a grid's codes lie in uint8."""
        least, most = min(grid.low, grid.zero_point), max(grid.high, grid.zero_point)
        offset = offset_of(grid)
        if least + offset < 0 or most + offset > 255:
            raise MixbitError(
                f"{what} has codes {grid.low} ... {grid.high} with the zero point {grid.zero_point}; the dialect 'qdq' "
                "holds 8 bits, the nearest width that can be expressed is 8"
            )
        return Value(name, grid, offset)

    def _scale(self, scale: float) -> str:
        return self.build.shared(scale, np.float32)

    def _quantize(
        self, real: str, scale: float, value: Value, low: int | None = None, high: int | None = None
    ) -> Value:
        """Quantizes a float value and clips the codes to the grid, or to narrower bounds."""
        bounds = [value.grid.low if low is None else low, value.grid.high if high is None else high]
        first, last = (bound + value.offset for bound in bounds)
        whole = (first, last) == (0, 255)
        target = value.name if whole else f"{value.name}8"
        self.build.node("QuantizeLinear", [real, self._scale(scale), self._zero(value)], target)
        if not whole:
            self._clip(target, value.name, first, last)
        return value

    def _zero(self, value: Value) -> str:
        return self.build.shared(value.zero_point, np.uint8)

    def _clip(self, codes: str, name: str, low: int, high: int) -> None:
        self.build.node("Clip", [codes, *(self.build.shared(v, np.uint8) for v in (low, high))], name)

    def _dequantize(self, value: Value, scale: float | None = None, output: str | None = None) -> str:
        """(code - zero_point) * scale, the grid's own by default."""
        scale = value.grid.scale if scale is None else scale
        key = (value.name, scale)
        if output is None and key in self._reals:
            return self._reals[key]
        name = output or f"{value.name}_d{len(self._reals)}"
        made = self.build.node("DequantizeLinear", [value.name, self._scale(scale), self._zero(value)], name)
        if output is None:
            self._reals[key] = made
        return made

    def _moved(self, value: Value, grid: Grid) -> Value:
        """Codes on another grid."""
        if value.grid == grid:
            return value
        key = (value.name, grid)
        if key not in self._moves:
            target = self._value(f"tensor {value.name!r}", f"{value.name}_m{len(self._moves)}", grid)
            if self.exact:
                ratio = float(np.float32(value.grid.scale) / np.float32(grid.scale))
                self._quantize(self._dequantize(value, ratio), 1.0, target)
            else:
                self._quantize(self._dequantize(value), grid.scale, target)
            self._moves[key] = target
        return self._moves[key]

    def _made(self, node: Node, grid: Grid) -> Value:
        """The codes that a node makes."""
        return self._value(f"tensor {node.name!r}", f"{node.name}_q", grid)

    def _around(self, node: Node, grid: Grid, op: str, constants: list[str], **attributes: Any) -> Value:
        """An operation that moves codes, on codes or between dequantize and quantize."""
        values = [self._moved(self._values[name], grid) for name in node.inputs]
        value = self._made(node, grid)
        if self.exact:
            self.build.node(op, [*(v.name for v in values), *constants], value.name, **attributes)
            return value
        reals = [self._dequantize(v) for v in values]
        self.build.node(op, [*reals, *constants], f"{node.name}_r", **attributes)
        return self._quantize(f"{node.name}_r", grid.scale, value)

    # ------------------------------------------------------------------------------------------------------ operations

    def _input(self, node: Node, grid: Grid) -> Value:
        self.input = node.name
        return self._quantize(node.name, grid.scale, self._made(node, grid))

    def _operands(self, node: Node) -> list[str]:
        """Dequantized input, weight and bias of a layer."""
        layer, path = self.network.layers[node.name], str(node.module)
        x = self._moved(self._values[node.inputs[0]], layer.act)
        operands = [self._dequantize(x)]
        build, stored = self.build, self.containers.stored[path]
        codes = build.codes(f"{path}.weight", layer.weight.numpy(), stored)
        wide = stored == 8
        if stored == 2 or (stored == 4 and self.exact):
            wide = True
            # ONNX Runtime 1.32 puts a dequantized int2 into QLinearConv, which then refuses it.
            codes = build.node("Cast", [codes], f"{path}.w8", to=build.onnx.TensorProto.INT8)
        scales = layer.weight_scale.numpy()
        axis: dict[str, Any] = (
            {} if bool((scales == scales[0]).all()) else {"axis": 0}
        )  # else one scale for the whole weight
        scale = build.tensor(f"{path}.scale", scales if axis else scales[0], "scales")
        inputs = [codes, scale]
        if node.op == "linear" and wide:
            # ONNX Runtime makes no QGemm of a weight without zero points. They are made when the file is loaded.
            shape = build.shared(scales.shape if axis else (), np.int64)
            zero = build.onnx.numpy_helper.from_array(np.zeros(1, np.int8))
            inputs.append(build.node("ConstantOfShape", [shape], f"{path}.zero", value=zero))
        operands.append(build.node("DequantizeLinear", inputs, f"{path}.w", **axis))
        if bool(layer.bias.any()):
            bias = build.tensor(f"{path}.bias", layer.bias.numpy().astype(np.int32), "biases")
            product = layer.product.numpy()
            scale = build.tensor(f"{path}.bscale", product if axis else product[0], "scales")
            operands.append(build.node("DequantizeLinear", [bias, scale], f"{path}.b", **axis))
        return operands

    def _conv2d(self, node: Node, grid: Grid) -> Value:
        o = node.options
        attributes: dict[str, Any] = {}
        for name, key, usual in (("strides", "stride", 1), ("dilations", "dilation", 1)):
            if tuple(o[key]) != (usual, usual):
                attributes[name] = list(o[key])
        if any(o["padding"]):
            attributes["pads"] = [*o["padding"], *o["padding"]]
        if o["groups"] != 1:
            attributes["group"] = o["groups"]
        real = self.build.node("Conv", self._operands(node), f"{node.name}_r", name=str(node.module), **attributes)
        return self._quantize(real, grid.scale, self._made(node, grid))

    def _linear(self, node: Node, grid: Grid) -> Value:
        x, *rest = self._operands(node)
        shape = self.shapes[node.inputs[0]]
        value = self._made(node, grid)
        if len(shape) > 2:
            x = self.build.node("Reshape", [x, self.build.shared([-1, shape[-1]], np.int64)], f"{node.name}_rows")
        real = self.build.node("Gemm", [x, *rest], f"{node.name}_r", name=str(node.module), transB=1)
        if len(shape) == 2:
            return self._quantize(real, grid.scale, value)
        flat = self._quantize(real, grid.scale, value._replace(name=f"{node.name}_flat"))
        back = self.build.shared([-1, *self.shapes[node.name][1:]], np.int64)
        self.build.node("Reshape", [flat.name, back], value.name)
        return value

    def _relu(self, node: Node, grid: Grid) -> Value:
        six = grid.high
        if node.op == "relu6":
            six = min(six, int(np.rint(np.float32(6.0) / np.float32(grid.scale))) + grid.zero_point)
        value = self._moved(self._values[node.inputs[0]], grid)
        if grid.low >= grid.zero_point and six >= grid.high:
            return value  # the clamp of the layer before has done it
        made = self._made(node, grid)
        low = max(grid.low, grid.zero_point)
        self._clip(value.name, made.name, low + made.offset, six + made.offset)
        return made

    _relu6 = _relu

    def _add(self, node: Node, grid: Grid) -> Value:
        reals = [self._dequantize(self._values[name]) for name in node.inputs]
        self.build.node("Sum" if self.exact else "Add", reals, f"{node.name}_r", name=str(node.module or ""))
        return self._quantize(f"{node.name}_r", grid.scale, self._made(node, grid))

    def _cat(self, node: Node, grid: Grid) -> Value:
        return self._around(node, grid, "Concat", [], axis=1)

    def _avg_pool2d(self, node: Node, grid: Grid) -> Value:
        o, shape = node.options, self.shapes[node.inputs[0]]
        value = self._values[node.inputs[0]]
        kernel, stride = (shape[2:], shape[2:]) if o["kernel"] is None else (o["kernel"], o["stride"])
        padding = tuple(o.get("padding", (0, 0)))
        keep, real = int(o.get("keepdim", True)), f"{node.name}_r"
        include = bool(o.get("count_include_pad", True))
        whole = tuple(kernel) == tuple(shape[2:]) and not any(padding)
        window: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}
        if not self.exact:
            x = self._dequantize(value)
            if whole:
                self._reduced("ReduceMean", x, real, keep)
            else:
                self.build.node("AveragePool", [x], real, count_include_pad=int(include), **window)
            return self._quantize(real, grid.scale, self._made(node, grid))
        x = self._dequantize(value, 1.0)
        if whole:
            self._reduced("ReduceSum", x, f"{node.name}_sum", keep)
        else:
            # A window of ones, made when the file is loaded.
            ones = self.build.shared([shape[1], 1, *kernel], np.int64)
            one = self.build.onnx.numpy_helper.from_array(np.ones(1, np.float32))
            self.build.node("ConstantOfShape", [ones], f"{node.name}_ones", value=one)
            self.build.node("Conv", [x, f"{node.name}_ones"], f"{node.name}_sum", group=shape[1], **window)
        counts = torch.tensor(float(kernel[0] * kernel[1]))
        if not include and any(padding):
            inside = torch.ones(1, 1, *shape[2:])
            counts = nn.functional.avg_pool2d(inside, kernel, stride, padding, divisor_override=1)
        multiplier = np.float32(value.grid.scale) / (counts.numpy() * np.float32(grid.scale))
        self.build.node("Mul", [f"{node.name}_sum", self.build.shared(multiplier, np.float32)], real)
        return self._quantize(real, 1.0, self._made(node, grid))

    def _reduced(self, op: str, x: str, output: str, keep: int) -> None:
        """A reduction over height and width; its axes became an input with opset 13 or 18."""
        if op == "ReduceSum" or self.build.opset >= 18:
            self.build.node(op, [x, self.build.shared([2, 3], np.int64)], output, keepdims=keep)
        else:
            self.build.node(op, [x], output, axes=[2, 3], keepdims=keep)

    def _max_pool2d(self, node: Node, grid: Grid) -> Value:
        o, shape, made = node.options, self.shapes[node.inputs[0]], self.shapes[node.name]
        ends = []
        for i in (0, 1):
            span = o["dilation"][i] * (o["kernel"][i] - 1) + 1
            # ceil_mode as padding behind: the same number of windows, whatever a runtime makes of the attribute.
            ends.append(
                max(o["padding"][i], (made[2 + i] - 1) * o["stride"][i] + span - shape[2 + i] - o["padding"][i])
            )
        attributes: dict[str, Any] = {
            "kernel_shape": list(o["kernel"]),
            "strides": list(o["stride"]),
            "pads": [*o["padding"], *ends],
        }
        if tuple(o["dilation"]) != (1, 1):
            attributes["dilations"] = list(o["dilation"])
        return self._around(node, grid, "MaxPool", [], **attributes)

    def _reshape(self, node: Node, grid: Grid) -> Value:
        return self._around(node, grid, "Reshape", [self.build.shared([0, *node.options["shape"]], np.int64)])

    def _slice(self, node: Node, grid: Grid) -> Value:
        o = node.options
        ends = [o["start"], o["end"], o["dim"], o["step"]]
        return self._around(node, grid, "Slice", [self.build.shared([end], np.int64) for end in ends])

    def _pad(self, node: Node, grid: Grid) -> Value:
        amounts = node.options["amounts"]  # pairs from the last dimension backwards
        rank = len(self.shapes[node.name])
        before, after = [0] * rank, [0] * rank
        for i in range(len(amounts) // 2):
            before[rank - 1 - i], after[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
        pads = self.build.shared(before + after, np.int64)
        if not self.exact:
            return self._around(node, grid, "Pad", [pads])
        return self._around(node, grid, "Pad", [pads, self._zero(self._made(node, grid))])

    def _repeat(self, node: Node, grid: Grid) -> Value:
        scales = self.build.shared([1, 1, *node.options["counts"]], np.float32)
        modes: dict[str, Any] = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
        return self._around(node, grid, "Resize", ["", scales], **modes)

    def _identity(self, node: Node, grid: Grid) -> Value:
        return self._moved(self._values[node.inputs[0]], grid)
