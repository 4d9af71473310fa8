"""Where a training step stops being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixbit.network import flatten_outputs
from mixbit.network.calling import input_tensors
from mixbit.training.objectives import Objective


def first_not_finite(model: nn.Module, item: Any, objective: Objective) -> str:
    """Repeats a step and says, as a clause, which tensor is the first that is not finite.

    Args:
        model: As it was before the step; its buffers and gradients may change.
        item: Of the step.
        objective: Of the step.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in input_tensors(item)):
        return "the batch's input is not finite"
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"parameter {name!r} is not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            for _, tensor in flatten_outputs(output):
                if not bool(torch.isfinite(tensor).all()):
                    found.append(f"the first output that is not finite is that of layer {name!r}")
                if tensor.requires_grad:
                    tensor.register_hook(_watcher(f"of the output of layer {name!r}", found))

        return after

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    handles += [p.register_hook(_watcher(f"of {n!r}", found)) for n, p in model.named_parameters() if p.requires_grad]
    try:
        loss = objective(model, item)
        if not found and not bool(torch.isfinite(loss)):
            return "every layer's output is finite, so the objective itself gives it"
        if not found:
            # Not backward(): that would wake the reducers of other processes.
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "repeated on this process all of it is finite (another process, or a sum, is not)"


def _watcher(what: str, found: list[str]) -> Any:
    def check(gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            found.append(f"the first gradient that is not finite is that {what}")

    return check
