"""Parts of an ONNX graph that recur as functions of the file (FunctionProto), which consumers put back in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

#: Of the functions and of the nodes that call them.
DOMAIN = "mixbit"


class Part(NamedTuple):
    """Nodes with what they read from others and what others read from them.

    Attributes:
        nodes: In order.
        inputs: Names, in order of first use.
        outputs: Names, in the order in which they are made.
        attributes: Those of the named node (the layer), which a call gives.
        form: The nodes with positions in place of names: equal for parts that compute the same.
    """

    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Any, ...]
    form: tuple[Any, ...]

    @property
    def layer(self) -> Any:
        """The named node; None where there is none."""
        return next((node for node in self.nodes if node.name), None)


def fold(onnx: Any, parts: Sequence[Sequence[Any]], results: Iterable[str], opset: int) -> tuple[list[Any], list[Any]]:
    """Makes parts that occur more than once one function and a call for each, where that saves bytes.

    Args:
        onnx: The package.
        parts: All nodes of a graph, in order, in parts that may become functions.
        results: Names of the graph's outputs.
        opset: Of the default domain.

    Returns:
        The nodes of the graph, and the functions.
    """
    readers: dict[str, set[int]] = {name: {-1} for name in results}
    for i, part in enumerate(parts):
        for node in part:
            for name in node.input:
                readers.setdefault(name, set()).add(i)
    found = [_part(part, {name for name, who in readers.items() if who - {i}}) for i, part in enumerate(parts)]
    often = Counter(part.form for part in found if len(part.nodes) > 1)
    nodes: list[Any] = []
    functions: dict[tuple[Any, ...], Any] = {}
    for part in found:
        count = often[part.form]
        if count > 1 and part.form not in functions:
            function = _function(onnx, f"F{len(functions)}", part, opset)
            saved = sum(node.ByteSize() for node in part.nodes) - _call(onnx, function, part).ByteSize()
            if count * saved > function.ByteSize():
                functions[part.form] = function
        if part.form in functions:
            nodes.append(_call(onnx, functions[part.form], part))
        else:
            nodes.extend(part.nodes)
    return nodes, list(functions.values())


def _call(onnx: Any, function: Any, part: Part) -> Any:
    """A node that calls a part's function."""
    name = "" if part.layer is None else part.layer.name
    call = onnx.helper.make_node(function.name, part.inputs, part.outputs, name=name, domain=DOMAIN)
    call.attribute.extend(part.attributes)
    return call


def _part(nodes: Sequence[Any], read: set[str]) -> Part:
    """Nodes as a part; `read` are the names that others read."""
    made: dict[str, int] = {}
    inputs: dict[str, int] = {}
    form: list[Any] = []
    layer = next((node for node in nodes if node.name), None)
    for node in nodes:
        operands: list[Any] = []
        for name in node.input:
            if name in made:
                operands.append(("made", made[name]))
            else:
                operands.append(("read", inputs.setdefault(name, len(inputs))) if name else None)
        # What the layers of a network differ in; their patterns are the same.
        attributes = tuple(
            (a.name, a.type) if node is layer else a.SerializeToString(deterministic=True) for a in node.attribute
        )
        for name in node.output:
            made[name] = len(made)
        form.append((node.op_type, node.domain, tuple(operands), len(node.output), attributes))
    outputs = tuple(name for name in made if name in read)
    form.append(tuple(made[name] for name in outputs))
    return Part(tuple(nodes), tuple(inputs), outputs, () if layer is None else tuple(layer.attribute), tuple(form))


def _function(onnx: Any, name: str, part: Part, opset: int) -> Any:
    """The function that computes a part."""
    names: dict[str, str] = {"": ""}
    for number, old in enumerate(dict.fromkeys([*part.inputs, *(o for node in part.nodes for o in node.output)])):
        names[old] = f"v{number}"
    body = []
    for node in part.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.input[:] = [names[old] for old in node.input]
        copy.output[:] = [names[old] for old in node.output]
        if node is part.layer:
            del copy.attribute[:]
            for a in node.attribute:
                copy.attribute.add(name=a.name, type=a.type, ref_attr_name=a.name)
        body.append(copy)
    inputs, outputs = ([names[old] for old in side] for side in (part.inputs, part.outputs))
    opsets, given = [onnx.helper.make_opsetid("", opset)], [a.name for a in part.attributes]
    return onnx.helper.make_function(DOMAIN, name, inputs, outputs, body, opsets, given)
