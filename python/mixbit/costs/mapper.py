"""What a model costs on an accelerator, each layer at its proven best mapping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mixbit.files import PathLike
from mixbit.hw import Architecture, Workload, mapper_table
from mixbit.tables import CostTable


def mapper(
    arch: Architecture | PathLike,
    model: nn.Module,
    example: Any,
    objective: str = "energy",
    *,
    widths: Iterable[int] | None = None,
    depthwise_as_full: bool = False,
    tensor_bits: int = 8,
    threads: int | None = None,
    scale_mac: bool = False,
    progress: Any = None,
) -> CostTable:
    """Cost of every layer at every (act, weight, output) width, mapped as well as can be.

    A layer's output has the act width of the layer that reads it (`consumer`), `tensor_bits` where it enters an add or
    a concatenation, and 8 bits at a network output; `values` is the slice with 8-bit outputs. `total(recipe)` is what
    `mixbit.hw.map_network(arch, net, recipe, objective).total()` gives.

    Args:
        arch: The accelerator, its name or its file.
        model: In eval mode.
        example: An item of `batches`.
        objective: "energy" (pJ), "delay" (cycles), "edp" (J * cycle, summed over layers) or "last_level_accesses"
            (words).
        widths: Bits to choose from; None takes 2 ... 8, and 16 where the words have as many.
        depthwise_as_full: Counts depthwise layers as full convolutions, as the published numbers do.
        tensor_bits: Width of adds and concatenations.
        threads: Of the search; None takes all processors.
        scale_mac: Lets the energy of a multiply-accumulate follow the widths.
        progress: Called with (layers done, layers, name).

    Raises:
        MixbitError: The architecture does not fit, or leaves a layer without a mapping.
    """
    found = arch if isinstance(arch, Architecture) else Architecture.load(arch)
    net = Workload.from_model(model, example, depthwise_as_full=depthwise_as_full, tensor_bits=tensor_bits)
    return mapper_table(found, net, objective, widths=widths, threads=threads, scale_mac=scale_mac, progress=progress)
