"""The program mixbit-run end to end, and the C header."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import _C, Recipe
from mixbit.runtime import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "csrc" / "runtime" / "mixbit-run"
GRID = {"scale": 1.0, "zero_point": 0, "low": 0, "high": 255}
ISAS = ["scalar", "avx2", "avx512", "vnni", "amx"]


def run(*arguments: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert result.returncode == expect, result.stderr
    return result


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 2, 1)
        self.eval()

    def forward(self, x):
        y = torch.relu(self.a(x))
        return y, self.b(y)


def exported(model: nn.Module, x: torch.Tensor, path: Path) -> mixbit.export.IntegerReference:
    mixbit.fold_batchnorm_(model, x)
    mixbit.prepare_(model, Recipe.uniform(mixbit.layers(model, x).names, weight=4, act=8), x)
    mixbit.calibrate_(model, [x], "maxabs", example=x)
    mixbit.export.integer(model, x, path)
    return mixbit.export.reference(model, x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package, an input, and the output that the reference makes of it."""
    folder = tmp_path_factory.mktemp("program")
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    reference = exported(seeded(Residual), x, folder / "m.mixbit")
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "expected.npy", reference(x)[0])
    return folder


@pytest.mark.parametrize("isa", ISAS)
def test_the_program_computes_the_reference(folder: Path, tmp_path: Path, isa: str) -> None:
    out = tmp_path / "y.npy"
    run(folder / "m.mixbit", "--input", folder / "x.npy", "--output", out, "--threads", 2, MIXBIT_CPU_ISA=isa)
    assert np.array_equal(np.load(out), np.load(folder / "expected.npy"))
    assert list(tmp_path.iterdir()) == [out]


def test_several_outputs_have_a_file_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6)
    reference = exported(Two(), x, tmp_path / "m.mixbit")
    np.save(tmp_path / "x.npy", x.numpy())
    run(tmp_path / "m.mixbit", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    for i, expected in enumerate(reference(x)):
        assert np.array_equal(np.load(tmp_path / f"y.{i}.npy"), expected)


def test_times_and_the_profile(folder: Path, tmp_path: Path) -> None:
    shown = run(folder / "m.mixbit", "--bench", 3, "--profile", tmp_path / "p.json", MIXBIT_CPU_ISA="scalar").stdout
    assert re.match(r"3 runs of 1 inputs, 1 threads, scalar kernels: min [\d.]+ ms, median [\d.]+ ms", shown)
    profile = json.loads((tmp_path / "p.json").read_text())
    assert (profile["isa"], profile["batch"], profile["runs"]) == ("scalar", 1, 3)
    steps = Network(folder / "m.mixbit").steps
    assert [s["node"] for s in profile["steps"]] == [s["node"] for s in steps]
    assert [s["macs"] for s in profile["steps"]] == [s["macs"] for s in steps]
    assert sum(s["ms"] for s in profile["steps"]) > 0
    # Shares follow from the times and the peaks, and the table shows them.
    assert re.search(r"loaded in [\d.]+ ms, first answer after [\d.]+ ms", shown)
    assert f"peak memory of the process by then: {profile['peak_memory_kb']} kB" in shown
    assert 500 < profile["peak_memory_kb"] < 200_000
    assert profile["first_answer_ms"] > profile["load_ms"] > 0
    for step in profile["steps"]:
        seconds = max(step["ms"] * 1e-3, 1e-9)
        moved = step["value_bytes"] + step["weight_bytes"]
        assert step["mac_share"] == pytest.approx(step["macs"] / seconds / profile["peak_macs_per_second"])
        assert step["bandwidth_share"] == pytest.approx(moved / seconds / profile["peak_bytes_per_second"])
        assert f"{step['kernel']} {step['module'] or step['node']}\n" in shown
    assert re.search(r"peak: [\d.]+ GMAC/s, [\d.]+ GB/s from memory", shown)


def test_the_installed_program_is_the_built_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mixbit.runtime.program()
    assert os.access(path, os.X_OK)
    assert path.read_bytes() == PROGRAM.read_bytes()
    code = "import sys; from mixbit.runtime import run_program; sys.argv[0] = 'mixbit-run'; run_program()"
    said = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("usage: mixbit-run PACKAGE")
    monkeypatch.setattr(mixbit.runtime, "__file__", str(tmp_path / "runtime" / "__init__.py"))
    with pytest.raises(mixbit.MixbitError, match="mixbit-run' is missing; build mixbit anew"):
        mixbit.runtime.program()


def test_what_a_package_may_ask_for_is_bounded(folder: Path, tmp_path: Path) -> None:
    text = json.dumps(
        {
            "nodes": [
                {"name": "x", "op": "input", "shape": [1, 4, 4], "grid": GRID},
                {"name": "y", "op": "repeat", "inputs": ["x"], "grid": GRID, "counts": [8192, 8192]},
            ],
            "outputs": ["y"],
        }
    )
    big = tmp_path / "big.mixbit"
    big.write_bytes(_C.runtime.make_package(text, []))
    message = run(big, "--bench", 1, expect=2).stderr
    assert "for values, 0 for weights" in message
    assert "max_memory allows 1073741824" in message
    with pytest.raises(mixbit.MixbitError, match=r"the network needs \d+ bytes .* max_memory allows 1000"):
        Network(folder / "m.mixbit", max_memory=1000)
    assert run(folder / "m.mixbit", "--bench", 1, "--max-memory", 1).returncode == 0
    for wrong in (0, True, 1.5, 2**63):
        with pytest.raises(mixbit.MixbitError, match=r"max_memory=.*: expected a whole number of bytes"):
            Network(folder / "m.mixbit", max_memory=wrong)


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


GOOD = npy(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (npy(np.zeros((1, 3, 8, 8))), r"holds dtype '<f8', expected float32 \('<f4'\)"),
        (npy(np.zeros((1, 3, 8, 8), ">f4")), r"holds dtype '>f4', expected float32"),
        (npy(np.asfortranarray(np.zeros((2, 3, 8, 8), np.float32))), "is in Fortran order, expected C order"),
        (npy(np.zeros((1, 3, 8, 9), np.float32)), r"has shape \[1, 3, 8, 9\], expected \[batch, 3, 8, 8\]"),
        (npy(np.float32(1)), r"has shape \[\], expected \[batch, 3, 8, 8\]"),
        (npy(np.zeros(2, [("a", "<f4")])), "holds a structured array, expected float32"),
        (GOOD[:-1], r"holds 767 bytes of data, which is not float32 \[1, 3, 8, 8\]"),
        (GOOD + b"\0", "holds 769 bytes of data"),
        (GOOD[:60], "its header is cut off or too long"),
        (GOOD[:6], "is no .npy file"),
        (b"", "is no .npy file"),
        (GOOD.replace(b"NUMPY\x01", b"NUMPY\x09"), r"has .npy version 9, expected 1 to 3"),
        (GOOD.replace(b"(1, 3, 8, 8)", b"(1, 3, 8,-8)"), "its header cannot be read"),
        (GOOD.replace(b"(1, 3, 8, 8)", b"(99999999999"), "its header cannot be read"),
        (GOOD.replace(b"(1, 3, 8, 8), }    ", b"(1, 3, 9223372036), "), "its header cannot be read|bytes of data"),
        (GOOD.replace(b"'shape'", b"'shade'"), "its header cannot be read"),
        (GOOD.replace(b"False", b"Maybe"), "its header cannot be read"),
    ],
)  # fmt: skip
def test_damaged_inputs_are_named(folder: Path, tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    arguments = (folder / "m.mixbit", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    result = run(*arguments, expect=2)
    assert re.fullmatch(rf"mixbit-run: '.*x.npy' .*({complaint}).*\n", result.stderr), result.stderr
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no package given; mixbit-run --help shows the usage"),
        (["m.mixbit"], "no --input given"),
        (["m.mixbit", "--input", "x.npy"], "no --output given"),
        (["m.mixbit", "other"], "two packages: 'm.mixbit' and 'other', expected one"),
        (["m.mixbit", "--speed", "9"], "unknown option '--speed', expected --input, --output, --threads"),
        (["m.mixbit", "--input"], "--input: no value follows"),
        (["m.mixbit", "--threads", "zero"], "--threads is 'zero', expected a whole number from 1 to 1024"),
        (["m.mixbit", "--threads", "0"], "--threads is '0', expected a whole number from 1 to 1024"),
        (["m.mixbit", "--bench", "3x"], "--bench is '3x', expected a whole number"),
        (["none.mixbit", "--bench", "1"], "cannot open 'none.mixbit': No such file"),
        (["x.npy", "--bench", "1"], "'x.npy': no mixbit package: it does not start as one"),
        (["m.mixbit", "--input", "none.npy", "--output", "y"], "cannot read 'none.npy'"),
        (["m.mixbit", "--input", "x.npy", "--output", "no/y.npy"], "cannot write 'no/y.npy': No such file"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, arguments: list[str], complaint: str) -> None:
    result = subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=folder, env=os.environ
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"mixbit-run: {complaint}")
    assert result.stderr.count("\n") == 1


def test_the_instruction_set_is_checked(folder: Path) -> None:
    result = run(folder / "m.mixbit", "--bench", 1, expect=2, MIXBIT_CPU_ISA="sse")
    assert "MIXBIT_CPU_ISA=sse is not known: expected scalar, avx2, avx512, vnni or amx" in result.stderr


def test_help_and_an_empty_batch(folder: Path, tmp_path: Path) -> None:
    assert "usage: mixbit-run PACKAGE --input IN.npy" in run("--help").stdout
    np.save(tmp_path / "x.npy", np.zeros((0, 3, 8, 8), np.float32))
    run(folder / "m.mixbit", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").shape == (0, 5)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_header_is_c(tmp_path: Path) -> None:
    source = tmp_path / "a.c"
    source.write_text("#include <mixbit/runtime/c.h>\nint f(mixbit_network* n) { return mixbit_outputs(n); }\n")
    include = ROOT / "csrc" / "runtime" / "include"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-I{include}", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
