"""Installs the libraries of a CMake build into the Python package: usage install_python_component.py BUILD PACKAGE.

Each file is copied beside its place and renamed, so that a process that has the old library mapped keeps it whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    build, package = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as staging:
        subprocess.run(
            ["cmake", "--install", str(build), "--component", "python", "--prefix", staging],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for source in sorted(p for p in Path(staging).rglob("*") if p.is_file()):
            target = package / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".new")
            shutil.copy2(source, beside)
            os.replace(beside, target)


if __name__ == "__main__":
    main()
