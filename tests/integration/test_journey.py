"""The whole journey on a small network: from a config to the report, killed, resumed, changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mixbit
from mixbit.pipeline import Config, Pipeline

HERE = Path(__file__).resolve().parent
STAGES = ("analyze", "assign", "retrain", "evaluate", "sweep", "report")


def config(output: Path) -> dict:
    return {
        "model": f"{HERE / 'journey_model.py'}:network",
        "data": {
            "calibration": f"{HERE / 'journey_model.py'}:calibration",
            "test": f"{HERE / 'journey_model.py'}:test",
            "training": {"source": f"{HERE / 'journey_model.py'}:test", "batch": 8, "augment": "crop_flip"},
        },
        "output": str(output),
        "stages": [
            {"analyze": {"precisions": [2, 4, 8]}},
            {"assign": {"method": "ilp", "budget_share": 0.5}},
            {"retrain": {"epochs": 3, "distill": 0.5, "checkpoint_every": 2}},
            "evaluate",
            {"sweep": {"methods": ["greedy", "threshold"], "modes": ["ops"], "shares": [0.5, 0.01]}},
            "report",
        ],
    }


@pytest.mark.parametrize("stage", (*STAGES, "search"))
def test_twenty_kills_inside_a_stage_change_no_byte(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    document = config(tmp_path / "unused")
    if stage == "search":
        document["stages"][1:] = [{"search": {"epochs": 3, "budget_share": 0.5, "checkpoint_every": 2}}]
    path.write_text(yaml.safe_dump(document))
    command = [sys.executable, str(HERE / "kill_and_resume.py"), str(path), stage, "20", "0", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 20


def test_the_journey_and_what_makes_a_stage_run_again(tmp_path: Path) -> None:
    said: list[str] = []
    document = config(tmp_path)
    made = Pipeline(Config.from_dict(document), said.append).run()
    assert [path.name for path in made] == [
        "sensitivity.json",
        "sensitivity.csv",
        "recipe.json",
        "costs.json",
        "assignment.json",
        "trained.safetensors",
        "history.json",
        "history.csv",
        "thresholds.json",
        "evaluation.json",
        "sweep.json",
        "sweep.csv",
        *(f"uniform-{bits}.json" for bits in (8, 4, 2)),
        *(f"bops-{method}-{share}.json" for method in ("greedy", "threshold-ops") for share in (0.5, 0.01)),
        "report.html",
    ]
    assert [line.split(":")[0] for line in said] == list(STAGES)
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    costs = mixbit.CostTable.load(tmp_path / "costs.json")
    assert costs.total(recipe) <= 0.5 * costs.uniform(8, 8)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["float"] == 100.0
    assert evaluation["images"] == 32
    assert abs(evaluation["quantized"] - evaluation["integer"]) <= 100 / 32
    assert set(json.loads((tmp_path / "timings.json").read_text())) == set(STAGES)
    manifest = json.loads((tmp_path / "assign.manifest.json").read_text())
    assert manifest["options"]["budget_share"] == 0.5
    assert manifest["versions"]["mixbit"] == mixbit.__version__

    def again(change: dict | None = None) -> list[str]:
        said.clear()
        Pipeline(Config.from_dict(change or document), said.append).run()
        return [line.split(":")[0] for line in said if "kept" not in line]

    assert again() == []
    changed = config(tmp_path)
    changed["stages"][1]["assign"]["budget_share"] = 0.6
    # The report names the recipe and the options, so every stage after the changed one is made again.
    assert again(changed) == ["assign", "retrain", "evaluate", "sweep", "report"]
    (tmp_path / "report.html").unlink()
    assert again(changed) == ["report"]
    (tmp_path / "recipe.json").write_text("{}")
    assert again(changed)[0] == "assign"
    (tmp_path / "assign.manifest.json").write_text("no json")
    assert again(changed)[0] == "assign"
    assert mixbit.Recipe.load(tmp_path / "recipe.json")["stem"].act is not None


def test_the_report_is_one_static_file_with_everything_in_it(tmp_path: Path) -> None:
    document = config(tmp_path)
    document["model"] = {"source": document["model"]}
    document["stages"][5] = {"report": {"title": "a <small> network"}}
    Pipeline(Config.from_dict(document)).run()
    html = (tmp_path / "report.html").read_text()
    assert "a &lt;small&gt; network" in html
    for name in ("stem", "a", "b", "side", "head"):
        assert f">{name}<" in html
    assert html.count("<svg") == 7  # two of them how far weights are from their thresholds, before and after training
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    for word in ("budget_share", "predicted", "measured", "versions", "bops", "weight_memory", "an estimate", "4 bit"):
        assert word in html, word
    # Every recipe that the page names is a file beside it.
    links = re.findall(r'href="([^"]+)"', html)
    assert links
    for link in links:
        assert mixbit.Recipe.load(tmp_path / link).cost["bops"] > 0
    first = html
    (tmp_path / "report.manifest.json").unlink()
    Pipeline(Config.from_dict(document)).run()
    assert (tmp_path / "report.html").read_text() == first


def test_temporaries_of_killed_writers_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".recipe.json.abc.mixbit-tmp"
    left.write_text("half")
    Pipeline(Config.from_dict(config(tmp_path)))
    assert not left.exists()
