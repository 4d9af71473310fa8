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
from mixbit.export.naming import Watcher, name_values, naming
from mixbit.export.standard import StandardNetwork, register_standard_ops
from mixbit.files import PathLike
from mixbit.network import input_tensor

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
        dynamic_batch: Whether any batch size may be fed later; else one image at a time.

    Raises:
        MixbitError: A step is missing (preparing, calibrating, folding, extracting what a search found), the network
            holds an operation that integer networks do not have (named with its module), or an accumulator can
            overflow.
    """
    check_choice("dialect", dialect, DIALECTS)
    return exported(lower(model, example), example, dialect, dynamic_batch)


def exported(network: IntegerNetwork, example: Any, dialect: str, dynamic_batch: bool) -> ExportedProgram:
    """A lowered network as a program."""
    x = input_tensor(example, "example").detach().float().cpu()
    # The example is saved with the program: two images are enough. A batch of one would be taken for a constant.
    x = (torch.cat([x, x])[:2] if dynamic_batch else x[:1]).clone()
    module = CodeNetwork(network) if dialect == "mixbit" else StandardNetwork(network)
    shapes = {"x": {0: Dim.DYNAMIC}} if dynamic_batch else None
    with torch.no_grad(), naming():
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    name_values(program)
    return program


class Runner:
    """A loaded program or package: an item of `batches` in, the list of outputs out.

    Attributes:
        dialect: "mixbit", "pt2e", or None for a package that does not say (one of an older torch).
        batch: The only size of a batch that it takes; None for any, or where a package does not say.
        watcher: Runs a program so that the codes between are seen; None for a package, which is machine code.
    """

    def __init__(
        self, call: Callable[..., Any], dialect: str | None, batch: int | None = None, watcher: Watcher | None = None
    ) -> None:
        self.dialect = dialect
        self.batch = batch
        self.watcher = watcher
        self._call = call

    @torch.no_grad()
    def __call__(self, item: Any) -> list[Tensor]:
        """The outputs, float32 in the order of `export.reference`.

        Raises:
            MixbitError: The program refuses the input, as one of another batch where the batch is fixed.
        """
        x = input_tensor(item, "item").detach().float()
        try:
            outputs = self._call(x)
        except (AssertionError, RuntimeError) as error:
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise MixbitError(f"artifact: it refuses an input of shape {tuple(x.shape)}: {first}") from error
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def runner(artifact: ExportedProgram | PathLike) -> Runner:
    """Loads a program or a package.

    Args:
        artifact: An ExportedProgram, a file of `torch.export.save`, or a package of `export.package`.

    Raises:
        MixbitError: The file is missing or neither of these.
    """
    if not isinstance(artifact, ExportedProgram):
        path = Path(artifact)
        if _is_package(path):
            from mixbit.export.package import load_package

            return Runner(*load_package(path))
        register_standard_ops()
        try:
            artifact = torch.export.load(path)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise MixbitError(f"cannot load the program {str(path)!r}: {first}") from error
    names = artifact.graph_signature.user_inputs
    standard = any("quantized_decomposed" in str(node.target) for node in artifact.graph.nodes)
    module = artifact.module()
    inputs = [node.meta.get("val") for node in artifact.graph.nodes if node.name in names]
    sizes = [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()]
    fixed = sizes[0] if sizes and isinstance(sizes[0], int) else None
    return Runner(module, "pt2e" if standard else "mixbit", fixed, Watcher(module))


def _is_package(path: Path) -> bool:
    """Whether a file holds a compiled package, not a program, told apart by what the archive holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .pt2 archive"
        raise MixbitError(f"cannot read {str(path)!r}: {reason}") from error
    if any("/data/aotinductor/" in name for name in names):
        return True
    if not any("/models/" in name for name in names):
        raise MixbitError(f"{str(path)!r} holds neither an exported program nor a compiled package")
    return False
