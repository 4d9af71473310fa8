"""Every program of examples/python runs on the shipped network, and says what its first lines promise."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixbit
from mixbit.pipeline import Config, Pipeline

EXAMPLES = Path(__file__).parents[3] / "examples" / "python"


def test_analyze_and_assign(tmp_path: Path) -> None:
    output = tmp_path / "recipe.json"
    command = [EXAMPLES / "analyze_and_assign.py", "--images", "64", "--test-images", "200", "--output", output]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = {
        k: float(v) for k, v in re.findall(r"^(float|fake-quantized|integer network) +([\d.]+) %", done.stdout, re.M)
    }
    assert found["float"] > 85
    assert abs(found["integer network"] - found["fake-quantized"]) <= 3
    assert found["float"] - found["integer network"] <= 5
    share = float(re.search(r"cost ([\d.]+) of", done.stdout)[1])
    assert 0.38 < share <= 0.4
    assert len(mixbit.Recipe.load(output).layers) == done.stdout.count(" bit, weight ")


def test_search_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    output = tmp_path / "m.onnx"
    command = ["--images", "128", "--test-images", "200", "--search-steps", "16", "--train-steps", "8"]
    command += ["--batch", "32", "--verify-images", "8", "--output", output]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "search_to_onnx.py", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.28 < float(re.search(r"cost ([\d.]+) of", done.stdout)[1]) <= 0.3
    assert "0 of 80 output values differ from the integer reference" in done.stdout
    # The accuracy of the file on the verified images, and of the trained model on more of them.
    float_top1, trained = (
        float(re.search(rf"^{name} +([\d.]+) %", done.stdout, re.M)[1]) for name in ("float", "trained")
    )
    assert float_top1 > 80
    assert trained > 40
    size = [
        int(v) for v in re.search(r"(\d+) bytes.* (\d+), .* (\d+), .* (\d+), .* (\d+)$", done.stdout, re.M).groups()
    ]
    assert size[0] == sum(size[1:]) == output.stat().st_size
    widths = {layer.weight for layer in mixbit.Recipe.load(f"{output}.recipe.json").layers.values()}
    assert len(widths) > 1


def test_the_program_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parents[1] / "README.md").read_text(), re.S)
    # The second block trains on what the first has made, the third searches, the fourth maps what was trained.
    code = "\n".join(blocks) + "\nprint('searched', costs.total(found.recipe) / costs.uniform(8, 8))"
    code += "\nmodel.eval()\nprint(mixbit.evaluate(model, test_batches, metric='top1'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    fake, integer, trained = (float(line) for line in re.findall(r"^[\d.]+$", done.stdout, re.M))
    assert fake > 75
    assert abs(fake - integer) <= 3
    assert trained > fake - 3
    assert float(re.search(r"searched ([\d.]+)", done.stdout)[1]) <= 0.25
    assert "DRAM [Weights, Inputs, Outputs]" in done.stdout  # a loop nest
    assert mixbit.Recipe.load(tmp_path / "recipe.json").layers


def test_the_programs_of_the_training_page_run_as_they_stand(tmp_path: Path) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "training.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    code += "\nprint('losses', history.loss)\nprint('trained', mixbit.evaluate(model, test))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    fake, integer = (float(v) for v in re.search(r"^([\d.]+) ([\d.]+)$", done.stdout, re.M).groups())
    assert abs(fake - integer) <= 5
    assert fake > 60
    assert (tmp_path / "run.checkpoint").exists()


def test_the_programs_of_the_search_page_run_as_they_stand(tmp_path: Path) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "search.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    code += (
        "\nprint('loop', costs.total(recipe) / costs.uniform(8, 8), len({p.weight for p in recipe.layers.values()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.39 < float(re.match(r"[\d.]+", done.stdout)[0]) <= 0.4
    share, widths = re.search(r"loop ([\d.]+) (\d)", done.stdout).groups()
    assert 0.49 < float(share) <= 0.5
    assert int(widths) > 1


@pytest.mark.parametrize("page", ["storage", "pe"])
def test_the_programs_of_the_storage_and_pe_pages_print_what_the_pages_say(page: str, tmp_path: Path) -> None:
    text = (EXAMPLES.parents[1] / "docs" / f"{page}.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^prints, .*?```\n(.*?)```", text, re.S | re.M)
    assert len(printed) == (1 if page == "pe" else 0)
    assert all(lines in done.stdout for lines in printed), done.stdout
    assert page == "pe" or re.search(r"^entropy +2\.92", done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_the_retraining_example_wins_accuracy_back(tmp_path: Path) -> None:
    Pipeline(dataclasses.replace(Config.load(EXAMPLES.parent / "retrain.yaml"), output=tmp_path)).run()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["quantized"] > evaluation["before_training"] + 5
    assert abs(evaluation["quantized"] - evaluation["integer"]) < 5


@pytest.mark.slow
def test_the_search_example_keeps_its_accuracy(tmp_path: Path) -> None:
    Pipeline(dataclasses.replace(Config.load(EXAMPLES.parent / "search.yaml"), output=tmp_path)).run()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    refinement = json.loads((tmp_path / "refinement.json").read_text())
    assert evaluation["quantized"] > evaluation["float"] - 4
    assert refinement["latency_after"] < min(refinement["latency_before"], refinement["latency_8bit"])


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"analyze_and_assign.py", "search_to_onnx.py"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_what_the_command_takes(path: Path) -> None:
    assert [verb for verb, _ in Config.load(path).stages][-1] == "report"


def test_the_program_of_the_latency_page_runs_as_it_stands(tmp_path: Path) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "latency.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (float(v) for v in re.search(r"^([\d.]+) ([\d.]+) us$", done.stdout, re.M).groups())
    assert 0 < after <= before
    assert (tmp_path / "this_machine.csv").exists()
