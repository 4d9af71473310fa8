"""What leaves Python, and the reference it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from mixbit.errors import check_choice
from mixbit.export.imports import recipe_from_aimet, recipe_from_qonnx
from mixbit.export.package import package
from mixbit.export.program import DIALECTS, Runner, program, runner
from mixbit.export.reference import FixedPointReference, IntegerReference
from mixbit.export.report import AccumulatorReport, report
from mixbit.export.simulation import IntegerSimulation
from mixbit.export.to_onnx import DIALECTS as ONNX_DIALECTS
from mixbit.export.to_onnx import OnnxReport, write_onnx
from mixbit.export.to_package import write_package
from mixbit.export.verification import Artifact, VerifyReport
from mixbit.export.verification import verify as _verify
from mixbit.files import PathLike

__all__ = [
    "DIALECTS",
    "ONNX_DIALECTS",
    "REQUANTIZE",
    "AccumulatorReport",
    "Artifact",
    "FixedPointReference",
    "IntegerReference",
    "IntegerSimulation",
    "OnnxReport",
    "Runner",
    "VerifyReport",
    "integer",
    "onnx",
    "package",
    "program",
    "recipe_from_aimet",
    "recipe_from_qonnx",
    "reference",
    "report",
    "runner",
    "simulation",
    "verify",
]

#: References by how they requantize.
REQUANTIZE: dict[str, type[IntegerReference]] = {"float32": IntegerReference, "fixed_point": FixedPointReference}


def reference(model: nn.Module, example: Any, requantize: str = "float32") -> IntegerReference:
    """The integer network of a prepared and calibrated model as an interpreter in NumPy int64: the ground truth.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.
        requantize: How accumulators become codes. "float32", the semantics of everything that is exported: an fp32
            product, rounded half to even. "fixed_point": a 32-bit multiplier and a shift, rounded half up, for targets
            without floating point (`FixedPointReference`); now and then a code is one apart.

    Raises:
        MixbitError: A step is missing, or the network holds an operation that integer networks do not have.
    """
    return REQUANTIZE[check_choice("requantize", requantize, REQUANTIZE)](model, example)


def simulation(model: nn.Module, example: Any) -> IntegerSimulation:
    """The same network in PyTorch: as fast as float, equal to the reference on every tensor.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.

    Raises:
        MixbitError: As `reference`.
    """
    return IntegerSimulation(model, example)


def onnx(
    model: nn.Module,
    example: Any,
    path: PathLike,
    *,
    dialect: str = "qdq",
    exact: bool = True,
    opset: int | None = None,
    dynamic_batch: bool = True,
    compact: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> OnnxReport:
    """Writes the integer network as ONNX.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`; all sizes but the batch are fixed to it.
        path: Of the file.
        dialect: "qdq": QuantizeLinear and DequantizeLinear around standard operators, activations uint8 (codes of fewer
            bits are clipped), weights packed as int2, int4 or int8, biases int32. "qonnx": Quant nodes, any width.
        exact: Of "qdq": patterns that ONNX Runtime computes as the integer reference does, bit for bit. False: the
            plain patterns (DequantizeLinear of packed weights, Add, AveragePool), which more compilers know and which
            round apart by a code now and then.
        opset: None takes the least that holds the weights packed: 13 for int8, 21 for int4, 25 for int2. A given older
            one has them stored wider.
        dynamic_batch: Whether the size of the batch may vary; else it is 1.
        compact: Of "qdq": patterns that recur, as a layer between its dequantizations and its quantization, are
            functions of the file, which most runtimes inline. Small networks take some percent less.
        force: Replaces a file that exists.
        say: Called with each limit of consumers before anything is written; without it, widths that are stored wider
            than they are (also those of channels beside wider ones) are a warning.

    Returns:
        What was written, its bytes by purpose, and the limits.

    Raises:
        MixbitError: As `reference`; a width that the dialect cannot express (the nearest one is named); the file
            exists; the packages of the extra `onnx` are missing. Nothing is written then.
    """
    return write_onnx(
        model,
        example,
        path,
        dialect=dialect,
        exact=exact,
        opset=opset,
        dynamic_batch=dynamic_batch,
        compact=compact,
        force=force,
        say=say,
    )


def integer(model: nn.Module, example: Any, path: PathLike, *, force: bool = False) -> Path:
    """Writes the integer network as a package that `mixbit.runtime.Network` and `mixbit-run` execute without torch.

    Weights are packed at their own widths (1 to 8 bits), all channels of a layer at that of the widest, with a warning
    where they differ; outputs equal those of `reference` bit for bit. The format is
    described in docs/package_format.md.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`; all sizes but the batch are fixed to it.
        path: A file that ends in ".mixbit".
        force: Replaces a file that exists.

    Returns:
        The path.

    Raises:
        MixbitError: As `reference`; a grid or weight of more than 8 bits, or a zero point outside its codes, by name;
            the file exists or has another ending. Nothing is written then.
    """
    return write_package(model, example, path, force=force)


def verify(
    artifact: PathLike | ExportedProgram | Artifact,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    promise: str | None = None,
) -> VerifyReport:
    """Runs an exported artifact and the integer reference of a model on the same data and compares every output.

    Where the artifact shows what lies between (an ONNX file and an integer package do), every value is also compared
    with what the reference makes of the artifact's own inputs: a fault is named where it is.

    Args:
        artifact: Path of an exported file (.onnx, .pt2, .mixbit), an ExportedProgram; or an `Artifact`, for kinds of
            your own.
        model: The prepared and calibrated model that was exported.
        batches: Re-iterable batches; where items are (input, labels) with labels int64 [N], top-1 of both is reported.
        promise: "exact" or "one_code", instead of what the artifact says it keeps.

    Raises:
        MixbitError: The file is missing or of no known kind, does not fit the network, or as `reference`.
    """
    return _verify(artifact, model, batches, promise=promise)
