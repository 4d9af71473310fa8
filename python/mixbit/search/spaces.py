"""What `prepare_` takes for a search: `Gates`, `Mixture`, `Fractional`."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch

from mixbit.errors import MixbitError, check_choice
from mixbit.quantizers import LSQ, Quantizer, SearchSpace
from mixbit.search.quantizers import FractionalQuantizer, GatedQuantizer, MixtureQuantizer

FORMS = ("difference", "residual")
RANGES = ("follow", "learned", "calibrated")
MASKS = ("widest", "narrowest")
BIT_GRANULARITIES = ("per_tensor", "per_channel")


def _positive(argument: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
        raise MixbitError(f"{argument}={value!r}: expected a positive finite number")
    return float(value)


class _Space(SearchSpace):
    """Quantizers of one kind, fixed ones where there is a single candidate."""

    def _make(self, candidates: tuple[int, ...], options: dict[str, Any]) -> Quantizer:
        raise NotImplementedError

    def weight_quantizer(self, channels: int, act: Quantizer | None, device: torch.device) -> Quantizer:
        """See `SearchSpace`."""
        options: dict[str, Any] = {"channels": channels, "axis": 0 if channels > 1 else None, "device": device}
        if len(self.weight_precisions) == 1:
            return LSQ(self.weight_precisions[0], **options)
        return self._make(self.weight_precisions, options | self._for_weight(act, channels))

    def act_quantizer(self, device: torch.device) -> Quantizer:
        """See `SearchSpace`."""
        options: dict[str, Any] = {"signed": False, "batched": True, "device": device}
        if len(self.act_precisions) == 1:
            return LSQ(self.act_precisions[0], **options)
        return self._make(self.act_precisions, options | self._for_act())

    def _for_weight(self, act: Quantizer | None, channels: int) -> dict[str, Any]:
        return {}

    def _for_act(self) -> dict[str, Any]:
        return {}


class _Ranged(_Space):
    """Candidates that divide one range."""

    def __init__(self, *args: Any, ranges: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ranges = check_choice("ranges", ranges, RANGES)

    def _for_weight(self, act: Quantizer | None, channels: int) -> dict[str, Any]:
        return {"learned": self.ranges == "learned", "follows": self.ranges == "follow"}

    def _for_act(self) -> dict[str, Any]:
        # The largest value of a batch is no range: that of activations comes from calibration.
        return {"learned": self.ranges == "learned", "follows": False}


class Gates(_Ranged):
    """Nested stochastic gates: the search of Free Bits (and, with form "residual", of Bayesian Bits).

    Layers gain Parameters `gate_logits` [candidates - 1]; give them to the optimizer with `param_groups`.

    Args:
        precisions: Ascending bit-widths; see `SearchSpace` for this and the options that follow it.
        form: "difference": each gate adds the difference of directly quantized values, and the range gets no gradient.
            "residual": each gate adds the quantized residual, and the range gets that of learned steps; unsigned widths
            must then be multiples of one another.
        ranges: "follow" (the weights' largest magnitude in every step, activations as calibrated), "learned" (with
            form "residual" only) or "calibrated".
        mask: "widest": values get a gradient in the range of the widest grid. "narrowest": in that of the narrowest
            alone, as in the published code of Free Bits, where weights above half of a two-bit range do not train.
        gate_init: First value of the logits: 2 starts at the widest candidate with a probability near 0.9.
        temperature: Of the hard-concrete samples.
        tie: A layer's weight and input share their gates, so that both get the same width.
        granularity_bits: "per_tensor": a weight has one width. "per_channel": each group of output channels of a weight
            chooses its own, with `gate_logits` [candidates - 1, groups]; inputs keep one width a tensor.
        group: Channels of a group, in order; the last group of a weight may be smaller.
        options: Of `SearchSpace`.

    Raises:
        MixbitError: A bad option; ties between different precisions; widths by channel beside ties, beside one weight
            width, or beside one range a weight.
    """

    def __init__(
        self,
        precisions: Any = (2, 4, 8),
        *,
        form: str = "difference",
        ranges: str = "follow",
        mask: str = "widest",
        gate_init: float = 2.0,
        temperature: float = 0.5,
        tie: bool = False,
        granularity_bits: str = "per_tensor",
        group: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(precisions, ranges=ranges, **options)
        check_choice("granularity_bits", granularity_bits, BIT_GRANULARITIES)
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise MixbitError(f"group={group!r}: expected a whole number of channels, at least 1")
        self.granularity_bits, self.group = granularity_bits, group
        if granularity_bits == "per_channel":
            if self.granularity != "per_channel":
                raise MixbitError(
                    f'granularity={self.granularity!r} with granularity_bits="per_channel": channels with widths of '
                    'their own have grids of their own; expected granularity="per_channel"'
                )
            if tie:
                raise MixbitError(
                    'tie=True with granularity_bits="per_channel": an input has one width, which groups of channels '
                    "cannot share; expected tie=False"
                )
            if len(self.weight_precisions) < 2:
                raise MixbitError(
                    f'weight_precisions={list(self.weight_precisions)} with granularity_bits="per_channel": expected '
                    "at least two bit-widths to choose from"
                )
        self.form = check_choice("form", form, FORMS)
        self.mask = check_choice("mask", mask, MASKS)
        if ranges == "learned" and form == "difference":
            raise MixbitError('ranges="learned": a range gets no gradient in form "difference"; expected "residual"')
        if form == "residual":
            for widths in (self.act_precisions, self.weight_precisions):
                for narrow, wide in itertools.pairwise(widths):
                    if wide % narrow:
                        raise MixbitError(
                            f'precisions={list(widths)}: form "residual" refines one grid by the next, so {wide} must '
                            f'be a multiple of {narrow}; expected e.g. [2, 4, 8], or form "difference"'
                        )
        if not torch.isfinite(torch.tensor(float(gate_init))):
            raise MixbitError(f"gate_init={gate_init}: expected a finite number")
        self.gate_init = float(gate_init)
        self.temperature = _positive("temperature", temperature)
        self.tie = tie
        if tie and self.act_precisions != self.weight_precisions:
            raise MixbitError(
                f"tie=True with act_precisions={list(self.act_precisions)} and "
                f"weight_precisions={list(self.weight_precisions)}: shared gates need the same candidates"
            )

    def _make(self, candidates: tuple[int, ...], options: dict[str, Any]) -> Quantizer:
        return GatedQuantizer(
            candidates,
            gate_init=self.gate_init,
            temperature=self.temperature,
            form=self.form,
            mask=self.mask,
            **options,
        )

    def _for_weight(self, act: Quantizer | None, channels: int) -> dict[str, Any]:
        options = super()._for_weight(act, channels)
        if self.tie and isinstance(act, GatedQuantizer):
            options["gate_logits"] = cast(Any, act.gate_logits)
        if self.granularity_bits == "per_channel" and channels > 1:
            options["group"] = self.group
        return options


class Mixture(_Space):
    """A softmax or Gumbel mixture of candidates, each with a learned scale of its own (EdMIPS, DNAS).

    Layers gain Parameters `mixture_logits` [candidates] and `scales` [candidates, channels].

    Args:
        precisions: Ascending bit-widths; see `SearchSpace` for this and the options that follow it.
        gumbel: Adds Gumbel noise to the logits in training.
        temperature: Of the softmax at the start; `Penalty` lowers it where asked.
        options: Of `SearchSpace`.
    """

    def __init__(
        self, precisions: Any = (2, 4, 8), *, gumbel: bool = False, temperature: float = 1.0, **options: Any
    ) -> None:
        super().__init__(precisions, **options)
        self.gumbel = gumbel
        self.temperature = _positive("temperature", temperature)

    def _make(self, candidates: tuple[int, ...], options: dict[str, Any]) -> Quantizer:
        return MixtureQuantizer(candidates, gumbel=self.gumbel, temperature=self.temperature, **options)


class Fractional(_Ranged):
    """Real-valued bit-widths between the candidates, which mix their two neighbours (FracBits).

    Layers gain Parameters `fractional_bits` [1].

    Args:
        precisions: Ascending bit-widths; see `SearchSpace` for this and the options that follow it.
        ranges: "learned", "follow" (the weights' largest magnitude in every step) or "calibrated".
        options: Of `SearchSpace`.
    """

    def __init__(self, precisions: Any = (2, 3, 4, 5, 6, 7, 8), *, ranges: str = "learned", **options: Any) -> None:
        super().__init__(precisions, ranges=ranges, **options)

    def _make(self, candidates: tuple[int, ...], options: dict[str, Any]) -> Quantizer:
        return FractionalQuantizer(candidates, **options)
