"""A whole search in one call, for those who want no loop of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.progress import Progress
from mixbit.recipe import Recipe
from mixbit.search.extract import extract, freeze_, param_groups, travel
from mixbit.search.penalty import Penalty, check_searching
from mixbit.tables import CostTable
from mixbit.training import (
    History,
    Objective,
    check_fit,
    cross_entropy,
    distill,
    in_bf16,
    reestimate_batchnorm_,
    train,
    weight_groups,
)
from mixbit.training.checkpoint import describe_teacher, tree_digest

#: Of Adam on the search's parameters. The price of a bit turns around within a few steps of a short search; with the
#: usual momentum of 0.9 a gate coasts past the point at which it should have stopped.
_BETAS = (0.5, 0.99)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        recipe: See `extract`.
        history: Loss of every step (penalty included); figures "cost" (of the recipe chosen then, in shares of
            uniform(8, 8)) and, for each layer of the cost table, "act NAME" and "weight NAME" (bits chosen then, 32 for
            float).
    """

    recipe: Recipe
    history: History


class Together(torch.optim.Optimizer):
    """Several optimizers as one: stepped, cleared and saved together, their groups in one list."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.optimizers = dict(optimizers)
        super().__init__([g for o in self.optimizers.values() for g in o.param_groups], {})
        # The very groups of the members, so that a schedule reaches them.
        self.param_groups = [g for o in self.optimizers.values() for g in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps all; the closure is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of each by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self.param_groups = [g for o in self.optimizers.values() for g in o.param_groups]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    costs: CostTable | Mapping[CostTable, float],
    *,
    epochs: int,
    budget: float | Mapping[CostTable, float] | None = None,
    strength: float | None = None,
    form: str = "expected",
    start_epoch: int = 0,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    search_lr: float = 1e-3,
    scale_lr: float | None = None,
    final_temperature: float | None = None,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    teacher_weight: float = 1.0,
    bf16: bool = False,
    reestimate: bool | Iterable[Any] = True,
    clip_norm: float | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int | None = None,
    progress: bool | Progress | None = None,
    say: Callable[[str], None] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Found:
    """Trains weights, scales and bit-widths of a model under a cost, in place, and extracts the recipe.

    Weights train by SGD with momentum along a cosine, the search's parameters and scales by Adam at constant rates (as
    in Free Bits). The rate of gates is raised where they could not travel from open to closed in a third of the steps.
    Afterwards the recipe's choices are frozen: the model can be trained on as it is, or prepared with the recipe.

    Args:
        model: Prepared for a search and calibrated; left in the mode it was in.
        batches: Re-iterable batches (input, labels); with a teacher of weight 1 also inputs alone.
        costs: See `Penalty`, like `budget`, `strength`, `form` and `final_temperature`.
        epochs: Passes over `batches`.
        budget: Largest cost of the result.
        strength: Of the penalty, in place of a budget.
        form: Of the penalty.
        start_epoch: Until then all candidates stay at their widest.
        lr: Of weights, biases and normalizations, at the start.
        momentum: Of SGD.
        weight_decay: Of weights.
        search_lr: Of logits, or of fractional widths.
        scale_lr: Of scales and ranges; None takes `lr` / 10.
        final_temperature: Of mixtures.
        objective: (model, item) -> scalar; None is cross entropy, or distillation where a teacher is given.
        teacher: The float network, in eval mode, whose outputs are learned.
        temperature: Of the distillation.
        teacher_weight: Share of the distillation in the loss.
        bf16: Runs the objective, but not the penalty, under bfloat16 autocast.
        reestimate: Whether batch normalizations are averaged anew at the chosen widths, over `batches` or the batches
            given (see `mixbit.training.reestimate_batchnorm_`): while the search goes on they see mixtures.
        clip_norm: Largest norm of the whole gradient.
        checkpoint: File that makes the search resumable; see `mixbit.training.train`.
        checkpoint_every: Steps from one checkpoint to the next, beside the one of each epoch.
        progress: True for a bar on a terminal, or a callable.
        say: Called with a sentence about what may go wrong (a rate that was raised).
        identity: More of what a checkpoint must agree in.

    Returns:
        Recipe and history.

    Raises:
        MixbitError: The model is not under search, frozen or not calibrated, an argument does not fit, or what `train`
            and `Penalty` raise.
    """
    quantizers = check_searching(model)
    if not any(quantizer.choice_parameter.requires_grad for quantizer in quantizers.values()):
        raise MixbitError("model: every choice is frozen; call mixbit.search.unfreeze_(model) to go on searching")
    rates = {"lr": lr, "search_lr": search_lr, "scale_lr": scale_lr}
    check_fit(model, batches, epochs, objective, teacher, rates, momentum=momentum, weight_decay=weight_decay)
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or not 0 <= start_epoch < epochs:
        raise MixbitError(
            f"start_epoch={start_epoch!r}: expected a whole number of at least 0, less than epochs={epochs}"
        )
    length: int = len(batches)  # type: ignore[arg-type]
    steps = epochs * length
    active = (epochs - start_epoch) * length
    penalty = Penalty(
        model,
        costs,
        strength=strength,
        budget=budget,
        form=form,
        total_steps=steps,
        start_step=start_epoch * length,
        final_temperature=final_temperature,
    )
    # Without a price nothing has to travel, and a larger rate would only follow the noise.
    priced = strength is None or strength > 0
    groups = param_groups(
        model, search_lr, scale_lr=lr / 10 if scale_lr is None else scale_lr, total_steps=active if priced else None
    )
    if say is not None and groups[0]["lr"] > search_lr:
        way = max(travel(q) for q in quantizers.values())
        say(
            f"search_lr={search_lr:g} moves by at most {search_lr * active:.2g} in {active} steps, but {way:.3g} lie "
            f"between the widest and the narrowest candidate: {groups[0]['lr']:.2g} is used"
        )
    held = [p for group in groups for p in group["params"]]
    weights = torch.optim.SGD(weight_groups(model, weight_decay, held), lr=lr, momentum=momentum)
    optimizer = Together({"weights": weights, "search": torch.optim.Adam(groups, betas=_BETAS)})
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(weights, steps)
    if objective is None:
        objective = cross_entropy() if teacher is None else distill(teacher, temperature, teacher_weight)
    task = in_bf16(objective) if bf16 else objective

    def with_penalty(trained: nn.Module, item: Any) -> Any:
        return task(trained, item) + penalty()

    unit = penalty.units()

    def record(step: int, _: float) -> dict[str, float]:
        # A few hundred points draw the whole search.
        if step % max(1, steps // 200) and step != steps:
            return {}
        act, weight = penalty.bits()
        figures = {f"act {n}": float(a) for n, a in zip(penalty.layers, act, strict=True)}
        figures |= {f"weight {n}": float(w) for n, w in zip(penalty.layers, weight, strict=True)}
        first = next(iter(unit))
        return figures | {"cost": penalty.costs()[first] / unit[first]}

    history = train(
        model,
        batches,
        with_penalty,
        optimizer,
        epochs=epochs,
        scheduler=cosine,
        modules={"penalty": penalty},
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        after_step=record,
        progress=progress,
        clip_norm=clip_norm,
        identity={
            "bf16": bf16,
            "clip_norm": clip_norm,
            "teacher": describe_teacher(teacher, temperature, teacher_weight),
            "costs": tree_digest(
                [
                    (table.unit, table.layers, torch.as_tensor(table.values if outs is None else outs))
                    for table in ([costs] if isinstance(costs, CostTable) else costs)
                    for outs in (table.values_out,)
                ]
            ),
            "penalty": f"form {form}, final temperature {final_temperature}",
            **(identity or {}),
        },
    )
    recipe = extract(model)
    freeze_(model, recipe)
    if reestimate is not False:
        reestimate_batchnorm_(model, batches if reestimate is True else reestimate, epochs)
    return Found(recipe, history)
