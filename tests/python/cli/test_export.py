"""The verbs and stages `export` and `verify`: files, exit codes, what is kept, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mixbit
from mixbit.cli import main
from mixbit.errors import MixbitError
from mixbit.pipeline import Config, Pipeline

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

JOURNEY = Path(__file__).resolve().parents[2] / "integration" / "journey_model.py"
MODEL = f"{JOURNEY}:network"
DATA = ["--data", f"{JOURNEY}:calibration"]
TEST = ["--test", f"{JOURNEY}:test"]


def recipe(path: Path, weight: int = 4) -> Path:
    from mixbit.sources import load_data, load_model

    names = mixbit.layers(load_model(MODEL), load_data(f"{JOURNEY}:calibration", 2)[0]).names
    mixbit.Recipe.uniform(names, weight=weight, act=8).save(path)
    return path


def test_export_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, folder = recipe(tmp_path / "given.json"), tmp_path / "out"
    output = ["--output", str(folder)]
    assert main(["export", MODEL, *DATA, *output, "--recipe", str(given), "--formats", "onnx,program,integer"]) == 0
    shown = capsys.readouterr().out
    assert "int4 weights need opset 21" in shown
    assert str(folder / "network.onnx") in shown
    document = json.loads((folder / "export.json").read_text())
    assert set(document) == {"network.onnx", "network.program.pt2", "network.mixbit"}
    assert document["network.mixbit"]["bytes"] == (folder / "network.mixbit").stat().st_size
    assert document["network.onnx"]["dialect"] == "qdq"
    assert sum(document["network.onnx"]["bytes"].values()) == (folder / "network.onnx").stat().st_size
    assert set(document["network.onnx"]["stored_bits"].values()) == {4}
    assert torch.export.load(folder / "network.program.pt2") is not None

    assert main(["verify", MODEL, *DATA, *TEST, *output, "--verify-images", "20"]) == 0
    shown = capsys.readouterr().out
    assert "keeps its promise of equality" in shown
    found = json.loads((folder / "verification.json").read_text())
    assert set(found) == set(document)
    for report in found.values():
        assert (report["mismatches"], report["images"], report["in_class"]) == (0, 20, True)
        assert report["accuracy"] == report["reference_accuracy"]
    # Results are not replaced unasked.
    assert main(["verify", MODEL, *DATA, *output]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", MODEL, *DATA, *output]) == 2
    assert "--force" in capsys.readouterr().err

    # One flipped weight: exit code 1, the layer named.
    proto = onnx.load(folder / "network.onnx")
    weight = next(t for t in proto.graph.initializer if t.name.endswith(".weight"))
    raw = bytearray(weight.raw_data)
    raw[0] ^= 0x08
    weight.raw_data = bytes(raw)
    onnx.save(proto, tmp_path / "bad.onnx")
    assert main(["verify", MODEL, *DATA, *output, "--artifacts", str(tmp_path / "bad.onnx"), "--force"]) == 1
    streams = capsys.readouterr()
    assert "an artifact breaks its promise" in streams.err
    assert f"the first layer that differs is '{weight.name.removesuffix('.weight')}'" in streams.out
    found = json.loads((folder / "verification.json").read_text())
    assert found[str(tmp_path / "bad.onnx")]["in_class"] is False


def test_stages_are_kept_until_something_changes(tmp_path: Path) -> None:
    recipe(tmp_path / "recipe.json")
    said: list[str] = []

    def run(**options) -> list[Path]:
        config = Config.from_dict(
            {
                "model": MODEL,
                "data": {"calibration": f"{JOURNEY}:calibration"},
                "output": str(tmp_path),
                "stages": [{"export": options}, {"verify": {"images": 4}}],
            }
        )
        said.clear()
        return Pipeline(config, say=said.append).run()

    made = run()
    assert [path.name for path in made] == ["network.onnx", "export.json", "verification.json"]
    assert not any("done before, kept" in line for line in said)
    run()
    assert sum("done before, kept" in line for line in said) == 2
    (tmp_path / "network.onnx").write_bytes((tmp_path / "network.onnx").read_bytes()[:-9])
    run()  # a damaged file is made again
    assert not any("export: done before" in line for line in said)
    run(exact=False)
    assert not any("done before, kept" in line for line in said)
    report = json.loads((tmp_path / "verification.json").read_text())["network.onnx"]
    assert report["promise"] == "one_code"


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ({"export": {"formats": ["onx"]}}, "formats='onx' is not known.*did you mean 'onnx'"),
        ({"export": {"formats": []}}, r"formats=\[\]: expected a list of some of"),
        ({"export": {"dialect": "pt2e"}}, "dialect='pt2e' is not known: expected one of 'qdq', 'qonnx'"),
        ({"export": {"opest": 21}}, "unknown key 'opest'.*did you mean 'opset'"),
        ({"verify": {"images": 0}}, "images=0: expected a whole number from 1"),
        ({"verify": {"artifacts": "m.onnx"}}, "artifacts='m.onnx': expected a list of files"),
    ],
)
def test_bad_options(stage: dict, complaint: str, tmp_path: Path) -> None:
    config = {
        "model": MODEL,
        "data": {"calibration": f"{JOURNEY}:calibration"},
        "output": str(tmp_path),
        "stages": [stage],
    }
    with pytest.raises(MixbitError, match=complaint):
        Config.from_dict(config)


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path)]
    assert main(["export", MODEL, *DATA, *output]) == 2
    assert "recipe.json' is missing" in capsys.readouterr().err
    recipe(tmp_path / "recipe.json")
    assert main(["verify", MODEL, *DATA, *output]) == 2
    assert "export.json' is missing; run the stage 'export' first" in capsys.readouterr().err
    assert main(["verify", MODEL, *DATA, *output, "--artifacts", "none.onnx"]) == 2
    assert "there is no file 'none.onnx'" in capsys.readouterr().err
    recipe(tmp_path / "recipe.json", 9)
    assert main(["export", MODEL, *DATA, *output]) == 2
    assert "nearest width that can be expressed is 8" in capsys.readouterr().err
    assert not (tmp_path / "network.onnx").exists()
