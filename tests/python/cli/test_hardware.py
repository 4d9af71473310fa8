"""`mixbit map` and `mixbit cosearch`: what they print and write, resume, one sentence on every bad input."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import mixbit
from mixbit import hw, report, sources
from mixbit.cli import main
from mixbit.files import file_digest

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
MODEL = [f"{JOURNEY}:network", "--input", "3,16,16"]
MAP = ["map", *MODEL, "--arch", "eyeriss", "--output", "OUT"]
ACCURACY = """
def bits(recipe):
    if recipe["stem"].weight == 3:
        raise RuntimeError("three is unlucky")
    return sum(p.act + 2 * p.weight for p in recipe.layers.values())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("a file, not a folder")
    Path("accuracy.py").write_text(ACCURACY)
    return tmp_path


def manifest(verb: str) -> dict:
    found = json.loads(Path(f"OUT/{verb}.manifest.json").read_text())
    assert {"verb", "options", "seed", "versions", "inputs", "outputs"} == set(found)
    for name, digest in found["outputs"].items():
        assert file_digest(f"OUT/{name}") == digest
    return found


def test_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MAP, "--act", "8", "--weight", "4"]) == 0
    shown = capsys.readouterr().out
    assert "proven" in shown and "random search" in shown and "evaluated" in shown
    document = json.loads(Path("OUT/mapping.json").read_text())
    model = sources.load_model(MODEL[0])
    import torch

    net = hw.Workload.from_model(model, torch.zeros(1, 3, 16, 16))
    best = hw.map_network(hw.Architecture.load("eyeriss"), net, {"act": 8, "weight": 4})
    assert document["totals"]["edp"] == best.edp
    assert document["layers"][0]["certificate"] == best.layers[0].certificate
    proven, claimed = (document["saving"]["edp"][how] for how in ("proven", "random_search"))
    assert proven["bits"] == best.edp
    # Neither end of a random search is better than the optimum there.
    assert claimed["against"] >= proven["against"] and claimed["bits"] >= proven["bits"]
    assert proven["saving"] == 1 - proven["bits"] / proven["against"]
    assert Path("OUT/loop_nests.txt").read_text().count("multiply-accumulate") == len(net)
    picture = ET.parse("OUT/energy.svg").getroot()
    texts = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stem", "MAC", "DRAM Weights", "shared_glb Inputs"} <= set(texts)
    assert set(manifest("map")["outputs"]) == {"workload.json", "mapping.json", "loop_nests.txt", "energy.svg"}
    before = {p.name: p.read_bytes() for p in Path("OUT").iterdir() if p.name != "timings.json"}
    assert main([*MAP, "--act", "8", "--weight", "4"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*MAP, "--act", "8", "--weight", "4", "--force"]) == 0
    assert before == {p.name: p.read_bytes() for p in Path("OUT").iterdir() if p.name != "timings.json"}


def test_map_takes_a_recipe_and_a_workload(folder: Path) -> None:
    assert main(MAP) == 0
    names = [entry["name"] for entry in json.loads(Path("OUT/workload.json").read_text())["layers"]]
    mixbit.Recipe.uniform(names, weight=4, act=5).save("recipe.json")
    again = ["map", "--workload", "OUT/workload.json", "--arch", "simba_8bit", "--output", "TWO", "--against", "8"]
    assert main([*again, "--recipe", "recipe.json", "--objective", "energy", "--threads", "1"]) == 0
    document = json.loads(Path("TWO/mapping.json").read_text())
    assert {tuple(v["bits"].values())[:2] for v in document["layers"]} == {(5, 4)}
    assert document["saving"]["against"] == 8
    assert file_digest("TWO/workload.json") == file_digest("OUT/workload.json")


def test_cosearch_on_predicted_sqnr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = sources.load_model(MODEL[0]), sources.load_data(f"{JOURNEY}:calibration")
    mixbit.analyze(model, batches[:1], (2, 4, 8)).save("sensitivity.json")
    shape = ",".join(str(n) for n in batches[0].shape[1:])
    command = ["cosearch", MODEL[0], "--input", shape, "--arch", "eyeriss", "--sensitivity", "sensitivity.json"]
    command += ["--widths", "2,4,8", "--generations", "5", "--exact", "--objective", "energy"]
    assert main([*command, "--output", "OUT"]) == 0
    shown = capsys.readouterr().out
    assert "uniform 8" in shown and "exact front" in shown
    front, exact = hw.Front.load("OUT/front.json"), hw.Front.load("OUT/exact_front.json")
    costs = mixbit.CostTable.load("OUT/costs.json")
    for point in front.points:
        assert costs.total(front.recipe(point)) == point.cost
        assert any(q.cost <= point.cost * (1 + 1e-12) and q.accuracy >= point.accuracy - 1e-9 for q in exact.points)
    assert front.measure == "predicted_sqnr_db"
    names = {"workload.json", "costs.json", "evaluations.json", "front.json", "exact_front.json", "front.svg"}
    assert set(manifest("cosearch")["outputs"]) == names
    texts = [t.text for t in ET.parse("OUT/front.svg").getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"2 bits", "8 bits", "found", "exact"} <= set(texts)
    assert main([*command, "--output", "TWO"]) == 0
    for name in names:
        assert Path("OUT", name).read_bytes() == Path("TWO", name).read_bytes()


def test_cosearch_on_a_function_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cosearch", *MODEL, "--arch", "edge_npu", "--accuracy", "accuracy.py:bits", "--engine", "published"]
    command += ["--widths", "2,3,8", "--generations", "3"]
    assert main([*command, "--output", "OUT"]) == 0
    front = hw.Front.load("OUT/front.json")
    assert {reason for _, reason in front.failures} == {"RuntimeError: three is unlucky"}
    # What was evaluated is kept: the function is not called again.
    Path("accuracy.py").write_text(ACCURACY.replace("return sum", "raise SystemExit; return sum"))
    assert main([*command, "--output", "OUT", "--force"]) == 0
    assert hw.Front.load("OUT/front.json") == front


BAD: list[tuple[str, list[str], list[str]]] = [
    ("no model", ["map", "--arch", "eyeriss", "--output", "OUT"], ["model or --workload"]),
    ("two models", [*MAP, "--workload", "w.json"], ["model or --workload"]),
    ("no arch", ["map", *MODEL, "--output", "OUT"], ["--arch"]),
    ("arch", ["map", *MODEL, "--arch", "eyeris", "--output", "OUT"], ["eyeris", "did you mean", "eyeriss"]),
    ("arch file", ["map", *MODEL, "--arch", "FILE", "--output", "OUT"], ["FILE", "keys and values"]),
    ("objective", [*MAP, "--objective", "epd"], ["epd", "edp"]),
    ("input", ["map", MODEL[0], "--input", "3;16", "--arch", "eyeriss", "--output", "OUT"], ["3;16"]),
    ("input size", ["map", MODEL[0], "--input", "3,0,16", "--arch", "eyeriss", "--output", "OUT"], ["--input", "at least 1"]),
    ("input shape", ["map", MODEL[0], "--input", "1,16,16", "--arch", "eyeriss", "--output", "OUT"], ["--input 1,16,16", "3 channels"]),
    ("bits", [*MAP, "--act", "17"], ["act=17", "16-bit words"]),
    ("bits", [*MAP, "--weight", "0"], ["weight is 0"]),
    ("workload", ["map", "--workload", "none.json", "--arch", "eyeriss", "--output", "OUT"], ["none.json"]),
    ("recipe", [*MAP, "--recipe", "none.json"], ["none.json"]),
    ("output", [*MAP[:-1], "FILE/folder"], ["FILE/folder", "output"]),
    ("threads", [*MAP, "--threads", "0"], ["threads is 0"]),
    ("nothing to search on", ["cosearch", *MAP[1:]], ["--sensitivity or --accuracy"]),
    ("exact", ["cosearch", *MAP[1:], "--accuracy", "accuracy.py:bits", "--exact"], ["--exact", "--sensitivity"]),
    ("function", ["cosearch", *MAP[1:], "--accuracy", "accuracy.py:bit"], ["bit", "did you mean", "bits"]),
    ("sensitivity", ["cosearch", *MAP[1:], "--sensitivity", "none.json"], ["none.json"]),
    ("engine", ["cosearch", *MAP[1:], "--accuracy", "accuracy.py:bits", "--engine", "publishd"], ["published"]),
    ("widths", ["cosearch", *MAP[1:], "--accuracy", "accuracy.py:bits", "--widths", "2,17"], ["17"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "arguments", "expected"), BAD, ids=[case for case, _, _ in BAD])
def test_bad_input(
    case: str, arguments: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mixbit: ")
    for word in expected:
        assert word in lines[0], lines[0]


def test_pictures_are_whole_xml_whatever_the_names() -> None:
    bars = report.stacked_bars([("<a&b>", [0.0, 0.0]), ("c", [1.0, 2.0])], ["<x>", "y"], "uJ", "t & t")
    chart = report.scatter([report.Dot(1.0, 2.0, "<one>", "<m>", "<l>", on_front=True)], "x", "<y>", 3.0)
    lines = report.svg.line_chart([("<one>", [(1.0, 2.0), (3.0, 4.0)])], ("x", "<y>"), "<t>")
    for picture in (bars, chart, lines):
        root = ET.fromstring(report.standalone(picture))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    widths = [float(r.get("width")) for r in ET.fromstring(bars).iter("rect")][2:]
    assert widths == [pytest.approx(560 / 3, abs=0.01), pytest.approx(1120 / 3, abs=0.01)]
