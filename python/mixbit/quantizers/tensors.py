"""Grids of the integer network's own tensors: adds, concatenations, pools, outputs, and what several kinds read.

A value of the network gets the act grid of the layers that read it when only layers do (through activations, pools and
reshapes); else it has a grid of its own, recorded here. See docs/integer_semantics.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.network import LAYER_OPS, PASS_OPS, Graph, Node, capture, input_tensor, run_node
from mixbit.quantizers.modules import JoinedTensors
from mixbit.quantizers.prepare import bypass, quantized_layers
from mixbit.quantizers.statistics import TensorStatistics
from mixbit.recipe import Recipe


def layer_grid(graph: Graph, modules: dict[str, Any], name: str) -> str | None:
    """The layer whose act grid a value takes: all its readers are layers with one act_quantizer; else None."""
    if name in graph.outputs:
        return None
    found: str | None = None
    for node in graph.consumers(name):
        if node.op in LAYER_OPS:
            reader = node.module
        elif node.op in PASS_OPS or node.op in ("relu", "relu6"):
            reader = layer_grid(graph, modules, node.name)
        else:
            return None
        if reader is None:
            return None
        if found is not None and modules[found].act_quantizer is not modules[reader].act_quantizer:
            return None
        found = reader
    return found


def grid_source(graph: Graph, modules: dict[str, Any], name: str) -> tuple[str, str]:
    """("layer", module path) or ("tensor", value name): where a value's grid comes from."""
    reader = layer_grid(graph, modules, name)
    if reader is not None:
        return "layer", reader
    readers = graph.consumers(name)
    if name not in graph.outputs and len(readers) == 1 and readers[0].op in ("relu", "relu6"):
        return grid_source(graph, modules, readers[0].name)
    node = graph[name]
    if node.op in PASS_OPS:
        return grid_source(graph, modules, node.inputs[0])
    return "tensor", name


def own_tensors(graph: Graph, modules: dict[str, Any]) -> list[str]:
    """Names of the values with a grid of their own, in order of execution."""
    found = []
    for node in graph.nodes:
        kind, name = grid_source(graph, modules, node.name)
        if kind == "tensor" and name not in found:
            found.append(name)
    return found


def record_tensors_(
    model: nn.Module, batches: Iterable[Any], example: Any, method: str = "mse", *, quantized: bool = False
) -> nn.Module:
    """Calibrates the tensors that no layer's act grid covers and stores their grids on the model.

    Scales, signs and bits become the buffers `mixbit_tensor_scales` (float32 [T]), `mixbit_tensor_signed` (uint8 [T])
    and `mixbit_tensor_bits` (float32 [T]) of the model, their names the attribute `mixbit_tensor_names`.

    Args:
        model: Prepared and calibrated, in eval mode, batch normalization folded.
        batches: Re-iterable batches.
        example: An item of `batches`.
        method: As of `calibrate_`, but for "percentile".
        quantized: Whether values are those of the fake-quantized network; after training at few bits these are far from
            the float network's, which is what `calibrate_` looks at.

    Returns:
        The model.

    Raises:
        MixbitError: The network cannot be captured, or a tensor holds NaN or infinity.
    """
    modules = quantized_layers(model)
    recipe = Recipe(tensors=getattr(model, "mixbit_tensors", {"default": {"act": 8}}))
    with bypass(model):
        graph = capture(model, example)
    _check_prepared(graph, modules)
    wanted = own_tensors(graph, modules)
    compute = _run_quantized if quantized else run_node
    seen = {name: TensorStatistics() for name in wanted}
    last_read = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    with torch.no_grad():
        for item in batches:
            x = input_tensor(item)
            values: dict[str, Tensor] = {}
            for i, node in enumerate(graph.nodes):
                inputs = [values[name] for name in node.inputs]
                values[node.name] = x if node.op == "input" else compute(node, inputs, modules)
                if node.name in seen:
                    try:
                        seen[node.name].update(values[node.name])
                    except MixbitError as error:
                        raise MixbitError(f"tensor {node.name!r} {error}") from error
                for name in node.inputs:
                    if last_read[name] == i and name in values:
                        del values[name]
    bits = [recipe.tensor_bits(name) for name in wanted]
    signed = [seen[name].signed for name in wanted]
    scales = [
        seen[name].scales([b], signed=s, narrow_range=False, method=method)[0]
        for name, b, s in zip(wanted, bits, signed, strict=True)
    ]
    model.mixbit_tensor_names = list(wanted)  # type: ignore[assignment]
    model.register_buffer("mixbit_tensor_scales", torch.stack(scales) if scales else torch.zeros(0))
    model.register_buffer("mixbit_tensor_signed", torch.tensor(signed, dtype=torch.uint8))
    model.register_buffer("mixbit_tensor_bits", torch.tensor(bits, dtype=torch.float32))
    for name, owner in joined_owners(graph, model).items():
        i = wanted.index(name)
        assert owner.output_quantizer is not None
        owner.tensor_name = name
        owner.output_quantizer.bit_width.fill_(float(bits[i]))
        owner.output_quantizer.set_(scales[i], signed=signed[i])
    return model


def _run_quantized(node: Node, inputs: list[Tensor], modules: dict[str, Any]) -> Tensor:
    """A node of the fake-quantized network."""
    if node.op in LAYER_OPS:
        layer = modules[str(node.module)]
        weight = layer.weight_quantizer(layer.weight)
        inputs = [layer.act_quantizer(inputs[0])]
        modules = {str(node.module): SimpleNamespace(weight=weight, bias=layer.bias)}
    return run_node(node, inputs, modules)


def joined_owners(graph: Graph, model: nn.Module) -> dict[str, JoinedTensors]:
    """For each tensor with a grid of its own that an Add or Cat module makes (a relu may follow it): that module.

    Raises:
        MixbitError: One module makes several tensors.
    """
    modules = dict(model.named_modules())
    layers = quantized_layers(model)
    found: dict[str, JoinedTensors] = {}
    seen: set[int] = set()
    for node in graph.nodes:
        module = modules.get(str(node.module)) if node.op in ("add", "cat") else None
        if not isinstance(module, JoinedTensors):
            continue
        if id(module) in seen:
            raise MixbitError(
                f"module {node.module!r} ({type(module).__name__}) is called twice; expected one module for each "
                "tensor, since each has a scale of its own"
            )
        seen.add(id(module))
        kind, name = grid_source(graph, dict(layers), node.name)
        if kind == "tensor":
            found[name] = module
    return found


def _check_prepared(graph: Graph, modules: dict[str, Any]) -> None:
    for node in graph.nodes:
        if node.op in LAYER_OPS:
            module = modules.get(str(node.module))
            if module is None or module.act_quantizer is None or module.weight_quantizer is None:
                raise MixbitError(
                    f"layer {node.module!r} is (partly) float in the recipe; an integer network needs bits for its "
                    "weight and its input"
                )
