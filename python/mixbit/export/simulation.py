"""The integer network in PyTorch: as fast as float, equal to the reference on every tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixbit.export.codes import CodeNetwork
from mixbit.export.lowering import lower
from mixbit.network import LAYER_OPS, input_tensor


class IntegerSimulation:
    """Runs the integer network of a prepared and calibrated model in PyTorch.

    Attributes:
        grids: Grid of every value by name.
        engine: For each layer "float32" or "float64": the type in which its codes are multiplied exactly.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        network = lower(model, example)
        self.graph = network.graph
        self.grids = network.grids
        self.engine = {
            str(node.module): network.layers[node.name].engine for node in network.graph.nodes if node.op in LAYER_OPS
        }
        self._codes = CodeNetwork(network, torch.float32)

    @torch.no_grad()
    def tensors(self, x: Any) -> dict[str, Tensor]:
        """Codes of every value for an input, as float32 tensors of whole numbers."""
        return {node.name: codes for node, codes in self._codes.values(input_tensor(x))}

    @torch.no_grad()
    def __call__(self, x: Any) -> list[Tensor]:
        """The network's outputs, dequantized."""
        return self._codes.outputs(input_tensor(x))
