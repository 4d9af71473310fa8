"""Which parameters of a model an optimizer treats alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mixbit.quantizers import PACT, Quantizer


def param_groups(
    model: nn.Module, lr: float, *, scale_lr: float | None = None, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """All trained parameters of a prepared model, for an optimizer.

    Args:
        model: Any.
        lr: Of weights, biases and normalizations.
        scale_lr: Of what quantizers learn; None takes `lr` / 10.
        weight_decay: Of weights and clips.

    Returns:
        The groups of `weight_groups` and `scale_groups`, with "lr".
    """
    scales = scale_groups(model, weight_decay)
    weights = weight_groups(model, weight_decay, [p for group in scales for p in group["params"]])
    rate = lr / 10 if scale_lr is None else scale_lr
    return [{**group, "lr": lr} for group in weights] + [{**group, "lr": rate} for group in scales]


def weight_groups(model: nn.Module, weight_decay: float, held: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """Trained parameters but for those held elsewhere: weights decay; biases and normalizations do not.

    Args:
        model: Any.
        weight_decay: Of weights, that is of parameters with more than one dimension.
        held: Parameters of other groups.

    Returns:
        Groups "weights" and "biases" with "params", "weight_decay" and "name"; one that would be empty is left out.
    """
    others = {id(p) for p in held}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    return named_groups(
        weights=([p for p in rest if p.dim() > 1], weight_decay), biases=([p for p in rest if p.dim() <= 1], 0.0)
    )


def scale_groups(model: nn.Module, weight_decay: float, held: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """What quantizers learn: scales, offsets and thresholds without decay; clips of PACT with it, as published.

    Args:
        model: Prepared; a model without quantizers has no such groups.
        weight_decay: Of clips.
        held: Parameters of other groups.

    Returns:
        Groups "scales" and "clips", as `weight_groups`.
    """
    others = {id(p) for p in held}
    found: dict[bool, dict[int, nn.Parameter]] = {False: {}, True: {}}
    for module in model.modules():
        if isinstance(module, Quantizer):
            own = found[isinstance(module, PACT)]
            own |= {id(p): p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in others}
    return named_groups(scales=(list(found[False].values()), 0.0), clips=(list(found[True].values()), weight_decay))


def named_groups(**groups: tuple[list[nn.Parameter], float]) -> list[dict[str, Any]]:
    """Groups of an optimizer from (parameters, weight decay) by name, without those that are empty."""
    return [{"params": p, "weight_decay": decay, "name": name} for name, (p, decay) in groups.items() if p]
