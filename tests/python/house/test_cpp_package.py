"""What a C++ user gets: an install tree that find_package(mixbit) reads, and the example that trains on it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(*command: str | Path, expect: int = 0) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == expect, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", ROOT / "build", "--component", "cpp", "--prefix", prefix)
    return prefix


def test_the_example_builds_against_the_installed_package_and_trains(installed: Path, tmp_path: Path) -> None:
    for header in (
        "common/numerics.h",
        "kernels/cpu.h",
        "assign/assign.h",
        "hw/pe.h",
        "storage/storage.h",
        "ops/ops.h",
    ):
        assert (installed / "include" / "mixbit" / header).is_file()
    build = tmp_path / "build"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={installed}")
    assert str(ROOT / "csrc") not in (build / "build.ninja").read_text()
    run("cmake", "--build", build, "--target", "qat")
    images = tmp_path / "images.bin"
    run(sys.executable, ROOT / "scripts" / "cifar_binary.py", images)
    assert images.stat().st_size == 512 * 3073
    out = run(build / "qat", images, "--bits", "4", "--epochs", "12")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0], out
    assert float(re.search(r"accuracy ([\d.]+)", out)[1]) > 35, out
    assert float(re.search(r"weights ([\d.]+) dB above", out)[1]) == pytest.approx(24, abs=4)
    assert "bit_widths[0]=17: expected a whole number" in run(build / "qat", images, "--bits", "17", expect=2)
    assert "cannot open" in run(build / "qat", tmp_path / "none.bin", expect=2)
    images.write_bytes(b"short")
    assert "expected a multiple of 3073" in run(build / "qat", images, expect=2)


def test_another_torch_version_is_refused(installed: Path, tmp_path: Path) -> None:
    include = tmp_path / "torch" / "include" / "torch" / "headeronly"
    include.mkdir(parents=True)
    (include / "version.h").write_text("#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 2\n")
    out = run(
        "cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path / "build", "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={installed}", f"-DMIXBIT_TORCH_ROOT={tmp_path / 'torch'}", expect=1,
    )  # fmt: skip
    assert re.search(r"mixbit was built against torch \d+\.\d+,\s+but", out)
    assert re.search(r"holds\s+1\.2", out)
