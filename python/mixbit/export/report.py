"""How large the accumulators of an integer network can get, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from mixbit.export.lowering import EXACT_FP32, INT32_MAX, lower
from mixbit.network import LAYER_OPS


@dataclasses.dataclass(frozen=True)
class AccumulatorReport:
    """The accumulator of one layer, over all inputs that its act grid can express.

    Attributes:
        layer: Module path.
        products: Largest sum of |q_w| max |q_x - z_x| over the outputs: what a float engine sums.
        reach: The same with the bias: no partial sum exceeds it, in any order.
        bits: Bits of a signed integer that holds every partial sum; 0 where a bias has no finite code.
        fits_int32: Whether overflow of 32 bits is impossible. Exporters refuse a layer that does not fit.
        exact_fp32: Whether products stay below 2^24, where float32 sums are exact in any order; else exported programs
            multiply this layer in float64.
    """

    layer: str
    products: int
    reach: float
    bits: int
    fits_int32: bool
    exact_fp32: bool


def report(model: nn.Module, example: Any) -> list[AccumulatorReport]:
    """Bounds of every layer's accumulator, from its codes; layers that can overflow are listed, not refused.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.

    Returns:
        One entry for each call of a layer, in order.

    Raises:
        MixbitError: A step is missing, or the network holds an operation that integer networks do not have.
    """
    network = lower(model, example, check_overflow=False)
    found = []
    for node in network.graph.nodes:
        if node.op in LAYER_OPS:
            layer = network.layers[node.name]
            found.append(
                AccumulatorReport(
                    str(node.module),
                    layer.products_reach,
                    layer.reach,
                    int(layer.reach).bit_length() + 1 if layer.reach < float("inf") else 0,
                    layer.reach <= INT32_MAX,
                    layer.products_reach < EXACT_FP32,
                )
            )
    return found
