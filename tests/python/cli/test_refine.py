"""The verb and the stage `refine`: what they write and print, what comes after them, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import mixbit
from mixbit import report, sources
from mixbit.cli import main
from mixbit.files import file_digest

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
MODEL, DATA, TEST = (f"{JOURNEY}:{name}" for name in ("network", "calibration", "test"))
LAYERS = ["stem", "a", "b", "side", "head"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe at 4 bits (3 in one layer) and a latency CSV."""
    monkeypatch.chdir(tmp_path)
    recipe = mixbit.Recipe.uniform(LAYERS, act=4, weight=4)
    recipe.layers["head"] = mixbit.LayerPrecision(act=3, weight=3)
    recipe.save("mine.json")
    model, example = sources.load_model(MODEL), sources.load_data(DATA)[0]
    mixbit.costs.pulp_csv("measured.csv", "xpulpnn", model, example, widths=range(2, 9))
    return tmp_path


def document(name: str, where: str = "out") -> dict[str, Any]:
    found = json.loads(Path(where, name).read_text())
    assert isinstance(found, dict)
    return found


def verb(*options: str, name: str = "refine") -> int:
    return main([name, MODEL, "--data", DATA, "--output", "out", *options])


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("--latency", "pulp:xpulpv2", "--recipe", "mine.json") == 0
    shown = capsys.readouterr().out
    recipe, refined = (mixbit.Recipe.load(f"out/{n}.json") for n in ("recipe", "refined_recipe"))
    table = mixbit.CostTable.load("out/latency.json")
    assert table.act_bits == (2, 3, 4, 8)  # those of the kernels and of the recipe
    by_hand = mixbit.refine(recipe, table)
    assert refined.layers == by_hand.layers != recipe.layers
    found = document("refinement.json")
    assert {k: found[k] for k in by_hand.report} == by_hand.report
    assert found["latency"] == "pulp-xpulpv2"
    assert found["unit"] == "cycles (stand-in)"
    total = f"{by_hand.report['latency_before']:,.0f} before, {by_hand.report['latency_after']:,.0f} after, "
    assert f"{total}{table.uniform(8, 8):,.0f} at uniform 8 bit (cycles (stand-in))" in " ".join(shown.split())
    assert "4/4" in shown and "8/8" in shown
    manifest = document("refine.manifest.json")
    assert manifest["options"] == {
        "latency": "pulp:xpulpv2",
        "mode": "strict",
        "widths": [2, 4, 8],
        "recipe": "mine.json",
    }
    assert list(manifest["outputs"]) == ["recipe.json", "refined_recipe.json", "latency.json", "refinement.json"]
    for name, digest in manifest["outputs"].items():
        assert file_digest(f"out/{name}") == digest
    # Results are not replaced unasked; another mode is another result.
    assert verb("--latency", "pulp:xpulpv2") == 2
    assert "--force" in capsys.readouterr().err
    assert verb("--latency", "pulp:8bit", "--mode", "no_slower", "--force") == 0
    assert {(p.act, p.weight) for p in mixbit.Recipe.load("out/refined_recipe.json").layers.values()} == {
        (4, 8),
        (8, 8),
    }
    assert mixbit.Recipe.load("out/refined_recipe.json")["stem"].act == 4  # the network input


def test_a_file_has_its_own_widths_and_layers_that_it_lacks_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("--latency", "measured.csv", "--recipe", "mine.json") == 0
    assert mixbit.CostTable.load("out/latency.json").act_bits == tuple(range(2, 9))
    lines = Path("measured.csv").read_text().splitlines()
    Path("measured.csv").write_text("\n".join(lines[:-1]))
    assert verb("--latency", "measured.csv", "--force") == 2
    error = capsys.readouterr().err
    assert "'measured.csv' has no latency for 1 entries: head" in error
    assert len(error.splitlines()) == 1


def test_later_verbs_take_the_refined_recipe_as_long_as_it_is_of_the_recipe_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("--precisions", "2,4,8", name="analyze") == 0
    assert verb("--budget-share", "0.3", name="assign") == 0
    assert verb("--latency", "pulp:xpulpnn") == 0
    refined = mixbit.Recipe.load("out/refined_recipe.json")
    assert refined.made_by["of"]["verb"] == "assign"
    table = mixbit.SensitivityTable.load("out/sensitivity.json")
    assert refined.sqnr_db == table.predicted_sqnr_db(refined) >= mixbit.Recipe.load("out/recipe.json").sqnr_db
    assert verb("--test", TEST, name="evaluate") == 0
    assert "the recipe as refined for pulp-xpulpnn" in capsys.readouterr().out
    assert document("evaluation.json")["predicted_sqnr_db"] == refined.sqnr_db
    assert verb(name="report") == 0
    html = Path("out/report.html").read_text()
    assert "refined for pulp-xpulpnn (strict)" in html
    assert "<td>pulp-xpulpnn</td>" in html
    assert f"{refined.sqnr_db:.1f} dB" in html
    raised = document("refinement.json")["raised"]
    assert f"raised in {len(raised)} of 5 layers" in html
    # The recipe is made anew: what was refined is of the old one.
    capsys.readouterr()
    assert verb("--budget-share", "0.9", "--force", name="assign") == 0
    assert "refined for" not in capsys.readouterr().out
    assert verb("--test", TEST, "--force", name="evaluate") == 0
    assert document("evaluation.json")["predicted_sqnr_db"] == mixbit.Recipe.load("out/recipe.json").sqnr_db
    assert verb("--force", name="report") == 0
    assert "refined for" not in Path("out/report.html").read_text()


def run(stages: list[object]) -> int:
    config = {"model": MODEL, "data": {"calibration": DATA, "test": TEST}, "output": "out", "stages": stages}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return main(["run", "config.yaml"])


def test_the_stage_goes_on_and_sees_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [{"analyze": {"precisions": [2, 4, 8]}}, {"assign": {"budget_share": 0.3}}]
    stages = [*first, {"refine": {"latency": "measured.csv"}}, {"evaluate": {"integer": False}}, "report"]
    assert run(stages) == 0
    made = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    capsys.readouterr()
    assert run(stages) == 0
    assert capsys.readouterr().out.count("done before, kept") == 5
    # Stopped behind the assignment, it ends in the same bytes.
    for name in ("refine.manifest.json", "refined_recipe.json", "evaluation.json", "report.html"):
        Path("out", name).unlink()
    assert run(stages) == 0
    assert capsys.readouterr().out.count("done before, kept") == 2
    again = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    assert {n: b for n, b in again.items() if n != "timings.json"} == {
        n: b for n, b in made.items() if n != "timings.json"
    }
    # Another table in the same file is another result; the stages before it stay.
    mixbit.costs.pulp_csv("measured.csv", "xpulpv2", sources.load_model(MODEL), sources.load_data(DATA)[0])
    assert run(stages) == 0
    assert capsys.readouterr().out.count("done before, kept") == 2
    assert Path("out/refined_recipe.json").read_bytes() != made["refined_recipe.json"]
    # A config without the stage uses the recipe as assigned, whatever else is in the folder.
    assert run([*first, {"evaluate": {"integer": False}}]) == 0
    assert "as refined" not in capsys.readouterr().out


def test_bits_assigned_within_a_latency(folder: Path) -> None:
    assert verb("--precisions", "2,4,8", name="analyze") == 0
    for cost in ("pulp:xpulpnn", "latency:measured.csv"):
        assert verb("--cost", cost, "--budget-share", "0.92", "--method", "ilp", "--force", name="assign") == 0
        recipe = mixbit.Recipe.load("out/recipe.json")
        table = mixbit.costs.pulp("xpulpnn", sources.load_model(MODEL), sources.load_data(DATA)[0])
        assert recipe.cost["cycles (stand-in)"] == table.total(recipe) <= 0.92 * table.uniform(8, 8)


def test_the_picture_has_two_bars_a_layer_in_proportion() -> None:
    layers = [{"layer": "a<b", "before": 400.0, "after": 100.0}, {"layer": "c", "before": 0.5, "after": 0.0}]
    svg = ElementTree.fromstring(report.latency_chart({"layers": layers}))
    bars = [(bar.get("class"), float(bar.get("width"))) for bar in svg.iter("rect")]
    assert [kind for kind, _ in bars] == ["before", "after"] * 2
    assert [width / bars[0][1] for _, width in bars] == pytest.approx([1, 0.25, 0.00125, 0], rel=1e-4)
    assert [text.text for text in svg.iter("text")] == ["a<b", "400", "100", "c", "0.5", "0"]
    room = float(svg.get("width"))
    assert all(float(t.get("x")) < room for t in svg.iter("text"))
    flat = ElementTree.fromstring(report.latency_chart({"layers": [{"layer": "a", "before": 0.0, "after": 0.0}]}))
    assert {bar.get("width") for bar in flat.iter("rect")} == {"0"}
