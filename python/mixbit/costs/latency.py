"""Latency tables from a CSV that was measured or given."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.files import PathLike, write_text
from mixbit.network import Layer, LayerList, Shapes, layers
from mixbit.tables import FLOAT_BITS, OUTPUT_BITS, CostTable

COLUMNS = (
    "kind cin cout groups kh kw sh sw ph pw hin win act_bits weight_bits out_bits latency unit".split()  # noqa: SIM905
)
SHAPE = COLUMNS[:12]
KINDS = ("conv2d", "linear")

#: A layer's kind and sizes, as `SHAPE` lists them.
Key = tuple[str | int, ...]
#: Latency by key, act bits and weight bits.
Latencies = dict[tuple[Key, int, int], float]


def shape_key(layer: Layer, shapes: Shapes | None = None) -> Key:
    """The shape columns of one call of a layer: calls with equal keys share the rows of a latency table.

    Args:
        layer: Of `mixbit.layers`.
        shapes: Of the call; None takes the first. A linear layer that reads several vectors of an image (tokens) has
            their number as hin.
    """
    shapes = layer.shapes if shapes is None else shapes
    if layer.kind == "linear":
        return ("linear", shapes.weight[1], shapes.weight[0], 1, 1, 1, 1, 1, 0, 0, math.prod(shapes.input[:-1]), 1)
    cin, hin, win = shapes.input
    kh, kw = shapes.weight[2:]
    return ("conv2d", cin, shapes.weight[0], layer.groups, kh, kw, *layer.stride, *layer.padding, hin, win)


def latency(path: PathLike, model: nn.Module, example: Any) -> CostTable:
    """Latency of every layer from a CSV with the columns kind, cin, cout, groups, kh, kw, sh, sw, ph, pw, hin, win,
    act_bits, weight_bits, out_bits, latency, unit; others are ignored.

    The axes are the widths in the file; of rows that differ in out_bits only, the one with out_bits 8 counts, else the
    slowest. Layers of equal shapes share rows. A layer called several times counts every call.

    Args:
        path: The CSV file.
        model: In eval mode.
        example: An item of `batches`.

    Raises:
        MixbitError: The file is missing or damaged, a row is no latency of a layer, contradicts another or has another
            unit, which is said with its line; or a layer lacks a pair of widths (all such holes in one error).
    """
    rows, unit = _read(Path(path))
    return latency_table(layers(model, example), rows, unit, repr(str(path)))


def latency_table(found: LayerList, rows: Mapping[tuple[Key, int, int], float], unit: str, source: str) -> CostTable:
    """The table of a network from latencies by shape and widths; the axes are all widths that occur.

    Args:
        found: The layers.
        rows: {(`shape_key`, act bits, weight bits): latency}.
        unit: Of the latencies.
        source: What errors call the rows.

    Raises:
        MixbitError: A layer lacks a pair of widths.
    """
    acts = sorted({a for _, a, _ in rows})
    weights = sorted({w for _, _, w in rows})
    values = np.zeros((len(found), len(acts), len(weights)))
    holes: dict[str, None] = {}
    for i, layer in enumerate(found):
        for shapes in layer.call_shapes:
            key = shape_key(layer, shapes)
            for j, a in enumerate(acts):
                for k, w in enumerate(weights):
                    if (key, a, w) in rows:
                        values[i, j, k] += rows[key, a, w]
                    else:
                        sizes = ",".join(str(size) for size in key)
                        holes[f"{layer.name} ({sizes}) act={a} weight={w}"] = None
    if holes:
        shown = "; ".join(list(holes)[:10]) + (f"; and {len(holes) - 10} more" if len(holes) > 10 else "")
        raise MixbitError(f"{source} has no latency for {len(holes)} entries: {shown}")
    groups = [layer.input_group for layer in found]
    return CostTable.from_arrays(found.names, values, acts, weights, unit=unit, input_group=groups)


def write_latencies(path: PathLike, rows: Mapping[tuple[Key, int, int], float], unit: str) -> Path:
    """Writes a CSV that `latency` reads, atomically, outputs at 8 bits; returns its path.

    Args:
        path: The file.
        rows: {(`shape_key`, act bits, weight bits): latency}.
        unit: Of the latencies.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (key, act, weight), value in rows.items():
        writer.writerow([*key, act, weight, OUTPUT_BITS, repr(value), unit])
    return write_text(path, text.getvalue())


def _read(path: Path) -> tuple[Latencies, str]:
    """The latencies that count, and their unit."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MixbitError(f"cannot read the latency table {str(path)!r}: {error}") from error
    reader = csv.DictReader(text.splitlines())
    header = reader.fieldnames or []
    for name in COLUMNS:
        if name not in header:
            raise MixbitError(
                f"{str(path)!r} has no column {name!r}{did_you_mean(name, header)}; expected {', '.join(COLUMNS)}"
            )
    # {out bits: (latency, line)} of each layer at each pair of widths.
    found: dict[tuple[Key, int, int], dict[int, tuple[float, int]]] = {}
    unit: str | None = None
    for row in reader:
        where = f"{str(path)!r} line {reader.line_num}"
        key, act, weight, out, value = _entry(row, where)
        unit = row["unit"] if unit is None else unit
        if row["unit"] != unit:
            raise MixbitError(f"{where}: unit {row['unit']!r}, after rows in {unit!r}; expected one unit")
        known, line = found.setdefault((key, act, weight), {}).setdefault(out, (value, reader.line_num))
        if known != value:
            raise MixbitError(
                f"{where}: latency={value} contradicts line {line} of the same layer and widths ({known})"
            )
    if unit is None:
        raise MixbitError(f"{str(path)!r} has no rows; expected at least one latency")
    return {at: outs.get(OUTPUT_BITS, max(outs.values()))[0] for at, outs in found.items()}, unit


def _entry(row: Mapping[str, Any], where: str) -> tuple[Key, int, int, int, float]:
    """Key, act, weight and out bits and latency of a row."""
    if None in row.values() or None in row:
        raise MixbitError(f"{where} has another number of fields than the header; expected {len(COLUMNS)} or more")
    kind = check_choice(f"{where}: kind", row["kind"], KINDS)
    try:
        sizes = [int(row[name]) for name in SHAPE[1:]]
        act, weight, out = widths = [int(row[name]) for name in ("act_bits", "weight_bits", "out_bits")]
        value = float(row["latency"])
    except ValueError as error:
        raise MixbitError(f"{where}: {error}; expected whole numbers and a latency") from error
    for name, bits in zip(("act_bits", "weight_bits", "out_bits"), widths, strict=True):
        if not 1 <= bits <= FLOAT_BITS:
            raise MixbitError(f"{where}: {name}={bits}; expected 1 ... {FLOAT_BITS}")
    if not math.isfinite(value) or value < 0:
        raise MixbitError(f"{where}: latency={row['latency']}; expected a finite number >= 0")
    return (kind, *sizes), act, weight, out, value
