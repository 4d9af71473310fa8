"""What a user gets from pip: a wheel that needs no compiler, a build without a CUDA toolkit, a quick import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build"


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def test_import_adds_less_than_a_second() -> None:
    """Minimum of three, so that another process on the machine does not decide."""
    code = (
        "import torch, time; start = time.perf_counter(); import mixbit; mixbit.ops.fake_quantize; "
        "print(time.perf_counter() - start)"
    )
    seconds = min(float(run(sys.executable, "-c", code).stdout) for _ in range(3))
    assert seconds < 1.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from a build folder of its own; ccache, where present, makes this quick."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = run("git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard").stdout.split("\n")
    for name in tracked:
        if name.startswith(("csrc/", "cmake/", "python/", "scripts/")) or "/" not in name:
            path = ROOT / name
            if path.is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, source / name)
    # No toolkit in sight: pip's torch is a CUDA build all the same.
    environment = os.environ | {
        "MIXBIT_CUDA": "OFF",
        "PATH": os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if "cuda" not in p),
    }
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "LIBRARY_PATH"):
        environment.pop(name, None)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(source),
        env=environment,
    )
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_pinned_to_the_torch_minor_version_and_needs_no_compiler(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    major, minor = torch.__version__.split(".")[:2]
    assert re.search(rf"Requires-Dist: torch<{major}\.{int(minor) + 1},>={major}\.{minor}\.0", metadata), metadata
    assert "mixbit/lib/libmixbit_ops.so" in names
    assert "mixbit/bin/mixbit-run" in names
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    )
    code = (
        "import mixbit, torch; y = mixbit.ops.fake_quantize(torch.ones(3), torch.tensor([0.4]), 0, 4); "
        "print(mixbit.__file__, y.tolist())"
    )
    # An empty PATH: neither nvcc nor a compiler can be found.
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": str(tmp_path), "HOME": str(tmp_path)}
    out = run(sys.executable, "-c", code, env=environment, cwd=tmp_path).stdout
    assert str(tmp_path) in out
    assert "0.8" in out
    # The program runs as it lies there, without Python.
    assert "usage: mixbit-run" in run(str(tmp_path / "site" / "mixbit" / "bin" / "mixbit-run"), "--help").stdout


def test_off_configures_and_compiles_without_a_cuda_toolkit(tmp_path: Path) -> None:
    """MIXBIT_CUDA=OFF with the toolkit hidden: no CUDA header is read by the sources of the ops."""
    run(
        "cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        "-DMIXBIT_CUDA=OFF", "-DMIXBIT_BUILD_TESTS=OFF", "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON",
        "-DCMAKE_DISABLE_FIND_PACKAGE_CUDA=ON",
    )  # fmt: skip
    run("cmake", "--build", str(tmp_path), "--target", "csrc/ops/CMakeFiles/mixbit_ops.dir/library.cpp.o")
    dependencies = run("ninja", "-C", str(tmp_path), "-t", "deps").stdout
    assert "library.cpp.o" in dependencies
    assert "cuda_runtime" not in dependencies
    assert "/usr/local/cuda" not in dependencies
