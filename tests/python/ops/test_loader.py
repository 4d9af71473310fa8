"""A library that cannot be loaded says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mixbit.ops._loader import load_library, minor_version


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="does not exist. Likely causes: mixbit was not built"):
        load_library(tmp_path / "libmixbit_ops.so")


def test_another_torch_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"")
    with pytest.raises(ImportError, match=r"built for torch 2\.3, but torch .* is installed"):
        load_library(tmp_path / "lib.so", built_with="2.3")


def test_a_damaged_library_keeps_the_cause(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    import torch

    with pytest.raises(ImportError, match="could not be loaded") as caught:
        load_library(tmp_path / "lib.so", built_with=minor_version(torch.__version__))
    assert caught.value.__cause__ is not None


def test_an_unknown_instruction_set_is_refused() -> None:
    code = (
        "import os; os.environ['MIXBIT_CPU_ISA'] = 'avx1024'\n"
        "import torch, mixbit\n"
        "mixbit.ops.fake_quantize(torch.ones(2), torch.ones(1), 0, 4)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MIXBIT_CPU_ISA=avx1024 is not known: expected scalar, avx2" in result.stderr


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_a_capped_instruction_set_computes_the_same_bits(isa: str) -> None:
    code = (
        "import torch, mixbit\ntorch.manual_seed(0)\nx = torch.randn(5000)\n"
        "s = torch.tensor([0.1], requires_grad=True)\ny = mixbit.ops.fake_quantize(x, s, 0, 4)\n(y * x).sum().backward()\n"
        "import hashlib; print(hashlib.sha256(y.detach().numpy().tobytes() + s.grad.numpy().tobytes()).hexdigest())"
    )
    import os

    outputs = {
        cap: subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"MIXBIT_CPU_ISA": cap},
        ).stdout
        for cap in (isa, "amx")
    }
    assert len(set(outputs.values())) == 1
