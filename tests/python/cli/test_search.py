"""The stage and the verb `search`: what they leave, what goes on from there, and one sentence for every bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mixbit
from mixbit import sources
from mixbit.cli import main
from mixbit.pipeline import Config, Pipeline

sys.path.insert(0, str(Path(__file__).parent))
from test_retrain import DATA, JOURNEY, MODEL, document, run

SEARCH = {"epochs": 6, "lr": 0.02, "search_lr": 0.1, "budget_share": 0.4, "distill": 1.0, "temperature": 1.0}


def test_a_run_searches_refines_trains_and_reports(tmp_path: Path) -> None:
    stages = (
        {"analyze": {"precisions": [2, 4, 8]}},
        {"search": SEARCH},
        {"refine": {"latency": "pulp:xpulpnn"}},
        {"retrain": {"epochs": 1}},
        "evaluate",
        "report",
    )
    config = document(tmp_path, *stages)
    assert list(dict.fromkeys(run(config))) == [next(iter(s)) if isinstance(s, dict) else s for s in stages]
    assert run(config) == []
    report = json.loads((tmp_path / "assignment.json").read_text())
    costs = mixbit.CostTable.load(tmp_path / "costs.json")
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    assert report["method"] == "gates"
    assert report["feasible"]
    assert report["budget"] == pytest.approx(0.4 * costs.uniform(8, 8))
    assert report["cost"] == costs.total(recipe) <= report["budget"]
    history = json.loads((tmp_path / "search.json").read_text())
    assert len(history["loss"]) == 6 * 4
    assert (tmp_path / "search.csv").read_text().startswith("step,loss,act stem,")
    html = (tmp_path / "report.html").read_text()
    for word in ("Bits per layer by gates", "bits of each operand over time", "Cost of the bits chosen so far"):
        assert word in html, word
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"float", "before_training", "quantized", "integer"} <= set(evaluation)
    assert abs(evaluation["integer"] - evaluation["quantized"]) <= 200 / 32


def test_the_searched_network_is_what_is_measured_and_trained_on(tmp_path: Path) -> None:
    config = document(tmp_path, {"search": SEARCH}, "evaluate")
    run(config)
    pipeline = Pipeline(Config.from_dict(config))
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    # By hand: the same search.
    model = sources.load_model(MODEL)
    mixbit.prepare_(model, mixbit.search.Gates(), pipeline.example)
    mixbit.calibrate_(model, pipeline.calibration)
    costs = mixbit.costs.bops(pipeline.model, pipeline.example)
    data = sources.load_images(f"{JOURNEY}:test", batch=8, augment="crop_flip")
    torch.manual_seed(0)
    found = mixbit.search.fit(
        model,
        data,
        costs,
        epochs=6,
        budget=0.4 * costs.uniform(8, 8),
        lr=0.02,
        search_lr=0.1,
        weight_decay=1e-4,
        teacher=pipeline.model,
    )
    assert found.history.loss == json.loads((tmp_path / "search.json").read_text())["loss"]
    assert found.recipe.layers == recipe.layers
    mixbit.prepare_(model, recipe, pipeline.example)
    state = load_file(tmp_path / "searched.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    figure = json.loads((tmp_path / "evaluation.json").read_text())["quantized"]
    assert figure == pytest.approx(mixbit.evaluate(model, pipeline.test), abs=100 / 32 + 1e-6)
    # Training without a step's length starts from these weights and grids. Folding multiplies both, by a
    # factor that may be negative, so the codes are the same but for their sign.
    run(document(tmp_path, {"search": SEARCH}, {"retrain": {"epochs": 1, "lr": 1e-12, "reestimate": False}}))
    trained = load_file(tmp_path / "trained.safetensors")

    def codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.round(weight / scale.reshape(-1, 1, 1, 1)).abs()

    for name in ("stem", "a", "b", "side"):
        layer = model.get_submodule(name)
        found_codes = codes(trained[f"{name}.weight"], trained[f"{name}.weight_quantizer.scale"])
        same = found_codes == codes(layer.weight.detach(), layer.weight_quantizer.scale.detach())
        assert same.float().mean() > 0.99, name
    # Another recipe in the folder is not the search's.
    mixbit.Recipe.uniform(["stem", "a", "b", "side", "head"], weight=8, act=8).save(tmp_path / "recipe.json")
    alone = Pipeline(Config.from_dict(document(tmp_path, "evaluate")))
    assert alone._searched(mixbit.Recipe.load(tmp_path / "recipe.json")) is None


@pytest.mark.parametrize("kind", ["mixture", "fractional"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    run(document(tmp_path, {"search": {**SEARCH, "kind": kind, "epochs": 2}}))
    assert json.loads((tmp_path / "assignment.json").read_text())["method"] == kind


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path)]
    training = ["--training", f"{JOURNEY}:test", "--training-batch", "8"]
    search = ["search", MODEL, *DATA, *output, *training, "--epochs", "2", "--budget-share", "0.5", "--tie"]
    assert main(search) == 0
    shown = capsys.readouterr().out
    assert "search_lr=0.001 moves by at most" in shown
    assert str(tmp_path / "searched.safetensors") in shown
    recipe = mixbit.Recipe.load(tmp_path / "recipe.json")
    assert all(p.weight == p.act for name, p in recipe.layers.items() if name not in ("stem",))
    assert main(search) == 2
    assert "exists; use --force" in capsys.readouterr().err
    assert main(["retrain", MODEL, *DATA, *output, *training, "--epochs", "1"]) == 0
    assert main(["evaluate", MODEL, *DATA, *output, "--test", f"{JOURNEY}:test"]) == 0
    assert "before training" in capsys.readouterr().out


BAD: list[tuple[dict, list[str]]] = [
    ({"kind": "gate"}, ["kind='gate'", "gates"]),
    ({"budget_share": None}, ["nothing given", "budget_share"]),
    ({"strength": 1}, ["budget_share and strength given", "expected one"]),
    ({"budget_share": 2.0}, ["budget=", "the candidates reach"]),
    ({"budget_share": 1e-3}, ["budget=", "the candidates reach"]),
    ({"precisions": [4, 2]}, ["precisions=[4, 2]", "ascending"]),
    ({"precisions": [2, 2, 4]}, ["precisions=[2, 2, 4]", "without duplicates"]),
    ({"precisions": [2, 32]}, ["precisions=[2, 32]", "1 to 16"]),
    ({"precisions": 4}, ["precisions=4", "a list of bits"]),
    ({"kind": "mixture", "tie": True}, ["tie=true", "gates"]),
    ({"kind": "fractional", "channel_group": 4}, ["channel_group=4", "gates"]),
    ({"channel_group": 0}, ["group=0", "at least 1"]),
    ({"channel_group": 4, "tie": True}, ["tie=True", "per_channel"]),
    ({"channel_group": 4, "cost": "pulp:xpulpnn"}, ["not linear in the weights' bits", "single channels of layer"]),
    ({"form": "sum"}, ["form", "sum", "expected"]),
    ({"start_epoch": 6}, ["start_epoch=6", "epochs=6"]),
    ({"search_lr": 0}, ["search_lr=0"]),
    ({"cost": "bop"}, ["bop", "bops"]),
    ({"bugdet": 1}, ["bugdet", "budget"]),
]


@pytest.mark.parametrize(("options", "expected"), BAD)
def test_bad_input(options: dict, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document(tmp_path / "out", {"search": {**SEARCH, **options}})))
    assert main(["run", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in expected:
        assert word in error, error
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_run_with_bits_of_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"epochs": 1, "lr": 0.02, "search_lr": 0.2, "channel_group": 2}
    stages = (
        {"analyze": {"precisions": [2, 4, 8]}},
        {"search": {**SEARCH, "channel_group": 2}},
        {"retrain": {"epochs": 1}},
        "evaluate",
        {"sweep": {"methods": ["ilp"], "shares": [0.4], "costs": ["bops"], "search": own, "measure": True}},
        "report",
    )
    config = document(tmp_path, *stages)
    run(config)
    assert run(config) == []
    recipe, costs = mixbit.Recipe.load(tmp_path / "recipe.json"), mixbit.CostTable.load(tmp_path / "costs.json")
    assert recipe.channel_maps
    assert 0.9 * 0.4 <= costs.total(recipe) / costs.uniform(8, 8) <= 0.4
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert abs(evaluation["integer"] - evaluation["quantized"]) <= 200 / 32
    bits = next(iter(recipe.channel_maps.values()))
    counts = ", ".join(f"{int((bits == b).sum())} at {b}" for b in sorted(set(bits.tolist())))
    assert f"({counts})" in (tmp_path / "report.html").read_text()
    # A searched point of a sweep comes from its file with its channels.
    file = "recipes/bops-gates-0.4.json"
    point = mixbit.Recipe.load(tmp_path / file)
    assert point.channel_maps
    pipeline = Pipeline(Config.from_dict(config))
    option = {**pipeline.config.stages[4][1]["search"]}
    bops = mixbit.costs.bops(pipeline.model, pipeline.example)
    _, again, _ = pipeline._searched_point("recipes/bops-gates-0.4.safetensors", option, bops, 0.4 * bops.uniform(8, 8))
    assert again.layers.keys() == point.layers.keys()
    assert all(p.weight == point[n].weight and p.act == point[n].act for n, p in again.layers.items())
    assert {n: m.tolist() for n, m in again.channel_maps.items()} == {
        n: m.tolist() for n, m in point.channel_maps.items()
    }
    # Stages know when the channels alone are others.
    beside = tmp_path / "recipe.channel_bits.safetensors"
    beside.write_bytes(beside.read_bytes()[:-1] + b"\x03")
    assert "search" in run(config)
    assert mixbit.Recipe.load(tmp_path / "recipe.json") == recipe
    # A latency is that of one width a layer: each point would be audited in it.
    config["stages"][4]["sweep"]["costs"] = ["pulp:xpulpnn"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "config.yaml")]) == 2
    assert "do not tell what single channels" in capsys.readouterr().err


def test_two_makers_of_one_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ("analyze", {"assign": {"budget_share": 0.5}}, {"search": SEARCH})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document(tmp_path / "out", *stages)))
    assert main(["run", str(tmp_path / "config.yaml")]) == 2
    assert "'assign' and 'search' both make the recipe" in capsys.readouterr().err


def test_a_sweep_with_searched_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"epochs": 2, "lr": 0.02, "search_lr": 0.2}
    stages = (
        {"analyze": {"precisions": [2, 4, 8]}},
        {"assign": {"budget_share": 0.5}},
        {"sweep": {"methods": ["ilp"], "shares": [1.2, 0.5, 0.3, 0.01], "costs": ["bops"], "search": own}},
        "report",
    )
    config = document(tmp_path, *stages)
    run(config)
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    points = {point["name"]: point for point in sweep["points"]}
    assert {"uniform-8", "bops-ilp-0.5", "bops-gates-0.5", "bops-gates-0.3", "bops-gates-0.01"} <= set(points)
    for share in (1.2, 0.5, 0.3):  # 1.2: more than the candidates can cost
        point = points[f"bops-gates-{share}"]
        assert point["feasible"]
        assert point["shares"]["bops"] <= share
        recipe = mixbit.Recipe.load(tmp_path / point["recipe"])
        state = load_file(tmp_path / "recipes" / f"bops-gates-{share}.safetensors")
        assert all(float(state[f"{n}.weight_quantizer.bit_width"]) == p.weight for n, p in recipe.layers.items())
        pipeline = Pipeline(Config.from_dict(config))
        model = pipeline._restored(recipe, state)
        assert point["measured"] == pytest.approx(mixbit.evaluate(model, pipeline.test), abs=100 / 32 + 1e-6)
    assert not points["bops-gates-0.01"]["feasible"]
    assert ">gates<" in (tmp_path / "report.html").read_text()  # the legend of the front
    # Another budget searches what is new; the others come from their files.
    kept = tmp_path / "recipes" / "bops-gates-0.5.safetensors"
    before = kept.stat().st_mtime_ns
    config["stages"][2]["sweep"]["shares"] = [0.5, 0.4]
    run(config)
    assert kept.stat().st_mtime_ns == before
    again = {point["name"]: point for point in json.loads((tmp_path / "sweep.json").read_text())["points"]}
    assert again["bops-gates-0.5"]["measured"] == points["bops-gates-0.5"]["measured"]
    assert "bops-gates-0.4" in again
    assert not (tmp_path / "recipes" / "bops-gates-0.3.safetensors").exists()
    config["stages"][2]["sweep"]["search"] = {**own, "budget": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "config.yaml")]) == 2
    assert "sweep: search: unknown key 'budget'" in capsys.readouterr().err
