"""Puts quantizers on a model and takes them off again, in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.network import LayerList, is_quantizable, layers
from mixbit.quantizers.modules import JoinedTensors, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from mixbit.quantizers.quantizer import KINDS, LSQ, LSQPlus, Quantizer, check_extra_bits
from mixbit.quantizers.space import SearchSpace
from mixbit.recipe import FLOAT, LayerPrecision, Recipe, match_name


def quantized_layers(model: nn.Module) -> dict[str, QuantizedConv2d | QuantizedLinear]:
    """Prepared layers by name, in order of registration; a shared module once, under its first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantizedConv2d, QuantizedLinear))}


def prepare_(
    model: nn.Module,
    recipe: Recipe | SearchSpace,
    example: Any = None,
    *,
    weight_quantizer: str | None = None,
    act_quantizer: str | None = None,
) -> nn.Module:
    """Turns the layers of a model into quantized ones, in place, at the bits of a recipe or with bits to be learned.

    Parameters and their state_dict keys stay what they are; each layer gains `weight_quantizer` and `act_quantizer`.
    Preparing again with another recipe keeps the calibration and multiplies each scale by hi_old / hi_new. Layers that
    read the same tensor share one act_quantizer, tied here if `example` is given, else by `calibrate_`. Extra levels
    (`Recipe.extra_maps`) are given to the weights that have them; those that a layer has already stay while its weight
    bits do, and go with them. Bits of single output channels (`Recipe.channel_maps`) are the weights' `bit_width`.

    Args:
        model: Any module; layers that the recipe leaves float are untouched.
        recipe: Bits per layer, or what to choose them from (`mixbit.search.Gates`, `Mixture`, `Fractional`): quantizers
            of the search then replace those of an earlier preparation.
        example: An item of `batches`; needed for a search, else only to tie shared inputs now.
        weight_quantizer: What training learns of the weights' grids: "lsq" (default), "tqt", "pact", "fixed", "ste",
            "ste_clip" or "plain" (see `mixbit.quantizers`). None keeps the kind of a layer that is prepared already.
        act_quantizer: The same for the inputs, also "lsq+".

    Returns:
        The model.

    Raises:
        MixbitError: The recipe names a layer that does not exist or cannot be quantized, or asks different act bits for
            layers that read the same tensor; an unknown kind of quantizer; a search without an example; extra levels or
            bits of channels that do not fit a layer, or that the recipe names without carrying them. The model is then
            unchanged.
    """
    if isinstance(recipe, SearchSpace):
        for argument, value in (("weight_quantizer", weight_quantizer), ("act_quantizer", act_quantizer)):
            if value is not None:
                raise MixbitError(f"{argument}={value!r}: a search has quantizers of its own; expected None")
        return _prepare_search(model, recipe, example)
    if not isinstance(recipe, Recipe):
        raise MixbitError(
            f"recipe is a {type(recipe).__name__}; expected a mixbit.Recipe, or mixbit.search.Gates, Mixture or "
            "Fractional"
        )
    if weight_quantizer is not None:
        check_choice("weight_quantizer", weight_quantizer, [kind for kind in KINDS if kind != "lsq+"])
    if act_quantizer is not None:
        check_choice("act_quantizer", act_quantizer, KINDS)
    names = _check_names(model, recipe)
    wanted = {name: recipe[name] for name in names}
    groups = layers(model, example) if example is not None else None
    if groups is not None:
        check_groups(groups, wanted)
    _check_tied(names, wanted)
    maps = _checked_maps(names, recipe)
    channels = _checked_channels(names, recipe)
    tied = [(m, m.act_quantizer) for m in names.values() if isinstance(m, QuantizedLayer)]
    for name, module in names.items():
        precision = wanted[name]
        if precision.weight is None and precision.act is None:
            _restore_layer(module)
        else:
            _prepare_layer(module, precision, weight_quantizer, act_quantizer, channels.get(name))
        if name in maps:
            cast(QuantizedLayer, module).weight_quantizer.set_extra_bits_(maps[name])  # type: ignore[union-attr]
    model.mixbit_tensors = dict(recipe.tensors)  # type: ignore[assignment]
    first = next(model.parameters(), None)
    for module in model.modules():
        if isinstance(module, JoinedTensors):
            _prepare_joined(module, recipe, None if first is None else first.device)
    _move_tensors_(model, recipe)
    _follow_modes_(model)
    shared: dict[int, Quantizer] = {}
    for layer, before in tied:
        # A quantizer that was replaced is so for all that shared it.
        if before is not None and isinstance(layer, QuantizedLayer) and layer.act_quantizer is not None:
            layer.act_quantizer = shared.setdefault(id(before), layer.act_quantizer)
    if groups is not None:
        tie_groups_(model, groups)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Takes the quantizers off: the model is what it was before `prepare_`, with its present weights.

    Args:
        model: A prepared (or float) model.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        _restore_layer(module)
        if isinstance(module, JoinedTensors):
            module.output_quantizer = None
    for name in ("mixbit_tensors", "mixbit_tensor_names", "mixbit_costs"):
        model.__dict__.pop(name, None)
    for name in ("mixbit_tensor_scales", "mixbit_tensor_signed", "mixbit_tensor_bits"):
        model._buffers.pop(name, None)
    return model


@contextlib.contextmanager
def bypass(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a prepared model runs as its float self."""
    able = (m for m in model.modules() if isinstance(m, (QuantizedLayer, JoinedTensors)))
    changed = [m for m in able if not m.bypassed]
    for module in changed:
        module.bypassed = True
    try:
        yield model
    finally:
        for module in changed:
            module.bypassed = False


def check_groups(found: LayerList, wanted: dict[str, LayerPrecision]) -> None:
    """Layers that read the same tensor must ask the same act bits.

    Raises:
        MixbitError: Names two layers that disagree.
    """
    first: dict[int, str] = {}
    for layer in found:
        check_same_act(first.setdefault(layer.input_group, layer.name), layer.name, wanted)


def check_same_act(one: str, other: str, wanted: dict[str, LayerPrecision]) -> None:
    """Two layers that read the same tensor must ask the same act bits; a float one asks nothing.

    Raises:
        MixbitError: They disagree.
    """
    a, b = wanted.get(one, FLOAT), wanted.get(other, FLOAT)
    if a.act is not None and b.act is not None and a.act != b.act:
        raise MixbitError(
            f"recipe: layers {one!r} and {other!r} read the same tensor but ask act={a.act} and act={b.act}; expected "
            "the same bits"
        )


def tie_groups_(model: nn.Module, found: LayerList) -> None:
    """Gives the layers of each input group one act_quantizer: that of the first one that has any."""
    modules = quantized_layers(model)
    shared: dict[int, Quantizer] = {}
    for layer in found:
        module = modules.get(layer.name)
        if module is not None and module.act_quantizer is not None:
            module.act_quantizer = shared.setdefault(layer.input_group, module.act_quantizer)


def _check_tied(names: dict[str, nn.Module], wanted: dict[str, LayerPrecision]) -> None:
    """Layers whose act_quantizers an earlier call has tied must ask the same act bits.

    Raises:
        MixbitError: Names two layers that disagree.
    """
    first: dict[int, str] = {}
    for name, module in names.items():
        quantizer = module.act_quantizer if isinstance(module, QuantizedLayer) else None
        if quantizer is not None:
            check_same_act(first.setdefault(id(quantizer), name), name, wanted)


def _check_names(model: nn.Module, recipe: Recipe) -> dict[str, nn.Module]:
    """First names of the modules that can be quantized; refuses names of the recipe that cannot."""
    every = dict(model.named_modules(remove_duplicate=False))
    usable = {name for name, module in every.items() if is_quantizable(module) is None}
    for name in recipe.layers:
        if name in every and name not in usable:
            module = every[name]
            raise MixbitError(
                f"recipe: layer {name!r} ({type(module).__name__}) cannot be quantized: {is_quantizable(module)}"
            )
    recipe.check_names(usable)
    return {name: module for name, module in model.named_modules() if name in usable}


def _checked_maps(names: dict[str, nn.Module], recipe: Recipe) -> dict[str, torch.Tensor]:
    """The recipe's extra levels by layer, each fitting its weight."""
    for name in recipe.extra_maps:
        if name not in names:
            raise MixbitError(f"recipe: extra levels of {name!r}: no such layer{did_you_mean(name, names)}")
    maps = {}
    for name, module in names.items():
        precision = recipe[name]
        extra = recipe.extra_maps.get(name)
        if extra is None:
            if precision.extra_levels is not None:
                raise MixbitError(
                    f"recipe: layer {name!r} names extra levels in {precision.extra_levels!r}, which the recipe does "
                    "not carry; read it with mixbit.Recipe.load, and let that file hold the layer"
                )
            continue
        if precision.weight is None:
            raise MixbitError(f"recipe: layer {name!r} has extra levels but float weights; expected bits")
        try:
            maps[name] = torch.as_tensor(extra)
            check_extra_bits(maps[name], module.weight.shape, precision.weight)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise MixbitError(f"recipe: layer {name!r}: {error}") from error
    return maps


def _checked_channels(names: dict[str, nn.Module], recipe: Recipe) -> dict[str, list[int]]:
    """The recipe's bits of output channels by layer, where they differ; each list fits its weight."""
    for name in recipe.channel_maps:
        if name not in names:
            raise MixbitError(f"recipe: channel bits of {name!r}: no such layer{did_you_mean(name, names)}")
    found = {}
    for name, module in names.items():
        if name not in recipe.channel_maps:
            if (named := recipe[name].channel_bits) is not None:
                raise MixbitError(
                    f"recipe: layer {name!r} names the bits of its channels in {named!r}, which the recipe does not "
                    "carry; read it with mixbit.Recipe.load, and let that file hold the layer"
                )
            continue
        try:
            recipe.check_channel_map(name)
        except MixbitError as error:
            raise MixbitError(f"recipe: {error}") from error
        given, channels = recipe.channel_maps[name], cast(torch.Tensor, module.weight).shape[0]
        if len(given) != channels:
            raise MixbitError(
                f"recipe: channel bits of layer {name!r} hold {len(given)} numbers; expected {channels}, one for each "
                "output channel"
            )
        if len(set(given.tolist())) > 1:
            found[name] = given.tolist()
    return found


def _prepare_layer(
    module: nn.Module,
    precision: LayerPrecision,
    weight_kind: str | None,
    act_kind: str | None,
    channel_bits: list[int] | None = None,
) -> None:
    layer = module
    if not isinstance(module, QuantizedLayer):
        float_class = type(module)
        module.__class__ = QuantizedConv2d if isinstance(module, nn.Conv2d) else QuantizedLinear
        layer = cast(QuantizedLayer, module)
        layer.float_class = float_class
        layer.bypassed = False
        layer.register_module("weight_quantizer", None)
        layer.register_module("act_quantizer", None)
    layer = cast(QuantizedLayer, layer)
    kind = _kind(layer.weight_quantizer, weight_kind)
    layer.weight_quantizer = _weight_quantizer(layer, precision, kind, channel_bits)
    layer.act_quantizer = _act_quantizer(layer, precision, _kind(layer.act_quantizer, act_kind))
    layer.precision = precision


def _prepare_search(model: nn.Module, space: SearchSpace, example: Any) -> nn.Module:
    """Quantizers of a search on every layer that it does not freeze; those that read one tensor share one."""
    if example is None:
        raise MixbitError("example is None; a search needs an item of batches, to know which layers share an input")
    with bypass(model):
        found = layers(model, example)
    modules = {name: module for name, module in model.named_modules() if is_quantizable(module) is None}
    for pattern in space.frozen:
        if not any(match_name(name, [pattern]) for name in modules):
            raise MixbitError(f"frozen: no layer matches {pattern!r}{did_you_mean(pattern, modules)}")
    per_channel = space.granularity == "per_channel"
    model.__dict__.pop("mixbit_costs", None)  # of an earlier search
    for prepared in modules.values():  # also those that an earlier recipe reached and the example does not
        _restore_layer(prepared)
    # A frozen layer fixes the bits of the tensor it reads for all that read it.
    acts: dict[int, Quantizer | None] = {}
    for layer in found:
        module = modules[layer.name]
        frozen, precision = space.frozen_precision(layer.name)
        if frozen and precision is not None and (precision.weight, precision.act) != (None, None):
            _prepare_layer(module, precision, None, None)
            acts.setdefault(layer.input_group, cast(QuantizedLayer, module).act_quantizer)
    for layer in found:
        if space.frozen_precision(layer.name)[0]:
            continue
        module = modules[layer.name]
        device = module.weight.device
        reads_input = layer.input_group == 0 and space.input_act is not None
        act_bits = space.input_act if reads_input else max(space.act_precisions)
        asked = LayerPrecision(
            weight=max(space.weight_precisions), act=act_bits, granularity=space.granularity, narrow_range=False
        )
        _prepare_layer(module, asked, None, None)
        prepared = cast(QuantizedLayer, module)
        if not reads_input and acts.get(layer.input_group) is None:
            acts[layer.input_group] = space.act_quantizer(device)
        prepared.act_quantizer = acts.get(layer.input_group) or prepared.act_quantizer
        channels = prepared.weight.shape[0] if per_channel else 1
        prepared.weight_quantizer = space.weight_quantizer(channels, prepared.act_quantizer, device)
    tie_groups_(model, found)
    _follow_modes_(model)
    model.mixbit_tensors = {"default": {"act": 8}}  # type: ignore[assignment]
    first = next(model.parameters(), None)
    for module in model.modules():
        if isinstance(module, JoinedTensors):
            _prepare_joined(module, Recipe(), None if first is None else first.device)
    return model


def _follow_modes_(model: nn.Module) -> None:
    """Quantizers take the mode of their layer: those of a search would draw samples in a network in eval mode."""
    for layer in quantized_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            if quantizer is not None:
                quantizer.train(layer.training)


def _kind(old: Quantizer | None, wanted: str | None) -> type[Quantizer]:
    """The class wanted; None keeps the present one, unless that was for a search."""
    if wanted is not None:
        return KINDS[wanted]
    return LSQ if old is None or old.searching else type(old)


def _weight_quantizer(
    layer: QuantizedLayer, precision: LayerPrecision, kind: type[Quantizer], channel_bits: list[int] | None
) -> Quantizer | None:
    if precision.weight is None:
        return None
    channels = layer.weight.shape[0] if precision.granularity == "per_channel" else 1
    widths = precision.weight if channel_bits is None else channel_bits
    made = kind(
        widths,
        channels=channels,
        signed=True,
        narrow_range=precision.narrow_range,
        axis=0 if channels > 1 else None,
        rounding=precision.rounding,
        shape=layer.weight.shape,
        device=layer.weight.device,
    )
    old = layer.weight_quantizer
    if old is None:
        return made
    if not old.searching and old.widths == (widths,):
        made.extra_bits = old.extra_bits
    if not old.is_calibrated:
        return made
    old.settle_(layer.weight)
    old.set_bit_width_(widths)
    if old.channels == channels and type(old) is kind:
        old.narrow_range, old.rounding = precision.narrow_range, precision.rounding
        return old
    with torch.no_grad():
        scale = old.effective_scale()
        made.set_(scale.amax().expand(1) if channels == 1 else scale.expand(channels))
    return made


def _act_quantizer(layer: QuantizedLayer, precision: LayerPrecision, kind: type[Quantizer]) -> Quantizer | None:
    if precision.act is None:
        return None
    old = layer.act_quantizer
    # A grid with an offset is unsigned whatever the data's sign.
    same_sign = old is not None and (
        precision.signed_act is None or precision.signed_act == old.signed or isinstance(old, LSQPlus)
    )
    made = kind(
        precision.act,
        signed=bool(precision.signed_act),
        rounding=precision.rounding,
        batched=True,
        device=layer.weight.device,
    )
    if old is None or not same_sign:
        return made
    old.set_bit_width_(precision.act)
    old.rounding = precision.rounding
    if type(old) is kind:
        return old
    # A grid with an offset and one without cannot stand for each other: that needs the data.
    if old.is_calibrated and not issubclass(kind, LSQPlus) and not isinstance(old, LSQPlus):
        with torch.no_grad():
            made.set_(old.effective_scale(), signed=old.signed)
    return made


def _prepare_joined(module: JoinedTensors, recipe: Recipe, device: torch.device | None) -> None:
    """Puts on a quantizer without a scale: only `calibrate_` knows whether the result has a grid of its own."""
    bits = recipe.tensor_bits(module.tensor_name or "default")
    if module.output_quantizer is None:
        module.output_quantizer = LSQ(bits, batched=True, device=device)
    else:
        module.output_quantizer.set_bit_width_(bits)


def _move_tensors_(model: nn.Module, recipe: Recipe) -> None:
    """Recorded grids of the network's own tensors keep their range at the recipe's bits."""
    for i, name in enumerate(getattr(model, "mixbit_tensor_names", ())):
        scales, signed, widths = (getattr(model, f"mixbit_tensor_{k}") for k in ("scales", "signed", "bits"))
        grid = Quantizer(int(widths[i]), signed=bool(signed[i]), device=scales.device).set_(scales[i])
        grid.set_bit_width_(recipe.tensor_bits(name))
        with torch.no_grad():
            scales[i], widths[i] = grid.scale[0], grid.bit_width[0]


def _restore_layer(module: nn.Module) -> None:
    if not isinstance(module, QuantizedLayer):
        return
    float_class = module.float_class
    for name in ("weight_quantizer", "act_quantizer"):
        module._modules.pop(name, None)
    for name in ("float_class", "bypassed", "precision"):
        module.__dict__.pop(name, None)
    module.__class__ = float_class  # type: ignore[assignment]
