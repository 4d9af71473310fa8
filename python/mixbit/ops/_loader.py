"""Loads the ops library into the process, and says what is likely wrong when it cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libmixbit_ops.so"


def minor_version(version: str) -> str:
    """`"2.15.0+cpu"` -> `"2.15"`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def load_library(library: Path = LIBRARY, built_with: str | None = None) -> None:
    """Loads the ops library; a second call does nothing.

    Args:
        library: The shared library.
        built_with: The torch minor version it was built with; read from the build's own record if None.

    Raises:
        ImportError: The library is missing, was built for another torch, or cannot be loaded.
    """
    if not library.exists():
        raise ImportError(
            f"mixbit's library {library} does not exist. Likely causes: mixbit was not built (in a checkout run "
            "`pip install --no-build-isolation -e .`), or the source folder is imported instead of the installed one."
        )
    if built_with is None:
        from mixbit._build_info import TORCH_VERSION as built_with
    running = minor_version(torch.__version__)
    if running != built_with:
        raise ImportError(
            f"mixbit was built for torch {built_with}, but torch {torch.__version__} is installed. A C++ library works "
            f"with the torch minor version it was built with: install torch {built_with}.*, or build mixbit again with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        )
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"mixbit's library {library} could not be loaded: {error}. Likely causes: it was built for another torch "
            f"build (running: {torch.__version__}), for another processor, or with CUDA where torch has none."
        ) from error
