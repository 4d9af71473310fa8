"""Latencies measured through the runtime: every layer and pair, resumed, written, read back; bad input."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixbit
from mixbit import MixbitError, profiling
from mixbit.cli import main
from mixbit.costs.latency import COLUMNS, shape_key
from mixbit.pipeline import Config, Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

X = torch.randn(2, 3, 16, 16)
JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"


class Odd(nn.Module):
    """Strides, dilation beside the same shape without, depthwise, "same" padding, tokens, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), (1, 2), (1, 2))
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.dense = nn.Conv2d(8, 8, 3, padding=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.dense(self.wide(x))[:, :, 2:, 2:]
        x = self.depthwise(self.depthwise(x))
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))


def test_every_layer_has_every_pair(tmp_path: Path) -> None:
    model = seeded(Odd)
    path = tmp_path / "table.csv"
    seen: list[tuple[int, int, str]] = []
    found = mixbit.profile(model, X, path, repeats=4, progress=lambda *args: seen.append(args))
    shapes = {(shape_key(layer, s), layer.dilation) for layer in mixbit.layers(model, X) for s in layer.call_shapes}
    pairs = {(m.key, m.dilation, m.act, m.weight) for m in found.measurements}
    assert len(pairs) == len(found.measurements) == 9 * len(shapes)
    assert seen[-1] == (3 * len(shapes), 3 * len(shapes), "layers")
    assert all(len(m.samples) == 4 and m.least > 0 for m in found.measurements)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    keys = {key for key, _ in shapes}
    assert len(rows) == 64 * len(keys)
    assert {(r["out_bits"], r["unit"]) for r in rows} == {("8", "us")}
    table = mixbit.costs.latency(path, model, X)
    assert table.act_bits == table.weight_bits == tuple(range(1, 9))
    assert np.array_equal(table.values, found.costs(model, X).values)
    assert sorted(os.listdir(tmp_path)) == ["table.csv", "table.json"]
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["machine"]["threads"] == 1
    assert len(document["measurements"]) == len(found.measurements)
    for entry in document["measurements"]:
        assert 0 < entry["min"] <= entry["median"] <= entry["max"]


def test_widths_have_the_entry_of_their_kernel() -> None:
    key = ("linear", 4, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1)
    other = ("conv2d", 4, 3, 1, 3, 3, 1, 1, 0, 0, 9, 9)
    times = {(2, 2): 5.0, (4, 2): 4.0, (8, 2): 6.0, (2, 4): 7.0, (4, 4): 8.0, (8, 4): 9.0}
    times |= {(2, 8): 3.0, (4, 8): 2.0, (8, 8): 1.0}
    measured = [
        profiling.Measurement(k, d, ("a",), a, w, (t * more + 1, t * more))
        for k, d, more in ((key, (1, 1), 1), (other, (1, 1), 10), (other, (2, 2), 20))
        for (a, w), t in times.items()
    ]
    rows = profiling.Profile(tuple(measured), {}).latencies
    assert len(rows) == 128
    for (k, _, weight), value in rows.items():
        assert value == (4.0 if weight <= 2 else 7.0 if weight <= 4 else 1.0) * (1 if k == key else 20)


def test_layers_run_at_the_widths_asked_for() -> None:
    runner = profiling._Runner(1, "scalar", False)
    assert runner.isa == "scalar"
    conv = ("conv2d", 8, 16, 2, 3, 5, 2, 1, 1, 2, 9, 7)
    for key, dilation in ((conv, (1, 1)), (conv, (2, 1)), (("linear", 8, 16, 1, 1, 1, 1, 1, 0, 0, 5, 1), (1, 1))):
        module = nn.Conv2d(8, 16, (3, 5), (2, 1), (1, 2), dilation, 2) if key is conv else nn.Linear(8, 16)
        x = torch.zeros(1, 8, 9, 7) if key is conv else torch.zeros(1, 5, 8)
        macs = sum(layer.macs for layer in mixbit.layers(nn.Sequential(module).eval(), x))
        for act, weight in ((2, 8), (8, 4), (4, 2)):
            network = runner._network(key, dilation, act, weight)
            (step,) = (s for s in network.steps if s["weight_bits"])
            assert (step["act_bits"], step["weight_bits"], step["macs"]) == (act, weight, macs)
            assert network(x.numpy())[0].shape == tuple(module(x).shape)


def test_a_cold_profile_empties_the_caches_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    warm, cold = (mixbit.profile(model, torch.zeros(1, 4), repeats=2, cold=cold) for cold in (False, True))
    assert (warm.machine["cold"], cold.machine["cold"]) == (False, True)
    assert len(warm.measurements) == len(cold.measurements) == 9
    runner = profiling._Runner(1, None, True)
    assert runner.other_data is not None
    assert runner.other_data.nbytes >= 4 << 20
    seen: list[int] = []

    class Counted(np.ndarray):
        def sum(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return super().sum(*args, **kwargs)

    runner.other_data = runner.other_data.view(Counted)
    runner.measure(("linear", 4, 2, 1, 1, 1, 1, 1, 0, 0, 1, 1), (1, 1), 3)
    assert len(seen) == 27
    # Every processor has such a cache: of several threads each one's is emptied, and the thread goes back to all.
    placed: list[list[int]] = []
    monkeypatch.setattr(profiling.os, "sched_setaffinity", lambda who, where: placed.append(list(where)), raising=False)
    runner.processors = [3, 5]
    runner.measure(("linear", 4, 2, 1, 1, 1, 1, 1, 0, 0, 1, 1), (1, 1), 1)
    assert placed == [[3], [5], [3, 5]] * 9
    assert len(seen) == 27 + 2 * 9


def test_energies_where_they_are_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)).eval(), torch.zeros(1, 4)
    monkeypatch.setattr(profiling, "_POWERCAP", tmp_path / "none")
    mixbit.profile(model, x, tmp_path / "a.csv", repeats=1)
    document = json.loads((tmp_path / "a.json").read_text())
    assert {entry["energy_uj"] for entry in document["measurements"]} == {"not readable"}
    # Two packages, one of which begins anew, a part that does not count, and one that may not be read.
    for name, energy in (("intel-rapl:0", 1000), ("intel-rapl:1", 90), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("100\n")
    (tmp_path / "intel-rapl:2").mkdir()
    monkeypatch.setattr(profiling, "_POWERCAP", tmp_path)
    monkeypatch.setattr(profiling, "_ENERGY_SECONDS", 0.0)
    assert list(profiling._energy_counters()) == [tmp_path / f"intel-rapl:{i}" / "energy_uj" for i in (0, 1)]
    told = iter([[1000, 90], [1300, 20]] * 9)
    monkeypatch.setattr(profiling, "_energies", lambda counters: next(told))
    clock = iter(range(1000))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock) / 4)
    monkeypatch.setattr(profiling, "_ENERGY_SECONDS", 0.6)  # two runs
    found = profiling._Runner(1, "scalar", False).energies(("linear", 4, 2, 1, 1, 1, 1, 1, 0, 0, 1, 1), (1, 1))
    assert set(found.values()) == {(300 + 30) / 2}
    assert len(found) == 9


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = seeded(Residual), tmp_path / "table.csv"
    measure, calls = profiling._Runner.measure, []

    def stops(self: Any, *args: Any) -> Any:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(self, *args)

    monkeypatch.setattr(profiling._Runner, "measure", stops)
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyboardInterrupt):
        mixbit.profile(model, X, path, repeats=3)
    assert os.sched_getaffinity(0) == before
    assert os.listdir(tmp_path) == [".table.csv.state"]
    kept = json.loads((tmp_path / ".table.csv.state").read_text())["done"]
    assert len(kept) == 7
    calls.append(None)  # another 8 are allowed
    monkeypatch.setattr(profiling._Runner, "measure", lambda self, *args: calls.append(args) or measure(self, *args))
    found = mixbit.profile(model, X, path, repeats=3)
    assert len(calls) == 1 + 3 * 5
    first = [m.samples[0] for m in found.measurements]
    assert first == [samples[0] for shape in list(kept.values())[:5] for samples in shape]
    assert sorted(os.listdir(tmp_path)) == ["table.csv", "table.json"]


@pytest.mark.parametrize("state", ["other options", "damaged", "short"])
def test_a_state_of_another_run_does_not_count(tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Linear(4, 2)).eval(), tmp_path / "table.csv"
    calls: list[int] = []
    measure = profiling._Runner.measure

    def stops(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(profiling._Runner, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        mixbit.profile(model, torch.rand(1, 4), path, repeats=3)
    if state == "damaged":
        (tmp_path / ".table.csv.state").write_text('{"key": ')
    if state == "short":
        document = json.loads((tmp_path / ".table.csv.state").read_text())
        assert len(document["done"]) == 2
        document["done"] = {name: samples[:8] for name, samples in document["done"].items()}
        (tmp_path / ".table.csv.state").write_text(json.dumps(document))
    mixbit.profile(model, torch.rand(1, 4), path, repeats=6 if state == "other options" else 3)
    assert len(calls) == 3 + 3


def test_a_run_that_was_stopped_between_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = nn.Sequential(nn.Linear(4, 2)).eval(), torch.rand(1, 4), tmp_path / "table.csv"

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(profiling, "write_latencies", stops)
        with pytest.raises(KeyboardInterrupt):
            mixbit.profile(model, x, path, repeats=3)
    assert sorted(os.listdir(tmp_path)) == [".table.csv.state", "table.json"]
    before = json.loads((tmp_path / "table.json").read_text())["measurements"]
    mixbit.profile(model, x, path, repeats=3)
    assert sorted(os.listdir(tmp_path)) == ["table.csv", "table.json"]
    assert json.loads((tmp_path / "table.json").read_text())["measurements"] == before


def test_bad_input(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)).eval(), torch.rand(1, 4)
    for options, message in (
        ({"threads": 0}, "threads=0: expected a whole number from 1 to"),
        ({"threads": 4096}, "threads=4096: expected a whole number from 1 to"),
        ({"repeats": 0}, "repeats=0: expected a whole number from 1"),
        ({"repeats": 2.5}, "repeats=2.5"),
        ({"isa": "neon"}, "isa=neon is not known"),
        ({"path": tmp_path / "table.txt"}, "expected a file that ends in '.csv'"),
        ({"path": tmp_path / "none" / "table.csv"}, "does not exist"),
    ):
        with pytest.raises(MixbitError, match=message):
            mixbit.profile(model, x, **options)
    with pytest.raises(MixbitError, match="nothing can be quantized"):
        mixbit.profile(nn.Sequential(nn.ReLU()).eval(), x)
    for name in ("table.csv", "table.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(MixbitError, match=f"{name}' exists"):
            mixbit.profile(model, x, tmp_path / "table.csv", repeats=1)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "table.csv").write_text("mine")
    found = mixbit.profile(model, x, tmp_path / "table.csv", repeats=1, force=True)
    assert mixbit.costs.latency(tmp_path / "table.csv", model, x).uniform(8, 8) > 0
    with pytest.raises(MixbitError, match="the profile has no latency"):
        found.costs(nn.Sequential(nn.Linear(5, 2)).eval(), torch.rand(1, 5))


def test_the_verb_and_what_reads_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = f"{JOURNEY}:network", f"{JOURNEY}:calibration"
    command = ["profile", model, "--input", "3,16,16", "--repeats", "2", "--output", "mine.csv"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "wrote mine.csv" in shown and "total" in shown and "stem" in shown
    manifest = json.loads(Path("mine.manifest.json").read_text())
    assert manifest["options"]["repeats"] == 2 and set(manifest["outputs"]) == {"mine.csv", "mine.json"}
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force", "--data", data]) == 2
    assert main([*command[:2], *command[4:], "--force", "--data", data]) == 0
    assert main(["profile", model, "--input", "5,16,16", "--output", "other.csv"]) == 2
    assert "--input 5,16,16 does not fit the model" in capsys.readouterr().err
    assert main([*command, "--force", "--threads", "0"]) == 2
    assert "threads=0" in capsys.readouterr().err
    mixbit.Recipe.uniform(["stem", "a", "b", "side", "head"], act=4, weight=2).save("recipe.json")
    refine = ["refine", model, "--data", data, "--output", "out", "--latency", "mine.csv", "--recipe", "recipe.json"]
    assert main([*refine, "--mode", "no_slower"]) == 0
    assert json.loads(Path("out/refinement.json").read_text())["unit"] == "us"
    refined = mixbit.Recipe.load("out/refined_recipe.json")
    # Acts are bytes in the runtime: none costs a thing, but the network's input keeps its width.
    assert {refined[name].act for name in ("a", "b", "side", "head")} == {8}


def test_the_stage_and_stages_that_wait_for_its_table(tmp_path: Path) -> None:
    mixbit.Recipe.uniform(["stem", "a", "b", "side", "head"], act=4, weight=2).save(tmp_path / "mine.json")
    table = str(tmp_path / "out" / "profile.csv")

    def run(repeats: int, *, first: bool = True) -> list[str]:
        stages: list[Any] = [{"profile": {"repeats": repeats}}] if first else []
        stages.append({"refine": {"latency": table, "mode": "no_slower", "recipe": str(tmp_path / "mine.json")}})
        document = {
            "model": f"{JOURNEY}:network",
            "data": {"calibration": f"{JOURNEY}:calibration"},
            "output": str(tmp_path / "out"),
            "stages": stages,
        }
        said: list[str] = []
        Pipeline(Config.from_dict(document), say=said.append).run()
        return said

    with pytest.raises(MixbitError, match="there is no latency table"):
        run(1, first=False)
    assert not any("kept" in line for line in run(1))
    measured = Path(table).read_bytes()
    found = json.loads((tmp_path / "out" / "refinement.json").read_text())
    assert (found["latency"], found["unit"]) == ("latency-profile", "us")
    assert all("kept" in line for line in run(1))
    assert Path(table).read_bytes() == measured
    assert not any("kept" in line for line in run(2))
    assert json.loads(Path(table).with_suffix(".json").read_text())["machine"]["repeats"] == 2
