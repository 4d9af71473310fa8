"""Batch-norm statistics of the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixbit.network import call_model, check_batches, device_of, item_on


@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Any], epoch: int | None = None) -> nn.Module:
    """Replaces the running statistics of every batch normalization by their plain averages over data, in place.

    Running averages of training lag behind the last weights and grids; each normalization gets the mean of the batches'
    means and of their unbiased variances, found with batch statistics in all normalizations at once (as in training)
    and everything else in eval mode. Under torch.distributed the averages are those over all processes.

    Args:
        model: Any; without batch normalization nothing happens.
        batches: Re-iterable batches; use batches as large as in training. Items are moved to the model's device if that
            is no CPU.
        epoch: Given to `batches.set_epoch` where there is such a method, so that the order does not depend on what was
            read before.

    Returns:
        The model, every module in the mode and with the momentum it had.

    Raises:
        MixbitError: The data is empty or one-shot.
    """
    check_batches(batches)
    set_epoch: Any = getattr(batches, "set_epoch", None)
    if epoch is not None and callable(set_epoch):
        set_epoch(epoch)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # torch's cumulative average
            norm.reset_running_stats()
        device = device_of(model)
        for item in batches:
            call_model(model, item_on(item, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if dist.is_available() and dist.is_initialized():
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()
    return model
