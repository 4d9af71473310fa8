"""Walking an integer network to write it as ONNX: what all dialects have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork
from mixbit.export.onnx_graph import GraphBuilder
from mixbit.network import LAYER_OPS, Node, UnsupportedOperation, input_tensor, run_node


class Value(NamedTuple):
    """Codes in the file: `name` holds code + offset of a grid."""

    name: str
    grid: Grid
    offset: int

    @property
    def zero_point(self) -> int:
        """Of the codes in the file."""
        return self.grid.zero_point + self.offset


def shapes_of(network: IntegerNetwork, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every value for one image; nothing is computed."""
    values: dict[str, Tensor] = {}
    for node in network.graph.nodes:
        if node.op == "input":
            values[node.name] = torch.empty((1, *x.shape[1:]), device="meta")
            continue
        inputs = [values[name] for name in node.inputs]
        layer: dict[str, Any] = {}
        if node.op in LAYER_OPS:
            weight = torch.empty(network.layers[node.name].weight.shape, device="meta")
            layer = {str(node.module): SimpleNamespace(weight=weight, bias=None)}
        values[node.name] = run_node(node, inputs, layer)
    return {name: tuple(value.shape) for name, value in values.items()}


class Writer(ABC):
    """Writes an integer network node by node.

    Args:
        network: The lowered network.
        example: An item of `batches`; sizes but the batch are fixed to it.
        build: Takes the nodes.

    Attributes:
        shapes: Of each value, for a batch of one.
        input: Name of the graph's input.
        outputs: Names of the graph's outputs, in order.
    """

    def __init__(self, network: IntegerNetwork, example: Any, build: GraphBuilder) -> None:
        self.network = network
        self.build = build
        self.shapes = shapes_of(network, input_tensor(example))
        self.values: dict[str, Value] = {}
        self._moves: dict[tuple[str, Grid], Value] = {}
        self.input = ""
        previous: Node | None = None
        for node in network.graph.nodes:
            write = getattr(self, f"_{node.op}", None)
            if write is None:
                raise UnsupportedOperation(f"ONNX export has no {node.op} (module {node.module!r}, node {node.name!r})")
            # What pads for one layer goes with it.
            if previous is None or previous.op != "pad" or node.inputs != (previous.name,):
                build.part()
            previous = node
            self.values[node.name] = write(node, network.grids[node.name])
        build.part()
        self.outputs: list[str] = []
        for i, output in enumerate(network.graph.outputs):
            name = output if output not in (*self.outputs, self.input) else f"{output}_{i}"
            self._output(self.values[output], name)
            self.outputs.append(name)

    @abstractmethod
    def _made(self, node: Node, grid: Grid) -> Value:
        """The codes that a node makes."""

    @abstractmethod
    def _operands(self, node: Node) -> list[str]:
        """Real input, weight and bias of a layer."""

    @abstractmethod
    def _requantized(self, real: str, value: Value) -> Value:
        """Real values on a grid."""

    @abstractmethod
    def _moved(self, value: Value, grid: Grid) -> Value:
        """Codes on another grid."""

    @abstractmethod
    def _around(self, node: Node, grid: Grid, op: str, constants: list[str], **attributes: Any) -> Value:
        """An operation that moves codes."""

    @abstractmethod
    def _output(self, value: Value, name: str) -> None:
        """An output of the graph."""

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
        real = self.build.node("Conv", self._operands(node), name=str(node.module), **attributes)
        return self._requantized(real, self._made(node, grid))

    def _linear(self, node: Node, grid: Grid) -> Value:
        x, *rest = self._operands(node)
        shape = self.shapes[node.inputs[0]]
        value = self._made(node, grid)
        if len(shape) > 2:
            x = self.build.node("Reshape", [x, self.build.shared([-1, shape[-1]], np.int64)])
        real = self.build.node("Gemm", [x, *rest], name=str(node.module), transB=1)
        if len(shape) == 2:
            return self._requantized(real, value)
        flat = self._requantized(real, value._replace(name=self.build.fresh()))
        back = self.build.shared([-1, *self.shapes[node.name][1:]], np.int64)
        self.build.node("Reshape", [flat.name, back], value.name)
        return value

    def _cat(self, node: Node, grid: Grid) -> Value:
        return self._around(node, grid, "Concat", [], axis=1)

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

    def _permute(self, node: Node, grid: Grid) -> Value:
        return self._around(node, grid, "Transpose", [], perm=list(node.options["dims"]))

    def _pixel_unshuffle(self, node: Node, grid: Grid) -> Value:
        # Not SpaceToDepth, which orders channels otherwise. The codes of any form pass through these three.
        value, made, f = self._moved(self.values[node.inputs[0]], grid), self._made(node, grid), node.options["factor"]
        _, c, h, w = self.shapes[node.inputs[0]]
        split, joined = [0, c, h // f, f, w // f, f], [0, c * f * f, h // f, w // f]
        parts = self.build.node("Reshape", [value.name, self.build.shared(split, np.int64)])
        turned = self.build.node("Transpose", [parts], perm=[0, 1, 3, 5, 2, 4])
        self.build.node("Reshape", [turned, self.build.shared(joined, np.int64)], made.name)
        return made

    def _reduced(self, op: str, x: str, axes: list[int], keep: int = 1) -> str:
        """A reduction; its axes became an input with opset 13 (ReduceSum) or 18."""
        if op == "ReduceSum" or self.build.opset >= 18:
            return self.build.node(op, [x, self.build.shared(axes, np.int64)], keepdims=keep)
        return self.build.node(op, [x], axes=axes, keepdims=keep)

    def _pads(self, node: Node) -> str:
        """Amounts of a padding as ONNX wants them: before each dimension, then behind each."""
        amounts = node.options["amounts"]  # pairs from the last dimension backwards
        rank = len(self.shapes[node.name])
        before, after = [0] * rank, [0] * rank
        for i in range(len(amounts) // 2):
            before[rank - 1 - i], after[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
        return self.build.shared(before + after, np.int64)

    def _repeat(self, node: Node, grid: Grid) -> Value:
        scales = self.build.shared([1, 1, *node.options["counts"]], np.float32)
        modes: dict[str, Any] = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
        return self._around(node, grid, "Resize", ["", scales], **modes)

    def _identity(self, node: Node, grid: Grid) -> Value:
        return self._moved(self.values[node.inputs[0]], grid)
