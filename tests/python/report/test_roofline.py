"""The roofline: every layer under (or above) a roof that bends where computing meets moving."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from mixbit.report import roofline_chart
from mixbit.report.svg import Kernel, roofline

KERNELS = [
    Kernel("stem", 1e6, 1e5, 1e-4),  # 10 a byte, 10 GMAC/s
    Kernel("a < b", 1e8, 1e6, 1e-3),  # 100 a byte, 100 GMAC/s
    Kernel("last", 1e5, 1e5, 1e-5),
]


def parts(svg: str) -> tuple[list[ElementTree.Element], list[tuple[float, float]]]:
    """Dots, and corners of the roof."""
    root = ElementTree.fromstring(svg)
    dots = [c for c in root.iter("circle")]
    (roof,) = [p.get("d", "") for p in root.iter("path") if p.get("class") == "front"]
    corners = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", roof)]
    return dots, corners


def test_dots_and_roof() -> None:
    svg = roofline(KERNELS, 1e11, 1e10, "layers")
    dots, corners = parts(svg)
    # Slowest first; the second one reaches the roof exactly, the others lie a decade below the slope.
    assert [d.find("title").text.partition(":")[0] for d in dots] == ["a < b", "stem", "last"]
    slow, stem, last = ((float(d.get("cx")), float(d.get("cy"))) for d in dots)
    (start, ridge, end) = corners
    assert ridge[1] == end[1] == pytest.approx(slow[1], abs=0.2)
    assert stem[0] == pytest.approx(ridge[0], abs=0.2)
    decade = stem[1] - slow[1]
    assert stem[1] - ridge[1] == pytest.approx(decade)
    assert start[1] > ridge[1]
    slope = (start[1] - ridge[1]) / (ridge[0] - start[0])
    assert slope == pytest.approx(decade / (slow[0] - stem[0]), rel=0.01)
    assert last[1] > ridge[1] + (ridge[0] - last[0]) * slope - 0.5
    areas = [float(d.get("r")) ** 2 for d in dots]
    assert areas[0] / areas[1] == pytest.approx(10, rel=0.05)
    inside = [(float(d.get("cx")), float(d.get("cy"))) for d in dots] + corners
    assert all(64 <= x <= 624 and 40 <= y <= 360 for x, y in inside)


def test_a_profile_becomes_a_picture() -> None:
    step = {"node": "n", "kernel": "convolve", "value_bytes": 1000, "weight_bytes": 100, "ms": 0.1}
    steps = [
        {**step, "module": "conv", "macs": 10**6},
        {**step, "module": "", "macs": 10**5},
        {**step, "module": "relu", "macs": 0},
        {**step, "module": "moves nothing", "macs": 10**4, "value_bytes": 0},
    ]
    profile = {"steps": steps, "batch": 2, "isa": "vnni", "threads": 1}
    profile |= {"peak_macs_per_second": 1e11, "peak_bytes_per_second": 1e10}
    dots, _ = parts(roofline_chart(profile))
    assert [d.find("title").text for d in dots] == [
        "conv: 20 GMAC/s, 50.0 % of the time",
        "n: 2 GMAC/s, 50.0 % of the time",
    ]
    assert roofline_chart({**profile, "steps": steps[2:]}) == ""
