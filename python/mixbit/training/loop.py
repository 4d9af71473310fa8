"""The training loop: resumable at any step, bit for bit, on one process or several."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.network import check_batches, device_of, item_on
from mixbit.progress import Progress, reporter
from mixbit.training.checkpoint import copied, read_checkpoint, tree_digest, write_checkpoint
from mixbit.training.diagnosis import first_not_finite
from mixbit.training.objectives import Objective, unwrapped

#: Called after every step as (steps done, loss); figures it returns are kept in the history.
AfterStep = Callable[[int, float], Mapping[str, float] | None]


@dataclasses.dataclass
class History:
    """What a training run measured. No wall-clock figures: a resumed run has the history of an unbroken one.

    Attributes:
        loss: Of every step, averaged over all processes.
        epochs: For each finished epoch `loss` (its mean), `lr` (of the first parameter group at its end) and `steps`
            (done by then).
        figures: What `after_step` returned: for each name [steps done, value] pairs.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    epochs: list[dict[str, float]] = dataclasses.field(default_factory=list)
    figures: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return dataclasses.asdict(self)

    def to_csv(self) -> str:
        """A line for each step: its number, its loss, and the figures taken there."""
        taken = {name: {int(step): value for step, value in points} for name, points in self.figures.items()}
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["step", "loss", *taken])
        for step, loss in enumerate(self.loss, 1):
            lines.writerow([step, loss, *(values.get(step, "") for values in taken.values())])
        return text.getvalue()


def train(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    scheduler: Any = None,
    modules: Mapping[str, Any] | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int | None = None,
    after_step: AfterStep | None = None,
    progress: bool | Progress | None = None,
    clip_norm: float | None = None,
    identity: Mapping[str, Any] | None = None,
) -> History:
    """Trains a model in place.

    A run with a checkpoint that is killed at any step and started again as it was (same model before training, data,
    optimizer) ends in the same weights, bit for bit: model, optimizer, scheduler, `modules`, history, the random states
    of torch and Python, and the position in the data are part of it. What is computed between two checkpoints is
    computed again. Under an initialized torch.distributed gradients are averaged through DistributedDataParallel and
    all processes end with the same bits; the first one writes the checkpoint, all read it.

    Args:
        model: In training mode it is trained as it is (parts may be in eval mode); in eval mode it is put into training
            mode and back at the end. Items are moved to its device if that is no CPU.
        batches: Re-iterable batches. Where there is a method `set_epoch(epoch)` it is called before each pass; else
            the order may come from torch's own random state, as a DataLoader's does.
        objective: (model, item) -> scalar Tensor; see `cross_entropy` and `distill`.
        optimizer: Of the model's parameters.
        epochs: Passes over `batches`.
        scheduler: Its `step()` is called after every optimizer step.
        modules: Further things with `state_dict` and `load_state_dict` whose state is part of the run (a penalty, a
            tracker), by name. Gradients of those that are nn.Modules are averaged over processes too.
        checkpoint: File that keeps the state; None keeps it in memory alone, for a loss that is not finite.
        checkpoint_every: Steps from one checkpoint to the next, beside the one at the end of each epoch.
        after_step: Called as (steps done, loss) before a checkpoint is taken.
        progress: True for a bar on a terminal, or a callable.
        clip_norm: Largest norm of the gradient of all parameters of the optimizer.
        identity: More of what makes this run this run; a checkpoint that differs there is refused.

    Returns:
        The history, of the whole run also after a resume.

    Raises:
        MixbitError: A checkpoint of another model or run; no data; an argument out of range; a loss or gradient that is
            not finite: model, optimizer and the rest are then back at the last checkpoint's state (or at the start).
    """
    _check_arguments(batches, epochs, checkpoint_every, clip_norm)
    run = _Run(model, optimizer, scheduler, dict(modules or {}), checkpoint)
    run.identity = run.described(batches, epochs, identity)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with _training_mode(model), reporter(progress if run.first else None, "train") as report:
        run.start()
        trained = _distributed(model)
        for epoch in range(run.epoch, epochs):
            for item in run.items(batches, epoch):
                loss = run.step(trained, item, objective, parameters, clip_norm)
                history = run.history
                history.loss.append(loss)
                for name, value in ((after_step and after_step(len(history.loss), loss)) or {}).items():
                    history.figures.setdefault(name, []).append([len(history.loss), float(value)])
                run.position += 1
                if checkpoint_every is not None and len(history.loss) % checkpoint_every == 0:
                    run.keep()
                report(len(history.loss), epochs * _length(batches), "steps")
            run.finish_epoch()
        run.share_buffers()
    return run.history


class _Run:
    """A run's state: what a checkpoint holds, and the last good one in memory."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        modules: dict[str, Any],
        checkpoint: PathLike | None,
    ) -> None:
        self.model = unwrapped(model)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": optimizer}
        if scheduler is not None:
            self.parts["scheduler"] = scheduler
        for name, part in modules.items():
            if name in self.parts or not all(
                callable(getattr(part, m, None)) for m in ("state_dict", "load_state_dict")
            ):
                raise MixbitError(
                    f"modules[{name!r}] is a {type(part).__name__}; expected something with state_dict and "
                    f"load_state_dict, under a name other than {', '.join(self.parts)}"
                )
            self.parts[name] = part
        self.extra = [p for m in modules.values() if isinstance(m, nn.Module) for p in m.parameters()]
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.identity: dict[str, Any] = {}
        self.history = History()
        self.epoch = self.position = 0
        self.epoch_random: Any = None
        self.last: dict[str, Any] = {}
        self.device = device_of(self.model)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return not _joined() or dist.get_rank() == 0

    def described(self, batches: Iterable[Any], epochs: int, identity: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint must agree in; every entry is named where it does not."""
        describe: Any = getattr(batches, "describe", None)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        optimizer, scheduler = state.pop("optimizer"), state.pop("scheduler", None)
        return {
            "model": type(self.model).__name__,
            "state before training": tree_digest(state),
            "optimizer": f"{type(self.optimizer).__name__}, settings {tree_digest(optimizer)}",
            "scheduler": f"{type(self.scheduler).__name__}, settings {tree_digest(scheduler)}",
            "modules": sorted(self.parts),
            "epochs": epochs,
            "batches": f"{type(batches).__name__} of {_length(batches)}",
            "data": repr(describe()) if callable(describe) else None,
            "processes": dist.get_world_size() if _joined() else 1,
            **(identity or {}),
        }

    def start(self) -> None:
        """Takes over a checkpoint if there is one; else this is the first good state."""
        if self.checkpoint is None or not self.checkpoint.exists():
            if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
                raise MixbitError(f"checkpoint={str(self.checkpoint)!r}: its folder does not exist")
            self.share_buffers()
            self.epoch_random = _random_state()
            self.last = self.state()
            return
        state = read_checkpoint(self.checkpoint)
        for name, own in self.identity.items():
            found = state["identity"].get(name)
            if found != own:
                raise MixbitError(
                    f"checkpoint={str(self.checkpoint)!r} is of another run: its {name} is {found!r}, this run's is "
                    f"{own!r}; delete it to start anew"
                )
        self.last = state
        self.restore()

    def state(self) -> dict[str, Any]:
        """A copy of everything."""
        return {
            "identity": self.identity,
            "epoch": self.epoch,
            "position": self.position,
            "history": copied(self.history.to_dict()),
            "random": _of_all_processes((self.epoch_random, _random_state())),
            "parts": {name: copied(part.state_dict()) for name, part in self.parts.items()},
        }

    def keep(self) -> None:
        """The present state becomes the last good one, in memory and in the file."""
        self.share_buffers()
        self.last = self.state()
        if self.checkpoint is not None and self.first:
            write_checkpoint(self.checkpoint, self.last)

    def restore(self) -> None:
        """Goes back to the last good state."""
        state = self.last
        for name, part in self.parts.items():
            part.load_state_dict(copied(state["parts"][name]))
        self.history = History(**copied(state["history"]))
        self.epoch, self.position = state["epoch"], state["position"]
        self.epoch_random, now = state["random"][dist.get_rank() if _joined() else 0]
        _set_random_state(now)

    def share_buffers(self) -> None:
        """All processes get the first one's buffers: batch statistics are each one's own."""
        if _joined():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def items(self, batches: Iterable[Any], epoch: int) -> Iterator[Any]:
        """The rest of an epoch's items."""
        now = _random_state()
        if self.position == 0:
            self.epoch_random = now
        else:
            _set_random_state(self.epoch_random)  # the order may be drawn from it
        set_epoch: Any = getattr(batches, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        rest = iter(batches)
        if self.position:
            for _ in range(self.position):
                if next(rest, None) is None:
                    raise MixbitError(f"batches ends before item {self.position}, where the checkpoint was taken")
            _set_random_state(now)
        for item in rest:
            yield item_on(item, self.device)

    def step(
        self, model: nn.Module, item: Any, objective: Objective, parameters: list[nn.Parameter], clip_norm: float | None
    ) -> float:
        """One step; its loss."""
        before = torch.get_rng_state()
        self.optimizer.zero_grad(set_to_none=True)
        loss = objective(model, item)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise MixbitError(f"objective returned {got}; expected a scalar Tensor")
        loss.backward()
        value = loss.detach().double().reshape(1)
        if _joined():
            # The same figure everywhere: all processes stop at the same step.
            dist.all_reduce(value)
            value /= dist.get_world_size()
            for p in self.extra:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        average = float(value)
        if not (math.isfinite(average) and math.isfinite(float(norm))):
            number = len(self.history.loss) + 1
            torch.set_rng_state(before)
            reason = first_not_finite(self.model, item, objective)
            self.restore()
            kept = f"the state after step {len(self.history.loss)} is restored"
            where = (
                ""
                if self.checkpoint is None or not self.checkpoint.exists()
                else f" and kept in {str(self.checkpoint)!r}"
            )
            raise MixbitError(
                f"step {number}: the loss is {average:g} and the norm of its gradient {float(norm):g}; {reason}; "
                f"{kept}{where}; try a smaller learning rate, clip_norm or more bits"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return average

    def finish_epoch(self) -> None:
        """Figures of an epoch, and a checkpoint."""
        if self.position == 0:
            raise MixbitError("batches is empty; expected at least one batch")
        losses = self.history.loss[-self.position :]
        lr = float(self.optimizer.param_groups[0]["lr"])
        figures = {"loss": math.fsum(losses) / len(losses), "lr": lr, "steps": float(len(self.history.loss))}
        self.history.epochs.append(figures)
        self.epoch, self.position = self.epoch + 1, 0
        self.epoch_random = _random_state()
        self.keep()


def _check_arguments(batches: Any, epochs: Any, checkpoint_every: Any, clip_norm: Any) -> None:
    check_batches(batches)
    for name, value in (("epochs", epochs), ("checkpoint_every", checkpoint_every)):
        if (value is not None or name == "epochs") and (not isinstance(value, int) or value < 1):
            raise MixbitError(f"{name}={value!r}: expected a whole number of at least 1")
    if clip_norm is not None and not clip_norm > 0:
        raise MixbitError(f"clip_norm={clip_norm!r}: expected a positive number")


def _length(batches: Any) -> int:
    """Items of a pass, 0 where that is not known."""
    return len(batches) if hasattr(batches, "__len__") else 0


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode is put into training mode, and back."""
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _distributed(model: nn.Module) -> nn.Module:
    if not _joined() or isinstance(model, DistributedDataParallel):
        return model
    devices = {p.device for p in model.parameters()}
    device = next(iter(devices)) if len(devices) == 1 else torch.device("cpu")
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _of_all_processes(value: Any) -> list[Any]:
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _random_state() -> dict[str, Any]:
    """States of all generators that training code usually draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": list(cuda), "python": random.getstate()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
