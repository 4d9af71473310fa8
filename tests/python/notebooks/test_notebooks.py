"""Every notebook runs from the first cell to the last; none is committed with outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[3] / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    return notebook


def printed(notebook: Any) -> str:
    return "".join(
        o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream"
    )


def pictures(notebook: Any) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells
    assert all(not c.outputs and c.execution_count is None for c in cells if c.cell_type == "code")


def test_analyze_and_assign() -> None:
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "01_analyze_and_assign"))
    text = printed(notebook)
    assert pictures(notebook) >= 4
    float_top1 = float(re.search(r"float: ([\d.]+) %", text)[1])
    rows = [
        [float(v) for v in line]
        for line in re.findall(r"^ +(0\.\d+) +([\d.-]+) +([\d.-]+) +([\d.]+) +([\d.]+)$", text, re.M)
    ]
    assert len(rows) == 5
    cost, predicted, measured, fake, integer = zip(*rows, strict=True)
    assert list(cost) == sorted(cost, reverse=True)
    assert list(predicted) == sorted(predicted, reverse=True)
    assert all(-1 <= m - p <= 6 for p, m in zip(predicted, measured, strict=True))
    assert float_top1 - fake[0] <= 1 and float_top1 - integer[0] <= 1


def test_search_and_refine() -> None:
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "02_search_and_refine"))
    text = printed(notebook)
    assert pictures(notebook) == 3
    float_top1 = float(re.search(r"float: ([\d.]+) %", text)[1])
    share = float(re.search(r"got ([\d.]+)", text)[1])
    assert 0.28 < share <= 0.3
    rows = {
        name: [float(v) for v in values]
        for name, *values in re.findall(r"^(8bit|xpulp\S*) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.M)
    }
    assert len(rows) == 4
    for eight, before, after, _ in rows.values():
        assert after <= before and after <= eight
    assert rows["xpulpv2"][1] > rows["xpulpv2"][0]  # fewer bits are slower where they must be unpacked
    assert rows["xpulpnn"][2] < 0.9 * rows["xpulpnn"][0]
    first, last = (float(v) for v in re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups())
    assert last < first
    searched = float(re.search(r"searched: ([\d.]+) %", text)[1])
    trained = float(re.search(r"trained on: ([\d.]+) %", text)[1])
    assert searched > float_top1 - 30 and trained > float_top1 - 15


def test_mapping() -> None:
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "04_mapping"))
    text = printed(notebook)
    assert pictures(notebook) == 2
    assert "multiply-accumulate" in text
    parts, layers = (float(v) for v in re.search(r"parts ([\d.]+) uJ, of the layers ([\d.]+) uJ", text).groups())
    assert parts == pytest.approx(layers, abs=0.11)
    proven, _ = (float(v) for v in re.search(r"16 to 8 bits: ([\d.]+)% proven, ([\d.-]+)% claimed", text).groups())
    # Sums of the optima at 16/16/16 and 8/8/8 of the published network, whose last layer has 100 classes.
    assert proven == pytest.approx(100 * (1 - 40562.9 / 60583.8), abs=0.1)
    above = [float(v) for v in re.search(r"above the optimum: ([\d.]+)% and ([\d.]+)%", text).groups()]
    assert min(above) > 0
    exact, found, evaluated = (
        int(v) for v in re.search(r"exact front: (\d+) points; genetic search: (\d+) of (\d+)", text).groups()
    )
    assert 10 < found < exact and found < evaluated
    float_top1 = float(re.search(r"float: ([\d.]+) %", text)[1])
    rows = re.findall(r"(?:everywhere|front): ([\d.]+) uJ, ([\d.]+) dB predicted, ([\d.]+) %", text)
    (uniform_cost, uniform_db, _), (cost, db, top1) = ([float(v) for v in row] for row in rows)
    assert cost < uniform_cost and db >= uniform_db
    assert top1 > float_top1 - 15


def test_detectors() -> None:
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "06_detectors"))
    text = printed(notebook)
    assert pictures(notebook) == 6
    float_ap = float(re.search(r"float: AP50 ([\d.]+) %", text)[1])
    assert 20 < float_ap < 60
    assert "70 layers, 28 of them depthwise" in text
    # Errors in cells of the background count less: every layer comes out better where objects are.
    at_output = re.findall(r"^([\w.]+\.\d) +(-?[\d.]+) +(-?[\d.]+)$", text, re.M)
    assert len(at_output) == 7
    assert all(float(confident) > float(plain) for _, plain, confident in at_output)
    modes = re.findall(r"^(sqnr|ops|weight_memory|ilp) +([\d.]+) +[\d.]+ +(-?[\d.]+) +-?[\d.]+ +[\d.]+$", text, re.M)
    assert [name for name, *_ in modes] == ["sqnr", "ops", "weight_memory", "ilp"]
    assert all(0.45 < float(bops) <= 0.5 for _, bops, _ in modes)
    predicted = [float(p) for *_, p in modes]
    assert max(predicted) == predicted[-1]  # the exact method predicts the least noise
    found = re.findall(r"^((?:uniform|bops)-\S+) +([\d.]+) +-?[\d.]+ +([\d.]+) *(\*?)$", text, re.M)
    points = {name: (float(bops), float(ap), star) for name, bops, ap, star in found}
    assert len(points) == 5 + 3 * 2
    assert points["uniform-8"][1] > float_ap - 5
    assert points["uniform-4"][1] < 5
    front = sorted((bops, ap) for bops, ap, star in points.values() if star)
    assert len(front) >= 3
    assert front == sorted(front, key=lambda p: p[1])


def test_retraining() -> None:
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "03_retraining"))
    text = printed(notebook)
    assert pictures(notebook) == 3
    error, late = {}, {}
    for name, e, switches in re.findall(r"^(\S.*?) +error ([\d.]+)  late switches ([\d.]+)", text, re.M):
        error[name], late[name] = float(e), float(switches)
    for figures in (error, late):
        assert figures["switching"] < figures["snapshot"] < figures["random"] < figures["2 bits"]
    assert error["3 bits"] < error["switching"]
    assert float(re.search(r"([\d.]+) times fewer", text)[1]) > 2
    before, after = (float(v) for v in re.search(r"assignment ([\d.]+), right after it ([\d.]+)", text).groups())
    assert after < before
    float_top1, base, levels = (
        float(re.search(pattern, text)[1])
        for pattern in (r"float: ([\d.]+) %", r"2 bits: ([\d.]+) %", r"with extra levels: ([\d.]+) %")
    )
    assert min(base, levels) > 40 and max(base, levels) < float_top1
    entropy = re.search(r"^entropy +([\d.]+)", text, re.M)
    assert 2 < float(entropy[1]) < 3.2
    assert float(re.search(r"4 bits: ([\d.]+) times less", text)[1]) > 1


def test_export() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("qonnx")
    notebook = executed(next(p for p in NOTEBOOKS if p.stem == "05_export"))
    text = printed(notebook)
    assert pictures(notebook) == 2
    float_top1, integer = (float(re.search(rf"^{name}: ([\d.]+) %", text, re.M)[1]) for name in ("float", "integer"))
    assert integer > float_top1 - 15
    assert "exact in float32: True" in text
    assert "the nearest width that can be expressed" in text
    sizes = {
        name: [int(v) for v in values]
        for name, *values in re.findall(r"^(\S.*?) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.M)
    }
    assert all(sum(parts) == whole for *parts, whole in sizes.values())
    packed = int(re.search(r"own widths: (\d+) bytes", text)[1])
    assert sizes["integer package"][0] == packed < sizes["ONNX"][0] < sizes["ONNX, opset 13"][0] < sizes["QONNX"][0]
    found = re.findall(r"^(\S.*?) +promise (\w+) +kept True: (\d+) of (\d+) outputs differ", text, re.M)
    assert len(found) == 6
    assert all(int(values) == 160 for *_, values in found)
    assert [name for name, promise, *_ in found if promise == "exact"] == [
        "qdq",
        "qdq, opset 13",
        "integer package",
        "program",
    ]
    assert all(int(wrong) == 0 for _, promise, wrong, _ in found if promise == "exact")
    assert "fault found in: block2_conv1" in text
    assert "BREAKS its promise" in text
    broken = re.search(r"top-1 ([\d.]+) %, reference ([\d.]+) %; BREAKS", text)
    assert broken[1] == broken[2]  # accuracy did not show it
    assert "is damaged: its checksum differs" in text
    package, expected = re.search(r"package: +(\[.*?\]) reference: (\[.*?\])", text).groups()
    assert package == expected


def test_every_notebook_has_a_test() -> None:
    assert {p.stem for p in NOTEBOOKS} == {
        "01_analyze_and_assign",
        "02_search_and_refine",
        "03_retraining",
        "04_mapping",
        "05_export",
        "06_detectors",
    }
