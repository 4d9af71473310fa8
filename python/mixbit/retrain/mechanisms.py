"""What retraining at few bits may do beside plain steps, and how a run does it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError, check_choice
from mixbit.quantizers.quantizer import MAX_EXTRA_WIDTH
from mixbit.retrain.oscillations import MOST_FROZEN_BITS, Dampening, IterativeFreezing
from mixbit.retrain.schedule import Schedule
from mixbit.retrain.switches import LARGEST_FRACTION, SwitchTracker
from mixbit.retrain.thresholds import ThresholdAware, named_layers
from mixbit.training import AfterStep, Objective, unwrapped

#: What becomes of weights that get a level.
EXTRA = ("nested", "mid_frozen")


@dataclasses.dataclass(frozen=True)
class Mechanisms:
    """Which mechanisms `fit` uses against weights that switch between levels; the defaults use none.

    Shares are of the whole run, windows are epochs.

    Args:
        threshold_aware: Shape of `ThresholdAware`: "step", "linear" or "gauss"; None or "off" is the plain step.
        alpha: Of `ThresholdAware`.
        rho: Of `ThresholdAware`.
        on_grad: Of `ThresholdAware`.
        count: Score of a `SwitchTracker` that watches the run: "adj", "pair", "osc" or "ema"; None counts nothing
            unless levels are assigned, which takes "adj".
        assign_at: Shares of the run after which extra levels are assigned, e.g. (0.5,) or (0.5, 0.75); each above 0 and
            below 1, ascending.
        fraction: Rule of `SwitchTracker.assign_`: share of each layer's weights.
        rate: The rule instead of `fraction`: switches a step.
        per: Of `SwitchTracker.assign_`.
        max_bits: Most bits of a weight with extra levels.
        group: Weights of this many consecutive input channels get levels together.
        by: Of `SwitchTracker.assign_`: "score" or "score_gradient".
        extra: "nested": flagged weights go on with a level more between each two. "mid_frozen": they are set to the new
            level next to them and held there.
        window: Epochs before an assignment whose switches count; None is all since the one before.
        freeze: Thresholds (first, last) of `IterativeFreezing`, annealed along a cosine; None freezes nothing.
        freeze_begin: Share of the run before weights are frozen.
        freeze_momentum: Of `IterativeFreezing`.
        dampen: Strength of `Dampening` at the end, rising from 0 along a cosine; None dampens nothing.
        dampen_begin: Share of the run before it rises.

    Raises:
        MixbitError: A value does not fit, or an option has no effect.
    """

    threshold_aware: str | None = None
    alpha: float = 0.1
    rho: float = 0.125
    on_grad: bool = False
    count: str | None = None
    assign_at: tuple[float, ...] = ()
    fraction: float | None = None
    rate: float | None = None
    per: str = "layer"
    max_bits: int = 4
    group: int = 1
    by: str = "score"
    extra: str = "nested"
    window: float | None = 1.0
    freeze: tuple[float, float] | None = None
    freeze_begin: float = 0.25
    freeze_momentum: float = 0.01
    dampen: float | None = None
    dampen_begin: float = 0.25

    def __post_init__(self) -> None:
        if self.threshold_aware is not None:
            check_choice("threshold_aware", self.threshold_aware, ops.STEP_SHAPES)
        if self.count is not None:
            check_choice("count", self.count, ops.SWITCH_SCORES)
        for name in ("assign_at", "freeze"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif value is not None and not isinstance(value, tuple):
                raise MixbitError(f"{name}={value!r}: expected a list of numbers")
        for name in ("alpha", "rho", "fraction", "rate", "window", "freeze_begin", "freeze_momentum", "dampen"):
            value = getattr(self, name)
            if value is not None or name in ("alpha", "rho", "freeze_begin", "freeze_momentum"):
                _check_number(name, value)
        _check_number("dampen_begin", self.dampen_begin)
        for value in self.freeze or ():
            _check_number("freeze", value)
        shares = self.assign_at
        inside = all(isinstance(s, (int, float)) and 0 < s < 1 for s in shares)
        if not inside or any(a >= b for a, b in itertools.pairwise(shares)):
            raise MixbitError(f"assign_at={list(shares)}: expected ascending shares of the run, above 0 and below 1")
        if self.fraction is not None and self.rate is not None:
            raise MixbitError("fraction and rate given; expected one of them")
        if not shares and (self.fraction is not None or self.rate is not None):
            name = "rate" if self.fraction is None else "fraction"
            raise MixbitError(f"{name}={getattr(self, name)!r} without assign_at; expected shares of the run, as [0.5]")
        if self.fraction is not None and not 0 < self.fraction <= LARGEST_FRACTION:
            raise MixbitError(f"fraction={self.fraction!r}: expected a share above 0, at most {LARGEST_FRACTION}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise MixbitError(f"rate={self.rate!r}: expected switches a step, above 0, at most 1")
        check_choice("per", self.per, ("layer", "network"))
        check_choice("by", self.by, ("score", "score_gradient"))
        check_choice("extra", self.extra, EXTRA)
        if self.rate is not None and self.by != "score":
            raise MixbitError(f"rate with by={self.by!r}: only scores have a rate; expected by='score', or fraction")
        for name in ("max_bits", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MixbitError(f"{name}={value!r}: expected a whole number above 0")
        if self.max_bits > MAX_EXTRA_WIDTH:
            raise MixbitError(f"max_bits={self.max_bits}: expected a whole number from 1 to {MAX_EXTRA_WIDTH}")
        if self.window is not None and not self.window > 0:
            raise MixbitError(f"window={self.window!r}: expected a number of epochs above 0")
        if self.freeze is not None and len(self.freeze) != 2:
            raise MixbitError(f"freeze={list(self.freeze)}: expected two thresholds, the first and the last")
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuses an option of a mechanism that is not used. "off" is a shape: a study may keep its options."""
        for switch, used, names in (
            ("threshold_aware", self.threshold_aware is not None, ("alpha", "rho", "on_grad")),
            ("assign_at", bool(self.assign_at), ("per", "max_bits", "group", "by", "extra", "window")),
            ("freeze", self.freeze is not None, ("freeze_begin", "freeze_momentum")),
            ("dampen", self.dampen is not None, ("dampen_begin",)),
        ):
            for name in names:
                value = getattr(self, name)
                if not used and value != type(self).__dataclass_fields__[name].default:
                    raise MixbitError(f"{name}={value!r} has no effect without {switch}; give that too, or neither")

    @property
    def active(self) -> bool:
        """Whether anything is used."""
        return bool(self.describe())

    def describe(self) -> dict[str, Any]:
        """The options of what is used, as plain values: what a resumed run must agree in."""
        used: set[str] = set()
        if self.threshold_aware not in (None, "off"):
            used |= {"threshold_aware", "alpha", "rho", "on_grad"}
        if self.count is not None or self.assign_at:
            used |= {"count"}
        if self.assign_at:
            used |= {"assign_at", "fraction", "rate", "per", "max_bits", "group", "window"}
            # What came later is named where it is used, so that the runs from before it go on.
            used |= {
                name for name in ("by", "extra") if getattr(self, name) != type(self).__dataclass_fields__[name].default
            }
        if self.freeze is not None:
            used |= {"freeze", "freeze_begin", "freeze_momentum"}
        if self.dampen is not None:
            used |= {"dampen", "dampen_begin"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in used}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise MixbitError(f"{name}={value!r}: expected a number")


class Retraining:
    """The mechanisms of one run: what wraps its optimizer and objective, what it does after each step.

    Args:
        given: Which ones.
        model: Prepared and calibrated.
        steps: Of the run.
        steps_of_epoch: Of an epoch.

    Attributes:
        modules: Whose states are part of the run, by name.
    """

    def __init__(self, given: Mechanisms, model: nn.Module, steps: int, steps_of_epoch: int) -> None:
        self.given = given
        self.model = model
        self.modules: dict[str, Any] = {}
        self.tracker: SwitchTracker | None = None
        self.freezing: IterativeFreezing | None = None
        self.dampening: Dampening | None = None
        if given.count is not None or given.assign_at:
            self.tracker = self.modules["switches"] = SwitchTracker(
                model, given.count or "adj", gradients=given.by == "score_gradient"
            )
            self._check_room(self.tracker)
        if given.freeze is not None or given.extra == "mid_frozen":
            first, last = given.freeze or (0.0, 0.0)
            threshold = Schedule(first, last, steps, begin=given.freeze_begin)
            # Without thresholds of its own it only holds what it is told to, in every layer that may get levels.
            most = 4 if given.freeze is not None else min(max(4, given.max_bits - 1), MOST_FROZEN_BITS)
            self.freezing = self.modules["freezing"] = IterativeFreezing(
                model, threshold, momentum=given.freeze_momentum, max_bits=most
            )
        if self.tracker is not None and self.freezing is not None and given.extra == "mid_frozen":
            for name in self._with_room(self.tracker):
                self.freezing.check_holds(name)
        if given.dampen is not None:
            strength = Schedule(0.0, given.dampen, steps, begin=given.dampen_begin)
            self.dampening = self.modules["dampening"] = Dampening(model, strength)
        # After how many steps levels are assigned; and after how many a window begins.
        self._events = [max(1, round(share * steps)) for share in given.assign_at]
        if len({*self._events}) < len(self._events) or (self._events and self._events[-1] >= steps):
            raise MixbitError(
                f"assign_at={list(given.assign_at)}: a run of {steps} steps would assign levels after the steps "
                f"{self._events}; expected different ones, each below {steps}"
            )
        length = None if given.window is None else max(1, round(given.window * steps_of_epoch))
        # A window that is longer than the time since the assignment before begins with that.
        starts = zip(self._events, [0, *self._events], strict=False)
        self._resets = set() if length is None else {at - length for at, before in starts if at - length > before}
        self._counted = 0 if self.tracker is None else self._weights_of(self.tracker.layers)
        self._freezable = 0 if self.freezing is None else self._weights_of(self.freezing.layers)
        self._objective: Objective | None = None
        self._item: Any = None

    def _check_room(self, tracker: SwitchTracker) -> None:
        """Refuses at once what an assignment would refuse in the middle of the run."""
        if self.given.assign_at and not self._with_room(tracker):
            layers = named_layers(self.model)
            widths = {int(layers[name].weight_quantizer.bit_width) for name in tracker.layers}
            raise MixbitError(
                f"max_bits={self.given.max_bits}: no weight may have another bit; the layers have {sorted(widths)} bits"
            )

    def _with_room(self, tracker: SwitchTracker) -> list[str]:
        """Layers that are narrower than weights with extra levels may be."""
        layers = named_layers(self.model)
        return [n for n in tracker.layers if int(layers[n].weight_quantizer.bit_width) < self.given.max_bits]

    def _weights_of(self, layers: Iterable[str]) -> int:
        """How many weights some layers have, at least 1."""
        found = named_layers(self.model)
        return max(1, sum(found[name].weight.numel() for name in layers))

    def optimizer(self, made: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that steps."""
        shape = self.given.threshold_aware
        if shape is None or shape == "off":
            return made
        return ThresholdAware(made, self.model, shape, self.given.alpha, self.given.rho, on_grad=self.given.on_grad)

    def objective(self, objective: Objective) -> Objective:
        """What training makes small; remembers the batch that it saw last."""
        self._objective = objective

        def with_terms(model: nn.Module, item: Any) -> Tensor:
            self._item = item
            term = None if self.dampening is None else self.dampening()  # before the forward: weights may be cut
            loss = objective(model, item)
            return loss if term is None else loss + term

        return with_terms

    def after_step(self, also: AfterStep | None) -> AfterStep:
        """What is done after each step of the optimizer, and the figures of it."""

        def after(step: int, loss: float) -> Mapping[str, float]:
            figures: dict[str, float] = {}
            if self.freezing is not None:
                figures["frozen"] = float(self.freezing.update_().sum()) / self._freezable
            if self.tracker is not None:
                figures["switches"] = float(self.tracker.update_().sum()) / self._counted
                if step in self._events:
                    figures |= self._assign(self.tracker)
                elif step in self._resets:
                    self.tracker.reset_()
            return {**figures, **((also and also(step, loss)) or {})}

        return after

    def _assign(self, tracker: SwitchTracker) -> dict[str, float]:
        """Gives levels; the loss on this step's batch before and after, and the share of flagged weights by layer."""
        given = self.given
        before = self._loss()
        tracker.assign_(
            given.fraction,
            rate=given.rate,
            per=given.per,
            max_bits=given.max_bits,
            group=given.group,
            by=given.by,
            freezing=self.freezing if given.extra == "mid_frozen" else None,
        )
        figures = {"loss_before_assignment": before, "loss_after_assignment": self._loss()}
        return figures | {f"flagged:{n}": float(tracker.flags(n).float().mean()) for n in tracker.layers}

    @torch.no_grad()
    def _loss(self) -> float:
        """On the batch of the last step, in eval mode: nothing of the network's state moves."""
        assert self._objective is not None
        model = unwrapped(self.model)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return float(self._objective(model, self._item))
        finally:
            for module, mode in modes.items():
                module.training = mode
