"""The integer network compiled ahead of time (AOTInductor) into a package that Python and C++ load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from mixbit.errors import MixbitError, check_choice
from mixbit.export.lowering import lower
from mixbit.export.program import DIALECTS, exported
from mixbit.files import PathLike, write_atomic

#: Keys in a package's metadata: the dialect, and the batch where it is fixed.
_DIALECT, _BATCH = "mixbit_dialect", "mixbit_batch"


def package(
    model: nn.Module,
    example: Any,
    path: PathLike,
    dialect: str = "mixbit",
    dynamic_batch: bool = True,
    force: bool = False,
) -> Path:
    """Compiles the integer network with AOTInductor and writes a package.

    `torch._inductor.aoti_load_package(path)` loads it in Python, `torch::inductor::AOTIModelPackageLoader` in C++
    (`examples/cpp/run_package.cpp`); neither needs mixbit, since both dialects consist of ops of torch. The package
    holds machine code for the processor that compiled it and works with the torch version that did. Compiling takes a
    C++ compiler and up to some minutes.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`; all sizes but the batch are those of its input.
        path: A file that ends in ".pt2".
        dialect: As of `program`; "mixbit" equals `export.reference` in every output on the CPU.
        dynamic_batch: Whether any batch size may be fed later; else one image at a time.
        force: Replace an existing file.

    Returns:
        The path.

    Raises:
        MixbitError: As `program`; or the file exists, cannot be written, or compiling fails. Nothing is written then.
    """
    check_choice("dialect", dialect, DIALECTS)
    target = check_output(path, ".pt2", force)
    compile_package = _inductor("aoti_compile_and_package")
    program = exported(lower(model, example), example, dialect, dynamic_batch)
    notes = {_DIALECT: dialect} if dynamic_batch else {_DIALECT: dialect, _BATCH: "1"}

    def write(file: BinaryIO) -> None:
        try:
            compile_package(program, package_path=file, **_noted(notes))
        except OSError:
            raise
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise MixbitError(
                f"AOTInductor cannot compile the network: {first}. It needs a C++ compiler ({torch.__version__} of "
                "torch looks for CXX, then g++)"
            ) from error

    return write_atomic(target, write)


def load_package(path: PathLike) -> tuple[Callable[..., Any], str | None, int | None]:
    """A package as a callable of the input tensor; where it says, its dialect and the only batch that it takes.

    Raises:
        MixbitError: It was compiled for another torch or processor, or is damaged.
    """
    try:
        loaded = _inductor("aoti_load_package")(str(path))
    except (RuntimeError, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise MixbitError(
            f"cannot load the package {str(path)!r}: {first}; a package works with the torch version and the processor "
            "that compiled it"
        ) from error
    notes = loaded.get_metadata()
    return loaded, notes.get(_DIALECT), int(notes[_BATCH]) if _BATCH in notes else None


def check_output(path: PathLike, suffix: str, force: bool) -> Path:
    """A path that may be written.

    Raises:
        MixbitError: It has another ending, its folder does not exist, or the file exists and `force` is not set.
    """
    target = Path(path)
    if target.suffix != suffix:
        raise MixbitError(f"path {str(target)!r} ends in {target.suffix!r}; expected {suffix!r}")
    if not target.parent.is_dir():
        raise MixbitError(f"cannot write {str(target)!r}: folder {str(target.parent)!r} does not exist")
    if target.exists() and not force:
        raise MixbitError(f"{str(target)!r} exists; pass force=True to replace it")
    return target


def _noted(notes: dict[str, str]) -> dict[str, Any]:
    """Options that put notes into the package's metadata, where this torch has them."""
    import torch._inductor.config as config

    if not hasattr(config.aot_inductor, "metadata"):
        return {}
    return {"inductor_configs": {"aot_inductor.metadata": notes}}


def _inductor(name: str) -> Callable[..., Any]:
    """A function of `torch._inductor`: private by name, though documented; it is looked for before it is called."""
    import torch._inductor

    found: Callable[..., Any] | None = getattr(torch._inductor, name, None)
    if found is None:
        raise MixbitError(f"torch {torch.__version__} has no torch._inductor.{name}; expected torch 2.11 or newer")
    return found
