"""What calls that train a prepared model, whether at given bits or in a search, ask of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mixbit.errors import MixbitError
from mixbit.network import check_batches
from mixbit.quantizers import quantized_layers
from mixbit.training.objectives import Objective


def check_fit(
    model: nn.Module,
    batches: Any,
    epochs: Any,
    objective: Objective | None,
    teacher: nn.Module | None,
    rates: Mapping[str, float | None],
    *,
    momentum: float,
    weight_decay: float,
) -> None:
    """Refuses what cannot be trained.

    Args:
        model: Prepared.
        batches: Must be re-iterable and have a length, which the schedule needs.
        epochs: A whole number of at least 1.
        objective: Not beside a teacher.
        teacher: Not beside an objective.
        rates: Learning rates by argument: positive and finite, or None.
        momentum: From 0 to below 1.
        weight_decay: At least 0, finite.

    Raises:
        MixbitError: A layer is not calibrated (it is named), or an argument does not fit.
    """
    for name, module in quantized_layers(model).items():
        for quantizer in (module.weight_quantizer, module.act_quantizer):
            if quantizer is not None:
                try:
                    quantizer.check_calibrated()
                except MixbitError as error:
                    raise MixbitError(f"layer {name!r}: {error}") from error
    check_batches(batches)
    if not hasattr(batches, "__len__"):
        raise MixbitError("batches has no length, which the schedule needs; expected a list or DataLoader")
    if objective is not None and teacher is not None:
        raise MixbitError(
            "objective and teacher are both given; expected one (distill makes an objective of a teacher)"
        )
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise MixbitError(f"epochs={epochs!r}: expected a whole number of at least 1")
    for argument, rate in rates.items():
        if rate is not None and not 0 < rate < float("inf"):
            raise MixbitError(f"{argument}={rate!r}: expected a positive number")
    if not 0 <= momentum < 1:
        raise MixbitError(f"momentum={momentum!r}: expected a number from 0 to below 1")
    if not 0 <= weight_decay < float("inf"):
        raise MixbitError(f"weight_decay={weight_decay!r}: expected a number of at least 0")
