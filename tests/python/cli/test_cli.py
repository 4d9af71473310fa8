"""The command: what it prints and writes, and one sentence with exit code 2 on every bad input."""

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
from mixbit import sources
from mixbit.analysis import POINTS
from mixbit.assignment import METHODS, MODES
from mixbit.cli import main
from mixbit.costs.pulp import TARGETS
from mixbit.errors import MixbitError
from mixbit.evaluation import METRICS
from mixbit.pipeline import COSTS
from mixbit.quantizers import METHODS as RANGES
from mixbit.refinement import REFINE_MODES
from mixbit.training import AUGMENTATIONS

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
MODEL = f"{JOURNEY}:network"
DATA = ["--data", f"{JOURNEY}:calibration"]
TEST = ["--test", f"{JOURNEY}:test"]


def test_verb_by_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path)]
    assert main(["analyze", MODEL, *DATA, *output, "--precisions", "2,4,8"]) == 0
    shown = capsys.readouterr().out
    assert "mixbit analyze" in shown
    assert str(tmp_path / "sensitivity.json") in shown
    assert main(["assign", MODEL, *DATA, *output, "--method", "ilp", "--budget-share", "0.5"]) == 0
    assert "weight bits" in capsys.readouterr().out
    assert main(["evaluate", MODEL, *DATA, *TEST, *output]) == 0
    shown = capsys.readouterr().out
    assert "32 images" in shown
    assert "an estimate" in shown
    options = ["--methods", "greedy,ilp", "--shares", "1,0.5", "--costs", "weight_memory"]
    assert main(["sweep", MODEL, *DATA, *TEST, *output, *options]) == 0
    shown = capsys.readouterr().out
    assert "Pareto front over weight_memory" in shown
    assert str(tmp_path / "recipes" / "weight_memory-ilp-0.5.json") in shown
    assert main(["report", MODEL, *DATA, *output, "--title", "mine"]) == 0
    assert "mine" in (tmp_path / "report.html").read_text()
    for verb in ("analyze", "assign", "evaluate", "sweep", "report"):
        manifest = json.loads((tmp_path / f"{verb}.manifest.json").read_text())
        assert {"options", "seed", "versions", "inputs", "outputs"} <= set(manifest)
    # A verb does not replace results unasked.
    capsys.readouterr()
    assert main(["report", MODEL, *DATA, *output]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["report", MODEL, *DATA, *output, "--force"]) == 0
    # The integer network's own times, as mixbit-run writes them; what is none is named.
    step = {"module": "0", "node": "n", "kernel": "convolve", "ms": 0.5, "macs": 1000, "act_bits": 8, "weight_bits": 4}
    step |= {"mac_share": 0.25, "bandwidth_share": 0.125, "value_bytes": 100, "weight_bytes": 10}
    profile = {"isa": "vnni", "threads": 1, "batch": 1, "run_ms": 0.75, "first_answer_ms": 2.5, "arena_bytes": 64}
    profile |= {"weight_bytes": 128, "peak_macs_per_second": 1e9, "peak_bytes_per_second": 1e9, "steps": [step]}
    times = tmp_path / "times.json"
    times.write_text(json.dumps(profile))
    assert main(["report", MODEL, *DATA, *output, "--force", "--runtime", str(times)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "multiply-accumulates a byte" in page
    assert "<td>25.0 %</td><td>12.5 %</td>" in page
    for change, complaint in (
        ({"steps": [{}]}, "steps[0].module is None, expected a text"),
        ({"steps": [{**step, "ms": "slow"}]}, "steps[0].ms is 'slow', expected a number of at least 0"),
        ({"steps": [step, {**step, "value_bytes": -1}]}, "steps[1].value_bytes is -1, expected a number of at least 0"),
        ({"steps": [{k: v for k, v in step.items() if k != "weight_bytes"}]}, "steps[0].weight_bytes is None"),
        ({"steps": 3}, "steps is 3, expected a list"),
        ({"run_ms": True}, "run_ms is True, expected a number of at least 0"),
        ({"peak_bytes_per_second": 0}, "peak_bytes_per_second is 0, expected a number above 0"),
    ):
        times.write_text(json.dumps({**profile, **change}))
        assert main(["report", MODEL, *DATA, *output, "--force", "--runtime", str(times)]) == 2
        assert f"is no profile of mixbit-run: {complaint}" in capsys.readouterr().err


def test_bits_bought_with_an_accelerators_energy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapper as a cost: its numbers are those of the library, and another accelerator is another cost."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump({"base": "eyeriss", "name": "mine/own"}))
    options = ["--output", "out"]
    assert main(["analyze", MODEL, *DATA, *options, "--precisions", "2,4,8"]) == 0
    assert main(["assign", MODEL, *DATA, *options, "--cost", "mapper:mine.yaml", "--budget-share", "0.7"]) == 0
    model, example = sources.load_model(MODEL), sources.load_data(DATA[1])[0]
    eyeriss = mixbit.hw.Architecture.load("eyeriss")
    table = mixbit.costs.mapper(eyeriss, model, example, widths=(2, 4, 8))
    saved, recipe = mixbit.CostTable.load("out/costs.json"), mixbit.Recipe.load("out/recipe.json")
    assert (saved.values_out == table.values_out).all()
    best = mixbit.hw.map_network(eyeriss, mixbit.hw.Workload.from_model(model, example), recipe, "energy")
    assert best.total() == table.total(recipe) == recipe.cost["pJ"] <= 0.7 * table.uniform(8, 8)
    sweep = ["sweep", MODEL, *DATA, *options, "--no-measure", "--methods", "greedy", "--shares", "0.7"]
    assert main([*sweep, "--costs", "bops,mapper:mine.yaml:delay"]) == 0
    assert "Pareto front over mapper-mine_own-delay" in capsys.readouterr().out
    swept = json.loads(Path("out/sweep.json").read_text())
    assert {"bops", "mapper-mine_own-delay", "ops"} < set(swept["uniform_8_8"])
    assert "recipes/mapper-mine_own-delay-greedy-0.7.json" in [p["recipe"] for p in swept["points"]]
    assert main(["report", MODEL, *DATA, *options]) == 0
    row = re.search(r"<tr><td>mapper-mine_own-energy</td>.*", Path("out/report.html").read_text())
    assert row is not None
    assert row[0].count("<td>–</td>") == 2  # no widths of 32 and 16 in the table, but of 8
    # A stage is kept while the file says the same, and made again when it does not.
    mapped = {"mapper": {"arch": "mine.yaml", "objective": "energy"}}
    stages = [{"analyze": {"precisions": [2, 4, 8]}}, {"assign": {"cost": mapped, "budget_share": 0.7}}]
    config = document(data={"calibration": DATA[1]}, stages=stages)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    for change, kept in ((None, 1), (None, 2), ("about", 2), ("levels", 1)):
        if change is not None:
            changed = {"about": "same numbers", "levels": {"shared_glb": {"size": 25600}}}[change]
            mine = yaml.safe_load(Path("mine.yaml").read_text())
            Path("mine.yaml").write_text(yaml.safe_dump({**mine, change: changed}))
        assert main(["run", "config.yaml", "--output", "out"]) == 0
        assert capsys.readouterr().out.count("done before, kept") == kept


def test_evaluate_takes_another_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.json"
    mixbit.Recipe.uniform(["stem", "a"], weight=8, act=8).save(recipe)
    output = tmp_path / "out"
    arguments = ["evaluate", MODEL, *DATA, *TEST, "--output", str(output), "--recipe", str(recipe), "--no-integer"]
    assert main(arguments) == 0
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert "integer" not in evaluation
    assert evaluation["measured_sqnr_db"] > 20


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert mixbit.__version__ in capsys.readouterr().out
    assert main([]) == 0
    assert "analyze" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("analyze", [*POINTS, *RANGES]),
        ("assign", [*METHODS, *MODES, *COSTS, *METRICS]),
        ("sweep", [*COSTS, *METRICS, *RANGES]),
        ("retrain", [*AUGMENTATIONS, *RANGES]),
        ("evaluate", METRICS),
        ("refine", [*(t for t in TARGETS if "-" not in t), *REFINE_MODES]),
    ],
)
def test_help_names_what_an_option_may_be(verb: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert [name for name in names if name not in words] == []


def test_a_network_without_an_integer_twin_says_what_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\n\ndef model():\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n\n"
        "def data():\n    return [(torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 0, 1]))]\n"
    )
    mixbit.Recipe.uniform(["0"]).save(tmp_path / "mine.json")
    source = str(tmp_path / "odd.py")
    arguments = ["evaluate", f"{source}:model", "--data", f"{source}:data", "--test", f"{source}:data"]
    arguments += ["--output", str(tmp_path / "out"), "--recipe", str(tmp_path / "mine.json")]
    assert main(arguments) == 2
    assert "no softplus.default (module '1'" in (error := capsys.readouterr().err)
    assert "evaluate --no-integer" in error
    assert main([*arguments, "--no-integer"]) == 0


ANALYZE = ["analyze", MODEL, *DATA, "--output", "OUT"]
ASSIGN = ["assign", MODEL, *DATA, "--output", "OUT", "--budget-share", "0.5"]
REFINE = ["refine", MODEL, *DATA, "--output", "OUT", "--latency", "pulp:xpulpnn"]
BAD: list[tuple[str, list[str], list[str]]] = [
    ("verb", ["analize"], ["analize", "did you mean", "analyze"]),
    ("missing option", ["analyze", MODEL, "--output", "OUT"], ["--data"]),
    ("zoo name", ["analyze", "zoo:cifar_resnett", *DATA, "--output", "OUT"], ["cifar_resnett", "cifar_resnet"]),
    ("torchvision name", ["analyze", "torchvision:resnet19", *DATA, "--output", "OUT"], ["resnet19", "resnet18"]),
    ("no such file", ["analyze", "missing.py:f", *DATA, "--output", "OUT"], ["missing.py"]),
    ("no such function", ["analyze", f"{JOURNEY}:netwrok", *DATA, "--output", "OUT"], ["netwrok", "network"]),
    ("no source", ["analyze", "resnet", *DATA, "--output", "OUT"], ["resnet", "zoo:NAME"]),
    (
        "weights",
        ["analyze", "zoo:cifar_resnet", "--weights", "cifar10_resnet21_fp32.npz", *DATA, "--output", "OUT"],
        ["cifar10_resnet21_fp32.npz", "cifar10_resnet20_fp32.npz"],
    ),
    (
        "model option",
        ["analyze", "zoo:cifar_resnet", "--model-option", "deph=20", *DATA, "--output", "OUT"],
        ["deph", "depth"],
    ),
    ("model option form", [*ANALYZE, "--model-option", "depth"], ["depth", "KEY=VALUE"]),
    (
        "data name",
        ["analyze", MODEL, "--data", "zoo:cifar10-tran", "--output", "OUT"],
        ["cifar10-tran", "cifar10-train"],
    ),
    ("images", [*ANALYZE[:2], "--data", "zoo:cifar10-train", "--images", "0", "--output", "OUT"], ["images", "0"]),
    ("precisions text", [*ANALYZE, "--precisions", "2;4"], ["2;4", "2,4,8"]),
    ("precisions range", [*ANALYZE, "--precisions", "0,4"], ["precisions", "0", "16"]),
    ("point", [*ANALYZE, "--point", "layer_outptu"], ["layer_outptu", "layer_output"]),
    ("ranges", [*ANALYZE, "--ranges", "mes"], ["mes", "mse"]),
    ("number", ["assign", MODEL, *DATA, "--output", "OUT", "--budget", "much"], ["--budget", "much"]),
    ("no table yet", ["assign", MODEL, *DATA, "--output", "OUT", "--budget", "1"], ["sensitivity.json", "analyze"]),
    ("shares text", ["sweep", MODEL, *DATA, "--output", "OUT", "--shares", "1;0.5"], ["1;0.5", "1,0.5,0.25"]),
    ("no sensitivity yet", ["sweep", MODEL, *DATA, "--output", "OUT"], ["sensitivity.json", "analyze"]),
    ("no recipe yet", ["evaluate", MODEL, *DATA, *TEST, "--output", "OUT"], ["recipe.json", "assign"]),
    (
        "recipe file",
        ["evaluate", MODEL, *DATA, *TEST, "--output", "OUT", "--recipe", "none.json"],
        ["none.json", "No such file"],
    ),
    ("config file", ["run", "none.yaml"], ["none.yaml"]),
    ("mapper's accelerator", [*ASSIGN, "--cost", "mapper:eyeris"], ["eyeris", "did you mean 'eyeriss"]),
    ("no accelerator", [*ASSIGN, "--cost", "mapper"], ["arch is ''", "mapper:ARCHITECTURE"]),
    ("mapper's objective", [*ASSIGN, "--cost", "mapper:simba:enrgy"], ["enrgy", "did you mean 'energy'"]),
    ("another cost", [*ASSIGN, "--cost", "maper:simba"], ["maper:simba", "did you mean 'mapper'"]),
    ("pulp's target", [*ASSIGN, "--cost", "pulp:xpulpn"], ["xpulpn", "did you mean 'xpulpnn'"]),
    ("no latency table", [*ASSIGN, "--cost", "latency:none.csv"], ["none.csv", "latency:FILE.csv"]),
    ("latency missing", REFINE[:-2], ["--latency"]),
    ("latency file", [*REFINE[:-1], "none.csv"], ["latency='latency:none.csv'", "none.csv"]),
    ("latency's target", [*REFINE[:-1], "pulp:"], ["latency: pulp=''", "xpulpnn-mixed"]),
    ("nothing to refine", REFINE, ["recipe.json", "assign"]),
    ("refined recipe", [*REFINE, "--recipe", "none.json"], ["none.json"]),
    ("refine mode", [*REFINE, "--mode", "no_slow", "--recipe", "mine.json"], ["no_slow", "did you mean 'no_slower'"]),
    ("float recipe", [*REFINE, "--recipe", "part.json"], ["layer 'head' has act=None, weight=None"]),
    ("wide recipe", [*REFINE, "--recipe", "wide.json"], ["widths=[2, 4, 8, 16]", "1 ... 8"]),
    ("refine widths", [*REFINE, "--recipe", "mine.json", "--widths", "2,17"], ["widths=17", "16"]),
    ("output", ["analyze", MODEL, *DATA, "--output", "FILE/folder"], ["FILE/folder", "output"]),
]


@pytest.mark.parametrize(("case", "arguments", "expected"), BAD, ids=[case for case, _, _ in BAD])
def test_bad_input(
    case: str,
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("a file, not a folder")
    layers = ["stem", "a", "b", "side", "head"]
    mixbit.Recipe.uniform(layers).save("mine.json")
    mixbit.Recipe.uniform(layers[:-1]).save("part.json")
    mixbit.Recipe.uniform(layers, act=16).save("wide.json")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("mixbit: ")
    assert "Traceback" not in shown.err
    for word in expected:
        assert word in lines[0], lines[0]


def document(**changes: object) -> dict:
    base = {
        "model": MODEL,
        "data": {"calibration": DATA[1], "test": TEST[1]},
        "output": "out",
        "stages": ["analyze", {"assign": {"budget_share": 0.5}}],
    }
    return {**base, **changes}


CONFIGS: list[tuple[str, dict, list[str]]] = [
    ("unknown key", document(sed=1), ["sed", "seed"]),
    ("missing", {"model": MODEL}, ["data", "missing"]),
    ("seed", document(seed="one"), ["seed", "one"]),
    ("corrections", document(corrections=["biass"]), ["corrections", "biass", "bias"]),
    ("corrections list", document(corrections="bias"), ["corrections", "list"]),
    ("stage", document(stages=["analyse"]), ["analyse", "analyze"]),
    ("twice", document(stages=["analyze", "analyze"]), ["twice"]),
    ("two verbs", document(stages=[{"analyze": {}, "assign": {}}]), ["one verb"]),
    ("stages", document(stages="analyze"), ["stages", "list"]),
    ("option", document(stages=[{"analyze": {"precision": [2]}}]), ["precision", "precisions"]),
    ("options", document(stages=[{"analyze": [2]}]), ["analyze", "keys"]),
    ("data key", document(data={"calib": "x"}), ["calib", "calibration"]),
    ("nothing asked", document(stages=["analyze", "assign"]), ["target_sqnr_db", "budget"]),
    (
        "two asked",
        document(stages=["analyze", {"assign": {"budget": 1, "budget_share": 0.5}}]),
        ["budget", "budget_share", "one of"],
    ),
    (
        "method",
        document(stages=["analyze", {"assign": {"method": "ipl", "budget_share": 0.5}}]),
        ["ipl", "ilp"],
    ),
    ("cost", document(stages=["analyze", {"assign": {"cost": "bop", "budget_share": 0.5}}]), ["bop", "bops"]),
    (
        "metric of a drop",
        document(stages=["analyze", {"assign": {"max_drop": 1, "metric": "top2"}}]),
        ["top2", "top5"],
    ),
    ("metric", document(stages=["analyze", {"sweep": {"metric": "ap5"}}]), ["ap5", "ap50"]),
    ("swept cost", document(stages=["analyze", {"sweep": {"costs": ["bop"]}}]), ["bop", "bops"]),
    ("costs", document(stages=[{"sweep": {"costs": "bops"}}]), ["costs='bops'", "list"]),
    ("cost of a kind", document(stages=[{"assign": {"cost": {"maper": {}}}}]), ["maper", "bops", "mapper:ARCH"]),
    ("mapper's key", document(stages=[{"assign": {"cost": {"mapper": {"arc": "simba"}}}}]), ["arc", "'arch'"]),
    ("mapper's arch", document(stages=[{"assign": {"cost": {"mapper": {"arch": 3}}}}]), ["arch is 3", "mapper:ARCH"]),
    (
        "mapper's flag",
        document(stages=[{"sweep": {"costs": [{"mapper": {"arch": "simba", "scale_mac": 1}}]}}]),
        ["scale_mac is 1", "true or false"],
    ),
    ("nothing to refine for", document(stages=["refine"]), ["latency=None", "FILE.csv", "pulp:TARGET"]),
    ("latency", document(stages=[{"refine": {"latency": "pulp:riscv"}}]), ["riscv", "xpulpv2"]),
    (
        "two recipes",
        document(stages=["analyze", "assign", {"refine": {"latency": "pulp:8bit", "recipe": "mine.json"}}]),
        ["mine.json", "assign"],
    ),
    ("shares", document(stages=["analyze", {"sweep": {"shares": [-1]}}]), ["shares", "-1", "above 0"]),
    (
        "nothing to measure on",
        document(data={"calibration": DATA[1]}, stages=["analyze", "sweep"]),
        ["sweep", "measure", "test"],
    ),
    (
        "no test data",
        document(data={"calibration": DATA[1]}, stages=["analyze", {"assign": {"max_drop": 1}}]),
        ["max_drop", "test"],
    ),
]


@pytest.mark.parametrize(("case", "config", "expected"), CONFIGS, ids=[case for case, _, _ in CONFIGS])
def test_bad_config(
    case: str,
    config: dict,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "config.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in expected:
        assert word in error, error


def test_yaml_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: [1\nb: 2")
    assert main(["run", str(path)]) == 2
    assert "no YAML document" in capsys.readouterr().err


def test_as_a_process() -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "mixbit", "run", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mixbit: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_file_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no luck')")
    with pytest.raises(MixbitError, match=r"broken\.py.*RuntimeError: no luck"):
        sources.load_model(f"{broken}:network")
    other = tmp_path / "other.py"
    other.write_text("def network():\n    return 3\n")
    with pytest.raises(MixbitError, match="returned a int"):
        sources.load_model(f"{other}:network")


def test_fingerprints_follow_content() -> None:
    first, second = sources.load_model(MODEL), sources.load_model(MODEL)
    assert sources.fingerprint(first) == sources.fingerprint(second)
    second.head.bias.data[0] += 1
    assert sources.fingerprint(first) != sources.fingerprint(second)
    batches = sources.load_data(DATA[1])
    assert sources.fingerprint(batches) != sources.fingerprint(batches[:-1])


def test_zoo_data_comes_in_labelled_batches() -> None:
    batches = sources.load_data("zoo:cifar10-test", 10, 4)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
    assert all(len(x) == len(y) for x, y in batches)
