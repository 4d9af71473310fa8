"""Latency tables from a CSV that was measured or given."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike
from mixbit.network import Layer, layers
from mixbit.tables import CostTable

COLUMNS = (
    "kind cin cout groups kh kw sh sw ph pw hin win act_bits weight_bits out_bits latency unit".split()  # noqa: SIM905
)
SHAPE = COLUMNS[:12]


def shape_key(layer: Layer) -> tuple[str | int, ...]:
    """The shape columns of a layer: layers with equal keys share the rows of a latency table."""
    if layer.kind == "linear":
        return ("linear", layer.shapes.weight[1], layer.shapes.weight[0], 1, 1, 1, 1, 1, 0, 0, 1, 1)
    cin, hin, win = layer.shapes.input
    kh, kw = layer.shapes.weight[2:]
    return ("conv2d", cin, layer.shapes.weight[0], layer.groups, kh, kw, *layer.stride, *layer.padding, hin, win)


def latency(path: PathLike, model: nn.Module, example: Any) -> CostTable:
    """Latency of every layer from a CSV with the columns kind, cin, cout, groups, kh, kw, sh, sw, ph, pw, hin, win,
    act_bits, weight_bits, out_bits, latency, unit.

    The axes are the widths in the file; of rows that differ in out_bits only, the one with out_bits 8 counts, else the
    slowest. A layer called several times counts as often.

    Args:
        path: The CSV file.
        model: In eval mode.
        example: An item of `batches`.

    Raises:
        MixbitError: The file is missing or damaged, a latency is negative or not finite, rows contradict each other or
            have different units, or a layer lacks a pair of widths (all such holes are listed).
    """
    rows, unit = _read(Path(path))
    found = layers(model, example)
    acts = sorted({a for _, a, _ in rows})
    weights = sorted({w for _, _, w in rows})
    values = np.zeros((len(found), len(acts), len(weights)))
    holes = []
    for i, layer in enumerate(found):
        key = shape_key(layer)
        for j, a in enumerate(acts):
            for k, w in enumerate(weights):
                choices = rows.get((key, a, w))
                if choices is None:
                    holes.append(f"{layer.name} {key} act={a} weight={w}")
                else:
                    values[i, j, k] = choices.get(8, max(choices.values())) * layer.calls
    if holes:
        shown = "; ".join(holes[:10]) + (f"; and {len(holes) - 10} more" if len(holes) > 10 else "")
        raise MixbitError(f"{str(path)!r} has no latency for {len(holes)} entries: {shown}")
    groups = [layer.input_group for layer in found]
    return CostTable.from_arrays(found.names, values, acts, weights, unit=unit, input_group=groups)


def _read(path: Path) -> tuple[dict[tuple[Any, int, int], dict[int, float]], str]:
    """{(shape, act, weight): {out_bits: latency}} and the unit."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MixbitError(f"cannot read the latency table {str(path)!r}: {error}") from error
    reader = csv.DictReader(text.splitlines())
    header = reader.fieldnames or []
    for name in COLUMNS:
        if name not in header:
            raise MixbitError(
                f"{str(path)!r} has no column {name!r}{did_you_mean(name, header)}; expected {', '.join(COLUMNS)}"
            )
    rows: dict[tuple[Any, int, int], dict[int, float]] = {}
    units = set()
    for row in reader:
        where = f"{str(path)!r} line {reader.line_num}"
        try:
            key = (row["kind"], *(int(row[c]) for c in SHAPE[1:]))
            act, weight, out = (int(row[c]) for c in ("act_bits", "weight_bits", "out_bits"))
            value = float(row["latency"])
        except (TypeError, ValueError) as error:
            raise MixbitError(f"{where}: {error}; expected whole numbers and a latency") from error
        if not math.isfinite(value) or value < 0:
            raise MixbitError(f"{where}: latency={row['latency']}; expected a finite number >= 0")
        units.add(row["unit"])
        known = rows.setdefault((key, act, weight), {})
        if known.setdefault(out, value) != value:
            raise MixbitError(f"{where}: contradicts an earlier row of the same layer and widths ({known[out]})")
    if not rows:
        raise MixbitError(f"{str(path)!r} has no rows; expected at least one latency")
    if len(units) > 1:
        raise MixbitError(f"{str(path)!r} mixes the units {sorted(units)}; expected one")
    return rows, units.pop()
