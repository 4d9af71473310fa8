"""Recipes from what other tools wrote: the bit-widths in a QONNX file, or in a file of AIMET's encodings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixbit.errors import MixbitError, did_you_mean
from mixbit.export.onnx_graph import packages
from mixbit.files import PathLike
from mixbit.recipe import LayerPrecision, Recipe

#: Operators that pass values on.
_PASSING = {
    "Relu",
    "Clip",
    "MaxPool",
    "Reshape",
    "Flatten",
    "Identity",
    "Pad",
    "Slice",
    "Resize",
    "Squeeze",
    "Unsqueeze",
}
_PASSING |= {"Transpose", "Dropout"}
_LAYERS = ("Conv", "Gemm", "MatMul")
#: What makes a tensor of the integer network with a width of its own.
_OWN = ("Add", "Sum", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean")


def recipe_from_qonnx(path: PathLike) -> Recipe:
    """Reads the widths of layers off Quant nodes.

    A layer is a Conv, Gemm or MatMul whose weight comes from a Quant; it is named as its weight's initializer without
    ".weight", else as its node. Its act is the Quant that its input comes from, through operators that only pass values
    on; without one it is float. Widths of adds, concatenations, average pools and outputs that differ from 8 go into
    `tensors` under the names that `mixbit.export.onnx` gives them.

    Args:
        path: Of the ONNX file.

    Raises:
        MixbitError: The file cannot be read, or says what a recipe cannot: other roundings, scales of activations per
            channel, BipolarQuant, widths that are no whole numbers from 1 to 16.
    """
    onnx = packages("onnx")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:
        raise MixbitError(f"cannot read {str(path)!r} as ONNX: {' '.join(str(error).split())[:200]}") from error
    maker = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    array = onnx.numpy_helper.to_array

    def quant(name: str, passing: bool) -> Any:
        """The Quant node that a tensor comes from."""
        node = maker.get(name)
        while node is not None and passing and node.op_type in _PASSING:
            node = maker.get(node.input[0])
        if node is not None and passing and node.op_type == "Concat":
            # A concatenation of tensors on one grid is on that grid.
            found = [quant(operand, True) for operand in node.input]
            grids = {None if q is None else tuple(q.input[1:]) for q in found}
            return found[0] if len(grids) == 1 else None
        if node is not None and node.op_type == "BipolarQuant":
            raise MixbitError(f"{str(path)!r}: {name!r} comes from a BipolarQuant, which a recipe cannot express")
        return node if node is not None and node.op_type in ("Quant", "IntQuant") else None

    def said(node: Any, what: str) -> tuple[int, bool, bool, int]:
        """Bits, signed, narrow, and number of scales."""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        mode = attributes.get("rounding_mode", b"ROUND").decode().upper()
        if mode not in ("ROUND", "HALF_EVEN"):
            raise MixbitError(f"{str(path)!r}: {what} is rounded by {mode!r}; a recipe has 'ROUND' (half to even)")
        if node.input[3] not in constants or node.input[1] not in constants:
            raise MixbitError(f"{str(path)!r}: {what} has a scale or bit-width that is no constant")
        bits = float(array(constants[node.input[3]]).reshape(-1)[0])
        if bits != int(bits) or not 1 <= bits <= 16:
            raise MixbitError(f"{str(path)!r}: {what} has {bits:g} bits; expected a whole number from 1 to 16")
        scales = int(np.prod(constants[node.input[1]].dims, dtype=int))
        return int(bits), bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0)), scales

    layers: dict[str, LayerPrecision] = {}
    tensors: dict[str, dict[str, int]] = {"default": {"act": 8}}
    for node in graph.node:
        if node.op_type in ("Quant", "IntQuant"):
            source = maker.get(node.input[0])
            ends = {o.name for o in graph.output}
            shown = any(
                maker[e].op_type == "Identity" and maker[e].input[0] == node.output[0] for e in ends if e in maker
            )
            own = source is not None and source.op_type in _OWN
            if (own or shown or node.output[0] in ends) and node.output[0].endswith("_q"):
                bits = said(node, f"{node.output[0]!r}")[0]
                if bits != 8:
                    tensors[node.output[0].removesuffix("_q")] = {"act": bits}
        if node.op_type not in _LAYERS:
            continue
        weight = quant(node.input[1], False)
        if weight is None:
            continue
        name = weight.input[0].removesuffix(".weight") if weight.input[0].endswith(".weight") else node.name
        if not name:
            raise MixbitError(f"{str(path)!r}: the {node.op_type} that makes {node.output[0]!r} has no name to go by")
        bits, signed, narrow, scales = said(weight, f"the weight of {name!r}")
        if not signed:
            raise MixbitError(f"{str(path)!r}: the weight of {name!r} is unsigned; weights of a recipe are signed")
        granularity = "per_channel" if scales > 1 else "per_tensor"
        act = quant(node.input[0], True)
        entry: dict[str, Any] = {"weight": bits, "act": None, "narrow_range": narrow, "granularity": granularity}
        if act is not None:
            entry["act"], entry["signed_act"], _, scales = said(act, f"the input of {name!r}")
            if scales > 1:
                raise MixbitError(f"{str(path)!r}: the input of {name!r} has {scales} scales; a recipe has one")
        layers[name] = LayerPrecision(**entry)
    if not layers:
        raise MixbitError(f"{str(path)!r} has no layer whose weight comes from a Quant node")
    return Recipe(layers=layers, tensors=tensors, made_by={"verb": "recipe_from_qonnx", "file": Path(path).name})


def recipe_from_aimet(path: PathLike, model: nn.Module, act: int | None = 8) -> Recipe:
    """Reads the widths of layers off AIMET's encodings (JSON: versions 0.x with objects by name, 1.0.0 with lists).

    Weights are the parameter encodings named `<layer>.weight`. The input of a layer is what its module's input
    encodings say (files for PyTorch have them); where AIMET put the quantizer on the output of the module before, or
    names tensors of an ONNX graph, `act` is taken.

    Args:
        path: Of the `.encodings` or JSON file.
        model: The network, for its layers' names.
        act: Bits of inputs about which the file says nothing; None leaves them float.

    Raises:
        MixbitError: The file cannot be read or is of another form, a parameter belongs to no layer of the model, or a
            width is no whole number from 1 to 16.
    """
    where = repr(str(path))
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MixbitError(f"cannot read {where} as JSON: {error}") from error
    if not isinstance(document, Mapping) or not {"param_encodings", "activation_encodings"} <= set(document):
        raise MixbitError(f"{where} has no 'param_encodings' and 'activation_encodings'; expected AIMET's encodings")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    parameters = _by_name(document["param_encodings"], where)
    activations = document["activation_encodings"]
    layers: dict[str, LayerPrecision] = {}
    known = {name for name, _ in model.named_parameters()}
    for name, given in parameters.items():
        layer, _, kind = name.rpartition(".")
        if name not in known:
            raise MixbitError(f"{where}: the model has no parameter {name!r}{did_you_mean(name, known)}")
        if kind != "weight" or layer not in modules:
            continue  # biases are 32 bits here; other modules have no weights to quantize
        entries = _entries(given)
        bits, symmetric = _width(entries[0], f"{where}: {name!r}")
        if bits is not None and not symmetric:
            raise MixbitError(f"{where}: the weight {name!r} is not symmetric; weights of a recipe are")
        entry: dict[str, Any] = {
            "weight": bits,
            "act": act,
            # AIMET's symmetric grids have the codes of two's complement, the lowest included.
            "narrow_range": False,
            "granularity": "per_channel" if _channels(entries) > 1 else "per_tensor",
        }
        inputs = activations.get(layer, {}) if isinstance(activations, Mapping) else {}
        inputs = inputs.get("input") if isinstance(inputs, Mapping) else None
        if inputs:
            first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
            entry["act"], _ = _width(_entries(first)[0], f"{where}: the input of {layer!r}")
        layers[layer] = LayerPrecision(**entry)
    if not layers:
        raise MixbitError(f"{where} has no encoding of a layer's weight; the model's layers are {list(modules)}")
    order = [name for name in modules if name in layers]
    return Recipe(
        layers={name: layers[name] for name in order},
        made_by={"verb": "recipe_from_aimet", "file": Path(path).name, "version": str(document.get("version", ""))},
    )


def _by_name(given: Any, where: str) -> dict[str, Any]:
    """Encodings by name, of either form."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, list) and all(isinstance(entry, Mapping) and "name" in entry for entry in given):
        return {str(entry["name"]): entry for entry in given}
    raise MixbitError(f"{where}: 'param_encodings' is neither an object nor a list of objects with names")


def _entries(given: Any) -> list[Mapping[str, Any]]:
    """The encodings of one tensor: one, or one a channel."""
    entries = list(given) if isinstance(given, Iterable) and not isinstance(given, (Mapping, str)) else [given]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise MixbitError(f"an encoding is {given!r}; expected an object, or a list of them")
    return entries


def _channels(entries: list[Mapping[str, Any]]) -> int:
    scale = entries[0].get("scale")
    return len(scale) if len(entries) == 1 and isinstance(scale, list) else len(entries)


def _width(entry: Mapping[str, Any], what: str) -> tuple[int | None, bool]:
    """Bits (None for float) and whether the grid is symmetric."""
    kind = str(entry.get("dtype", "int")).lower()
    if kind.startswith("float"):
        return None, True
    bits = entry.get("bitwidth", entry.get("bw"))
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise MixbitError(f"{what} has the bit-width {bits!r}; expected a whole number from 1 to 16")
    return bits, str(entry.get("is_symmetric", entry.get("is_sym", True))).lower() == "true"
