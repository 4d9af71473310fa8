"""The integer network as a program of torch.export."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mixbit.errors import MixbitError, check_choice
from mixbit.export.codes import CodeNetwork
from mixbit.export.lowering import IntegerNetwork, lower
from mixbit.export.standard import StandardNetwork, register_standard_ops
from mixbit.files import PathLike
from mixbit.network import input_of

#: What the operations of an exported program are.
DIALECTS = ("mixbit", "pt2e")


def program(model: nn.Module, example: Any, dialect: str = "mixbit", dynamic_batch: bool = True) -> ExportedProgram:
    """The integer network of a prepared and calibrated model as an ExportedProgram, frozen to constants.

    The program takes the input tensor (float32 [N, ...]) and returns the dequantized outputs in the model's order: one
    Tensor, or a tuple of several. Weights are stored as integer codes (one byte up to 8 bits).

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`; all sizes but the batch are those of its input.
        dialect: "mixbit" computes on codes and equals `export.reference` in every output on the CPU. It consists of
            ATen ops alone: `torch.export.load` needs nothing but torch.
            "pt2e" has the form of PyTorch 2 export quantization, which backends recognize: float operations between
            quantize and dequantize ops (`torch.ops.quantized_decomposed`), weights dequantized per channel from int8.
            Its rounding differs: a code may be off by one where the reference is near a half. Register those ops with
            `import torch.ao.quantization.fx._decomposed` before `torch.export.load`; mixbit is not needed.
        dynamic_batch: Whether any batch size may be fed later; else the example's alone.

    Raises:
        MixbitError: A step is missing (preparing, calibrating, folding, extracting what a search found), the network
            holds an operation that integer networks do not have (named with its module), or an accumulator can
            overflow.
    """
    check_choice("dialect", dialect, DIALECTS)
    return exported(lower(model, example), example, dialect, dynamic_batch)


def exported(network: IntegerNetwork, example: Any, dialect: str, dynamic_batch: bool) -> ExportedProgram:
    """A lowered network as a program."""
    x = input_of(example).detach().float().cpu()
    if dynamic_batch:
        # The example is saved with the program: two images are enough. A batch of one would be taken for a constant.
        x = torch.cat([x, x])[:2].clone()
    module = CodeNetwork(network) if dialect == "mixbit" else StandardNetwork(network)
    shapes = {"x": {0: Dim.DYNAMIC}} if dynamic_batch else None
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)


def runner(artifact: ExportedProgram | PathLike) -> Callable[[Any], list[Tensor]]:
    """Loads a program or a package and returns what runs it: an item of `batches` in, the list of outputs out.

    The outputs are float32 Tensors on the CPU in the order of `export.reference`.

    Args:
        artifact: An ExportedProgram, a file of `torch.export.save`, or a package of `export.package`.

    Raises:
        MixbitError: The file is missing or neither of these.
    """
    if isinstance(artifact, ExportedProgram):
        call: Callable[..., Any] = artifact.module()
    else:
        call = _loaded(Path(artifact))

    @torch.no_grad()
    def run(item: Any) -> list[Tensor]:
        outputs = call(input_of(item).detach().float())
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


def _loaded(path: Path) -> Callable[..., Any]:
    """The program or package in a file, told apart by what the archive holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .pt2 archive"
        raise MixbitError(f"cannot read {str(path)!r}: {reason}") from error
    if any("/data/aotinductor/" in name for name in names):
        from mixbit.export.package import load_package

        return load_package(path)
    if not any("/models/" in name for name in names):
        raise MixbitError(f"{str(path)!r} holds neither an exported program nor a compiled package")
    register_standard_ops()
    return torch.export.load(path).module()
