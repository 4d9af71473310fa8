"""Stages that measure: what a sweep leaves and keeps, metrics of a whole data set, the metric that `assign` holds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import mixbit
from mixbit.pipeline import Config, Pipeline

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
ANALYZE = {"analyze": {"precisions": [2, 4, 8]}}


def config(output: Path, *stages: object, source: Path = JOURNEY, corrections: tuple[str, ...] = ()) -> Config:
    """Stages on a small network."""
    return Config.from_dict(
        {
            "model": f"{source}:network",
            "data": {"calibration": f"{source}:calibration", "test": f"{source}:test"},
            "output": str(output),
            "corrections": list(corrections),
            "stages": list(stages),
        }
    )


def run(output: Path, *stages: object) -> list[str]:
    """Runs stages on the small network; what was made or kept."""
    return [str(path.relative_to(output)) for path in Pipeline(config(output, *stages)).run()]


def test_a_sweep_measures_each_distinct_recipe_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized: list[mixbit.Recipe] = []
    original = Pipeline._quantized

    def counted(self: Pipeline, recipe: mixbit.Recipe, *rest: object) -> torch.nn.Module:
        quantized.append(recipe)
        return original(self, recipe, *rest)

    monkeypatch.setattr(Pipeline, "_quantized", counted)
    options = {"methods": ["greedy", "aimet"], "shares": [0.5, 0.01]}
    made = run(tmp_path, ANALYZE, {"sweep": options})
    document = json.loads((tmp_path / "sweep.json").read_text())
    points = {point["name"]: point for point in document["points"]}
    distinct = {json.dumps(mixbit.Recipe.load(tmp_path / p["recipe"]).to_dict()["layers"]) for p in points.values()}
    assert len(quantized) == len(distinct) < len(points)
    assert document["float"] == 100.0
    assert document["images"] == 32
    assert not points["bops-greedy-0.01"]["feasible"]
    assert points["bops-greedy-0.5"]["feasible"]
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(points)

    # The measured figure is that of the recipe's file, prepared and evaluated by hand.
    pipeline = Pipeline(config(tmp_path, "report"))
    recipe = mixbit.Recipe.load(tmp_path / points["bops-greedy-0.5"]["recipe"])
    assert recipe.made_by["share"] == 0.5
    by_hand = mixbit.evaluate(original(pipeline, recipe, "mse", False), pipeline.test)
    assert points["bops-greedy-0.5"]["measured"] == pytest.approx(by_hand, abs=1e-6)

    # Another share measures what is new, and files of recipes that are no longer in the sweep go.
    quantized.clear()
    mine = tmp_path / "recipes" / "mine.json"
    mixbit.Recipe.uniform(["stem"]).save(mine)
    again = run(tmp_path, ANALYZE, {"sweep": {**options, "shares": [0.7, 0.01]}})
    assert all(abs(recipe.made_by["share"] - 0.7) < 1e-9 for recipe in quantized)
    assert quantized
    assert "recipes/bops-greedy-0.5.json" in made
    assert "recipes/bops-greedy-0.5.json" not in again
    kept = {f"recipes/{path.name}" for path in (tmp_path / "recipes").iterdir()}
    assert kept == {name for name in again if name.startswith("recipes/")} | {"recipes/mine.json"}


def test_corrections_are_made_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("equalize_", "optimize_rounding_", "correct_bias_"):
        original = getattr(mixbit, name)

        def counted(*arguments, name: str = name, original=original, **keywords):
            made.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(mixbit, name, counted)
    stages = ({"analyze": {"precisions": [2, 3]}}, {"assign": {"budget_share": 0.1}}, {"evaluate": {"integer": False}})
    measured = {}
    for corrections in ((), ("bias", "equalize", "rounding")):
        made.clear()
        folder = tmp_path / "-".join(("run", *corrections))
        Pipeline(config(folder, *stages, corrections=corrections)).run()
        # Whatever the order in the config: equalized before the analysis, rounded and then corrected behind it.
        assert made == (["equalize_", "optimize_rounding_", "correct_bias_"] if corrections else [])
        measured[corrections] = json.loads((folder / "evaluation.json").read_text())["measured_sqnr_db"]
        manifest = json.loads((folder / "analyze.manifest.json").read_text())
        measured[corrections, "key"] = manifest["key"]
    assert measured["bias", "equalize", "rounding"] > measured[()]
    assert measured[(), "key"] != measured[("bias", "equalize", "rounding"), "key"]


def test_a_sweep_of_integer_networks_and_one_without_measuring(tmp_path: Path) -> None:
    options = {"methods": ["greedy"], "shares": [0.5], "integer": True}
    run(tmp_path, ANALYZE, {"assign": {"budget_share": 0.5}}, "evaluate", {"sweep": options})
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["network"] == "integer"
    assert document["points"][-1]["measured"] == json.loads((tmp_path / "evaluation.json").read_text())["integer"]
    run(tmp_path, ANALYZE, {"assign": {"budget_share": 0.5}}, {"sweep": {"measure": False, "shares": [0.5]}}, "report")
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["metric"] is None
    assert {point["measured"] for point in document["points"]} == {None}
    html = (tmp_path / "report.html").read_text()
    assert "predicted SQNR, an estimate [dB]" in html
    assert "front of measured" not in html


#: The small network with logits that are even on average, so that its answers differ between images.
EVEN = """
import sys
import torch

sys.path.insert(0, {folder!r})
from journey_model import calibration, network as plain


def network():
    model = plain()
    with torch.no_grad():
        model.head.bias -= torch.cat([model(x) for x in calibration()]).mean(0)
    return model


def test():
    model = network()
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in calibration()]
"""


def test_assign_keeps_the_metric_it_is_told(tmp_path: Path) -> None:
    source = tmp_path / "even.py"
    source.write_text(EVEN.format(folder=str(JOURNEY.parent)))
    found = {}
    for metric in ("top1", "top5"):
        stages = (ANALYZE, {"assign": {"max_drop": 0.5, "metric": metric}})
        Pipeline(config(tmp_path / metric, *stages, source=source)).run()
        found[metric] = json.loads((tmp_path / metric / "assignment.json").read_text())
    # Five classes: top5 is always 100 %, so that a cheap recipe keeps it; top1 asks for more bits.
    assert found["top5"]["metric"] == 100.0
    assert found["top5"]["cost"]["bops"] < found["top1"]["cost"]["bops"]


#: Every cell of a 4 x 4 grid says how surely it holds a box of which of two classes; the truth is noisy.
DETECTOR = """
import torch
from torch import nn


class Cells(nn.Module):
    coco_classes = (0, 1)

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 2, 3, stride=2, padding=1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

    def decode(self, outputs):
        row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        boxes = torch.stack([column, row, column + 1, row + 1], -1).reshape(-1, 4) / 4
        found = []
        for image in outputs.flatten(2):
            scores, classes = image.max(0)
            found.append((boxes, scores, classes))
        return found


def network():
    torch.manual_seed(3)
    return Cells().eval()


def images(seed):
    return list(torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).split(4))


def calibration():
    return images(1)


def test():
    model, data = network(), []
    with torch.no_grad():
        for x in images(2):
            truths = []
            for boxes, scores, classes in model.decode(model(x) + 0.3 * torch.randn(4, 2, 4, 4)):
                best = scores.topk(3).indices
                truths.append(torch.cat([classes[best, None].float(), boxes[best]], 1))
            data.append((x, truths))
    return data
"""


@pytest.mark.parametrize("metric", ["ap50", "coco_map"])
def test_detections_are_scored_over_the_whole_test_set(metric: str, tmp_path: Path) -> None:
    source = tmp_path / "detector.py"
    source.write_text(DETECTOR)
    sweep = {"methods": ["greedy"], "shares": [0.5], "metric": metric}
    stages = (ANALYZE, {"assign": {"budget_share": 0.3}}, {"evaluate": {"metric": metric}}, {"sweep": sweep})
    pipeline = Pipeline(config(tmp_path / "out", *stages, source=source))
    pipeline.run()
    evaluation, swept = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("evaluation", "sweep"))
    assert pipeline.test is not None
    whole = mixbit.evaluate(pipeline.model, pipeline.test, metric)
    batches = [mixbit.evaluate(pipeline.model, [item], metric) for item in pipeline.test]
    assert evaluation["images"] == 12
    assert evaluation["float"] == swept["float"] == pytest.approx(whole, abs=1e-6)
    assert abs(sum(batches) / len(batches) - whole) > 1  # the mean over batches is another figure
    quantized = pipeline._quantized(mixbit.Recipe.load(tmp_path / "out" / "recipe.json"), "mse", True)
    for name in ("quantized", "integer"):
        expected = mixbit.evaluate(quantized, pipeline.test, metric, integer=name == "integer")
        assert evaluation[name] == pytest.approx(expected, abs=1e-6)
