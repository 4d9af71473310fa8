"""The integer package: what `IntegerReference` computes, as a file for the C++ runtime (docs/package_format.md)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixbit import _C
from mixbit._build_info import VERSION
from mixbit.errors import MixbitError
from mixbit.export.codes import exponentials, lookup_table
from mixbit.export.grid import Grid
from mixbit.export.lowering import IntegerNetwork, lower
from mixbit.export.package import check_output
from mixbit.files import PathLike, write_bytes
from mixbit.network import LAYER_OPS, Node, input_tensor

#: Arguments of an operation that go into the package under the same name.
_OPTIONS = {
    "conv2d": ("stride", "padding", "dilation", "groups"),
    "max_pool2d": ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    "slice": ("dim", "start", "end", "step"),
    "pad": ("amounts",),
    "repeat": ("counts",),
    "softmax": ("dim",),
    "permute": ("dims",),
    "pixel_unshuffle": ("factor",),
}


def write_package(model: nn.Module, example: Any, path: PathLike, *, force: bool = False) -> Path:
    """Writes a prepared and calibrated model as an integer package; see `mixbit.export.integer`."""
    target = check_output(path, ".mixbit", force)
    network = lower(model, example)
    if (widest := network.widest_stored()) is not None:
        warnings.warn(widest, UserWarning, stacklevel=3)
    return write_bytes(target, _package(network, example))


def package_bytes(model: nn.Module, example: Any) -> bytes:
    """The package of a model as bytes.

    Args:
        model: Batch normalization folded, prepared and calibrated with `example=`.
        example: An item of `batches`.
    """
    return _package(lower(model, example), example)


def _package(network: IntegerNetwork, example: Any) -> bytes:
    tensors: dict[str, tuple[int, np.ndarray[Any, Any]]] = {}
    tables: dict[tuple[str, bytes], str] = {}  # names by content: equal ones are stored once
    nodes = []
    for node in network.graph.nodes:
        where = f"tensor {node.name!r}"
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "grid": _grid(network.grids[node.name], where)}
        if node.op == "input":
            entry["shape"] = list(input_tensor(example).shape[1:])
        else:
            entry["inputs"] = list(node.inputs)
        if node.module:
            entry["module"] = node.module
        if node.op in LAYER_OPS:
            module = str(node.module)
            layer = network.layers[node.name]
            entry["act"] = _grid(layer.act, f"layer {module!r}: its input")
            low, high = layer.weight_range
            bits = 1 + max(high.bit_length(), (-low - 1).bit_length())
            if bits > 8:
                raise MixbitError(f"layer {module!r}: weights of {bits} bits; a package holds 1 to 8")
            # A layer that is called twice has one weight, but an output grid for each call.
            for key, name, width, array in (
                ("weight", f"{module}.weight", bits, layer.weight.numpy().astype(np.int8)),
                ("bias", f"{module}.bias", 0, layer.bias.numpy().astype(np.int32)),
                ("multiplier", f"{node.name}.multiplier", 0, layer.multiplier.numpy().astype(np.float32)),
            ):
                entry[key] = name
                tensors.setdefault(name, (width, array))
        if node.op in ("lookup", "softmax"):
            table = _table(node, network)
            same = tables.setdefault((table.dtype.str, table.tobytes()), f"{node.name}.table")
            tensors.setdefault(same, (0, table))
            entry["table"] = same
        entry.update(_options(node))
        nodes.append(entry)
    manifest = {"made_by": {"mixbit": VERSION}, "nodes": nodes, "outputs": list(network.graph.outputs)}
    arrays = [(name, bits, array) for name, (bits, array) in tensors.items()]
    try:
        package: bytes = _C.runtime.make_package(json.dumps(manifest), arrays)
    except ValueError as error:
        raise MixbitError(f"model: no package can hold it: {error}") from error
    return package


def _grid(grid: Grid, where: str) -> dict[str, Any]:
    if not (0 <= grid.low <= grid.high <= 255 or -128 <= grid.low <= grid.high <= 127):
        raise MixbitError(f"{where} has codes from {grid.low} to {grid.high}; a package holds grids of 1 to 8 bits")
    if not grid.low <= grid.zero_point <= grid.high:
        raise MixbitError(
            f"{where} has zero point {grid.zero_point} outside its codes {grid.low} to {grid.high}; a package holds "
            "grids that can represent 0"
        )
    scale = float(np.float32(grid.scale))
    return {"scale": scale, "zero_point": grid.zero_point, "low": grid.low, "high": grid.high}


def _table(node: Node, network: IntegerNetwork) -> np.ndarray[Any, Any]:
    """What an operation looks codes up in: bytes of codes (lookup), powers by distance (softmax)."""
    old, grid = network.grids[node.inputs[0]], network.grids[node.name]
    if node.op == "softmax":
        return exponentials(old).numpy().astype(np.int32)
    codes = lookup_table(node, old, grid).numpy()
    return codes.astype(np.int8 if grid.low < 0 else np.uint8).view(np.uint8)


def _options(node: Node) -> dict[str, Any]:
    o = node.options
    if node.op == "reshape":
        return {"to": list(o["shape"])}
    if node.op == "avg_pool2d":
        if o["kernel"] is None:
            return {"keepdim": bool(o["keepdim"])}
        names = {"kernel": o["kernel"], "stride": o["stride"], "padding": o.get("padding", (0, 0))}
        return {**names, "count_include_pad": bool(o.get("count_include_pad", True))}
    return {key: o[key] for key in _OPTIONS.get(node.op, ())}
