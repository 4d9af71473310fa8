"""Training at given bits in one call, for those who want no loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.progress import Progress
from mixbit.quantizers import TQT, quantized_layers
from mixbit.retrain.mechanisms import Mechanisms, Retraining
from mixbit.training import (
    AfterStep,
    History,
    Objective,
    check_fit,
    cross_entropy,
    distill,
    in_bf16,
    param_groups,
    reestimate_batchnorm_,
    train,
)
from mixbit.training.checkpoint import describe_teacher

#: Groups of parameters -> their optimizer.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    scale_lr: float | None = None,
    optimizer: MakeOptimizer | None = None,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    teacher_weight: float = 1.0,
    mechanisms: Mechanisms | None = None,
    bf16: bool = False,
    reestimate: bool | Iterable[Any] = True,
    clip_norm: float | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int | None = None,
    modules: Mapping[str, Any] | None = None,
    after_step: AfterStep | None = None,
    progress: bool | Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> History:
    """Trains weights, biases and the grids of a prepared model at its bits, in place.

    SGD with momentum; all rates fall along a cosine to zero. Weights decay; biases, normalizations and scales do not.
    Gradients of trained thresholds (TQT) are normalized before each step, as published, so that the step is bounded.
    A run with a checkpoint that is killed at any step and started again as it was ends in the same weights, bit for
    bit, on one process or under torch.distributed; see `mixbit.training.train`.

    Args:
        model: Prepared and calibrated; left in the mode it was in.
        batches: Re-iterable batches (input, labels) with a length; with a teacher of weight 1 also inputs alone. Where
            there is a method `set_epoch(epoch)` it is called before each pass.
        epochs: Passes over `batches`.
        lr: Of weights, biases and normalizations, at the start.
        momentum: Of SGD.
        weight_decay: Of weights, and of the clips of PACT.
        scale_lr: Of scales, offsets, thresholds and clips, at the start; None takes `lr` / 10.
        optimizer: Makes another optimizer of the groups, which carry "lr", "weight_decay" and "name"; then `momentum`
            is its own affair.
        objective: (model, item) -> scalar; None is cross entropy, or distillation where a teacher is given.
        teacher: The float network, in eval mode, whose outputs are learned.
        temperature: Of the distillation.
        teacher_weight: Share of the distillation in the loss, 0 to 1.
        mechanisms: Against weights that switch between levels: smaller steps near thresholds, extra levels, freezing,
            dampening. Figures in the history: "switches" (per weight and step), "frozen" (share of the weights), and at
            each assignment "flagged:LAYER" (share of a layer's weights with extra levels), "loss_before_assignment"
            and "loss_after_assignment" (of that step's batch, in eval mode). None uses none.
        bf16: Runs the objective under bfloat16 autocast: operands are quantized in float32 and multiplied in bfloat16.
        reestimate: Whether the statistics of batch normalizations are averaged anew over `batches` at the end (see
            `mixbit.training.reestimate_batchnorm_`), or the batches to do so on. Where parts of the model were frozen
            in eval mode, pass False.
        clip_norm: Largest norm of the whole gradient.
        checkpoint: File that makes the run resumable.
        checkpoint_every: Steps from one checkpoint to the next, beside the one of each epoch.
        modules: Further things whose state is part of the run, by name.
        after_step: Called as (steps done, loss); the figures it returns are kept in the history.
        progress: True for a bar on a terminal, or a callable.
        identity: More of what a checkpoint must agree in.

    Returns:
        Loss of every step and figures of every epoch, of the whole run also after a resume.

    Raises:
        MixbitError: The model is not prepared or not calibrated, an argument does not fit, or what `train`,
            `cross_entropy` and `distill` raise: a loss that is not finite names step and layer and leaves the model as
            it was at the last checkpoint.
    """
    _check_bits(model)
    rates = {"lr": lr, "scale_lr": scale_lr}
    check_fit(model, batches, epochs, objective, teacher, rates, momentum=momentum, weight_decay=weight_decay)
    of_epoch = len(batches)  # type: ignore[arg-type]
    steps = epochs * of_epoch
    used = Retraining(mechanisms or Mechanisms(), model, steps, of_epoch)
    groups = param_groups(model, lr, scale_lr=scale_lr, weight_decay=weight_decay)
    made = used.optimizer(torch.optim.SGD(groups, lr=lr, momentum=momentum) if optimizer is None else optimizer(groups))
    thresholds = [module for module in model.modules() if isinstance(module, TQT)]

    def normalize(*_: Any) -> None:
        for quantizer in thresholds:
            quantizer.normalize_gradient_()

    made.register_step_pre_hook(normalize)
    if objective is None:
        objective = cross_entropy() if teacher is None else distill(teacher, temperature, teacher_weight)
    history = train(
        model,
        batches,
        used.objective(in_bf16(objective) if bf16 else objective),
        made,
        epochs=epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(made, steps),
        modules={**used.modules, **(modules or {})},
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        after_step=used.after_step(after_step),
        progress=progress,
        clip_norm=clip_norm,
        identity={
            "bf16": bf16,
            "clip_norm": clip_norm,
            "teacher": describe_teacher(teacher, temperature, teacher_weight),
            **({"mechanisms": used.given.describe()} if used.given.active else {}),
            **(identity or {}),
        },
    )
    if reestimate is not False:
        reestimate_batchnorm_(model, batches if reestimate is True else reestimate, epochs)
    return history


def _check_bits(model: nn.Module) -> None:
    """Refuses a model without prepared layers, or whose bits still move."""
    modules = quantized_layers(model)
    if not modules:
        raise MixbitError("model has no prepared layers; call mixbit.prepare_(model, recipe) first")
    for name, module in modules.items():
        for quantizer in (module.weight_quantizer, module.act_quantizer):
            if quantizer is not None and quantizer.searching and quantizer.choice_parameter.requires_grad:
                raise MixbitError(
                    f"layer {name!r}: its bits are still being searched; call mixbit.prepare_(model, "
                    "mixbit.search.extract(model)) first, or mixbit.search.freeze_(model)"
                )
