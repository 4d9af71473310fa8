"""Small static pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape


def _color(share: float) -> str:
    """From dark violet (0) over green to yellow (1)."""
    stops = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def heat_map(layers: Sequence[str], bits: Sequence[int], values: Sequence[Sequence[float]]) -> str:
    """Layers x bits, SQNR in dB as colour and number."""
    finite = [v for row in values for v in row if math.isfinite(v)]
    top = max([*finite, 1.0])
    left, width, height = 8 + 7 * max(len(n) for n in layers), 44, 18
    total = (left + width * len(bits) + 8, 26 + height * len(layers))
    parts = [f'<svg viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img">']
    parts.append("<title>SQNR in dB of each layer at equal act and weight bits</title>")
    for j, b in enumerate(bits):
        parts.append(f'<text x="{left + width * (j + 0.5):.0f}" y="16" text-anchor="middle">{b}</text>')
    for i, (name, row) in enumerate(zip(layers, values, strict=True)):
        y = 24 + height * i
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(row):
            share = 1.0 if value == math.inf else value / top
            ink = "#000" if share > 0.6 else "#fff"
            text = "∞" if value == math.inf else f"{value:.1f}"
            x = left + width * j
            parts.append(f'<rect x="{x}" y="{y}" width="{width - 1}" height="{height - 1}" fill="{_color(share)}"/>')
            parts.append(f'<text x="{x + width / 2:.0f}" y="{y + 13}" text-anchor="middle" fill="{ink}">{text}</text>')
    return "".join([*parts, "</svg>"])


def bits_chart(rows: Sequence[tuple[str, int | None, int | None]]) -> str:
    """Two bars a layer: weight and act bits; float is shown as 32, cut at the top of the scale."""
    left, step, unit, height = 8 + 7 * max(len(n) for n, _, _ in rows), 22, 20, 9
    highest = max([min(b or 32, 16) for _, act, weight in rows for b in (act, weight)])
    total = (left + unit * highest + 60, step * len(rows) + 8)
    parts = [f'<svg viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img">']
    parts.append("<title>Bits of weights and inputs of each layer</title>")
    for i, (name, act, weight) in enumerate(rows):
        y = 4 + step * i
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for k, (kind, bits) in enumerate((("weight", weight), ("act", act))):
            length = unit * min(bits or 32, highest)
            at = y + k * height
            parts.append(f'<rect class="{kind}" x="{left}" y="{at}" width="{length}" height="{height - 1}"/>')
            label = "float" if bits is None else str(bits)
            parts.append(f'<text class="small" x="{left + length + 4}" y="{at + 8}">{label}</text>')
    return "".join([*parts, "</svg>"])
