"""Against oscillating weights: iterative freezing and dampening (Nagel et al., ICML 2022, arXiv 2203.11086)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError, check_choice
from mixbit.quantizers import Quantizer
from mixbit.retrain.levels import TrackedWeights
from mixbit.retrain.schedule import Schedule, range_of, value_at
from mixbit.retrain.shards import all_sums, is_sharded, local, local_quantizer, whole_like

#: How `Dampening` adds up the squares of a layer.
AGGREGATIONS = ("kernel_mean", "mean", "sum")
#: Most bits of a layer that can be frozen: codes are kept as int8 in units of a quarter of the scale.
MOST_FROZEN_BITS = 6
_UNITS = 2.0**ops.MAX_EXTRA_BITS
#: The mark of a frozen weight.
_FROZEN = 2


class IterativeFreezing:
    """Holds weights that oscillate between two levels at the one where they mostly were (section 4.3 of the paper).

    Call `update_()` after each optimizer step. A weight oscillates where its code changes in the direction opposite to
    the change before; the exponential average of this is its frequency. Once that is above the threshold, the weight is
    set to the level next to the exponential average of its codes after every step, for the rest of training. Weights
    that a `SwitchTracker` gives extra levels meanwhile go on with the counts they have.

    The paper takes a threshold that falls along a cosine, from 0.1 to 0.01 for MobileNetV2 at 4 bits, from a quarter of
    training on, and advises at least two to three times the momentum at its end.

    Args:
        model: Prepared and calibrated.
        threshold: Frequency above which a weight is frozen, 0 ... 1; a number or a `Schedule` over the steps of the
            run. 0 freezes nothing.
        momentum: Of both averages, above 0 and at most 1.
        max_bits: Layers of more weight bits are left alone; at most 6.

    Attributes:
        layers: Names of the layers that are watched.
        steps: Updates so far.

    Raises:
        MixbitError: The model has no quantized weights of at most `max_bits` bits, is not calibrated or still under
            search; an argument is out of range.
    """

    def __init__(
        self, model: nn.Module, threshold: Schedule | float, *, momentum: float = 0.01, max_bits: int = 4
    ) -> None:
        low, high = range_of(threshold)
        if not (low >= 0 and high <= 1):
            raise MixbitError(f"threshold={threshold!r}: expected frequencies from 0 to 1")
        if not 0 < momentum <= 1:
            raise MixbitError(f"momentum={momentum!r}: expected a number above 0, at most 1")
        if isinstance(max_bits, bool) or not isinstance(max_bits, int) or not 1 <= max_bits <= MOST_FROZEN_BITS:
            raise MixbitError(f"max_bits={max_bits!r}: expected a whole number from 1 to {MOST_FROZEN_BITS}")
        self._threshold = threshold
        self._momentum = float(momentum)
        kept = {
            "codes": torch.int8,
            "marks": torch.int8,
            "frequencies": torch.float32,
            "averages": torch.float32,
        }
        self._weights = TrackedWeights(model, max_bits, kept)
        self._kept = list(kept.items())
        self.layers = tuple(self._weights.layers)
        self.steps = 0
        # Takes in the first codes: with momentum 1 the averages become them.
        self._weights.call(ops.freeze_oscillating_, self._kept, threshold=0.0, momentum=1.0)
        for state in self._weights.state.values():
            state["marks"].zero_()

    @property
    def threshold(self) -> float:
        """What the next update compares with."""
        return value_at(self._threshold, self.steps + 1)

    def update_(self) -> Tensor:
        """Watches the weights, freezes those that oscillate too often, and sets all frozen ones to their levels.

        Returns:
            How many weights of each layer are frozen, int64 [layers], on the device of the weights.
        """
        frozen = self._weights.call(
            ops.freeze_oscillating_, self._kept, threshold=self.threshold, momentum=self._momentum
        )
        self.steps += 1
        return frozen

    def frozen(self, layer: str) -> Tensor:
        """Which weights are frozen: bool of the weight's shape.

        Raises:
            MixbitError: The layer is not watched.
        """
        self._weights.check(layer)
        return self._whole(layer, "marks") == _FROZEN

    def frequencies(self, layer: str) -> Tensor:
        """How often each weight oscillates, per step: float32 of the weight's shape; of a frozen one until then.

        Raises:
            MixbitError: The layer is not watched.
        """
        self._weights.check(layer)
        return self._whole(layer, "frequencies").clone()

    def _whole(self, layer: str, name: str) -> Tensor:
        return whole_like(self._weights.state[layer][name], self._weights.layers[layer].weight)

    def check_holds(self, layer: str) -> None:
        """Refuses a layer whose weights `hold_` cannot hold.

        Raises:
            MixbitError: The layer is not watched, or its weight is sharded.
        """
        if layer not in self.layers:
            raise MixbitError(
                f"layer {layer!r} is not watched by this IterativeFreezing, which has {', '.join(self.layers)}; "
                f"expected one of the same model with max_bits of at least the layer's (at most {MOST_FROZEN_BITS}), "
                "or no new levels for that layer (a smaller max_bits of the assignment)"
            )
        if is_sharded(self._weights.layers[layer].weight):
            raise MixbitError(f"layer {layer!r}: its weight is sharded; expected whole weights to hold")

    def hold_(self, layer: str, flags: Tensor) -> IterativeFreezing:
        """Holds weights from now on at the nearest threshold between two levels of their grids.

        For weights that are about to get an extra level there (`SwitchTracker.assign_` with `freezing`): call it before
        their extra bits are set.

        Args:
            layer: Name of a watched layer.
            flags: bool of the weight's shape: which.

        Raises:
            MixbitError: The layer is not watched, the flags do not fit, or a weight has two extra bits already.
        """
        self.check_holds(layer)
        weight, quantizer = self._weights.layers[layer].weight, self._weights.quantizer(layer)
        if flags.dtype != torch.bool or flags.shape != weight.shape:
            raise MixbitError(
                f"layer {layer!r}: flags are {flags.dtype} {list(flags.shape)}; "
                f"expected torch.bool {list(weight.shape)}"
            )
        extra = quantizer.extra_bits
        if extra is not None and bool((extra[flags] >= ops.MAX_EXTRA_BITS).any()):
            raise MixbitError(f"layer {layer!r}: weights with {ops.MAX_EXTRA_BITS} extra bits cannot get a level more")
        with torch.no_grad():
            state = self._weights.state[layer]
            codes = self._threshold_codes(weight, quantizer)
            for name, value in (("codes", codes), ("averages", codes), ("marks", torch.full_like(codes, _FROZEN))):
                state[name].copy_(torch.where(flags, value.to(state[name].dtype), state[name]))
            # Sets them there; nothing else is frozen or counted.
            held = codes * (quantizer.effective_scale().detach() / _UNITS).reshape([-1] + [1] * (weight.dim() - 1))
            weight.copy_(torch.where(flags, held.to(weight.dtype), weight))
        return self

    @staticmethod
    def _threshold_codes(weight: Tensor, quantizer: Quantizer) -> Tensor:
        """The threshold nearest to each weight, in units of scale / 4; whole where there is an extra bit left."""
        extra = torch.zeros_like(weight, dtype=torch.uint8) if quantizer.extra_bits is None else quantizer.extra_bits
        steps = torch.exp2(extra.float())
        scale = quantizer.effective_scale().detach().reshape([-1] + [1] * (weight.dim() - 1))
        low, high = quantizer.quant_range()
        left_out = low + high + 1  # 1 with narrow_range
        lowest, highest = (low - left_out) * steps + left_out, (high + 1) * steps - 1
        below = torch.floor(weight.detach().float() / (scale / steps))
        return (torch.minimum(torch.maximum(below, lowest), highest - 1) + 0.5) * (_UNITS / steps)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain tensors and numbers. Schedules are the program's."""
        return {"momentum": self._momentum, "steps": self.steps, "layers": self._weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of an object for the same model; load the model first.

        Raises:
            MixbitError: The state is that of another model or momentum; names the layer.
        """
        if state.get("momentum") != self._momentum:
            raise MixbitError(
                f"momentum is {state.get('momentum')!r} in the state and {self._momentum!r} here; expected the same"
            )
        self._weights.load_state_dict(state["layers"])
        self.steps = int(state["steps"])


class Dampening:
    """A term of the loss that draws weights to the levels they are at: `strength * sum |q(w) - clip(w)|^2`.

    Section 4.2 of the paper. q(w) is taken as constant; weights outside their grid, which clip(w) sets to its ends, add
    nothing. Scales get no gradient. The paper lets the strength rise along a cosine from 0 on, from a quarter of
    training: `Schedule(0, 0.1, steps)`. Of weights that FSDP2 cuts by rows each process draws its own part, and the
    term is that of the whole; ask for it before the forward pass, which leaves weights of a root module whole.

        dampening = mixbit.retrain.Dampening(model, mixbit.retrain.Schedule(0.0, 0.1, steps))
        loss = dampening() + cross_entropy(model(images), labels)  # once a step

    Args:
        model: Prepared and calibrated.
        strength: At least 0; a number or a `Schedule` over the calls.
        aggregation: How the squares of a layer are added: "sum", "mean", or "kernel_mean", the sum over output channels
            of the mean over the rest. Layers are summed.
        max_bits: Layers of more weight bits are left alone.

    Attributes:
        layers: Names of the layers that count.
        steps: Calls so far.

    Raises:
        MixbitError: The model has no quantized weights of at most `max_bits` bits, is not calibrated or still under
            search; an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: Schedule | float,
        *,
        aggregation: str = "kernel_mean",
        max_bits: int = 8,
    ) -> None:
        check_choice("aggregation", aggregation, AGGREGATIONS)
        if not range_of(strength)[0] >= 0 or not range_of(strength)[1] < float("inf"):
            raise MixbitError(f"strength={strength!r}: expected finite numbers, at least 0")
        if isinstance(max_bits, bool) or not isinstance(max_bits, int) or not 1 <= max_bits <= 16:
            raise MixbitError(f"max_bits={max_bits!r}: expected a whole number from 1 to 16")
        self._strength = strength
        self._aggregation = aggregation
        self._weights = TrackedWeights(model, max_bits, {})
        self.layers = tuple(self._weights.layers)
        self._cut = {name for name, layer in self._weights.layers.items() if is_sharded(layer.weight)}
        self.steps = 0

    @property
    def strength(self) -> float:
        """What the next call multiplies with."""
        return value_at(self._strength, self.steps)

    def __call__(self) -> Tensor:
        """The term at this step, a scalar; counts one step.

        Raises:
            MixbitError: A weight that FSDP2 cuts is whole now, between the forward and the backward pass.
        """
        weights = {name: layer.weight for name, layer in self._weights.layers.items()}
        for name in self._cut:
            if not is_sharded(weights[name]):
                raise MixbitError(
                    f"layer {name!r}: its weight was cut and is whole now; expected a call before the forward pass"
                )
        strength = self.strength
        self.steps += 1
        if strength == 0:
            return local(weights[self.layers[0]]).new_zeros(())
        terms = torch.stack([self._term(weight, self._weights.quantizer(name)) for name, weight in weights.items()])
        if self._cut:
            # The others' parts are constants here.
            own = terms.detach()
            terms = terms + (all_sums(own, list(weights.values())) - own)
        return strength * terms.sum()

    def _term(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        part = local(weight)
        if part.numel() == 0:
            return part.sum().float()
        levels = local_quantizer(weight, quantizer)
        # Inside of the grid, whatever gradients pass its ends; outside q(w) is clip(w).
        with torch.no_grad():
            quantized, inside = levels(part), levels.within(part)
        squares = ((quantized - part) * inside).float().square()
        if self._aggregation == "kernel_mean":
            return squares.sum(0).mean()
        return squares.sum() if self._aggregation == "sum" else squares.sum() / weight.numel()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"steps": self.steps, "layers": list(self.layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of an object for the same model.

        Raises:
            MixbitError: Its layers are others.
        """
        for name in {*self.layers} ^ {*state["layers"]}:
            raise MixbitError(f"layer {name!r} is in only one of model and state; expected the state of this model")
        self.steps = int(state["steps"])
