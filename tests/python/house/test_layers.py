"""The arrows of docs/architecture.md hold, and the check that says so finds a wrong one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHECK = ROOT / "scripts" / "check_layers.py"


def run_check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CHECK), str(root)], capture_output=True, text=True, check=False)


def test_every_include_and_import_follows_the_arrows() -> None:
    result = run_check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("csrc/kernels/cpu/extra.cpp", "#include <torch/library.h>", "kernels may not include torch/library.h"),
        ("csrc/kernels/cpu/extra.cpp", "#include <mixbit/ops/checks.h>", "kernels may not include ops"),
        ("csrc/assign/extra.h", '#include "mixbit/hw/model.h"', "assign may not include hw"),
        ("csrc/ops/extra.cpp", "#include <Python.h>", "ops may not include Python.h"),
        ("python/mixbit/tables.py", "from mixbit.costs import bops", "tables may not import costs"),
        ("python/mixbit/assignment/extra.py", "import mixbit.hw", "assignment may not import hw"),
        ("python/mixbit/network/extra.py", "from ..quantizers import prepare_", "network may not import quantizers"),
        ("python/mixbit/ops/extra.py", "def f():\n    from mixbit import recipe", "ops may not import recipe"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + "\n" + line + "\n")
    result = run_check(tmp_path)
    assert result.returncode == 1
    assert complaint in result.stdout


def test_a_lower_room_does_not_compile_with_a_higher_include(tmp_path: Path) -> None:
    """The include folders of the kernels' target hold neither torch nor the ops."""
    for header in ("torch/library.h", "mixbit/ops/library.h"):
        source = tmp_path / "wrong.cpp"
        source.write_text(f"#include <mixbit/common/numerics.h>\n#include <{header}>\n")
        result = subprocess.run(
            ["c++", "-std=c++20", "-fsyntax-only", *includes("common", "kernels"), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        assert "numerics.h" not in result.stderr
        assert header in result.stderr


def includes(*rooms: str) -> list[str]:
    return [f"-I{ROOT / 'csrc' / room / 'include'}" for room in rooms]
