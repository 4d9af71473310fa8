"""Quantizers whose bit-width is learned: nested gates, mixtures of candidates, and fractional widths.

Each kind knows its candidates' probabilities as a differentiable function of its parameter, and the candidate it would
choose now. Both are functions of stacked parameters, so that the cost of a whole model takes a handful of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.quantizers import Quantizer
from mixbit.quantizers.quantizer import SCALE_FLOOR

#: Stretch of the hard-concrete distribution (Louizos et al., arXiv 1712.01312) as Bayesian Bits and Free Bits have it.
GATE_LOW, GATE_HIGH = -0.1, 1.1
#: A gate is closed where its probability of being exactly zero reaches this share.
CLOSED_SHARE = 0.34

#: A logit that leaves no doubt.
_CLEAR = 6.0

#: What a quantizer under search does while its model trains.
WIDEST, SAMPLED, DECIDED = 0.0, 1.0, 2.0


def open_shift(temperature: float) -> float:
    """P(gate > 0) = logistic(logit - open_shift)."""
    return temperature * math.log(-GATE_LOW / GATE_HIGH)


def gate_threshold(temperature: float) -> float:
    """The logit from which on a gate counts as open."""
    return open_shift(temperature) + math.log((1 - CLOSED_SHARE) / CLOSED_SHARE)


class SearchQuantizer(Quantizer):
    """What the kinds share.

    In eval mode, and in training mode once the search is decided, the tensor is quantized at the chosen candidate
    alone; before the search starts at the widest. `bit_width` follows the choice whenever the model is put into eval
    mode or its state is saved.

    Args:
        candidates: Ascending bit-widths.
        options: Of `Quantizer`.

    Attributes:
        candidates: As given.
        phase: Buffer float32 [1]: `WIDEST`, `SAMPLED` or `DECIDED`.
    """

    fused = False
    searching = True
    phase: Tensor

    def __init__(self, candidates: Sequence[int], **options: Any) -> None:
        self.candidates = tuple(candidates)
        self._drawn: tuple[Tensor, ...] | None = None
        super().__init__(self.candidates[-1], **options)
        device = options.get("device")
        self.register_buffer("phase", torch.full((1,), SAMPLED, device=device))
        self.register_state_dict_pre_hook(_refresh)

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        self.register_buffer("zero_point", torch.zeros(1, device=device))

    @property
    def choice_parameter(self) -> Tensor:
        """The parameter that decides."""
        raise NotImplementedError

    @property
    def choices(self) -> Tensor:
        """The same as a row for each choice: [1, ...], or one a group of channels; a view."""
        return self.choice_parameter[None]

    @property
    def choice_channels(self) -> list[int] | None:
        """How many channels each choice is for; None where one is for all."""
        return None

    def spread(self, choices: Tensor) -> Tensor:
        """What is known of each choice, [..., choices], for the elements of `bit_width`."""
        return choices

    @staticmethod
    def probabilities(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """Probability of each candidate, [n, K], differentiable, for n quantizers of one kind and their parameters."""
        raise NotImplementedError

    @staticmethod
    def decided(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """Index of the candidate chosen now, int64 [n]."""
        raise NotImplementedError

    def choose_(self, indices: int | Sequence[int]) -> None:
        """Moves the parameter, if need be, to where a candidate is the one chosen, or one for each choice."""
        rows = self.choices.detach()
        if isinstance(indices, int):
            indices = [indices] * len(rows)
        for row, now, index in zip(rows, self.decided(rows, [self]).tolist(), indices, strict=True):
            if now != index:
                row.copy_(self._at(index, row))

    def _at(self, index: int, parameter: Tensor) -> Tensor:
        """The parameter for a clear choice of a candidate."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh_(self) -> None:
        """Writes the width chosen now to `bit_width`."""
        index = self.decided(self.choices.detach(), [self])
        self.bit_width.copy_(self.spread(self.bit_width.new_tensor(self.candidates)[index]))

    def train(self, mode: bool = True) -> SearchQuantizer:
        """Sets the mode; eval brings `bit_width` up to date."""
        super().train(mode)
        if not mode:
            self.refresh_()
        return self

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        """What quantizing x takes beside x: ranges or scales, and gates or weights."""
        raise NotImplementedError

    def quantize(self, x: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
        """x quantized with what `draw` returned."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes x at a mixture of candidates, or at the one that is chosen."""
        if not self.enabled:
            return x
        self.check_calibrated()
        drawn = self.draw(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._drawn = tuple(t.detach() for t in drawn)
        return self.quantize(x, drawn)

    def repeat(self, x: Tensor) -> Callable[[], Tensor] | None:
        """The last forward's result again, from the same draw."""
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return None
        given = x.detach()

        def again() -> Tensor:
            with torch.no_grad():
                return self.quantize(given, drawn)

        return again

    def _chosen(self, one_hot: Tensor, sampled: Tensor | None) -> Tensor:
        """[K] or what is sampled, by phase and without reading it on the host."""
        if sampled is None:
            return one_hot
        return torch.where(self.phase == SAMPLED, sampled, one_hot)

    def extra_repr(self) -> str:
        """Candidates and what `Quantizer` says."""
        return f"candidates={list(self.candidates)}, {super().extra_repr()}"


def _refresh(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, SearchQuantizer)
    module.refresh_()


class RangedQuantizer(SearchQuantizer):
    """Candidates that divide one range: [-range, range) of a signed grid, [0, range] of an unsigned one.

    Attributes:
        range: float32 [channels]; a Parameter where it is learned.
        follows: Whether the range is the largest magnitude of the tensor itself, taken anew in each forward.
    """

    range: Tensor
    calibrated_range: Tensor

    def __init__(self, candidates: Sequence[int], *, learned: bool, follows: bool, **options: Any) -> None:
        self.learned = learned
        self.follows = follows
        super().__init__(candidates, **options)

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        super()._register_grid(channels, device)
        start = torch.ones(channels, device=device)
        if self.learned:
            self.range = nn.Parameter(start)
        else:
            self.register_buffer("range", start)
        self.register_buffer("calibrated_range", start.clone())

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Step of the width chosen now."""
        return self.effective_scale()

    def effective_scale(self, gradient_factor: Tensor | None = None) -> Tensor:
        """range / steps at `bit_width`."""
        return self._effective_range().detach() / self._range_steps_tensor()

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        if zero_point.any():
            raise MixbitError(f"zero_point={zero_point.tolist()}: a searched grid has none; expected 0")
        found = scale * self._range_steps(self.candidates[-1])
        self.range.copy_(found)
        self.calibrated_range.copy_(found)

    def _rescale(self, ratio: float | Tensor) -> None:
        """The range stays."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The widest candidate: its range holds the others."""
        return (self.candidates[-1],)

    def _effective_range(self, gradient_factor: Tensor | None = None) -> Tensor:
        """At least 2^-20 of the calibrated range, with the range's own gradient."""
        value = torch.maximum(self.range.detach(), self.calibrated_range * SCALE_FLOOR)
        if not self.learned or not torch.is_grad_enabled():
            return value
        difference = self.range - self.range.detach()
        return value + (difference if gradient_factor is None else difference * gradient_factor)

    def _range_of(self, x: Tensor) -> Tensor:
        if not self.follows:
            return self._effective_range(self._gradient_factor(x))
        with torch.no_grad():
            largest = _largest(x, self.axis).float()
            found = torch.where(largest > 0, largest, torch.ones_like(largest))
            self.range.copy_(found)
        return found

    @torch.no_grad()
    def settle_(self, x: Tensor) -> None:
        """Takes the range of the tensor as it is now, and the width chosen now."""
        self.refresh_()
        if self.follows:
            self._range_of(x)

    def _gradient_factor(self, x: Tensor) -> Tensor | None:
        """The share of LSQ (arXiv 1902.08153, section 2.2) for a range: 1 / sqrt(n) in units of the widest step."""
        if not self.learned or not torch.is_grad_enabled() or x.numel() == 0:
            return None
        count = x.numel() // self.channels
        if self.batched and x.dim() > 0:
            count //= x.shape[0]
        return self.range.new_full((1,), 1 / math.sqrt(count))


def _largest(x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return x.abs().amax().reshape(1)
    dims = [d for d in range(x.dim()) if d != axis % x.dim()]
    return x.abs().amax(dims) if dims else x.abs()


def _mixed(quantizer: SearchQuantizer, x: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
    scales, weights, widths = drawn
    if quantizer.axis is None:
        scales = scales[:, 0]
    return ops.mixture_fake_quantize(x, scales, weights, widths, signed=quantizer.signed, axis=quantizer.axis)


class GatedQuantizer(RangedQuantizer):
    """Nested gates: the narrowest candidate is always there, each gate adds what the next wider one refines.

    Parameter `gate_logits` [K - 1], or [K - 1, groups] where each group of channels chooses by itself. In training each
    gate is a hard-concrete sample, for activations one per image of the batch (specification: Bayesian Bits, arXiv
    2005.07093, as Free Bits has it).

    Args:
        candidates: Ascending bit-widths.
        gate_init: First value of the logits.
        temperature: Of the samples.
        form: "difference" or "residual", see `mixbit.ops.gated_fake_quantize`.
        mask: "widest" or "narrowest": the grid in whose range x gets a gradient.
        gate_logits: Shares the gates of another quantizer.
        group: Channels that share a choice: 0 ... group - 1 do, the next `group` of them, and so on; the last group may
            be smaller. None: all channels do.
        options: `learned`, `follows`, and those of `Quantizer`.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        *,
        gate_init: float,
        temperature: float,
        form: str,
        mask: str = "widest",
        gate_logits: nn.Parameter | None = None,
        group: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(candidates, **options)
        self.group = group
        self.temperature = temperature
        self.form = form
        self.mask = mask
        if gate_logits is None:
            shape = [len(candidates) - 1]
            if group is not None:
                shape.append(-(-self.channels // group))
                self.bit_width = self.bit_width.repeat(self.channels)
            gate_logits = nn.Parameter(torch.full(shape, gate_init, device=options.get("device")))
        self.gate_logits = gate_logits

    @property
    def choice_parameter(self) -> Tensor:
        """gate_logits."""
        return self.gate_logits

    @property
    def choices(self) -> Tensor:
        """gate_logits, a row for each choice."""
        return self.gate_logits[None] if self.group is None else self.gate_logits.T

    @property
    def choice_channels(self) -> list[int] | None:
        """Sizes of the groups."""
        if self.group is None:
            return None
        starts = range(0, self.channels, self.group)
        return [min(self.group, self.channels - start) for start in starts]

    def spread(self, choices: Tensor) -> Tensor:
        """[..., groups] -> [..., channels]."""
        if self.group is None:
            return choices
        return choices.unsqueeze(-1).expand(*choices.shape, self.group).flatten(-2)[..., : self.channels]

    @staticmethod
    def open_shares(logits: Tensor, like: Sequence[Any]) -> Tensor:
        """C_j, the probability that gates 1 ... j are all open; [n, K - 1]."""
        return torch.cumprod(torch.sigmoid(logits - open_shift(like[0].temperature)), 1)

    @staticmethod
    def probabilities(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """C_j - C_(j+1) with C_0 = 1."""
        shares = GatedQuantizer.open_shares(parameters, like)
        ends = F.pad(shares, (1, 0), value=1.0)
        return ends - F.pad(shares, (0, 1), value=0.0)

    @staticmethod
    def decided(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """How many gates from the first on are open."""
        threshold = gate_threshold(like[0].temperature)
        return torch.cumprod((parameters > threshold).to(torch.int64), 1).sum(1)

    def _at(self, index: int, parameter: Tensor) -> Tensor:
        order = torch.arange(len(parameter), device=parameter.device)
        return torch.where(order < index, _CLEAR, -_CLEAR)

    def gates(self, x: Tensor) -> Tensor:
        """Gates for x: [K - 1], [K - 1, images] while activations are sampled, [K - 1, channels] of groups."""
        logits = self.gate_logits
        open_now = (logits.detach() > gate_threshold(self.temperature)).to(logits.dtype)
        if not self.training:
            return self.spread(open_now)
        fixed = torch.where(self.phase == WIDEST, torch.ones_like(open_now), open_now)
        shape = (len(logits), x.shape[0]) if self.batched else tuple(logits.shape)
        noise = torch.rand(shape, device=logits.device)
        if self.group is not None:
            sampled = ops.sample_gates(logits.flatten(), noise.flatten(), self.temperature).reshape(shape)
            return self.spread(self._chosen(fixed, sampled))
        sampled = ops.sample_gates(logits, noise, self.temperature)
        return self._chosen(fixed.reshape(-1, 1) if self.batched else fixed, sampled)

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        """Range and gates."""
        return self._range_of(x), self.gates(x)

    def quantize(self, x: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
        """See `mixbit.ops.gated_fake_quantize`."""
        scale_range, gates = drawn
        if self.mask == "narrowest" and torch.is_grad_enabled():
            bits = self.candidates[0]
            low, high = (-1.0, 1 - 2.0 ** (1 - bits)) if self.signed else (0.0, 1.0)
            reach = scale_range.detach()
            if self.axis is not None:
                reach = reach.reshape([-1 if d == self.axis else 1 for d in range(x.dim())])
            given = x.detach()
            x = torch.where((given >= low * reach) & (given <= high * reach), x, given)
        return ops.gated_fake_quantize(
            x, scale_range, gates, self.candidates, signed=self.signed, axis=self.axis, form=self.form
        )


class MixtureQuantizer(SearchQuantizer):
    """A weighted mean of all candidates, each with a scale of its own that is learned.

    Parameters `mixture_logits` [K] and `scales` [K, channels]. In training the weights are the softmax of the logits
    over the temperature, with Gumbel noise if asked for (EdMIPS, arXiv 2004.05795; Gumbel softmax, arXiv 1611.01144).

    Args:
        candidates: Ascending bit-widths.
        gumbel: Adds the noise.
        temperature: First value of the buffer `temperature` [1].
        options: Of `Quantizer`.
    """

    temperature: Tensor
    calibrated_scales: Tensor
    candidate_widths: Tensor

    def __init__(self, candidates: Sequence[int], *, gumbel: bool, temperature: float, **options: Any) -> None:
        super().__init__(candidates, **options)
        device = options.get("device")
        self.gumbel = gumbel
        self.register_buffer("temperature", torch.full((1,), temperature, device=device))
        self.mixture_logits = nn.Parameter(torch.zeros(len(candidates), device=device))

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        super()._register_grid(channels, device)
        self.scales = nn.Parameter(torch.ones(len(self.candidates), channels, device=device))
        self.register_buffer("calibrated_scales", torch.ones(len(self.candidates), channels, device=device))
        self.register_buffer("candidate_widths", torch.tensor(self.candidates, dtype=torch.float32, device=device))

    @property
    def choice_parameter(self) -> Tensor:
        """mixture_logits."""
        return self.mixture_logits

    @property
    def widths(self) -> tuple[int, ...]:
        """All candidates."""
        return self.candidates

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Scale of the width chosen now."""
        return self.effective_scale()

    def effective_scale(self, gradient_factor: Tensor | None = None) -> Tensor:
        """Scale of `bit_width`, [channels]."""
        index = self.candidates.index(int(self.bit_width)) if int(self.bit_width) in self.candidates else -1
        return torch.maximum(self.scales.detach(), self.calibrated_scales * SCALE_FLOOR)[index]

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        if zero_point.any():
            raise MixbitError(f"zero_point={zero_point.tolist()}: a searched grid has none; expected 0")
        found = scale.reshape(-1, self.channels) if scale.numel() > 1 else scale.reshape(1, 1)
        self.scales.copy_(found)
        self.calibrated_scales.copy_(found)

    def _rescale(self, ratio: float | Tensor) -> None:
        """Every candidate has its scale."""

    @torch.no_grad()
    def settle_(self, x: Tensor) -> None:
        """Takes the width chosen now."""
        self.refresh_()

    @staticmethod
    def probabilities(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """Softmax over the temperature."""
        temperature = torch.stack([q.temperature for q in like])
        return torch.softmax(parameters / temperature, 1)

    @staticmethod
    def decided(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """The likeliest; of equal ones the widest."""
        count = parameters.shape[1]
        return count - 1 - parameters.flip(1).argmax(1)

    def _at(self, index: int, parameter: Tensor) -> Tensor:
        order = torch.arange(len(parameter), device=parameter.device)
        return torch.where(order == index, parameter.amax() + _CLEAR, parameter)

    def mixture(self) -> Tensor:
        """Weights of the candidates, [K]."""
        logits = self.mixture_logits
        index = self.decided(logits.detach()[None], [self])
        count = len(self.candidates)
        chosen = F.one_hot(index[0], count).to(logits.dtype)
        if not self.training:
            return chosen
        widest = F.one_hot(torch.full_like(index[0], count - 1), count).to(logits.dtype)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7))) if self.gumbel else 0.0
        sampled = torch.softmax((logits + noise) / self.temperature, 0)
        return self._chosen(torch.where(self.phase == WIDEST, widest, chosen), sampled)

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        """All scales, with LSQ's gradient each, the weights, and the widths."""
        value = torch.maximum(self.scales.detach(), self.calibrated_scales * SCALE_FLOOR)
        if torch.is_grad_enabled() and x.numel() > 0:
            count = x.numel() // self.channels
            if self.batched and x.dim() > 0:
                count //= x.shape[0]
            largest = (torch.exp2(self.candidate_widths - int(self.signed)) - 1).clamp(min=1)
            factor = torch.rsqrt(count * largest)[:, None]
            value = value + (self.scales - self.scales.detach()) * factor
        return value, self.mixture(), self.candidate_widths

    def quantize(self, x: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
        """See `mixbit.ops.mixture_fake_quantize`."""
        return _mixed(self, x, drawn)


class FractionalQuantizer(RangedQuantizer):
    """A real-valued bit-width: the two neighbouring candidates are mixed in proportion (FracBits, arXiv 2007.02017).

    Parameter `fractional_bits` [1], kept within the candidates.

    Args:
        candidates: Ascending bit-widths.
        options: `learned`, `follows`, and those of `Quantizer`.
    """

    candidate_widths: Tensor

    def __init__(self, candidates: Sequence[int], **options: Any) -> None:
        super().__init__(candidates, **options)
        device = options.get("device")
        self.register_buffer("candidate_widths", torch.tensor(self.candidates, dtype=torch.float32, device=device))
        self.fractional_bits = nn.Parameter(torch.full((1,), float(self.candidates[-1]), device=device))

    @property
    def choice_parameter(self) -> Tensor:
        """fractional_bits."""
        return self.fractional_bits

    @staticmethod
    def _between(parameters: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the candidate below (int64 [n]), and the share of the one above ([n], differentiable).

        An optimizer's step may leave the candidates until `clamp_`: then the nearest one counts.
        """
        given = parameters[:, 0]
        inside = given.detach().clamp(widths[0], widths[-1])
        bits = inside + (given - given.detach())
        below = torch.searchsorted(widths, inside.contiguous(), right=True).sub(1).clamp(0, len(widths) - 2)
        return below, (bits - widths[below]) / (widths[below + 1] - widths[below])

    @staticmethod
    def probabilities(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """The shares of the two neighbours."""
        widths: Tensor = like[0].candidate_widths
        below, share = FractionalQuantizer._between(parameters, widths)
        count = len(widths)
        lower = F.one_hot(below, count).to(share.dtype) * (1 - share)[:, None]
        return lower + F.one_hot(below + 1, count).to(share.dtype) * share[:, None]

    @staticmethod
    def decided(parameters: Tensor, like: Sequence[Any]) -> Tensor:
        """The nearer neighbour, the wider one of equal ones."""
        widths: Tensor = like[0].candidate_widths
        below, share = FractionalQuantizer._between(parameters, widths)
        return below + (share >= 0.5)

    def _at(self, index: int, parameter: Tensor) -> Tensor:
        return torch.full_like(parameter, float(self.candidates[index]))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps the parameter within the candidates; the search calls it at every step."""
        self.fractional_bits.clamp_(self.candidates[0], self.candidates[-1])

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        """Scales, weights and widths of the two neighbours."""
        below, share = self._between(self.fractional_bits[None], self.candidate_widths)
        widths = torch.cat([self.candidate_widths[below], self.candidate_widths[below + 1]])
        upper = decided = (share.detach() >= 0.5).to(share.dtype)
        if self.training:
            fixed = torch.where(self.phase == WIDEST, torch.ones_like(decided), decided)
            upper = self._chosen(fixed, share)
            widths = torch.where(self.phase == WIDEST, self.candidate_widths[-2:], widths)
        half = torch.exp2(widths - 1)
        steps = half if self.signed else 2 * half - 1
        return self._range_of(x)[None] / steps[:, None], torch.cat([1 - upper, upper]), widths

    def quantize(self, x: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
        """See `mixbit.ops.mixture_fake_quantize`."""
        return _mixed(self, x, drawn)
