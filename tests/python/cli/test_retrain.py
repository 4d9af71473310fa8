"""The stage and the verb `retrain`: what they train and leave, who uses it, and one sentence for every bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mixbit
from mixbit import sources
from mixbit.cli import main
from mixbit.errors import MixbitError
from mixbit.pipeline import Config, Pipeline
from mixbit.quantizers import quantized_layers

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
MODEL = f"{JOURNEY}:network"
DATA = ["--data", f"{JOURNEY}:calibration"]
ASSIGN = ({"analyze": {"precisions": [2, 4, 8]}}, {"assign": {"budget_share": 0.15}})
RETRAIN = {"epochs": 4, "lr": 0.05, "distill": 1.0, "temperature": 1.0}


def document(output: Path, *stages: object, **training: object) -> dict:
    """Stages on a small network that is trained on its own answers."""
    return {
        "model": MODEL,
        "data": {
            "calibration": f"{JOURNEY}:calibration",
            "test": f"{JOURNEY}:test",
            "training": {"source": f"{JOURNEY}:test", "batch": 8, "augment": "crop_flip", **training},
        },
        "output": str(output),
        "stages": list(stages),
    }


def run(config: dict) -> list[str]:
    """What was made anew."""
    said: list[str] = []
    Pipeline(Config.from_dict(config), said.append).run()
    return [line.split(":")[0] for line in said if "kept" not in line]


def test_training_starts_from_the_seed_whatever_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(document(tmp_path, *ASSIGN))
    pipeline = Pipeline(Config.from_dict(document(tmp_path, *ASSIGN, {"retrain": {**RETRAIN, "epochs": 1}})))
    fit, drawn = mixbit.retrain.fit, []

    def watched(*arguments: Any, **options: Any) -> Any:
        drawn.append(torch.rand(1))
        return fit(*arguments, **options)

    monkeypatch.setattr(mixbit.retrain, "fit", watched)
    for _ in range(2):
        torch.rand(3)
        pipeline.retrain(pipeline.config.stages[-1][1])
    assert drawn[0] == drawn[1]


def test_a_run_trains_evaluates_and_reports_the_trained_network(tmp_path: Path) -> None:
    stages = (*ASSIGN, {"retrain": RETRAIN}, "evaluate", "report")
    config = document(tmp_path, *stages)
    assert run(config) == ["analyze", "assign", "retrain", "evaluate", "report"]
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["loss"]) == 16
    assert history["epochs"][-1]["loss"] < history["epochs"][0]["loss"]
    with (tmp_path / "history.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == history["loss"]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"float", "before_training", "quantized", "integer"} <= set(evaluation)
    html = (tmp_path / "report.html").read_text()
    for word in ("Training at these bits", "before training", "fake-quantized, trained", "<title>Loss</title>"):
        assert word in html, word

    # By hand: the same training, folded, gives the weights of the file and the figures of the evaluation.
    pipeline = Pipeline(Config.from_dict(config))
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    model = mixbit.prepare_(sources.load_model(MODEL), recipe, pipeline.example)
    mixbit.calibrate_(model, pipeline.calibration)
    data = sources.load_images(f"{JOURNEY}:test", batch=8, augment="crop_flip")
    mixbit.retrain.fit(model, data, epochs=4, lr=0.05, teacher=pipeline.model)
    unfolded = mixbit.evaluate(model, pipeline.test)
    mixbit.fold_batchnorm_(model, pipeline.example)
    state = load_file(tmp_path / "trained.safetensors")
    assert set(model.state_dict()) == {name for name in state if not name.startswith("mixbit_tensor_")}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert evaluation["quantized"] == pytest.approx(mixbit.evaluate(model, pipeline.test), abs=1e-6)
    assert evaluation["quantized"] == pytest.approx(unfolded, abs=100 / 32 + 1e-6)
    assert abs(evaluation["integer"] - evaluation["quantized"]) <= 200 / 32
    before = json.loads((tmp_path / "evaluation.json").read_text())["before_training"]
    Pipeline(Config.from_dict(document(tmp_path / "untrained", *ASSIGN, "evaluate"))).run()
    assert json.loads((tmp_path / "untrained" / "evaluation.json").read_text())["quantized"] == before


def test_kinds_of_quantizers_train_as_asked_for_and_leave_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"weight_quantizer": "tqt", "act_quantizer": "pact"}
    config = document(tmp_path, *ASSIGN, {"retrain": {**RETRAIN, **kinds}}, "evaluate")
    fit, seen = mixbit.retrain.fit, []

    def watched(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        layers = quantized_layers(model).values()
        seen.append({type(quantizer).__name__ for m in layers for quantizer in (m.weight_quantizer, m.act_quantizer)})
        return fit(model, *arguments, **options)

    monkeypatch.setattr(mixbit.retrain, "fit", watched)
    run(config)
    assert seen == [{"TQT", "PACT"}]

    pipeline = Pipeline(Config.from_dict(config))
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    model = mixbit.prepare_(sources.load_model(MODEL), recipe, pipeline.example, **kinds)
    mixbit.calibrate_(model, pipeline.calibration)
    data = sources.load_images(f"{JOURNEY}:test", batch=8, augment="crop_flip")
    fit(model, data, epochs=4, lr=0.05, teacher=pipeline.model)
    x = pipeline.example
    with torch.no_grad():
        expected = mixbit.fold_batchnorm_(model.eval(), x)(x)
    again = mixbit.fold_batchnorm_(sources.load_model(MODEL), x)
    mixbit.calibrate_(mixbit.prepare_(again, recipe, x), pipeline.calibration, example=x)
    again.load_state_dict(load_file(tmp_path / "trained.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), expected, rtol=1e-4, atol=1e-4)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert abs(evaluation["integer"] - evaluation["quantized"]) <= 200 / 32
    other = (*ASSIGN, {"retrain": {**RETRAIN, "weight_quantizer": "tqt"}}, "evaluate")
    assert run(document(tmp_path, *other)) == ["retrain", "evaluate"]


def test_what_makes_a_network_be_trained_again(tmp_path: Path) -> None:
    stages = (*ASSIGN, {"retrain": {"epochs": 1}}, "evaluate")
    run(document(tmp_path, *stages))
    assert run(document(tmp_path, *stages)) == []
    assert run(document(tmp_path, *stages, batch=16)) == ["retrain", "evaluate"]
    assert run(document(tmp_path, *stages, augment=None)) == ["retrain", "evaluate"]
    other = (*ASSIGN, {"retrain": {"epochs": 1, "bf16": True}}, "evaluate")
    assert run(document(tmp_path, *other)) == ["retrain", "evaluate"]
    (tmp_path / "trained.safetensors").unlink()
    assert run(document(tmp_path, *other))[0] == "retrain"
    # A run that does not train measures the untrained network, whatever lies in the folder.
    run(document(tmp_path, *ASSIGN, "evaluate"))
    assert "before_training" not in json.loads((tmp_path / "evaluation.json").read_text())


@pytest.mark.parametrize("changed", [False, True])
def test_a_killed_stage_goes_on_only_with_the_data_it_had(changed: bool, tmp_path: Path) -> None:
    source = tmp_path / "data.py"
    text = (
        "import torch\n\ndef data():\n    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))\n"
    )
    text += "    return [(x, (torch.arange(16) + SHIFT) % 5)]\n"
    source.write_text(text.replace("SHIFT", "0"))

    def config(name: str) -> Config:
        retrain = {"epochs": 4, "checkpoint_every": 1}
        given = document(tmp_path / name, *ASSIGN, {"retrain": retrain}, source=f"{source}:data")
        return Config.from_dict(given)

    def kill(done: int, total: int, text: str) -> None:
        if (total, done) == (8, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(config("killed"), progress=kill).run()
    (partial,) = (tmp_path / "killed").glob(".retrain-*.partial")
    if changed:
        source.write_text(text.replace("SHIFT", "1"))
    steps: list[int] = []
    progress = lambda done, total, text: steps.append(done) if total == 8 else None  # noqa: E731
    Pipeline(config("killed"), progress=progress).run()
    assert steps == (list(range(1, 9)) if changed else [6, 7, 8])
    assert not partial.exists()
    Pipeline(config("calm")).run()
    for name in ("trained.safetensors", "history.json", "history.csv", "thresholds.json", "retrain.manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name


def test_a_refined_recipe_is_what_is_trained(tmp_path: Path) -> None:
    stages = (*ASSIGN, {"refine": {"latency": "pulp:xpulpnn"}}, {"retrain": {"epochs": 1}}, "evaluate", "report")
    run(document(tmp_path, *stages))
    recipe, refined = (mixbit.Recipe.load(tmp_path / f"{name}.json") for name in ("recipe", "refined_recipe"))
    assert recipe.layers != refined.layers
    state = load_file(tmp_path / "trained.safetensors")
    for name, precision in refined.layers.items():
        assert float(state[f"{name}.weight_quantizer.bit_width"]) == precision.weight
        assert float(state[f"{name}.act_quantizer.bit_width"]) == precision.act
    assert "before_training" in json.loads((tmp_path / "evaluation.json").read_text())


def test_rounding_and_scales_of_whole_tensors_are_trained_too(tmp_path: Path) -> None:
    stages = ({"analyze": {"precisions": [4, 8], "granularity": "per_tensor"}}, {"assign": {"budget_share": 0.4}})
    config = document(tmp_path, *stages, {"retrain": {"epochs": 1, "lr": 1e-3}}, {"evaluate": {"integer": False}})
    recipe = mixbit.Recipe(default=mixbit.LayerPrecision(weight=4, act=8, granularity="per_tensor"))
    run(document(tmp_path, *stages))
    recipe.save(tmp_path / "recipe.json")
    config["corrections"] = ["rounding"]
    config["stages"] = config["stages"][2:]
    run(config)
    state = load_file(tmp_path / "trained.safetensors")
    assert state["stem.weight_quantizer.scale"].shape == (1,)
    assert "bn.running_mean" not in state


def test_the_verb_and_the_verbs_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path)]
    mixbit.Recipe.uniform(["stem", "a", "b", "side", "head"], weight=3, act=4).save(tmp_path / "mine.json")
    train = ["retrain", MODEL, *DATA, *output, "--training", f"{JOURNEY}:test", "--training-batch", "8"]
    options = ["--epochs", "2", "--lr", "1e-2", "--scale-lr", "1e-3", "--distill", "0.5", "--augment", "crop_flip"]
    assert main([*train, *options, "--recipe", str(tmp_path / "mine.json"), "--no-reestimate", "--clip-norm", "5"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "trained.safetensors") in shown
    loss = json.loads((tmp_path / "history.json").read_text())["epochs"][1]["loss"]
    assert f"{loss:.4f}" in shown
    manifest = json.loads((tmp_path / "retrain.manifest.json").read_text())
    assert manifest["options"]["lr"] == 0.01
    assert manifest["options"]["distill"] == 0.5
    assert manifest["options"]["reestimate"] is False
    assert manifest["options"]["clip_norm"] == 5
    assert "training" in manifest["inputs"]
    assert main(["evaluate", MODEL, *DATA, *output, "--test", f"{JOURNEY}:test"]) == 0
    assert "before training" in capsys.readouterr().out
    # Another recipe is not measured with weights that were trained for this one.
    mixbit.Recipe.uniform(["stem", "a"], weight=8, act=8).save(tmp_path / "mine.json")
    other = ["evaluate", MODEL, *DATA, *output, "--test", f"{JOURNEY}:test", "--recipe", str(tmp_path / "mine.json")]
    assert main([*other, "--force"]) == 2
    assert "was trained for another network or recipe" in capsys.readouterr().err
    (tmp_path / "trained.safetensors").write_bytes(b"no tensors")
    assert main([*other, "--force"]) == 2
    assert "cannot be read" in capsys.readouterr().err


BAD: list[tuple[dict, dict, list[str]]] = [
    ({"epochs": 0}, {}, ["epochs=0", "at least 1"]),
    ({"lr": "fast"}, {}, ["lr='fast'", "a number"]),
    ({"lr": -1}, {}, ["lr=-1", "positive"]),
    ({"scale_lr": 0}, {}, ["scale_lr=0", "positive"]),
    ({"weight_decay": -1}, {}, ["weight_decay=-1"]),
    ({"clip_norm": 0}, {}, ["clip_norm=0"]),
    ({"distill": 1.5}, {}, ["distill=1.5", "from 0 to 1"]),
    ({"distill": 0.5, "temperature": 0}, {}, ["temperature=0"]),
    ({"checkpoint_every": 0}, {}, ["checkpoint_every=0"]),
    ({"ranges": "mes"}, {}, ["mes", "mse"]),
    ({"epoch": 1}, {}, ["epoch", "epochs"]),
    ({"threshold_aware": "stop"}, {}, ["threshold_aware='stop'", "step"]),
    ({"alpha": "low"}, {}, ["alpha='low'", "a number"]),
    ({"assign_at": [0.5, 1.5]}, {}, ["assign_at=[0.5, 1.5]", "below 1"]),
    ({"fraction": 0.2}, {}, ["fraction=0.2 without assign_at"]),
    ({"assign_at": 0.5, "fraction": 0.7}, {}, ["fraction=0.7", "at most 0.5"]),
    ({"weight_quantizer": "lsqq"}, {}, ["weight_quantizer", "lsqq", "lsq"]),
    ({"act_quantizer": "lsq+"}, {}, ["act_quantizer='lsq+'", "offsets"]),
    ({"freeze": 0.1}, {}, ["freeze=[0.1]", "two thresholds"]),
    ({}, {"augment": "crop"}, ["augment", "crop", "crop_flip"]),
    ({}, {"batch": 64}, ["32 images", "batch of 64"]),
    ({}, {"bach": 64}, ["bach", "batch"]),
    ({}, {"source": f"{JOURNEY}:tset"}, ["tset", "test"]),
    ({}, {"source": f"{JOURNEY}:calibration"}, ["without labels"]),
]


@pytest.mark.parametrize(("options", "training", "expected"), BAD)
def test_bad_input(
    options: dict, training: dict, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    mixbit.Recipe.uniform(["stem", "a", "b", "side", "head"]).save(output / "recipe.json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document(output, {"retrain": options}, **training)))
    assert main(["run", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in expected:
        assert word in error, error


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document(output, "retrain")))
    assert main(["run", str(path)]) == 2
    assert "recipe.json' is missing; run the stage 'assign' first" in capsys.readouterr().err
    config = document(output, "retrain")
    del config["data"]["training"]
    path.write_text(yaml.safe_dump(config))
    assert main(["run", str(path)]) == 2
    assert "config: data: 'training' is missing" in capsys.readouterr().err
    assert main(["retrain", MODEL, *DATA, "--output", str(output)]) == 2
    assert "--training" in capsys.readouterr().err


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    text = yaml.safe_dump(document(tmp_path, *ASSIGN, {"retrain": {"epochs": 1, "lr": "RATE"}})).replace("RATE", "1e-3")
    config = yaml.safe_load(text)
    assert config["stages"][2]["retrain"]["lr"] == "1e-3"
    run(config)
    assert json.loads((tmp_path / "history.json").read_text())["epochs"]


#: A cell of a 4 x 4 grid holds a box where its logit is positive; its own loss reads the boxes.
DETECTOR = """
import torch
from torch import nn


class Cells(nn.Module):
    coco_classes = (0,)

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 1, 3, stride=2, padding=1)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

    def head_tensors(self, outputs):
        return [outputs]

    def loss(self, outputs, boxes):
        wanted = torch.zeros_like(outputs)
        for image, own in enumerate(boxes):
            for row in own:
                wanted[image, 0, int(4 * row[2]), int(4 * row[1])] = 1.0
        return nn.functional.binary_cross_entropy_with_logits(outputs, wanted)

    def decode(self, outputs):
        row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        boxes = torch.stack([column, row, column + 1, row + 1], -1).reshape(-1, 4) / 4
        return [(boxes, image.flatten(), torch.zeros(16).long()) for image in outputs]


def network():
    torch.manual_seed(3)
    return Cells().eval()


def data():
    generator = torch.Generator().manual_seed(1)
    x = 0.2 * torch.randn(16, 1, 16, 16, generator=generator)
    truths = []
    for image in x:
        row, column = torch.randint(0, 4, (2,), generator=generator).tolist()
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2.0
        truths.append(torch.tensor([[0, column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]]))
    return [(x[i : i + 4], truths[i : i + 4]) for i in range(0, 16, 4)]
"""


def test_a_detector_is_trained_on_its_boxes(tmp_path: Path) -> None:
    source = tmp_path / "cells.py"
    source.write_text(DETECTOR)
    config = document(
        tmp_path / "out", *ASSIGN, {"retrain": {"epochs": 30, "lr": 0.2}}, {"evaluate": {"metric": "ap50"}}
    )
    config["model"] = f"{source}:network"
    config["data"] = {"calibration": f"{source}:data", "test": f"{source}:data"}
    config["data"]["training"] = {"source": f"{source}:data", "batch": 8}
    run(config)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["quantized"] > evaluation["before_training"] + 20
    assert abs(evaluation["integer"] - evaluation["quantized"]) < 10
    config["stages"][2]["retrain"] = {"epochs": 1, "distill": 1.0}
    run(config)
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())["loss"]) == 2


@pytest.mark.parametrize(
    "body",
    [
        "[(torch.randn(4, 3, 8, 8), torch.zeros(4).long()), torch.randn(4, 3, 8, 8)]",
        "[torch.randn(4, 3, 8, 8), torch.randn(4, 3, 9, 9)]",
        "[{'x': torch.randn(4, 3, 8, 8)}]",
        "[]",
    ],
)
def test_data_that_cannot_be_shuffled_is_refused(body: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(f"import torch\n\ndef data():\n    return {body}\n")
    with pytest.raises(MixbitError, match=r"training data .*odd\.py.*of one size"):
        sources.load_images(f"{tmp_path / 'odd.py'}:data", batch=4)


def test_images_come_from_all_batches_with_their_labels() -> None:
    items = sources.load_data(f"{JOURNEY}:test")
    data = sources.load_images(f"{JOURNEY}:test", batch=8, seed=2)
    assert torch.equal(data.x, torch.cat([x for x, _ in items]))
    assert torch.equal(data.y, torch.cat([y for _, y in items]))
    assert data.describe()["seed"] == 2
    assert sources.load_images(f"{JOURNEY}:calibration", batch=8).y is None


MECHANISMS = {
    "epochs": 4,
    "lr": 0.02,
    "checkpoint_every": 1,
    "threshold_aware": "linear",
    "alpha": "2e-1",
    "assign_at": [0.5],
    "fraction": 0.3,
    "max_bits": 8,
    "freeze": [0.3, 0.1],
    "dampen": 1e-3,
}
LEVELS = (
    {"analyze": {"precisions": [2, 4, 8]}},
    {"assign": {"budget_share": 0.15, "rounding": "half_up", "narrow_range": False}},
)


def test_every_mechanism_in_a_run_killed_and_resumed(tmp_path: Path) -> None:
    stages = (*LEVELS, {"retrain": MECHANISMS}, "evaluate", "report")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run(document(calm, *stages))
    for stop in (3, 9, 14):

        def kill(done: int, total: int, text: str, stop: int = stop) -> None:
            if (total, done) == (16, stop):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Pipeline(Config.from_dict(document(killed, *stages)), progress=kill).run()
    run(document(killed, *stages))
    for path in sorted(
        p for p in calm.iterdir() if p.name not in ("timings.json", "report.html", "report.manifest.json")
    ):
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name
    recipe, trained = (mixbit.Recipe.load(calm / f"{n}.json") for n in ("recipe", "trained_recipe"))
    assert all(p.rounding == "half_up" and not p.narrow_range for p in recipe.layers.values())
    state = load_file(calm / "trained.safetensors")
    assert trained.extra_maps
    for name, extra in trained.extra_maps.items():
        assert torch.equal(torch.from_numpy(extra), state[f"{name}.weight_quantizer.extra_bits"])
    # Extra levels cost bits; the recipe of the trained network says so.
    table = mixbit.tables.CostTable.load(calm / "costs.json")
    assert trained.cost == {table.unit: table.total(trained)}
    assert trained.cost[table.unit] > recipe.cost[table.unit]
    evaluation = json.loads((calm / "evaluation.json").read_text())
    assert abs(evaluation["integer"] - evaluation["quantized"]) <= 200 / 32
    html = (calm / "report.html").read_text()
    words = ("Level switches", "weights with extra levels", "the loss of its batch went from")
    for word in (*words, "distance from the nearest threshold"):
        assert word in html, word
    distances = json.loads((calm / "thresholds.json").read_text())
    for when in ("before", "after"):
        counts = {name: sum(counts) for name, counts in distances[when].items()}
        assert counts == {name: state[f"{name}.weight"].numel() for name in recipe.layers}
    assert distances["before"] != distances["after"]
    # Without the mechanism the files of the levels go, too.
    run(document(calm, *LEVELS, {"retrain": {"epochs": 1}}, "evaluate"))
    assert not list(calm.glob("trained_recipe*"))


def test_the_verb_has_the_mechanisms(tmp_path: Path) -> None:
    layers = ["stem", "a", "b", "side", "head"]
    mixbit.Recipe.uniform(layers, weight=2, act=4).save(tmp_path / "mine.json")
    train = ["retrain", MODEL, *DATA, "--output", str(tmp_path), "--training", f"{JOURNEY}:test", "--lr", "0.1"]
    options = ["--training-batch", "8", "--recipe", str(tmp_path / "mine.json"), "--threshold-aware", "step"]
    assert main([*train, *options, "--assign-at", "0.5", "--fraction", "0.2", "--freeze", "0.2,0.1"]) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    assert {"switches", "frozen", "flagged:a", "loss_before_assignment"} <= set(history["figures"])
    assert (tmp_path / "trained_recipe.extra_levels.safetensors").exists()
    assert main(["evaluate", MODEL, *DATA, "--output", str(tmp_path), "--test", f"{JOURNEY}:test"]) == 0
