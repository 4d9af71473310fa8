"""ONNX files of integer networks: what is said before, during and after writing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mixbit.errors import MixbitError, check_choice
from mixbit.export.lowering import lower
from mixbit.export.onnx_graph import IR_VERSIONS, Bytes, write_model
from mixbit.export.package import check_output
from mixbit.export.qdq import OPSETS, QDQ
from mixbit.export.qonnx import DOMAIN, QONNX
from mixbit.files import PathLike

DIALECTS = ("qdq", "qonnx")
QONNX_LIMIT = (
    f"Quant nodes of the domain {DOMAIN} need a consumer that knows them (qonnx, FINN, hls4ml); weights are stored as "
    "float32"
)

FUNCTIONS_LIMIT = "patterns that recur are functions of the file (IR version 8): the consumer has to inline them"


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: The file.
        dialect: "qdq" or "qonnx".
        opset: Of the default domain.
        stored: Bits in which each layer's weights are stored, by module path.
        bytes: Of the file, by what they are for.
        limits: What a consumer must be able to do, and widths that the format could not express, as sentences.
    """

    path: Path
    dialect: str
    opset: int
    stored: dict[str, int]
    bytes: Bytes
    limits: tuple[str, ...]


def write_onnx(
    model: nn.Module,
    example: Any,
    path: PathLike,
    *,
    dialect: str,
    exact: bool,
    opset: int | None,
    dynamic_batch: bool,
    compact: bool,
    force: bool,
    say: Callable[[str], None] | None,
) -> OnnxReport:
    """See `mixbit.export.onnx`."""
    check_choice("dialect", dialect, DIALECTS)
    target = check_output(path, ".onnx", force)
    known = list(IR_VERSIONS)
    if opset is not None and opset not in known:
        raise MixbitError(f"opset={opset!r}: expected one from {known[0]} to {known[-1]}")
    if compact and dialect != "qdq":
        raise MixbitError(f"compact=True: the dialect {dialect!r} has no functions; expected dialect 'qdq'")
    network = lower(model, example)
    writer = QDQ(network, example, opset, exact) if dialect == "qdq" else QONNX(network, example, opset)
    limits = _limits(writer) if isinstance(writer, QDQ) else [QONNX_LIMIT]
    if compact:
        limits.append(FUNCTIONS_LIMIT)
    widest = network.widest_stored()
    limits += [] if widest is None else [widest]
    for limit in limits:
        if say is not None:
            say(limit)
    wider = [limit for limit in limits if "nearest" in limit or limit == widest]
    if say is None and wider:
        warnings.warn("; ".join(wider), UserWarning, stacklevel=3)
    batch = ["N"] if dynamic_batch else [1]
    notes = {"version": 1, "dialect": dialect, "class": "exact" if exact and dialect == "qdq" else "one_code"}
    shapes = writer.shapes
    stored = writer.containers.stored if isinstance(writer, QDQ) else dict.fromkeys(writer.bits, 32)
    outputs = dict(zip(writer.outputs, network.graph.outputs, strict=True))
    proto = writer.build.model(
        "mixbit",
        {writer.input: batch + list(shapes[writer.input][1:])},
        {name: batch + list(shapes[node][1:]) for name, node in outputs.items()},
        domains=() if dialect == "qdq" else (DOMAIN,),
        compact=compact,
        notes=notes,
    )
    data = write_model(proto, target)
    return OnnxReport(target, dialect, writer.build.opset, stored, writer.build.bytes_of(data), tuple(limits))


def _limits(writer: QDQ) -> list[str]:
    """What a consumer of a QDQ file has to know."""
    limits = []
    wider: dict[tuple[int, int], list[str]] = {}
    for path, stored in writer.containers.stored.items():
        bits = writer.containers.bits[path]
        if stored > max(bits, 2):
            wider.setdefault((bits, stored), []).append(path)
    for (bits, stored), paths in sorted(wider.items()):
        missing = f" that opset {writer.build.opset} has" if stored > 2 * bits or (bits, stored) == (2, 4) else ""
        limits.append(
            f"{bits}-bit weights are stored in {stored} bits, the nearest width that can be expressed{missing} "
            f"({len(paths)} layer(s), the first is {paths[0]!r})"
        )
    for bits in (2, 4):
        if bits in writer.containers.stored.values():
            opset = OPSETS[bits]
            limits.append(f"int{bits} weights need opset {opset} (IR version {IR_VERSIONS[opset]}) at the consumer")
            break
    return limits
