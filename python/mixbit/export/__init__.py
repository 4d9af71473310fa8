"""What leaves Python, and the reference it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mixbit.export.reference import IntegerReference
from mixbit.export.simulation import IntegerSimulation
from mixbit.export.to_package import write_package
from mixbit.files import PathLike

__all__ = ["IntegerReference", "IntegerSimulation", "integer", "reference", "simulation"]


def reference(model: nn.Module, example: Any) -> IntegerReference:
    """The integer network of a prepared and calibrated model as an interpreter in NumPy int64: the ground truth.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.

    Raises:
        MixbitError: A step is missing, or the network holds an operation that integer networks do not have.
    """
    return IntegerReference(model, example)


def simulation(model: nn.Module, example: Any) -> IntegerSimulation:
    """The same network in PyTorch: as fast as float, equal to the reference on every tensor.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.

    Raises:
        MixbitError: As `reference`.
    """
    return IntegerSimulation(model, example)


def integer(model: nn.Module, example: Any, path: PathLike, *, force: bool = False) -> Path:
    """Writes the integer network as a package that `mixbit.runtime.Network` and `mixbit-run` execute without torch.

    Weights are packed at their own widths (1 to 8 bits); outputs equal those of `reference` bit for bit. The format is
    described in docs/package_format.md.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`; all sizes but the batch are fixed to it.
        path: Of the file, by custom "*.mixbit".
        force: Replaces a file that exists.

    Returns:
        The path.

    Raises:
        MixbitError: As `reference`; a grid or weight of more than 8 bits, or a zero point outside its codes, by name;
            the file exists. Nothing is written then.
    """
    return write_package(model, example, path, force=force)
