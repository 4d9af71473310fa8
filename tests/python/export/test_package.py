"""AOTInductor packages: equal to the reference in Python and in C++; nothing is written where something is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe
from mixbit.errors import MixbitError

ROOT = Path(__file__).resolve().parents[3]


class Two(nn.Module):
    """A residual sum, a pool, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        z = torch.relu(y + self.side(y))
        return self.head(z.mean((2, 3))), z


@pytest.fixture(scope="module")
def prepared() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(5, 3, 12, 12)
    layers = {"stem": (8, 8), "side": (4, 6), "head": (16, 8)}  # the last beyond the float32 engine
    mixbit.prepare_(model, Recipe(layers={k: LayerPrecision(weight=w, act=a) for k, (w, a) in layers.items()}))
    return mixbit.calibrate_(model, [x], example=x), x


@pytest.fixture(scope="module")
def compiled(prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, x = prepared
    path = tmp_path_factory.mktemp("package") / "m.pt2"
    path.write_bytes(b"older")
    assert mixbit.export.package(model, x, path, force=True) == path
    assert [p.name for p in path.parent.iterdir()] == ["m.pt2"]
    return path


@pytest.mark.slow
def test_a_package_equals_the_reference(prepared, compiled: Path) -> None:
    model, x = prepared
    reference, run = mixbit.export.reference(model, x), mixbit.export.runner(compiled)
    assert run.dialect == "mixbit"
    for n in (1, 2, 5):
        for mine, theirs in zip(reference(x[:n]), run(x[:n]), strict=True):
            assert np.array_equal(mine, theirs.numpy())


@pytest.mark.slow
def test_a_package_runs_in_cpp_without_mixbit(prepared, compiled: Path, tmp_path: Path) -> None:
    model, x = prepared

    def run(*command: str | Path, expect: int = 0) -> str:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        assert done.returncode == expect, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    prefix, build = tmp_path / "prefix", tmp_path / "build"
    run("cmake", "--install", ROOT / "build", "--component", "cpp", "--prefix", prefix)
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build, "--target", "run_package")
    assert "libmixbit" not in run("ldd", build / "run_package")
    source, first, second = (tmp_path / name for name in ("x.npy", "a.npy", "b.npy"))
    np.save(source, x.numpy())
    run(build / "run_package", compiled, source, first, second)
    for mine, path in zip(mixbit.export.reference(model, x)(x), (first, second), strict=True):
        assert np.array_equal(mine, np.load(path))
    assert "has 2 outputs; got 1 files" in run(build / "run_package", compiled, source, first, expect=2)
    assert "is no .npy file" in run(build / "run_package", compiled, compiled, first, second, expect=2)


def test_bad_input_writes_nothing(prepared, tmp_path: Path) -> None:
    model, x = prepared
    existing = tmp_path / "m.pt2"
    existing.write_bytes(b"mine")
    with pytest.raises(MixbitError, match=r"m.pt2' exists; pass force=True"):
        mixbit.export.package(model, x, existing)
    assert existing.read_bytes() == b"mine"
    with pytest.raises(MixbitError, match=r"ends in '.so'; expected '.pt2'"):
        mixbit.export.package(model, x, tmp_path / "m.so")
    with pytest.raises(MixbitError, match=r"folder .*nowhere' does not exist"):
        mixbit.export.package(model, x, tmp_path / "nowhere" / "m.pt2")
    with pytest.raises(MixbitError, match="dialect"):
        mixbit.export.package(model, x, tmp_path / "n.pt2", dialect="onnx")
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.export.package(Two().eval(), x, tmp_path / "n.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_what_cannot_be_compiled_is_said_and_leaves_nothing(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = prepared

    def broken(program: object, package_path: object, **options: object) -> None:
        package_path.write(b"half")
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    with pytest.raises(MixbitError, match=r"cannot compile the network: No working C\+\+ compiler found\. It needs"):
        mixbit.export.package(model, x, tmp_path / "m.pt2")
    monkeypatch.delattr(torch._inductor, "aoti_compile_and_package")
    with pytest.raises(MixbitError, match="has no torch._inductor.aoti_compile_and_package; expected torch 2.11"):
        mixbit.export.package(model, x, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []
