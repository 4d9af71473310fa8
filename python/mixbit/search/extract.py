"""From a model under search to a recipe, and what an optimizer needs for the search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from mixbit.assignment.landing import land
from mixbit.errors import MixbitError
from mixbit.quantizers import QuantizedLayer, quantized_layers
from mixbit.recipe import FLOAT, LayerPrecision, Recipe
from mixbit.search.penalty import Choices, check_searching, search_quantizers
from mixbit.search.quantizers import DECIDED, SAMPLED, GatedQuantizer, SearchQuantizer, gate_threshold
from mixbit.tables import FLOAT_BITS, CostTable, unit_names
from mixbit.training import scale_groups


def param_groups(
    model: nn.Module, lr: float = 1e-4, *, scale_lr: float | None = None, total_steps: int | None = None
) -> list[dict[str, Any]]:
    """What the optimizer needs beside the float parameters: the search's own, and learned scales and ranges.

    Adam is advised for the first group: it moves a logit by about `lr` a step, whatever the size of the gradient. From
    its first value of 2 a gate has to travel 2.54 to close, so a search of few steps needs a larger rate, and betas of
    (0.5, 0.99): with the usual momentum gates coast past the point at which they should have stopped.

    Args:
        model: Prepared for a search.
        lr: Of logits (or fractional widths).
        scale_lr: Of scales and ranges; None takes `lr`.
        total_steps: If given, `lr` is raised so that a gate can close in a third of the search.

    Returns:
        Groups with "params", "lr", "weight_decay" 0 and "name"; a group that would be empty is left out.

    Raises:
        MixbitError: The model is not under search.
    """
    found = check_searching(model)
    own: dict[int, nn.Parameter] = {}
    for quantizer in found.values():
        parameter = quantizer.choice_parameter
        assert isinstance(parameter, nn.Parameter)
        own[id(parameter)] = parameter
    if total_steps is not None:
        lr = max(lr, 3 * max(travel(q) for q in found.values()) / total_steps)
    rate = lr if scale_lr is None else scale_lr
    groups = [{"params": list(own.values()), "lr": lr, "weight_decay": 0.0, "name": "search"}]
    return groups + [{**group, "lr": rate} for group in scale_groups(model, 0.0, own.values())]


def travel(quantizer: SearchQuantizer) -> float:
    """How far the search's parameter has to move from where it is to reach the narrowest candidate."""
    value = quantizer.choice_parameter.detach()
    if isinstance(quantizer, GatedQuantizer):
        return max(float(value.max()) - gate_threshold(quantizer.temperature), 0.0)
    if value.numel() == 1:
        return float(value) - quantizer.candidates[0]
    return 1.0


@torch.no_grad()
def freeze_(model: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """Holds every choice, as it is now or as a recipe has it: training goes on at these widths, without samples.

    Args:
        model: Under search.
        recipe: Widths among the candidates, e.g. what `extract` found with a budget; None keeps the present choices.
            Channels that choose as a group have one width.

    Returns:
        The model; `unfreeze_` lets the search go on.

    Raises:
        MixbitError: The model is not under search, a width of the recipe is no candidate, or its channels differ where
            they choose as one.
    """
    found = check_searching(model)
    chosen: list[tuple[SearchQuantizer, list[int]]] = []
    if recipe is not None:
        for name in recipe.channel_maps:
            recipe.check_channel_map(name)
        for name, module in quantized_layers(model).items():
            for operand, quantizer in (("act", module.act_quantizer), ("weight", module.weight_quantizer)):
                if isinstance(quantizer, SearchQuantizer):
                    widths = _chosen_widths(recipe, name, operand, quantizer)
                    for width in widths:
                        if width not in quantizer.candidates:
                            raise MixbitError(
                                f"recipe: layer {name!r} has {operand}={width}; expected one of the candidates "
                                f"{list(quantizer.candidates)}"
                            )
                    chosen.append((quantizer, [quantizer.candidates.index(width) for width in widths]))
    for quantizer, indices in chosen:
        quantizer.choose_(indices)
    for quantizer in found.values():
        quantizer.phase.fill_(DECIDED)
        quantizer.refresh_()
        quantizer.choice_parameter.requires_grad_(False)
    return model


def _chosen_widths(recipe: Recipe, name: str, operand: str, quantizer: SearchQuantizer) -> list[Any]:
    """A recipe's width for each choice of an operand."""
    channels = quantizer.choice_channels or [quantizer.channels]
    given = recipe.channel_maps.get(name) if operand == "weight" else None
    if given is None:
        return [getattr(recipe[name], operand)] * len(channels)
    if len(given) != sum(channels):
        raise MixbitError(
            f"recipe: channel bits of layer {name!r} hold {len(given)} numbers; expected {sum(channels)} for its grids"
        )
    groups = np.split(given, np.cumsum(channels)[:-1])
    for i, group in enumerate(groups):
        if (group != group[0]).any():
            raise MixbitError(
                f"recipe: layer {name!r} has channels of {sorted(set(group.tolist()))} bits in group {i} of "
                f"{len(groups)}, which chooses as one; expected one width a group"
            )
    return [int(group[0]) for group in groups]


@torch.no_grad()
def unfreeze_(model: nn.Module) -> nn.Module:
    """Lets a frozen search go on.

    Raises:
        MixbitError: The model is not under search.
    """
    for quantizer in check_searching(model).values():
        quantizer.phase.fill_(SAMPLED)
        quantizer.choice_parameter.requires_grad_(True)
    return model


def extract(model: nn.Module) -> Recipe:
    """The recipe that the search has come to, with the grids that were searched.

    Of a prepared model that is not under search: the recipe that it runs at, extra levels included.

    A model prepared with the recipe anew computes what the model under search computes in eval mode, unless a budget
    moved layers. With a budget the result costs at most the budget and at least 99 % of the most that can be reached
    below it: where the choice made by the search itself does not, the likeliest one that does is taken (exactly, by an
    integer program over the candidates' probabilities), and `.report["moved"]` lists the layers.

    Args:
        model: Under search, with a budget if a `Penalty` with one was made for it; or prepared with a recipe.

    Returns:
        A Recipe; `.report` holds method, cost and budget (by unit where there are several), feasible, misses_by,
        average bits, and for each layer the probabilities of its candidates (the mean over its channels). Where groups
        of channels chose, `.channel_maps` has the layers whose channels differ.

    Raises:
        MixbitError: The model is not prepared, or a parameter of the search is not finite.
    """
    if not search_quantizers(model) and quantized_layers(model):
        return _present(model)
    found = check_searching(model)
    for name, quantizer in found.items():
        parameter = quantizer.choice_parameter
        if not torch.isfinite(parameter).all():
            raise MixbitError(f"{name}: the search's parameter holds {parameter.tolist()}; expected finite numbers")
        quantizer.refresh_()
    modules = quantized_layers(model)
    names = list(modules)
    choices = Choices(model, names)
    with torch.no_grad():
        rows = choices.probabilities()
        probabilities = rows.double().cpu().numpy()
        shares = choices.of_operands(rows).double().cpu().numpy()
        decided = choices.decided().tolist()
    # One place a layer, or one for each group of channels that chooses.
    places = choices.places()
    act = [choices.candidates[a][decided[choices.first[a]]] for a in (choices.act[i] for i, _ in places)]
    weight = [choices.candidates[choices.weight[i]][decided[choice]] for i, choice in places]
    priced: tuple[tuple[CostTable, float | None], ...] = getattr(model, "mixbit_costs", ())
    budgets = {table: limit for table, limit in priced if limit is not None}
    feasible, moved = True, []
    if budgets:
        options = choices.options(probabilities)
        first = ([options.acts.index(a) for a in act], [options.weights.index(w) for w in weight])
        fixed = {name: FLOAT for name in priced[0][0].layers if name not in modules}
        chosen, feasible = land(options, budgets, fixed, first)
        pairs = zip(options.names, *first, *chosen, strict=True)
        moved = list(dict.fromkeys(name for name, *pair in pairs if pair[:2] != pair[2:]))
        act, weight = [options.acts[a] for a in chosen[0]], [options.weights[w] for w in chosen[1]]
    layers, maps, average = {}, {}, []
    for i, (name, module) in enumerate(modules.items()):
        own = [p for p, (layer, _) in enumerate(places) if layer == i]
        widths = [weight[p] for p in own]
        layers[name] = _precision(module, _bits(act[own[0]]), _bits(max(widths)))
        weighing = module.weight_quantizer
        if len(set(widths)) > 1 and isinstance(weighing, SearchQuantizer):
            maps[name] = weighing.spread(torch.tensor(widths, dtype=torch.uint8)).numpy()
        average.append(sum(float(choices.shares[places[p][1]]) * weight[p] for p in own))
    recipe = Recipe(layers=layers, made_by={"verb": "search", "method": _method(found)}, channel_maps=maps)
    units = unit_names(table for table, _ in priced)
    cost = {unit: table.total(recipe) for table, unit in units.items()}
    limits = {units[table]: limit for table, limit in budgets.items()}
    recipe.cost = dict(cost)
    single = len(priced) == 1
    recipe.report = {
        "method": _method(found),
        "cost": next(iter(cost.values())) if single else cost,
        "budget": (next(iter(limits.values()), None) if single else limits) or None,
        "budget_share": {units[t]: limit / t.uniform(8, 8) for t, limit in budgets.items()} or None,
        "feasible": feasible,
        "misses_by": max((max(t.total(recipe) - limit, 0.0) for t, limit in budgets.items()), default=0.0),
        "moved": moved,
        "average_bits": {
            "act": _mean([_counted(precision.act) for precision in layers.values()]),
            "weight": _mean(average),
        },
        "probabilities": {
            name: {
                "act": _shares(choices, shares, choices.act[i]),
                "weight": _shares(choices, shares, choices.weight[i]),
            }
            for i, name in enumerate(names)
        },
    }
    return recipe


def _present(model: nn.Module) -> Recipe:
    """The recipe of a model that is not under search."""
    layers, maps, channels, average = {}, {}, {}, []
    for name, module in quantized_layers(model).items():
        act, weight = module.act_quantizer, module.weight_quantizer
        act_bits = None if act is None else act.check_bit_width()
        layers[name] = _precision(module, act_bits, None if weight is None else weight.check_bit_width())
        if weight is not None and weight.extra_bits is not None:
            maps[name] = weight.extra_bits.cpu().numpy().copy()
        if weight is not None and len(weight.widths) > 1:
            channels[name] = weight.bit_width.cpu().numpy().astype(np.uint8)
        average.append(float(FLOAT_BITS if weight is None else weight.bit_width.double().mean()))
    recipe = Recipe(layers=layers, made_by={"verb": "extract"}, extra_maps=maps, channel_maps=channels)
    recipe.tensors = {name: dict(entry) for name, entry in getattr(model, "mixbit_tensors", recipe.tensors).items()}
    recipe.report = {
        "method": "prepared",
        "cost": None,
        "budget": None,
        "feasible": True,
        "misses_by": 0.0,
        "average_bits": {
            "act": _mean([_counted(precision.act) for precision in layers.values()]),
            "weight": _mean(average),
        },
    }
    return recipe


def _precision(module: QuantizedLayer, act: int | None, weight: int | None) -> LayerPrecision:
    """The searched grid: as asked for, at other widths, with the sign that calibration found."""
    quantizer = module.act_quantizer
    signed = None if quantizer is None or not quantizer.is_calibrated else quantizer.signed
    own = module.precision
    narrow = own.narrow_range if module.weight_quantizer is None else module.weight_quantizer.narrow_range
    return LayerPrecision(
        weight=weight,
        act=act,
        signed_act=signed,
        granularity=own.granularity,
        narrow_range=narrow,
        rounding=own.rounding,
    )


def _method(found: dict[str, SearchQuantizer]) -> str:
    return {"GatedQuantizer": "gates", "MixtureQuantizer": "mixture", "FractionalQuantizer": "fractional"}[
        type(next(iter(found.values()))).__name__
    ]


def _shares(choices: Choices, probabilities: Any, index: int) -> dict[str, float]:
    return {str(b): round(float(probabilities[index, k]), 6) for k, b in enumerate(choices.candidates[index])}


def _mean(bits: list[float]) -> float:
    return math.fsum(bits) / len(bits)


def _counted(bits: int | None) -> float:
    return float(FLOAT_BITS if bits is None else bits)


def _bits(width: int) -> int | None:
    return None if width == FLOAT_BITS else width


__all__ = ["extract", "freeze_", "param_groups", "search_quantizers", "travel", "unfreeze_"]
