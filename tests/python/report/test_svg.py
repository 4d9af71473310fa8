"""The scatter of a sweep: one mark a dot, the front as a staircase, ticks that hold everything."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbit.report.svg import Dot, _ticks, scatter

DOTS = [
    Dot(0.25, 60.0, "uniform", "uniform-4", "4 bit", on_front=True),
    Dot(1.0, 90.0, "uniform", "uniform-8", "8 bit", on_front=True),
    Dot(0.5, 80.0, "greedy", "a < b", on_front=True),
    Dot(0.75, 70.0, "greedy", "beaten"),
    Dot(0.25, 60.0, "ilp", "missed", hollow=True),
]


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(name))


def test_every_dot_has_its_mark_and_every_series_its_own() -> None:
    svg = scatter(DOTS, "bops", "top1 & more", reference=91.5)
    marks = [p for p in elements(svg, "path") if p.get("transform")]
    series = ["uniform", "greedy", "ilp"]
    assert len(marks) == len(DOTS) + len(series)
    looks = {(m.get("d"), m.get("stroke")) for m in marks}
    assert len(looks) == len({d for d, _ in looks}) == len({color for _, color in looks}) == len(series)
    assert [m.get("fill") == "none" for m in marks[: len(DOTS)]] == [True] + [False] * 4
    texts = [t.text for t in elements(svg, "text")]
    for text in (*series, "4 bit", "8 bit", "bops", "top1 & more", "float 91.50"):
        assert text in texts
    assert "a < b: 0.500, 80.00" in [t.text for t in elements(svg, "title")]


def test_the_front_is_a_staircase_and_the_float_line_is_above_it() -> None:
    svg = scatter(DOTS, "bops", "top1", reference=91.5)
    (front,) = [p.get("d") for p in elements(svg, "path") if p.get("class") == "front"]
    assert re.fullmatch(r"M\S+ \S+H\S+V\S+H\S+V\S+H\d+", front)
    heights = [float(v) for v in re.findall(r"V([\d.]+)", front)]
    assert heights[0] > heights[1]  # further right is further up
    (line,) = [p.get("d") for p in elements(svg, "path") if p.get("class") == "float"]
    assert float(line.split("H")[0].split()[1]) < heights[1]
    without = scatter([DOTS[3]], "bops", "top1")
    assert 'class="front"' not in without
    assert 'class="float"' not in without


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(-100, 1e4)), min_size=1, max_size=8),
    st.none() | st.floats(-100, 1e4),
)
def test_everything_is_inside_the_picture(places, reference) -> None:
    svg = scatter([Dot(x, y, "greedy", "d") for x, y in places], "cost", "figure", reference)
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(k)) for k in ("width", "height"))
    for mark in (p for p in root.iter("path") if p.get("transform")):
        x, y = (float(v) for v in re.findall(r"[-\d.]+", mark.get("transform")))
        assert 0 <= x <= width
        assert 0 <= y <= height


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-6.2, 39.9), (91.3, 91.6), (0.0, 1e9), (1e-9, 3e-9)])
def test_ticks_are_round_few_and_hold_the_range(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 4 <= len(ticks) <= 9
