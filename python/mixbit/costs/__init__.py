"""Cost tables of a model: operations, bit operations, memory, latency, an accelerator. All for one image.

Functions of `(model, example)` return a CostTable over the widths 1 ... 8, 16 and 32 (float); `latency`, `mapper` and
`pulp` have widths of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from mixbit.costs.latency import latency
from mixbit.costs.mapper import mapper
from mixbit.costs.pulp import pulp, pulp_csv
from mixbit.network import Layer, LayerList, layers
from mixbit.tables import CostTable

__all__ = [
    "WIDTHS",
    "activation_memory",
    "bops",
    "latency",
    "mapper",
    "ops",
    "pulp",
    "pulp_csv",
    "weight_memory",
]

#: Widths of both axes; 32 stands for float.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


def _table(
    model: nn.Module,
    example: Any,
    unit: str,
    cost: Callable[[Layer, int, int], float],
    reduce: str = "sum",
    additive: bool = True,
) -> CostTable:
    found: LayerList = layers(model, example)
    values = np.array([[[cost(layer, a, w) for w in WIDTHS] for a in WIDTHS] for layer in found], dtype=np.float64)
    groups = [layer.input_group for layer in found]
    return CostTable.from_arrays(
        found.names, values, WIDTHS, WIDTHS, unit=unit, input_group=groups, reduce=reduce, additive=additive
    )


def ops(model: nn.Module, example: Any) -> CostTable:
    """Operations weighted by the wider operand: MACs * max(act bits, weight bits)."""
    return _table(model, example, "ops", lambda layer, a, w: float(layer.macs) * max(a, w))


def bops(model: nn.Module, example: Any) -> CostTable:
    """Bit operations: MACs * act bits * weight bits."""
    return _table(model, example, "bops", lambda layer, a, w: float(layer.macs) * a * w)


def weight_memory(model: nn.Module, example: Any) -> CostTable:
    """Bits that the weights take."""
    return _table(model, example, "bits", lambda layer, a, w: float(layer.weights) * w)


def activation_memory(model: nn.Module, example: Any) -> CostTable:
    """Bits of the tensors alive while a layer runs, totalled by maximum.

    The input at its act bits, the output and every other tensor that is still needed at 8 bits.
    """
    return _table(
        model,
        example,
        "peak bits",
        lambda layer, a, w: layer.input_elements * a + (layer.output_elements + layer.other_live) * 8.0,
        reduce="max",
        additive=False,
    )
