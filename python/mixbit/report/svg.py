"""Small static pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

#: Most values that the key of a picture lists.
_KEYS = 10


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


def bits_chart(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Two bars a layer: weight and act bits; float is shown as 32, cut at the top of the scale."""
    highest = math.ceil(max([min(b or 32, 16) for _, act, weight in rows for b in (act, weight)]))

    def bar(kind: str, bits: float | None) -> Bar:
        return Bar(kind, min(bits or 32, highest), "float" if bits is None else str(bits))

    bars = [(name, (bar("weight", weight), bar("act", act))) for name, act, weight in rows]
    return paired_bars(bars, "Bits of weights and inputs of each layer", 20 * highest)


def strips(rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, title: str) -> str:
    """What each row is over time, as colour: dark for the least value of all, light for the largest.

    Args:
        rows: Name and (time from which on, value) pairs, ascending; every row ends at the latest time of all.
        label: Of the time axis.
        title: For screen readers.
    """
    left, height, length = 8 + 7 * max(len(n) for n, _ in rows), 12, 480
    values = sorted({value for _, points in rows for _, value in points})
    start, end = (pick(time for _, points in rows for time, _ in points) for pick in (min, max))
    total = (left + length + 12, height * len(rows) + 44)
    parts = [f'<svg viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img">']
    parts.append(f"<title>{escape(title)}</title>")

    def color(value: float) -> str:
        return _color(values.index(value) / max(len(values) - 1, 1))

    def at(time: float) -> float:
        return left + length * (time - start) / max(end - start, 1e-9)

    # Means over channels may be many: some of them tell the scale.
    count = min(len(values), _KEYS)
    for i in range(count):
        value = values[round(i * (len(values) - 1) / max(count - 1, 1))]
        parts.append(f'<rect x="{left + 60 * i}" y="2" width="12" height="10" fill="{color(value)}"/>')
        parts.append(f'<text class="small" x="{left + 60 * i + 16}" y="11">{value:g}</text>')
    for i, (name, points) in enumerate(rows):
        y = 18 + height * i
        parts.append(f'<text class="small" x="{left - 6}" y="{y + 9}" text-anchor="end">{escape(name)}</text>')
        turns = [p for k, p in enumerate(points) if k == 0 or p[1] != points[k - 1][1]]
        for (time, value), until in zip(turns, [*(t for t, _ in turns[1:]), end], strict=True):
            x, width = at(time), at(until) - at(time)
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height - 2}" fill="{color(value)}"/>')
    y = total[1] - 8
    parts.append(f'<text class="small" x="{left}" y="{y}">{label} {start:g}</text>')
    parts.append(f'<text class="small" x="{left + length}" y="{y}" text-anchor="end">{label} {end:g}</text></svg>')
    return "\n".join(parts)


class Bar(NamedTuple):
    """A bar: its CSS class, its value >= 0, what is written behind it."""

    kind: str
    value: float
    label: str


def paired_bars(rows: Sequence[tuple[str, tuple[Bar, Bar]]], title: str, length: int = 420) -> str:
    """Two thin bars a row.

    Args:
        rows: Name and bars, from above.
        title: For screen readers.
        length: Of the longest bar.
    """
    left, step, height = 8 + 7 * max(len(n) for n, _ in rows), 22, 9
    top = max([bar.value for _, bars in rows for bar in bars]) or 1.0
    room = 24 + max(12, *(5 * len(bar.label) for _, bars in rows for bar in bars))
    total = (left + length + room, step * len(rows) + 8)
    parts = [f'<svg viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img">']
    parts.append(f"<title>{escape(title)}</title>")
    for i, (name, bars) in enumerate(rows):
        y = 4 + step * i
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for k, bar in enumerate(bars):
            size, at = length * bar.value / top, y + k * height
            parts.append(f'<rect class="{bar.kind}" x="{left}" y="{at}" width="{size:.5g}" height="{height - 1}"/>')
            label = f'<text class="small" x="{left + size + 4:.5g}" y="{at + 8}">{escape(bar.label)}</text>'
            parts.append(label)
    return "".join([*parts, "</svg>"])


@dataclasses.dataclass(frozen=True)
class Dot:
    """A point of a scatter: where it is, what it belongs to, what is said of it."""

    x: float
    y: float
    series: str
    name: str
    label: str = ""
    on_front: bool = False
    hollow: bool = False


#: Okabe and Ito's colours, which people with any colour vision tell apart, and a mark for each, so that print does too.
_COLORS = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a5a2b")
#: Outlines of marks around (0, 0), about 9 across.
_MARKS = (
    "M-4-4H4V4H-4Z",
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",
    "M0-5L5 4H-5Z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0 5L5-4H-5Z",
    "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "M-5-5L0-1.8L5-5L1.8 0L5 5L0 1.8L-5 5L-1.8 0Z",
    "M-2-5H2L5-2V2L2 5H-2L-5 2V-2Z",
)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from below `low` to above `high`, at most about `most`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, reference: float | None = None) -> str:
    """Points by series, the dots on a front joined by a staircase, a horizontal line for the float network.

    Args:
        dots: At least one; x is 0 or more. Series take their marks in the order in which they first appear.
        x_label: Under the picture.
        y_label: Above the picture.
        reference: Where the float network's line lies, if there is one.
    """
    series = list(dict.fromkeys(dot.series for dot in dots))
    values = [dot.y for dot in dots] + ([] if reference is None else [reference])
    spread = max(values) - min(values) or max(abs(values[0]), 1.0)
    xs = _ticks(0.0, max(*(dot.x for dot in dots), 1e-9))
    ys = _ticks(min(values) - 0.02 * spread, max(values) + 0.02 * spread)
    left, top, width, height = 46, 26, 430, 270
    key = top + height + 44
    columns = 2
    rows = math.ceil(len(series) / columns)

    def place(x: float, y: float) -> tuple[str, str]:
        across = left + width * (x - xs[0]) / (xs[-1] - xs[0])
        down = top + height * (ys[-1] - y) / (ys[-1] - ys[0])
        return f"{across:.1f}", f"{down:.1f}"

    def mark(index: int, x: str, y: str, name: str, hollow: bool) -> str:
        color, outline = _COLORS[index % len(_COLORS)], _MARKS[index % len(_MARKS)]
        fill = "none" if hollow else color
        shape = f'<path d="{outline}" transform="translate({x} {y})" fill="{fill}" stroke="{color}" stroke-width="1.2"'
        return f'{shape} fill-opacity="0.8"><title>{escape(name)}</title></path>'

    total = (left + width + 14, key + 18 * rows)
    parts = [f'<svg viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img">']
    parts.append(f"<title>{escape(y_label)} against {escape(x_label)}</title>")
    parts.append(f'<text x="6" y="14">{escape(y_label)}</text>')
    for y in ys:
        at = place(xs[0], y)[1]
        parts.append(f'<path d="M{left} {at}H{left + width}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{float(at) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        at = place(x, ys[0])[0]
        parts.append(f'<path d="M{at} {top}V{top + height}" class="grid"/>')
        parts.append(f'<text x="{at}" y="{top + height + 15}" text-anchor="middle">{x:g}</text>')
    middle = left + width // 2
    parts.append(f'<text x="{middle}" y="{top + height + 31}" text-anchor="middle">{escape(x_label)}</text>')
    if reference is not None:
        at = place(xs[0], reference)[1]
        parts.append(f'<path d="M{left} {at}H{left + width}" class="float"/>')
        parts.append(f'<text x="{left + 4}" y="{float(at) - 4:.1f}">float {reference:.2f}</text>')
    front = sorted({(dot.x, dot.y) for dot in dots if dot.on_front})
    if front:
        # A staircase: what a budget buys stays the same up to the next point of the front.
        first, *others = (place(*corner) for corner in front)
        steps = "".join(f"H{across}V{down}" for across, down in others)
        parts.append(f'<path d="M{" ".join(first)}{steps}H{left + width}" class="front"/>')
    for dot in reversed(dots):  # what comes first lies on top
        said = f"{dot.name}: {dot.x:.3f}, {dot.y:.2f}"
        parts.append(mark(series.index(dot.series), *place(dot.x, dot.y), said, dot.hollow))
    for dot in dots:
        if dot.label:
            across, down = (float(v) for v in place(dot.x, dot.y))
            anchor, right, below = ("end", -8, -7) if across > left + width - 50 else ("start", 8, 12)
            where = f'x="{across + right:.1f}" y="{down + below:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text class="small" {where}>{escape(dot.label)}</text>')
    for i, name in enumerate(series):
        across, down = left + width // columns * (i % columns), key + 18 * (i // columns)
        parts.append(mark(i, str(across), str(down), name, False))
        parts.append(f'<text x="{across + 10}" y="{down + 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """A picture as a file of its own."""
    style = (
        "<style>svg{font:11px system-ui,sans-serif;background:#fff}.small{font-size:9px}.grid{stroke:#ddd}"
        ".front{stroke:#222;stroke-width:1.4;fill:none}.float{stroke:#777;stroke-dasharray:5 4}</style>"
    )
    head, _, rest = svg.partition(">")
    named = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}>{style}{rest}\n"


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], unit: str, title: str) -> str:
    """One bar a row, made of parts, with a legend.

    Args:
        rows: Name and one value for each part, all >= 0.
        parts: What the values are.
        unit: Of the values.
        title: For screen readers and as a heading.
    """
    left, step, length = 8 + 7 * max(len(n) for n, _ in rows), 18, 560
    legend = 14 * -(-len(parts) // 3)
    top = max([sum(values) for _, values in rows] + [1e-300])
    width, height = left + length + 90, 30 + legend + step * len(rows)
    colors = [_color(i / max(len(parts) - 1, 1)) for i in range(len(parts))]
    svg = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    svg.append(f'<title>{escape(title)}</title><text x="{left}" y="14">{escape(title)}</text>')
    for i, (part, color) in enumerate(zip(parts, colors, strict=True)):
        x, y = left + 190 * (i % 3), 22 + 14 * (i // 3)
        svg.append(f'<rect x="{x}" y="{y}" width="9" height="9" fill="{color}"/>')
        svg.append(f'<text class="small" x="{x + 13}" y="{y + 8}">{escape(part)}</text>')
    for i, (name, values) in enumerate(rows):
        y, end = 26 + legend + step * i, float(left)
        svg.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        for value, color in zip(values, colors, strict=True):
            share = length * value / top
            if share > 0:
                svg.append(f'<rect x="{end:.2f}" y="{y}" width="{share:.2f}" height="{step - 4}" fill="{color}"/>')
            end += share
        svg.append(f'<text class="small" x="{end + 4:.0f}" y="{y + 11}">{sum(values):,.4g} {escape(unit)}</text>')
    return "".join([*svg, "</svg>"])


def line_chart(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], labels: tuple[str, str], title: str) -> str:
    """Points (x, y) joined by lines.

    Args:
        lines: Name and points of each line, ascending in x.
        labels: Of the x and y axes.
        title: For screen readers and as a heading.
    """
    left, top, width, height = 64, 40, 560, 320
    everything = [p for _, points in lines for p in points]
    spans = []
    for axis in (0, 1):
        low, high = (f(p[axis] for p in everything) for f in (min, max))
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        spans.append((low - room, high + room))

    def at(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        return left + width * (x - x0) / (x1 - x0), top + height * (1 - (y - y0) / (y1 - y0))

    svg = [f'<svg viewBox="0 0 {left + width + 20} {top + height + 44}" role="img" width="{left + width + 20}">']
    svg.append(f'<title>{escape(title)}</title><text x="{left}" y="14">{escape(title)}</text>')
    svg.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
    for i in range(5):
        x, y = (low + (high - low) * i / 4 for low, high in spans)
        px, py = at(x, y)
        svg.append(f'<text class="small" x="{px:.0f}" y="{top + height + 14}" text-anchor="middle">{x:.4g}</text>')
        svg.append(f'<text class="small" x="{left - 6}" y="{py + 3:.0f}" text-anchor="end">{y:.4g}</text>')
    svg.append(
        f'<text x="{left + width / 2:.0f}" y="{top + height + 34}" text-anchor="middle">{escape(labels[0])}</text>'
    )
    svg.append(f'<text x="{left}" y="{top - 6}">{escape(labels[1])}</text>')
    for i, (name, points) in enumerate(lines):
        color = _color(0.55 * i / max(len(lines) - 1, 1) + 0.15)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        svg.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        svg += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in (at(*p) for p in points)]
        svg.append(f'<text x="{left + 150 + 150 * i}" y="{top - 6}" fill="{color}">{escape(name)}</text>')
    return "".join([*svg, "</svg>"])


class Kernel(NamedTuple):
    """A layer under a roofline: its multiply-accumulates, bytes that it reads and writes, seconds, and its name."""

    name: str
    macs: float
    bytes: float
    seconds: float


def roofline(kernels: Sequence[Kernel], macs_per_second: float, bytes_per_second: float, title: str) -> str:
    """Products a second over products a byte, both logarithmic, under the roof of a machine (Williams et al. 2009).

    Areas of the dots are shares of the time; the five slowest are labelled. Values that stay in a cache move faster
    than memory, so that dots may lie above the slope.

    Args:
        kernels: At least one; macs, bytes and seconds above 0.
        macs_per_second: The level roof.
        bytes_per_second: The slope.
        title: For screen readers and as a heading.
    """
    left, top, width, height = 64, 40, 560, 320
    ridge = macs_per_second / bytes_per_second
    xs = [k.macs / k.bytes for k in kernels]
    ys = [k.macs / k.seconds for k in kernels]
    x_low, x_high = math.floor(math.log10(min(*xs, ridge))), math.ceil(math.log10(max(*xs, ridge) * 1.2))
    y_low = math.floor(math.log10(min(*ys, macs_per_second)))
    y_high = math.ceil(math.log10(max(*ys, macs_per_second) * 1.2))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return left + width * across, top + height * (1 - up)

    svg = [f'<svg viewBox="0 0 {left + width + 20} {top + height + 44}" role="img" width="{left + width + 20}">']
    svg.append(f'<title>{escape(title)}</title><text x="{left}" y="14">{escape(title)}</text>')
    svg.append(f'<text x="{left - 56}" y="{top - 8}">GMAC/s</text>')
    for power in range(x_low, x_high + 1):
        across = at(10.0**power, 10.0**y_low)[0]
        svg.append(f'<path d="M{across:.1f} {top}V{top + height}" class="grid"/>')
        label = f'x="{across:.1f}" y="{top + height + 14}" text-anchor="middle"'
        svg.append(f'<text class="small" {label}>{10.0**power:g}</text>')
    for power in range(y_low, y_high + 1):
        down = at(10.0**x_low, 10.0**power)[1]
        svg.append(f'<path d="M{left} {down:.1f}H{left + width}" class="grid"/>')
        label = f'x="{left - 6}" y="{down + 3:.1f}" text-anchor="end"'
        svg.append(f'<text class="small" {label}>{10.0 ** (power - 9):g}</text>')
    middle, below = left + width // 2, top + height + 34
    svg.append(f'<text x="{middle}" y="{below}" text-anchor="middle">multiply-accumulates a byte</text>')
    # The slope enters the picture at its left or at its lower edge.
    start = max(10.0**x_low, 10.0**y_low / bytes_per_second)
    corners = [at(start, start * bytes_per_second), at(ridge, macs_per_second), at(10.0**x_high, macs_per_second)]
    roof = "L".join(f"{across:.1f} {down:.1f}" for across, down in corners)
    svg.append(f'<path d="M{roof}" class="front"/>')
    peak = f"{macs_per_second * 1e-9:.4g} GMAC/s, {bytes_per_second * 1e-9:.3g} GB/s from memory"
    down = corners[2][1] - 6
    svg.append(f'<text class="small" x="{left + width - 4}" y="{down:.1f}" text-anchor="end">{escape(peak)}</text>')
    total = math.fsum(k.seconds for k in kernels)
    slowest = sorted(kernels, key=lambda k: -k.seconds)[:5]
    for kernel in sorted(kernels, key=lambda k: -k.seconds):  # small dots lie on top
        across, down = at(kernel.macs / kernel.bytes, kernel.macs / kernel.seconds)
        share = kernel.seconds / total
        radius = max(2.0, 24.0 * math.sqrt(share))
        said = f"{kernel.name}: {kernel.macs / kernel.seconds * 1e-9:.4g} GMAC/s, {100 * share:.1f} % of the time"
        svg.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}" fill="{_COLORS[1]}" fill-opacity="0.4"'
            f' stroke="{_COLORS[1]}"><title>{escape(said)}</title></circle>'
        )
    for kernel in slowest:
        across, down = at(kernel.macs / kernel.bytes, kernel.macs / kernel.seconds)
        anchor = "end" if across > left + width / 2 else "start"
        svg.append(
            f'<text class="small" x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{escape(kernel.name)}</text>'
        )
    return "".join([*svg, "</svg>"])
