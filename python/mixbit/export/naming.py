"""The network's values in exported programs: what makes the codes of a value NAME is called NAME_q, as in ONNX."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.fx.traceback
from torch.export import ExportedProgram

_NOTE = "mixbit_value"
_SUFFIX = "_q"


def making(name: str) -> contextlib.AbstractContextManager[None]:
    """While a program is captured: the last operation inside makes the codes of a value."""
    # torch's notes on nodes may change; without them a program shows nothing but its outputs.
    annotate = getattr(torch.fx.traceback, "annotate", None)
    return contextlib.nullcontext() if annotate is None else annotate({_NOTE: name})


def naming() -> contextlib.AbstractContextManager[None]:
    """Around the capture: keeps what `making` notes."""
    keep = getattr(torch.fx.traceback, "preserve_node_meta", None)
    return contextlib.nullcontext() if keep is None else keep()


def name_values(program: ExportedProgram) -> None:
    """Renames the operations that make codes, and takes the notes away."""
    makers: dict[str, torch.fx.Node] = {}
    for node in program.graph.nodes:
        note = node.meta.pop("custom", None) or {}
        # Checks that torch puts in between make nothing.
        if node.op == "call_function" and _NOTE in note and isinstance(node.meta.get("val"), torch.Tensor):
            makers[note[_NOTE]] = node
    for name, node in makers.items():
        node.name = f"{name}{_SUFFIX}"
    program.graph_module.recompile()


class Watcher(torch.fx.Interpreter):
    """Runs a program node by node and keeps the codes of its values.

    Attributes:
        names: Of the values whose codes the program names.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.name.endswith(_SUFFIX)]
        self.names = {node: node.name.removesuffix(_SUFFIX) for node in nodes}
        self._codes: dict[str, torch.Tensor] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        """As the base class has it."""
        value = super().run_node(node)
        if node in self.names:
            self._codes[self.names[node]] = value
        return value

    @torch.no_grad()
    def codes(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes of every named value, [N, ...] in the types of the program."""
        self._codes = {}
        self.run(x)
        return self._codes
