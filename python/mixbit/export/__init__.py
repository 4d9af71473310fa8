"""What leaves Python, and the reference it is held against."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixbit.export.package import package
from mixbit.export.program import DIALECTS, program, runner
from mixbit.export.reference import IntegerReference
from mixbit.export.report import AccumulatorReport, report
from mixbit.export.simulation import IntegerSimulation

__all__ = [
    "DIALECTS",
    "AccumulatorReport",
    "IntegerReference",
    "IntegerSimulation",
    "package",
    "program",
    "reference",
    "report",
    "runner",
    "simulation",
]


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
