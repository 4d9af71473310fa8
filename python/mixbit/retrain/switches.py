"""Extra levels for weights that keep switching between two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError, check_choice
from mixbit.retrain.distances import FARTHEST, distances_of
from mixbit.retrain.levels import TrackedWeights
from mixbit.retrain.oscillations import IterativeFreezing
from mixbit.retrain.shards import all_sums, is_sharded, local, whole_like

#: What is kept of each weight beside its code, by score.
_KEPT: dict[str, dict[str, torch.dtype]] = {
    "adj": {"counts": torch.int16},
    "pair": {"marks": torch.int8, "counts": torch.int16, "runs": torch.int16},
    "osc": {"marks": torch.int8, "counts": torch.int16},
    "ema": {"marks": torch.int8, "counts": torch.float32},
}
#: By what `assign_` may rank weights.
RANKINGS = ("score", "score_gradient", "snapshot", "random")
#: Codes are kept as int8.
_MOST_BITS = 8
#: More flags do not lower the error of the weights (a weight near a level gains nothing from a second one beside it).
LARGEST_FRACTION = 0.5


class SwitchTracker:
    """Counts how often the weights of a model switch between quantization levels, and gives extra levels to those that
    switch most.

    Retraining-based mixed precision (Kim et al., IEEE TNNLS 32(7), 2021): a weight that keeps switching between two
    contiguous levels finds neither of them good; with one more bit it gets the level between them. How switches are
    counted, when, and how many weights get a level is ours, and an option each: the paper's abstract does not say.

        tracker = mixbit.retrain.SwitchTracker(model)
        for step, (images, labels) in enumerate(batches):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
            tracker.update_()
            if step == len(batches) // 2:
                tracker.assign_(fraction=0.2)

    The grids of the model stay as they are (rounding, narrow_range, scale); latent weights are not changed. Works under
    DistributedDataParallel: weights, and with them counts and flags, agree on all ranks. Of weights that FSDP2 cuts by
    rows each process counts its part; `scores`, `rates`, `history` and `assign_` are of the whole, and all processes
    have to call them.

    Args:
        model: Prepared and calibrated. Layers of more than 8 weight bits, or whose weight quantizer is None or off, are
            left out.
        score: "adj" (switches between contiguous levels), "pair" (longest run of them between the same two levels),
            "osc" (switches against the direction of the switch before) or "ema" (exponential average of those).
        momentum: Of "ema".
        gradients: Adds up the squares of the gradients that the weights have in `update_`, 4 bytes a weight, so that
            `assign_` can rank by "score_gradient".

    Attributes:
        layers: Names of the layers that are watched, without those of wrappers around the model.
        score: As given.
        steps: Updates since the start of the window: construction, `reset_` or the last assignment.

    Raises:
        MixbitError: The model has no quantized weights, is not calibrated or still under search; an argument does not
            fit.
    """

    def __init__(
        self, model: nn.Module, score: str = "adj", *, momentum: float = 0.01, gradients: bool = False
    ) -> None:
        check_choice("score", score, ops.SWITCH_SCORES)
        if not 0 < momentum <= 1:
            raise MixbitError(f"momentum={momentum!r}: expected a number above 0, at most 1")
        self.score = score
        self._momentum = float(momentum)
        squares = {"squares": torch.float32} if gradients else {}
        self._gradients = bool(gradients)
        self._weights = TrackedWeights(model, _MOST_BITS, {"codes": torch.int8, **_KEPT[score], **squares})
        self._cut = any(is_sharded(layer.weight) for layer in self._weights.layers.values())
        self.layers = tuple(self._weights.layers)
        self._history: list[Tensor] = []
        self.steps = 0
        self.reset_()

    def update_(self) -> Tensor:
        """Compares the levels of all weights with those of the update before; call it after each optimizer step.

        Returns:
            How many weights of each layer switched, int64 [layers], on the device of the weights: nothing waits for it.
            Of sharded weights those of this process.

        Raises:
            MixbitError: Gradients are to be added up and no weight has one.
        """
        if self._gradients:
            self._add_squares()
        switched = self._count()
        self.steps += 1
        self._history.append(switched)
        return switched

    @torch.no_grad()
    def _add_squares(self) -> None:
        layers = {n: layer for n, layer in self._weights.layers.items() if layer.weight.grad is not None}
        if not layers:
            raise MixbitError(
                "gradients=True and no watched weight has a gradient: call update_() between the optimizer's step and "
                "zero_grad()"
            )
        squares = [self._weights.state[name]["squares"] for name in layers]
        grads = [local(layer.weight.grad).float() for layer in layers.values()]
        torch._foreach_addcmul_(squares, grads, grads)

    def _count(self) -> Tensor:
        states = [("codes", torch.int8), ("marks", torch.int8), ("counts", torch.int16), ("runs", torch.int16)]
        return self._weights.call(ops.update_level_switches_, states, score=self.score, momentum=self._momentum)

    @torch.no_grad()
    def reset_(self) -> SwitchTracker:
        """Starts a new window at the present levels. Call it too where weights or grids were changed by hand."""
        self._count()
        for kept in self._weights.state.values():
            for name, value in kept.items():
                if name != "codes":
                    value.zero_()
        self.steps = 0
        return self

    def scores(self, layer: str) -> Tensor:
        """The score of each weight in this window: float32 of the weight's shape.

        Raises:
            MixbitError: The layer is not watched.
        """
        self._weights.check(layer)
        return self._whole(layer, "counts")

    def gradients(self, layer: str) -> Tensor:
        """The mean square of each weight's gradient in this window: float32 of the weight's shape.

        Raises:
            MixbitError: The layer is not watched, or the tracker does not add up gradients.
        """
        self._weights.check(layer)
        if not self._gradients:
            raise MixbitError("gradients are not added up; expected SwitchTracker(..., gradients=True)")
        return self._whole(layer, "squares") / max(1, self.steps)

    def _whole(self, layer: str, name: str) -> Tensor:
        """What is kept of all weights of a layer, as float32."""
        kept = self._weights.state[layer][name].to(torch.float32, copy=True)
        return whole_like(kept, self._weights.layers[layer].weight)

    def flags(self, layer: str) -> Tensor:
        """Which weights have extra levels: bool of the weight's shape.

        Raises:
            MixbitError: The layer is not watched.
        """
        extra = self._weights.extra_bits(layer)
        if extra is None:
            weight = self._weights.layers[layer].weight
            return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        return extra > 0

    def rates(self) -> dict[str, float]:
        """Switches of each layer in this window, for each weight and step; 0 before the first step."""
        if self.steps == 0:
            return dict.fromkeys(self.layers, 0.0)
        totals = self._over_processes(torch.stack(self._history[-self.steps :]).sum(0)).tolist()
        return {
            name: total / (self.steps * max(1, self._weights.layers[name].weight.numel()))
            for name, total in zip(self.layers, totals, strict=True)
        }

    def history(self) -> Tensor:
        """How many weights switched in each step of the whole run: int64 [steps, layers], on the CPU."""
        if not self._history:
            return torch.zeros(0, len(self.layers), dtype=torch.int64)
        return self._over_processes(torch.stack(self._history)).cpu()

    def _over_processes(self, counts: Tensor) -> Tensor:
        """Counts [..., layers] of the parts of this process, added up over all."""
        return all_sums(counts, [layer.weight for layer in self._weights.layers.values()]) if self._cut else counts

    @torch.no_grad()
    def assign_(
        self,
        fraction: float | None = None,
        *,
        rate: float | None = None,
        bits: float | None = None,
        per: str = "layer",
        max_bits: int = 4,
        group: int = 1,
        by: str = "score",
        seed: int = 0,
        freezing: IterativeFreezing | None = None,
    ) -> dict[str, int]:
        """Gives one extra bit to the weights that switch most, and starts a new window.

        Weights of equal score are taken from the lower index on; those of score 0, and those that have `max_bits` bits
        or two extra ones already, never. One rule of three decides how many:

        Args:
            fraction: This share of the weights of each layer (or of the network), above 0 and at most 0.5; 0.2 where no
                rule is given.
            rate: Weights of at least this score a step ("ema": of at least this average), in the whole network.
            bits: As many, from the network's highest score down, as leave the codes of the watched weights at this
                number of bits in all. The index that says which weights have extra levels is not counted.
            per: Whether `fraction` ranks within each "layer" or over the "network". Layers without a weight that may
                have more bits do not count.
            max_bits: Most bits of a weight, extra ones included.
            group: Weights of this many consecutive input channels get levels together, by their mean score: the index
                is then that much smaller.
            by: "score"; "score_gradient", the score times the mean square of the weight's gradient in the window (with
                `gradients=True`), for a number of `bits` over layers of different weight; or to compare with:
                "snapshot" (nearest to a threshold now) or "random".
            seed: Of "random".
            freezing: Sets the weights that get a bit to the new level in the middle, the threshold next to them, and
                holds them there (call its `update_` after each step): an IterativeFreezing of the same model, of
                threshold 0 if nothing else is to be frozen. Weights that it holds already get no bit. Stored, these
                weights sit on odd levels only (`storage`, index "oddlevel"). None leaves all weights free.

        Returns:
            How many weights of each layer got a bit.

        Raises:
            MixbitError: The window is empty, an argument is out of range, no weight may have more bits, the codes have
                more than `bits` already, `freezing` cannot hold a layer that may have more bits, or the ranks of a
                distributed run disagree. The model is then unchanged.
        """
        rules = {k: v for k, v in {"fraction": fraction, "rate": rate, "bits": bits}.items() if v is not None}
        if len(rules) > 1:
            raise MixbitError(f"{' and '.join(rules)} given; expected one of fraction, rate and bits")
        fraction = 0.2 if not rules else fraction
        self._check(fraction, rate, bits, per, max_bits, group, by)
        ranked = self._ranked(max_bits, group, by, seed, freezing)
        if not ranked:
            widths = sorted({int(self._weights.quantizer(n).bit_width) for n in self.layers})
            raise MixbitError(
                f"max_bits={max_bits}: no watched weight may have another bit; the layers have {widths} bits, and "
                "weights at most two extra"
            )
        if rate is not None:
            window = 1 if self.score == "ema" else self.steps
            chosen = {n: (v >= rate * window) & (v > 0) for n, (v, _) in ranked.items()}
        elif bits is not None:
            chosen = self._within(bits, ranked)
        elif per == "network":
            everything = torch.cat([v.flatten() for v, _ in ranked.values()])
            flags = _top(everything, _share(fraction, everything.numel()))
            parts = flags.split([v.numel() for v, _ in ranked.values()])
            chosen = {n: part.view(v.shape) for (n, (v, _)), part in zip(ranked.items(), parts, strict=True)}
        else:
            chosen = {n: _top(v.flatten(), _share(fraction, v.numel())).view(v.shape) for n, (v, _) in ranked.items()}
        maps = {n: _expanded(flags, group, self._weights.layers[n].weight) for n, flags in chosen.items()}
        self._check_ranks(maps)
        for name, flags in maps.items():
            extra = self._weights.extra_bits(name)
            given = flags.to(torch.uint8)
            if bool(flags.any()):
                if freezing is not None:
                    freezing.hold_(name, flags)
                self._weights.quantizer(name).set_extra_bits_(given if extra is None else extra + given)
        self.reset_()
        return {name: int(maps[name].sum()) if name in maps else 0 for name in self.layers}

    def _check(
        self,
        fraction: float | None,
        rate: float | None,
        bits: float | None,
        per: str,
        max_bits: int,
        group: int,
        by: str,
    ) -> None:
        check_choice("per", per, ("layer", "network"))
        check_choice("by", by, RANKINGS)
        if fraction is not None and not 0 < fraction <= LARGEST_FRACTION:
            raise MixbitError(f"fraction={fraction!r}: expected a share above 0, at most {LARGEST_FRACTION}")
        if rate is not None and not 0 < rate <= 1:
            raise MixbitError(f"rate={rate!r}: expected switches a step, above 0, at most 1")
        if by == "score_gradient" and not self._gradients:
            raise MixbitError('by="score_gradient": gradients are not added up; expected SwitchTracker(gradients=True)')
        if rate is not None and by != "score":
            raise MixbitError(f"rate with by={by!r}: only scores have a rate; expected by='score', or fraction")
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise MixbitError(f"bits={bits!r}: expected a number of bits above 0")
        for name, value, most in (("max_bits", max_bits, _MOST_BITS), ("group", group, None)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
                raise MixbitError(
                    f"{name}={value!r}: expected a whole number " + (f"from 1 to {most}" if most else "above 0")
                )
        if by in ("score", "score_gradient") and self.steps == 0:
            raise MixbitError("nothing is counted yet in this window: call update_() after each optimizer step first")

    def _ranked(
        self, max_bits: int, group: int, by: str, seed: int, freezing: IterativeFreezing | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer with weights that may have another bit: what groups are ranked by, -1 where they may not; and
        how many weights a group has.
        """
        generator = torch.Generator().manual_seed(seed)
        ranked = {}
        for name, layer in self._weights.layers.items():
            quantizer = self._weights.quantizer(name)
            weight = layer.weight
            extra = quantizer.extra_bits
            present = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device) if extra is None else extra
            may = (int(quantizer.bit_width) + present < max_bits) & (present < ops.MAX_EXTRA_BITS)
            if freezing is not None and bool(may.any()):
                freezing.check_holds(name)
                may &= ~freezing.frozen(name)
            if by == "score":
                values = self.scores(name)
            elif by == "score_gradient":
                values = self.scores(name) * self.gradients(name)
            elif by == "random":
                # Never 0, which is never flagged.
                values = 1 - torch.rand(weight.shape, generator=generator).to(weight.device)
            else:
                (distances,) = distances_of([weight], [quantizer])
                values = (FARTHEST - distances).clamp(min=1e-6)
            count = torch.ones_like(values)
            if group > 1:
                grouped, count = _grouped(values, group)
                # A group gets its bit as a whole.
                values, may = grouped / count, _grouped((~may).to(values.dtype), group)[0] == 0
            if bool(may.any()):
                ranked[name] = (torch.where(may, values, -1.0), count)
        return ranked

    def _within(self, bits: float, ranked: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The best groups that a number of bits in all has room for."""
        present = 0
        for name, layer in self._weights.layers.items():
            extra = self._weights.extra_bits(name)
            present += int(self._weights.quantizer(name).bit_width) * layer.weight.numel()
            present += 0 if extra is None else int(extra.sum())
        if bits < present:
            raise MixbitError(f"bits={bits!r}: the codes of the watched weights have {present} already; expected more")
        values = torch.cat([v.flatten() for v, _ in ranked.values()])
        sizes = torch.cat([c.flatten() for _, c in ranked.values()])
        order = values.argsort(descending=True, stable=True)
        fits = (sizes[order].to(torch.int64).cumsum(0) <= bits - present) & (values[order] > 0)
        flags = torch.zeros_like(values, dtype=torch.bool)
        flags[order] = fits
        parts = flags.split([v.numel() for v, _ in ranked.values()])
        return {n: part.view(v.shape) for (n, (v, _)), part in zip(ranked.items(), parts, strict=True)}

    def _check_ranks(self, maps: Mapping[str, Tensor]) -> None:
        """Refuses flags that are not the same on all ranks: their weights have drifted apart."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and maps):
            return
        digests = []
        for flags in maps.values():
            index = torch.arange(flags.numel(), device=flags.device)
            # A hash of the positions: products that wrap around.
            digests.append((flags.reshape(-1) * (index * 0x9E3779B97F4A7C1 + 1)).sum())
        own = torch.stack([d.to(digests[0].device) for d in digests])
        both = torch.cat([own, ~own])  # the largest complement is that of the smallest
        dist.all_reduce(both, dist.ReduceOp.MAX)
        for name, largest, smallest in zip(maps, both[: len(own)].tolist(), both[len(own) :].tolist(), strict=True):
            if largest != ~smallest:
                raise MixbitError(f"layer {name!r}: the ranks disagree on its flags; their weights are not the same")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain tensors, numbers and strings."""
        return {
            "score": self.score,
            "momentum": self._momentum,
            "steps": self.steps,
            "history": torch.stack(self._history).cpu() if self._history else self.history(),
            "layers": self._weights.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of a tracker of the same model; load the model first.

        Raises:
            MixbitError: The state is that of another score or model; names the layer.
        """
        for name, own in (("score", self.score), ("momentum", self._momentum)):
            if state.get(name) != own:
                raise MixbitError(f"{name} is {state.get(name)!r} in the state and {own!r} here; expected the same")
        self._weights.load_state_dict(state["layers"])
        self.steps = int(state["steps"])
        first = next(iter(self._weights.layers.values())).weight
        self._history = list(state["history"].to(first.device).unbind(0))


def _share(fraction: float | None, count: int) -> int:
    """The largest number of items that is at most a share of them (rounding of the product aside)."""
    assert fraction is not None
    return math.floor(fraction * count * (1 + 1e-12))


def _top(values: Tensor, count: int) -> Tensor:
    """The `count` largest positive values of a vector; of equal ones the first."""
    flags = torch.zeros_like(values, dtype=torch.bool)
    chosen = values.argsort(descending=True, stable=True)[:count]
    flags[chosen] = values[chosen] > 0
    return flags


def _grouped(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Sums over groups along dimension 1, and how many values each has: [O, I, ...] -> [O, ceil(I / group), ...]."""
    inputs = values.shape[1]
    padded = F.pad(values.movedim(1, -1), (0, -inputs % group))
    sums = padded.unflatten(-1, (-1, group)).sum(-1)
    ones = F.pad(torch.ones(inputs, dtype=values.dtype, device=values.device), (0, -inputs % group))
    count = ones.unflatten(0, (-1, group)).sum(-1)
    return sums.movedim(-1, 1), count.expand(sums.shape).movedim(-1, 1)


def _expanded(flags: Tensor, group: int, weight: Tensor) -> Tensor:
    """Flags of groups as flags of weights."""
    if group == 1:
        return flags
    return flags.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
