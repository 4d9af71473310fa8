"""Forwards the build to CMake, which owns sources and options; see CMakeLists.txt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r"project\(mixbit VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
# Environment variables that are handed to CMake as options of the same name.
CMAKE_OPTIONS = ("MIXBIT_CUDA", "MIXBIT_BUILD_TESTS", "MIXBIT_WERROR", "MIXBIT_TORCH_ROOT", "CMAKE_CUDA_ARCHITECTURES")


def torch_requirement() -> str:
    """The library is linked against one torch minor version and must be loaded with the same one."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return f"torch>={major}.{minor}.0,<{major}.{int(minor) + 1}"


class CMakeBuild(build_ext):
    """Runs configure, build and the `python` component of install."""

    def run(self) -> None:
        # Editable installs put the libraries into the source package, wheels into the build folder.
        package = ROOT / "python" / "mixbit" if self.inplace else Path(self.build_lib).resolve() / "mixbit"
        build = Path(os.environ.get("MIXBIT_BUILD_DIR", ROOT / "build")).resolve()
        options = {"MIXBIT_BUILD_TESTS": "OFF"}
        if not self.inplace:
            options["MIXBIT_TORCH_IN_RPATH"] = "OFF"  # a wheel is used elsewhere
        options |= {name: os.environ[name] for name in CMAKE_OPTIONS if name in os.environ}
        subprocess.run(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-DCMAKE_BUILD_TYPE=Release",
                *(f"-D{name}={value}" for name, value in options.items()),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "install_python_component.py"), str(build), str(package)],
            check=True,
        )

    def get_outputs(self) -> list[str]:
        return []

    def get_source_files(self) -> list[str]:
        return []


setup(
    version=VERSION,
    install_requires=[
        torch_requirement(),
        "numpy>=1.26",
        "scipy>=1.11",
        "pyyaml>=6",
        "safetensors>=0.4",
        "rich>=13",
        "jinja2>=3.1",
        "pillow>=10",
        "pymoo>=0.6.2",
        "torchvision",
        "pycocotools>=2.0.7",
    ],
    ext_modules=[Extension("mixbit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
