"""Cycles of layers on a family of small parallel RISC-V clusters: a model of our own that stands in for measurements.

The family is that of PULP's 8-core clusters and their kernel libraries: cores without any instruction below 8 bits
("8bit" with 8-bit kernels only, "xpulpv2" with kernels that unpack), cores that multiply 8-, 4- and 2-bit vectors of
equal widths ("xpulpnn"), and cores that multiply vectors of any two of these widths ("xpulpnn-mixed"). The rates are
counted from the inner loops of such kernels, the rest is assumed: nothing here was measured, and no figure is one of
the Free Bits paper (arXiv 2307.02894). It says which widths a kind of core likes, not how long a network takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from mixbit.costs.latency import Latencies, latency_table, shape_key, write_latencies
from mixbit.errors import MixbitError, check_choice
from mixbit.files import PathLike
from mixbit.network import Layer, LayerList, Shapes, layers
from mixbit.tables import OUTPUT_BITS, CostTable

TARGETS = ("8bit", "xpulpv2", "xpulpnn", "xpulpnn-mixed")
KERNELS = (2, 4, 8)
UNIT = "cycles (stand-in)"

_CORES = 8
#: Bits a cycle between the two levels of memory, for weights (double-buffered behind the computation) and for maps.
_WEIGHT_BITS, _MAP_BITS = 8, 64
#: Cycles of a call beside its work.
_CALL = 1000
#: MACs a cycle and core: of operands that are unpacked in software, by weight bits; of vectors, by the wider operand;
#: of depthwise kernels, as they are and with unpacking.
_UNPACKED = {8: Fraction(32, 14), 4: Fraction(64, 72), 2: Fraction(128, 140)}
_VECTORS = {8: Fraction(32, 9), 4: Fraction(64, 9), 2: Fraction(128, 9)}
_DEPTHWISE, _DEPTHWISE_UNPACKED = Fraction(3, 5), Fraction(3, 10)
#: Cycles and core to lay out one element of the input for the inner loop (im2col), by act bits.
_LAYOUT = {8: Fraction(1, 2), 4: Fraction(15, 8), 2: Fraction(29, 16)}


def pulp(target: str, model: nn.Module, example: Any, widths: Iterable[int] = KERNELS) -> CostTable:
    """Cycles of every layer, by an analytic model that stands in for measurements; see the module.

    Args:
        target: "8bit", "xpulpv2", "xpulpnn" or "xpulpnn-mixed".
        model: In eval mode.
        example: An item of `batches`.
        widths: Axes of the table, 1 ... 8; a width without a kernel costs what the next wider kernel (2, 4, 8) does.

    Raises:
        MixbitError: The target is unknown, or a width is not in 1 ... 8.
    """
    found = layers(model, example)
    return latency_table(found, _rows(target, found, widths), UNIT, target)


def pulp_csv(path: PathLike, target: str, model: nn.Module, example: Any, widths: Iterable[int] = KERNELS) -> Path:
    """Writes `pulp`'s figures as a latency CSV, a row for each distinct shape and pair of widths.

    Args:
        path: The file, replaced if it exists.
        target: As in `pulp`.
        model: In eval mode.
        example: An item of `batches`.
        widths: As in `pulp`.

    Returns:
        The path. `mixbit.costs.latency` reads the table of `pulp` from it.

    Raises:
        MixbitError: As in `pulp`.
    """
    return write_latencies(path, _rows(target, layers(model, example), widths), UNIT)


def _rows(target: str, found: LayerList, widths: Iterable[int]) -> Latencies:
    check_choice("target", target, TARGETS)
    bits = sorted(set(widths))
    if not bits or not all(1 <= b <= KERNELS[-1] for b in bits):
        raise MixbitError(f"widths={bits}: expected some of 1 ... {KERNELS[-1]}")
    return {
        (shape_key(layer, shapes), a, w): float(cycles(target, layer, shapes, a, w))
        for layer in found
        for shapes in layer.call_shapes
        for a in bits
        for w in bits
    }


def cycles(target: str, layer: Layer, shapes: Shapes, act: int, weight: int) -> int:
    """Cycles of one call: the larger of computing and fetching weights, then moving input and output (8 bits).

    Args:
        target: As in `pulp`.
        layer: The layer.
        shapes: Of the call.
        act: Bits of the input, 1 ... 8.
        weight: Bits of the weights, 1 ... 8.
    """
    a, w = (next(k for k in KERNELS if bits <= k) for bits in (act, weight))
    if target == "8bit":
        a = w = KERNELS[-1]
    fetching = Fraction(math.prod(shapes.weight) * w, _WEIGHT_BITS)
    moving = Fraction(math.prod(shapes.input) * a + math.prod(shapes.output) * OUTPUT_BITS, _MAP_BITS)
    return math.ceil(max(_computing(target, layer, shapes, a, w), fetching) + moving) + _CALL


def _computing(target: str, layer: Layer, shapes: Shapes, a: int, w: int) -> Fraction:
    vectors = target in ("xpulpnn", "xpulpnn-mixed")
    patch = math.prod(shapes.weight[1:])
    macs = math.prod(shapes.output) * patch
    if layer.depthwise:
        rate = _DEPTHWISE if vectors or min(a, w) == KERNELS[-1] else _DEPTHWISE_UNPACKED
        return macs / rate / _CORES
    # A kernel larger than a pixel is laid out anyway; a pixel only where its bits have to be changed.
    laid_out = math.prod(shapes.weight[2:]) > 1
    layout = _LAYOUT[a]
    if target == "xpulpnn-mixed":
        rate, layout = _VECTORS[max(a, w)], _LAYOUT[KERNELS[-1]]
    elif target == "xpulpnn":
        # Narrower weights are unpacked as without vectors, at the faster loop's pace; narrower acts in the layout.
        rate = _VECTORS[w] if w >= a else _UNPACKED[w] * _VECTORS[8] / _UNPACKED[8]
        laid_out |= a < w
    else:
        rate = _UNPACKED[w]
        laid_out |= a < KERNELS[-1]
    pixels = math.prod(shapes.output) // shapes.weight[0]
    return (macs / rate + (pixels * patch * layer.groups * layout if laid_out else 0)) / _CORES
