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
* A product multiplies dequantized-by-1 codes, then fp32(s_a s_b / s'); functions are looked up; softmax is made of sums
  of looked-up integers and two divisions.
* Everything that only moves codes (max pool, concatenation, reshape, ...) works on the codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.export.codes import exponentials, lookup_table
from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork
from mixbit.export.onnx_graph import GraphBuilder
from mixbit.export.onnx_writer import Value, Writer
from mixbit.network import LAYER_OPS, Node

#: The least opset that holds weights of so many bits.
OPSETS = {8: 13, 4: 21, 2: 25}


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
        MixbitError: A layer has wider weights.
    """
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


class QDQ(Writer):
    """Writes an integer network as QDQ nodes.

    Args:
        network: The lowered network.
        example: An item of `batches`; sizes but the batch are fixed to it.
        opset: None for the least that holds the weights packed.
        exact: The forms of this module's head; else the plain patterns that most runtimes look for.
    """

    def __init__(self, network: IntegerNetwork, example: Any, opset: int | None, exact: bool) -> None:
        self.exact = exact
        self.containers = containers(network, opset)
        self._reals: dict[tuple[str, float], str] = {}
        self._weights: dict[str, str] = {}
        super().__init__(network, example, GraphBuilder(self.containers.opset))

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

    def _quantize(self, real: str, scale: float, value: Value) -> Value:
        """Quantizes a float value and clips the codes to the grid."""
        first, last = value.grid.low + value.offset, value.grid.high + value.offset
        whole = (first, last) == (0, 255)
        target = value.name if whole else self.build.fresh()
        self.build.node("QuantizeLinear", [real, self._scale(scale), self._zero(value)], target)
        if not whole:
            self._clip(target, value.name, first, last)
        return value

    def _output(self, value: Value, name: str) -> None:
        self._dequantize(value, output=name)

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
        made = self.build.node("DequantizeLinear", [value.name, self._scale(scale), self._zero(value)], output or "")
        if output is None:
            self._reals[key] = made
        return made

    def _moved(self, value: Value, grid: Grid) -> Value:
        """Codes on another grid."""
        if value.grid == grid:
            return value
        key = (value.name, grid)
        if key not in self._moves:
            target = self._value(f"tensor {value.name!r}", self.build.fresh(), grid)
            # In the plain form too: a code of a layer's input that is off would be more at its output.
            ratio = float(np.float32(value.grid.scale) / np.float32(grid.scale))
            self._quantize(self._dequantize(value, ratio), 1.0, target)
            self._moves[key] = target
        return self._moves[key]

    def _made(self, node: Node, grid: Grid) -> Value:
        """The codes that a node makes."""
        return self._value(f"tensor {node.name!r}", f"{node.name}_q", grid)

    def _around(self, node: Node, grid: Grid, op: str, constants: list[str], **attributes: Any) -> Value:
        """An operation that moves codes, on codes or between dequantize and quantize."""
        values = [self._moved(self.values[name], grid) for name in node.inputs]
        value = self._made(node, grid)
        if self.exact:
            self.build.node(op, [*(v.name for v in values), *constants], value.name, **attributes)
            return value
        reals = [self._dequantize(v) for v in values]
        return self._quantize(self.build.node(op, [*reals, *constants], **attributes), grid.scale, value)

    def _requantized(self, real: str, value: Value) -> Value:
        return self._quantize(real, value.grid.scale, value)

    # ------------------------------------------------------------------------------------------------------ operations

    def _input(self, node: Node, grid: Grid) -> Value:
        self.input = node.name
        return self._quantize(node.name, grid.scale, self._made(node, grid))

    def _operands(self, node: Node) -> list[str]:
        """Dequantized input, weight and bias of a layer."""
        layer, path = self.network.layers[node.name], str(node.module)
        x = self._moved(self.values[node.inputs[0]], layer.act)
        operands = [self._dequantize(x)]
        build, stored = self.build, self.containers.stored[path]
        if path not in self._weights:
            self._weights[path] = self._weight(node, stored)
        operands.append(self._weights[path])
        if bool(layer.bias.any()):
            # The bias of a layer that is called again has another scale.
            prefix = path if f"{path}.bias" not in build.initializers else f"{path}.{node.name}"
            axis, product = _per_channel(layer.product.numpy())
            bias = build.tensor(f"{prefix}.bias", layer.bias.numpy().astype(np.int32), "biases")
            scale = build.tensor(build.fresh(), product, "scales")
            operands.append(build.node("DequantizeLinear", [bias, scale], **axis))
        return operands

    def _weight(self, node: Node, stored: int) -> str:
        """A dequantized weight."""
        layer, path, build = self.network.layers[node.name], str(node.module), self.build
        codes = build.codes(f"{path}.weight", layer.weight.numpy(), stored)
        wide = stored == 8
        if stored == 2 or (stored == 4 and self.exact):
            wide = True
            # ONNX Runtime 1.32 puts a dequantized int2 into QLinearConv, which then refuses it.
            codes = build.node("Cast", [codes], to=build.onnx.TensorProto.INT8)
        axis, scales = _per_channel(layer.weight_scale.numpy())
        inputs = [codes, build.tensor(build.fresh(), scales, "scales")]
        if node.op == "linear" and wide:
            # ONNX Runtime makes no QGemm of a weight without zero points. They are made when the file is loaded.
            shape = build.shared(scales.shape, np.int64)
            zero = build.onnx.numpy_helper.from_array(np.zeros(1, np.int8))
            inputs.append(build.node("ConstantOfShape", [shape], value=zero))
        return build.node("DequantizeLinear", inputs, **axis)

    def _relu(self, node: Node, grid: Grid) -> Value:
        six = grid.high
        if node.op == "relu6":
            six = min(six, int(np.rint(np.float32(6.0) / np.float32(grid.scale))) + grid.zero_point)
        value = self._moved(self.values[node.inputs[0]], grid)
        if grid.low >= grid.zero_point and six >= grid.high:
            return value  # the clamp of the layer before has done it
        made = self._made(node, grid)
        low = max(grid.low, grid.zero_point)
        self._clip(value.name, made.name, low + made.offset, six + made.offset)
        return made

    _relu6 = _relu

    def _add(self, node: Node, grid: Grid) -> Value:
        reals = [self._dequantize(self.values[name]) for name in node.inputs]
        real = self.build.node("Sum" if self.exact else "Add", reals, name=str(node.module or ""))
        return self._quantize(real, grid.scale, self._made(node, grid))

    def _avg_pool2d(self, node: Node, grid: Grid) -> Value:
        o, shape = node.options, self.shapes[node.inputs[0]]
        value = self.values[node.inputs[0]]
        kernel, stride = (shape[2:], shape[2:]) if o["kernel"] is None else (o["kernel"], o["stride"])
        padding = tuple(o.get("padding", (0, 0)))
        keep = int(o.get("keepdim", True))
        include = bool(o.get("count_include_pad", True))
        whole = tuple(kernel) == tuple(shape[2:]) and not any(padding)
        window: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}
        if not self.exact:
            x = self._dequantize(value)
            if whole:
                real = self._reduced("ReduceMean", x, [2, 3], keep)
            else:
                real = self.build.node("AveragePool", [x], count_include_pad=int(include), **window)
            return self._quantize(real, grid.scale, self._made(node, grid))
        x = self._dequantize(value, 1.0)
        if whole:
            total = self._reduced("ReduceSum", x, [2, 3], keep)
        else:
            # A window of ones, made when the file is loaded.
            ones = self.build.shared([shape[1], 1, *kernel], np.int64)
            one = self.build.onnx.numpy_helper.from_array(np.ones(1, np.float32))
            filled = self.build.node("ConstantOfShape", [ones], value=one)
            total = self.build.node("Conv", [x, filled], group=shape[1], **window)
        counts = torch.tensor(float(kernel[0] * kernel[1]))
        if not include and any(padding):
            inside = torch.ones(1, 1, *shape[2:])
            counts = nn.functional.avg_pool2d(inside, kernel, stride, padding, divisor_override=1)
        multiplier = np.float32(value.grid.scale) / (counts.numpy() * np.float32(grid.scale))
        real = self.build.node("Mul", [total, self.build.shared(multiplier, np.float32)])
        return self._quantize(real, 1.0, self._made(node, grid))

    def _mul(self, node: Node, grid: Grid) -> Value:
        values = [self.values[name] for name in node.inputs]
        if not self.exact:
            real = self.build.node("Mul", [self._dequantize(v) for v in values])
            return self._quantize(real, grid.scale, self._made(node, grid))
        product = self.build.node("Mul", [self._dequantize(v, 1.0) for v in values])
        scale = np.float32(values[0].grid.scale) * np.float32(values[1].grid.scale) / np.float32(grid.scale)
        real = self.build.node("Mul", [product, self.build.shared(scale, np.float32)])
        return self._quantize(real, 1.0, self._made(node, grid))

    def _index(self, codes: str) -> str:
        return self.build.node("Cast", [codes], to=self.build.onnx.TensorProto.INT32)

    def _lookup(self, node: Node, grid: Grid) -> Value:
        """A function of one element: a table of codes, by the codes of the input as they are stored."""
        value, made = self.values[node.inputs[0]], self._made(node, grid)
        table = np.zeros(256, np.uint8)
        first = value.grid.low + value.offset
        codes = lookup_table(node, value.grid, grid).numpy().astype(np.int64) + made.offset
        table[first : first + len(codes)] = codes
        index = self._index(value.name)
        self.build.node("Gather", [self.build.shared(table, np.uint8), index], made.name)
        return made

    def _softmax(self, node: Node, grid: Grid) -> Value:
        value, made = self.values[node.inputs[0]], self._made(node, grid)
        axis, build, kinds = node.options["dim"], self.build, self.build.onnx.TensorProto
        if not self.exact:
            return self._quantize(build.node("Softmax", [self._dequantize(value)], axis=axis), grid.scale, made)
        index = self._index(value.name)
        distance = build.node("Sub", [self._reduced("ReduceMax", index, [axis]), index])
        table = build.shared(exponentials(value.grid).numpy().astype(np.int64), np.int64)
        powers = build.node("Gather", [table, distance])
        total = self._reduced("ReduceSum", powers, [axis])
        shares = [build.node("Cast", [x], to=kinds.FLOAT) for x in (powers, total)]
        return self._quantize(build.node("Div", shares), grid.scale, made)

    def _pad(self, node: Node, grid: Grid) -> Value:
        zero = [self._zero(self._made(node, grid))] if self.exact else []
        return self._around(node, grid, "Pad", [self._pads(node), *zero])


def _per_channel(scales: npt.NDArray[Any]) -> tuple[dict[str, Any], npt.NDArray[Any]]:
    """Scales with the axis that they need; equal ones are one."""
    return ({}, scales[0]) if bool((scales == scales[0]).all()) else ({"axis": 0}, scales)
