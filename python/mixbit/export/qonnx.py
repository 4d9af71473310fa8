"""The integer network in the QONNX dialect: float operators between Quant nodes of any bit-width.

Quant (domain qonnx.custom_op.general, arXiv 2206.07527) quantizes and dequantizes in one: inputs x, scale, zero point
and bit-width. Weights are stored as the float values of their codes. Tensors named NAME_q hold the values of NAME on
its grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.errors import MixbitError
from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork
from mixbit.export.onnx_graph import GraphBuilder
from mixbit.export.onnx_writer import Value, Writer
from mixbit.network import Node, UnsupportedOperation

DOMAIN = "qonnx.custom_op.general"


def quant_type(low: int, high: int) -> tuple[int, bool, bool]:
    """Bits, signed and narrow of a range of codes."""
    if low >= 0:
        return max(high.bit_length(), 1), False, False
    bits = high.bit_length() + 1
    return bits, True, low == -(2 ** (bits - 1)) + 1


class QONNX(Writer):
    """Writes an integer network with Quant nodes.

    Args:
        network: The lowered network.
        example: An item of `batches`; sizes but the batch are fixed to it.
        opset: None for 13.
    """

    def __init__(self, network: IntegerNetwork, example: Any, opset: int | None) -> None:
        self._weights: dict[str, str] = {}
        self.bits: dict[str, int] = {}
        super().__init__(network, example, GraphBuilder(13 if opset is None else opset))

    def _quant(self, real: str, name: str, scale: Any, zero_point: int, low: int, high: int) -> str:
        bits, signed, narrow = quant_type(low, high)
        if signed and bits == 1:
            raise MixbitError(
                f"{name!r} has one signed bit, whose codes are -1 and 0; QONNX takes it for -1 and 1, and the nearest "
                "width that can be expressed is 2"
            )
        return self.build.node(
            "Quant",
            [real, scale, *(self.build.shared(v, np.float32) for v in (zero_point, bits))],
            name,
            domain=DOMAIN,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )

    def _on_grid(self, real: str, name: str, grid: Grid) -> Value:
        scale = self.build.shared(grid.scale, np.float32)
        return Value(self._quant(real, name, scale, grid.zero_point, grid.low, grid.high), grid, 0)

    def _made(self, node: Node, grid: Grid) -> Value:
        return Value(f"{node.name}_q", grid, 0)

    def _requantized(self, real: str, value: Value) -> Value:
        return self._on_grid(real, value.name, value.grid)

    def _moved(self, value: Value, grid: Grid) -> Value:
        if value.grid == grid:
            return value
        key = (value.name, grid)
        if key not in self._moves:
            self._moves[key] = self._on_grid(value.name, self.build.fresh(), grid)
        return self._moves[key]

    def _around(self, node: Node, grid: Grid, op: str, constants: list[str], **attributes: Any) -> Value:
        value = self._made(node, grid)
        reals = [self._moved(self.values[name], grid).name for name in node.inputs]
        self.build.node(op, [*reals, *constants], value.name, **attributes)
        return value

    def _output(self, value: Value, name: str) -> None:
        self.build.node("Identity", [value.name], name)

    def _input(self, node: Node, grid: Grid) -> Value:
        self.input = node.name
        return self._requantized(node.name, self._made(node, grid))

    def _operands(self, node: Node) -> list[str]:
        layer, path, build = self.network.layers[node.name], str(node.module), self.build
        operands = [self._moved(self.values[node.inputs[0]], layer.act).name]
        if path not in self._weights:
            columns = (-1, *[1] * (layer.weight.dim() - 1))
            codes, scales = layer.weight.numpy().astype(np.float32), layer.weight_scale.numpy()
            values = build.tensor(f"{path}.weight", codes * scales.reshape(columns), "weights")
            scale = build.tensor(f"{path}.scale", _shaped(scales, columns), "scales")
            self._weights[path] = self._quant(values, f"{path}.w", scale, 0, *layer.weight_range)
            self.bits[path] = quant_type(*layer.weight_range)[0]
        operands.append(self._weights[path])
        if bool(layer.bias.any()):
            prefix = path if f"{path}.bias" not in build.initializers else f"{path}.{node.name}"
            product = layer.product.numpy()
            bias = build.tensor(f"{prefix}.bias", layer.bias.numpy().astype(np.float32) * product, "biases")
            scale = build.tensor(f"{prefix}.bscale", _shaped(product, (-1,)), "scales")
            operands.append(self._quant(bias, f"{prefix}.b", scale, 0, -(2**31), 2**31 - 1))
        return operands

    def _relu(self, node: Node, grid: Grid) -> Value:
        value = self._moved(self.values[node.inputs[0]], grid)
        made = self._made(node, grid)
        if node.op == "relu":
            self.build.node("Relu", [value.name], made.name)
            return made
        six = np.rint(np.float32(6.0) / np.float32(grid.scale)) * np.float32(grid.scale)
        limits = [self.build.shared(v, np.float32) for v in (0.0, six)]
        self.build.node("Clip", [value.name, *limits], made.name)
        return made

    _relu6 = _relu

    def _add(self, node: Node, grid: Grid) -> Value:
        names = [self.values[name].name for name in node.inputs]
        real = self.build.node("Add", names, name=str(node.module or ""))
        return self._requantized(real, self._made(node, grid))

    def _avg_pool2d(self, node: Node, grid: Grid) -> Value:
        o = node.options
        x, padding = self.values[node.inputs[0]].name, list(o.get("padding", (0, 0)))
        if o["kernel"] is None:
            keep = int(o.get("keepdim", True))
            real = self._reduced("ReduceMean", x, [2, 3], keep)
        else:
            real = self.build.node(
                "AveragePool",
                [x],
                kernel_shape=list(o["kernel"]),
                strides=list(o["stride"]),
                pads=padding * 2,
                count_include_pad=int(o.get("count_include_pad", True)),
            )
        return self._requantized(real, self._made(node, grid))

    def _mul(self, node: Node, grid: Grid) -> Value:
        real = self.build.node("Mul", [self.values[name].name for name in node.inputs])
        return self._requantized(real, self._made(node, grid))

    def _softmax(self, node: Node, grid: Grid) -> Value:
        x = self.values[node.inputs[0]].name
        real = self.build.node("Softmax", [x], axis=node.options["dim"])
        return self._requantized(real, self._made(node, grid))

    def _lookup(self, node: Node, grid: Grid) -> Value:
        """A function of one element, in float."""
        options = dict(node.options)
        function, x = options.pop("function"), self.values[node.inputs[0]].name

        def make(op: str, *inputs: Any, **attributes: Any) -> str:
            names = [i if isinstance(i, str) else self.build.shared(i, np.float32) for i in inputs]
            return self.build.node(op, names, **attributes)

        if function in ("sigmoid", "tanh"):
            real = make(function.capitalize(), x)
        elif function == "silu":
            real = make("Mul", x, make("Sigmoid", x))
        elif function == "gelu":
            error = make("Erf", make("Div", x, 2.0**0.5))
            real = make("Mul", make("Mul", x, 0.5), make("Add", error, 1.0))
        elif function in ("hardsigmoid", "hardswish"):
            gate = make("HardSigmoid", x, alpha=1 / 6, beta=0.5)
            real = make("Mul", x, gate) if function == "hardswish" else gate
        elif function == "elu":
            real = make("Elu", x, alpha=float(options["alpha"]))
        elif function == "leaky_relu":
            real = make("LeakyRelu", x, alpha=float(options["negative_slope"]))
        elif function == "clamp":
            limits = ["" if options[key] is None else options[key] for key in ("min", "max")]
            real = make("Clip", x, *limits)
        elif function == "affine":
            real = make("Add", make("Mul", x, options["factor"]), options["offset"])
        else:
            raise UnsupportedOperation(f"QONNX export has no {function} (node {node.name!r})")
        return self._requantized(real, self._made(node, grid))

    def _pad(self, node: Node, grid: Grid) -> Value:
        return self._around(node, grid, "Pad", [self._pads(node)])


def _shaped(scales: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Scales that broadcast against a tensor; equal ones are one."""
    return scales[0] if bool((scales == scales[0]).all()) else scales.reshape(shape)
