"""Quantizers: one tensor, one grid; the kinds differ in what of the grid is learned, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError

#: The forward uses at least this share of the calibrated scale, so that no optimizer step drives a scale through zero.
SCALE_FLOOR = 2.0**-20

#: Most bits of a weight with extra levels: the widest integer that packages hold.
MAX_EXTRA_WIDTH = 8


class Quantizer(nn.Module):
    """Fake-quantizes one tensor with a learned scale, whose gradient is the plain sum over the tensor.

    State: Parameter `scale` [1] or [channels]; buffers `zero_point` [1], `bit_width` [1] or [channels],
    `calibrated_scale` (like scale), `signed_flag` and `calibrated` (uint8 [1]); shapes are fixed from construction, but
    for that of `bit_width`, which `set_bit_width_` and a loaded state may change. All other kinds are subclasses; `LSQ`
    is what `prepare_` takes by default.

    Args:
        bit_width: Whole number 1 ... 16, or one for each channel.
        channels: Number of scales.
        signed: Whether the grid is signed.
        narrow_range: Whether the lowest signed code is left out.
        axis: Dimension of the channels, None per tensor.
        rounding: "half_even" or "half_up".
        batched: Whether dimension 0 of the tensor is a batch (activations): kinds that count elements count one image.
        shape: Of the tensor, for those that may get extra levels (weights).
        device: Of the state.

    Attributes:
        extra_bits: Buffer uint8 of the tensor's shape, 0 ... 2 each, or None: see `set_extra_bits_`.
        signed: As given, or as `set_` found it.
        enabled: A disabled quantizer returns its input.
        fused: Whether the gradient is that of `ops.fake_quantize` behind `grid`, so that layers may use the fused ops.
        gradient: Which of its gradients: "learned_step" or "clip".
        searching: Whether the bit-width is still being learned.
    """

    fused = True
    gradient = "learned_step"
    searching = False
    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor
    calibrated_scale: Tensor
    signed_flag: Tensor
    calibrated: Tensor
    extra_bits: Tensor | None

    def __init__(
        self,
        bit_width: int | Sequence[int],
        *,
        channels: int = 1,
        signed: bool = True,
        narrow_range: bool = False,
        axis: int | None = None,
        rounding: str = "half_even",
        batched: bool = False,
        shape: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._register_grid(channels, device)
        self.register_buffer("bit_width", _width_tensor(bit_width, channels, device))
        self.register_buffer("signed_flag", torch.tensor([int(signed)], dtype=torch.uint8, device=device))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.uint8, device=device))
        self.register_buffer("extra_bits", None)
        self.shape = None if shape is None else tuple(shape)
        self.channels = channels
        self.signed = signed
        self.is_calibrated = False
        self.narrow_range = narrow_range
        self.axis = axis
        self.rounding = rounding
        self.batched = batched
        self.enabled = True
        self.register_load_state_dict_pre_hook(_fill_missing)
        self.register_load_state_dict_post_hook(_follow_buffers)

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        """What is learned, and the zero point."""
        self.scale = nn.Parameter(torch.ones(channels, device=device))
        self.register_buffer("calibrated_scale", torch.ones(channels, device=device))
        self.register_buffer("zero_point", torch.zeros(1, device=device))

    def set_(self, scale: Tensor, *, signed: bool | None = None, zero_point: Tensor | float = 0.0) -> Quantizer:
        """Takes over a calibrated grid: scale [1] or [channels], > 0; optionally its sign and zero point.

        Raises:
            MixbitError: A scale is not a positive finite number, or this kind has no zero point.
        """
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise MixbitError("scale: expected positive finite numbers")
        with torch.no_grad():
            if signed is not None:
                self.signed_flag.fill_(int(signed))
                self.signed = signed
            self._set_grid(scale, torch.as_tensor(zero_point, dtype=torch.float32))
            self.calibrated.fill_(1)
        _follow_buffers(self, None)
        return self

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        if zero_point.any():
            raise MixbitError(f"zero_point={zero_point.tolist()}: {type(self).__name__} has none; expected 0")
        self.scale.copy_(scale)
        self.calibrated_scale.copy_(scale)

    def initialize_(self, x: Tensor) -> Quantizer:
        """Takes a first grid from a tensor, without a search: max |x| in reach. `calibrate_` chooses more carefully.

        A tensor without negative values gets an unsigned grid, unless the quantizer is for weights (`batched` False).
        """
        x = x.detach().float()
        signed = not self.batched or bool((x < 0).any())
        largest = self._rows(x.abs()).amax(1)
        steps = _largest_code(self.bit_width, signed)
        return self.set_(torch.where(largest > 0, largest / steps, 1.0), signed=signed)

    def _rows(self, x: Tensor) -> Tensor:
        """[channels, elements]."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def repeat(self, x: Tensor) -> Callable[[], Tensor] | None:
        """What makes the result of the last forward, which was on x, again; None where it is better kept.

        Only where autograd holds x itself for the backward, and so notices when it is changed in between.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.enabled or not self.fused:
            return None
        if self.extra_bits is None and not any(p.requires_grad for p in self.parameters()):
            return None
        given = x.detach()
        with torch.no_grad():
            scale, zero_point = (t.clone() for t in self.grid(x))

        def again() -> Tensor:
            with torch.no_grad():
                return self._quantize(given, scale, zero_point)

        return again

    def settle_(self, x: Tensor) -> None:
        """Brings state that follows the tensor up to date, for kinds that have such state."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bit-widths that need a scale of their own when the quantizer is calibrated, ascending."""
        return tuple(sorted({int(bits) for bits in self.bit_width.tolist()}))

    @property
    def by_channel(self) -> bool:
        """Whether channels have bit-widths of their own."""
        return self.bit_width.numel() > 1

    def set_extra_bits_(self, extra_bits: Tensor, *, max_bits: int = MAX_EXTRA_WIDTH) -> Quantizer:
        """Gives single elements extra levels: an element with e extra bits has the step scale / 2^e.

        The base grid stays: all its levels remain, 2^e - 1 appear between each two of them
        (`ops.extra_level_fake_quantize`). The scale, its gradient's factor and `bit_width` are those of the base grid.
        A map of zeros is none. The map is part of the state_dict. A state of a quantizer without one takes it away, and
        so does another bit-width: the levels were given to a grid that is gone.

        Args:
            extra_bits: uint8 of the tensor's shape, each 0, 1 or 2; copied.
            max_bits: Most bits of an element, bit_width + extra_bits; at most 8.

        Raises:
            MixbitError: The map does not fit, the bits are still being searched, or this is no weight quantizer.
        """
        if isinstance(max_bits, bool) or not isinstance(max_bits, int) or not 1 <= max_bits <= MAX_EXTRA_WIDTH:
            raise MixbitError(f"max_bits={max_bits!r}: expected a whole number from 1 to {MAX_EXTRA_WIDTH}")
        if self.searching or self.shape is None or not self.signed:
            what = "its bits are still being searched" if self.searching else "it is not that of a weight"
            raise MixbitError(f"this quantizer takes no extra levels: {what}")
        if self.by_channel:
            raise MixbitError("this quantizer takes no extra levels: its channels have bits of their own")
        check_extra_bits(extra_bits, self.shape, self.check_bit_width(), max_bits)
        given = bool(extra_bits.any())
        self.extra_bits = extra_bits.to(self.bit_width.device, copy=True).contiguous() if given else None
        return self

    def clear_extra_bits_(self) -> Quantizer:
        """Takes the extra levels away: every element has the base grid again."""
        self.extra_bits = None
        return self

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32 like x: of `bit_width` bits, and of an element's extra bits more.

        The value of a code is (code - zero_point) * scale / 2^e, e the element's extra bits.
        """
        with torch.no_grad():
            scale, zero_point = self.grid(x)
            step = _along(scale, x, self.axis)
            if self.extra_bits is not None:
                step = step * torch.exp2(-self.extra_bits.float())
            # The quotient of a product by its factor is the other one to within a fraction of a code.
            value = self._quantize(x.detach().float(), scale, zero_point)
            return (torch.round(value / step) + torch.round(_along(zero_point, x, None))).to(torch.int32)

    def set_bit_width_(self, bit_width: int | Sequence[int]) -> Quantizer:
        """Moves to another width at the same range: each scale is multiplied by hi_old / hi_new.

        Extra levels belong to the old grid and go with it.

        Args:
            bit_width: Whole number 1 ... 16, or one for each channel.

        Raises:
            MixbitError: There are neither one nor as many widths as channels.
        """
        wanted = _width_tensor(bit_width, self.channels, self.bit_width.device)
        old = self.bit_width
        if torch.equal(old.expand(self.channels), wanted.expand(self.channels)):
            if old.shape != wanted.shape:
                self.bit_width = wanted
            return self
        self.clear_extra_bits_()
        pairs = zip(*torch.broadcast_tensors(old, wanted), strict=True)
        ratios = [self._range_steps(int(before)) / self._range_steps(int(after)) for before, after in pairs]
        with torch.no_grad():
            if old.shape == wanted.shape:
                old.copy_(wanted)
            else:
                self.bit_width = wanted
            self._rescale(ratios[0] if len(ratios) == 1 else torch.tensor(ratios, device=wanted.device))
        return self

    def _rescale(self, ratio: float | Tensor) -> None:
        self.scale.mul_(ratio)
        self.calibrated_scale.mul_(ratio)

    def _range_steps(self, bit_width: int) -> float:
        """The range in steps: of the positive half of a signed grid, as two's complement has it."""
        if not self.signed:
            return 2.0**bit_width - 1
        return 2.0 ** (bit_width - 1) - 1 if self.narrow_range else 2.0 ** (bit_width - 1)

    def _range_steps_tensor(self) -> Tensor:
        """The same as a tensor [1], for formulas of the forward: reading the width would break a compiled graph."""
        if not self.signed:
            return torch.exp2(self.bit_width) - 1
        half = torch.exp2(self.bit_width - 1)
        return half - 1 if self.narrow_range else half

    def quant_range(self) -> tuple[int, int]:
        """Smallest and largest code; of the widest channel, where they differ."""
        bits = int(self.bit_width.max())
        if self.signed:
            return -(2 ** (bits - 1)) + int(self.narrow_range), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1

    def effective_scale(self, gradient_factor: Tensor | None = None) -> Tensor:
        """max(scale, 2^-20 of the calibrated scale); the gradient is the scale's own, also below the floor.

        Args:
            gradient_factor: Multiplies the gradient, not the value.
        """
        value = torch.maximum(self.scale.detach(), self.calibrated_scale * SCALE_FLOOR)
        if not torch.is_grad_enabled():
            return value
        # The difference is exactly zero: it carries the gradient only.
        difference = self.scale - self.scale.detach()
        return value + (difference if gradient_factor is None else difference * gradient_factor)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for quantizing x, differentiable the way of this kind."""
        return self.effective_scale(), self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes x to the grid and back."""
        if not self.enabled:
            return x
        self.check_calibrated()
        return self._quantize(x, *self.grid(x))

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.extra_bits is not None:
            return ops.extra_level_fake_quantize(
                x,
                scale,
                self.bit_width,
                self.extra_bits,
                axis=self.axis,
                narrow_range=self.narrow_range,
                rounding=self.rounding,
            )
        return ops.fake_quantize(
            x,
            scale,
            zero_point,
            self.bit_width,
            signed=self.signed,
            narrow_range=self.narrow_range,
            axis=self.axis,
            rounding=self.rounding,
            gradient=self.gradient,
        )

    @torch.no_grad()
    def within(self, x: Tensor, margin: float = 0.0) -> Tensor:
        """Where x is between the ends of its grid, or beyond them by at most `margin` steps of it: bool like x.

        Of an element with extra bits its own grid and steps count. NaN is nowhere.
        """
        scale, zero_point = self.grid(x)
        steps: Tensor | float = 1.0 if self.extra_bits is None else torch.exp2(self.extra_bits.float())
        half = torch.exp2(_along(self.bit_width, x, self.axis) - 1) * steps
        low, high = (1 - half if self.narrow_range else -half, half - 1) if self.signed else (0 * half, 2 * half - 1)
        v = x.detach().float() / (_along(scale, x, self.axis) / steps) + torch.round(_along(zero_point, x, None))
        return (v >= low - margin) & (v <= high + margin)

    def check_bit_width(self) -> int:
        """The width, read and checked: on CUDA a wrong one makes the ops return NaN instead of raising.

        Returns:
            The width, or the widest one of the channels.

        Raises:
            MixbitError: No whole number from 1 to 16, or one signed bit with narrow_range.
        """
        values = self.bit_width.tolist()
        for value in values:
            if not (1 <= value <= 16 and value == math.floor(value)):
                raise MixbitError(f"bit_width={value:g}: expected a whole number from 1 to 16")
            if value == 1 and self.signed and self.narrow_range:
                raise MixbitError(
                    "bit_width=1 with a signed grid and narrow_range leaves only the level 0; expected 2 to 16"
                )
        return int(max(values))

    def check_calibrated(self) -> None:
        """Refuses to run before a grid is set.

        Raises:
            MixbitError: No scale has been set.
        """
        if not self.is_calibrated:
            # Averages of a model copy its buffers and know nothing of Python flags.
            _follow_buffers(self, None)
        if not self.is_calibrated:
            raise MixbitError(
                "a quantizer has no scales yet; call mixbit.calibrate_(model, batches) first, or set_ or initialize_ "
                "on a quantizer of your own"
            )

    def extra_repr(self) -> str:
        """Bits, sign and granularity."""
        sign = "signed" if self.signed else "unsigned"
        widths = self.widths
        bits = str(widths[0]) if len(widths) == 1 else f"{list(widths)} by channel"
        text = f"bit_width={bits}, {sign}, channels={self.channels}, calibrated={self.is_calibrated}"
        if self.extra_bits is None:
            return text
        return f"{text}, extra_levels={(self.extra_bits > 0).float().mean():.1%}"


class LSQ(Quantizer):
    """Learned step size (arXiv 1902.08153): the gradient of the scale is multiplied by 1 / sqrt(n hi).

    n is the number of elements that share a scale, of one image for activations (section 2.2 there); hi the largest
    code. The factor keeps the scale's relative update near the weights', so that both train at one learning rate.
    """

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, with LSQ's gradient."""
        return self.effective_scale(self.gradient_factor(x)), self.zero_point

    def gradient_factor(self, x: Tensor) -> Tensor | None:
        """1 / sqrt(n hi) as float32 [1]; None where no gradient is recorded."""
        if not torch.is_grad_enabled() or x.numel() == 0:
            return None
        count = x.numel() // self.channels
        if self.batched and x.dim() > 0:
            count //= x.shape[0]
        return torch.rsqrt(count * _largest_code(self.bit_width, self.signed))

    def initialize_(self, x: Tensor) -> Quantizer:
        """2 mean |x| / sqrt(hi), as published (section 2.1)."""
        x = x.detach().float()
        signed = not self.batched or bool((x < 0).any())
        mean = self._rows(x.abs()).mean(1)
        return self.set_(
            torch.where(mean > 0, 2 * mean / _largest_code(self.bit_width, signed).sqrt(), 1.0), signed=signed
        )


class LSQPlus(LSQ):
    """LSQ with a learned offset (LSQ+, arXiv 2004.09576), for activations that are not centred.

    Parameters `scale` and `offset` [1]: the grid is unsigned, and its zero point is -offset / scale, rounded in the
    forward so that the network keeps an integer form. Gradients are eqs. 3 and 4 there; the offset's has the factor of
    the scale's.
    """

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        self.scale = nn.Parameter(torch.ones(channels, device=device))
        self.offset = nn.Parameter(torch.zeros(channels, device=device))
        self.register_buffer("calibrated_scale", torch.ones(channels, device=device))

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """-offset / scale, float32 [1]."""
        return -self.offset.detach() / self.effective_scale().detach()

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        super()._set_grid(scale, torch.zeros(1))
        self.offset.copy_(-zero_point.to(scale.device) * scale)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point; both carry gradients."""
        factor = self.gradient_factor(x)
        scale = self.effective_scale(factor)
        offset: Tensor = self.offset
        if factor is not None:
            offset = offset.detach() + (offset - offset.detach()) * factor
        return scale, -offset / scale

    def initialize_(self, x: Tensor) -> Quantizer:
        """The whole range of x."""
        x = x.detach().float()
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        steps = float(2 ** int(self.bit_width) - 1)
        scale = (high - low) / steps if high > low else 1.0
        return self.set_(torch.full_like(self.scale, scale), signed=False, zero_point=-low / scale)


class TQT(Quantizer):
    """Trained threshold (arXiv 1903.08066): Parameter `log2_threshold`, scale = 2^log2_threshold / steps of the range.

    The gradient is that of the scale times scale ln 2. The threshold is positive whatever an optimizer does, and its
    step is relative; Adam is advised there, or `normalize_gradient_` before a plain SGD step.

    Args:
        power_of_two: Rounds the logarithm up in the forward (section 3.2 there), so that scales are powers of two; the
            steps of an unsigned range count as 2^b then. Off by default.
    """

    #: Decay of the running variance of `normalize_gradient_`.
    DECAY = 0.9
    gradient_variance: Tensor
    gradient_steps: Tensor

    def __init__(self, bit_width: int, *, power_of_two: bool = False, **options: Any) -> None:
        super().__init__(bit_width, **options)
        self.power_of_two = power_of_two

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        self.log2_threshold = nn.Parameter(torch.zeros(channels, device=device))
        self.register_buffer("zero_point", torch.zeros(1, device=device))
        self.register_buffer("gradient_variance", torch.zeros(channels, device=device))
        self.register_buffer("gradient_steps", torch.zeros(1, device=device))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale that follows from the threshold."""
        return self.effective_scale()

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        if zero_point.any():
            raise MixbitError(f"zero_point={zero_point.tolist()}: TQT has none; expected 0")
        threshold = scale.double() * self._steps().double()
        self.log2_threshold.copy_(torch.log2(threshold))

    def _rescale(self, ratio: float | Tensor) -> None:
        """The threshold is the range, which stays."""

    def _steps(self) -> Tensor:
        steps = self._range_steps_tensor()
        return steps + 1 if self.power_of_two and not self.signed else steps

    def effective_scale(self, gradient_factor: Tensor | None = None) -> Tensor:
        """2^log2_threshold / steps, differentiable in the threshold."""
        exponent: Tensor = self.log2_threshold
        if self.power_of_two:
            exponent = torch.ceil(exponent).detach() + (exponent - exponent.detach())
        return torch.exp2(exponent) / self._steps()

    @torch.no_grad()
    def normalize_gradient_(self) -> None:
        """Replaces the threshold's gradient by tanh(g / (sqrt(v) + 1e-5)), v its bias-corrected running variance.

        Bounds a step of plain SGD by the learning rate, whatever the magnitude of the loss (the appendix of the paper).
        Call it between backward and the optimizer's step. Does nothing without a gradient.
        """
        g = self.log2_threshold.grad
        if g is None:
            return
        self.gradient_steps += 1
        self.gradient_variance.mul_(self.DECAY).add_((1 - self.DECAY) * g.square())
        corrected = self.gradient_variance / (1 - self.DECAY**self.gradient_steps)
        g.copy_(torch.tanh(g / (corrected.sqrt() + 1e-5)))


class PACT(Quantizer):
    """Parametrized clipping (arXiv 1805.06085): Parameter `clip` [channels], the end of the range.

    The gradient of the clip is the sum of those of the clipped values (eq. 3 there), without the rounding term of
    learned steps; rounding passes gradients straight through. On signed grids the range is [-clip, clip - scale].
    Weight decay on `clip` is part of the method: give it to the optimizer.
    """

    gradient = "clip"

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        self.clip = nn.Parameter(torch.ones(channels, device=device))
        self.register_buffer("calibrated_scale", torch.ones(channels, device=device))
        self.register_buffer("zero_point", torch.zeros(1, device=device))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale that follows from the clip."""
        return self.effective_scale()

    def _set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        if zero_point.any():
            raise MixbitError(f"zero_point={zero_point.tolist()}: PACT has none; expected 0")
        self.clip.copy_(scale * self._range_steps_tensor())
        self.calibrated_scale.copy_(scale)

    def _rescale(self, ratio: float | Tensor) -> None:
        self.calibrated_scale.mul_(ratio)

    def effective_scale(self, gradient_factor: Tensor | None = None) -> Tensor:
        """clip / steps, at least 2^-20 of the calibrated scale."""
        scale = self.clip / self._range_steps_tensor()
        value = torch.maximum(scale.detach(), self.calibrated_scale * SCALE_FLOOR)
        return value + (scale - scale.detach()) if torch.is_grad_enabled() else value

    def repeat(self, x: Tensor) -> Callable[[], Tensor] | None:
        """As for all kinds, but for extra levels: their graph does not hold x."""
        return super().repeat(x) if self.extra_bits is None else None

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.extra_bits is None:
            return super()._quantize(x, scale, zero_point)
        with torch.no_grad():
            y = super()._quantize(x, scale, zero_point)
        if not torch.is_grad_enabled():
            return y
        half = torch.exp2(self.bit_width - 1)
        # One step of an element's own grid, in steps of the base grid.
        one = torch.exp2(-self.extra_bits.float())
        high, low = half - one, one - half if self.narrow_range else -half
        upper, lower = ((_along(scale, x, self.axis) * end).to(x.dtype) for end in (high, low))
        # Values at the upper end count as clipped, as published.
        clipped = torch.where(x >= upper, upper, torch.where(x < lower, lower, x))
        return y + (clipped - clipped.detach())  # the difference is exactly zero: it carries the gradient only


class FixedRange(Quantizer):
    """A grid that stays as it was set: `scale` gets no gradient, and the backward keeps one bit an element.

    For inputs of known range (`from_range`), and for training against a given grid.
    """

    def _register_grid(self, channels: int, device: torch.device | None) -> None:
        super()._register_grid(channels, device)
        self.scale.requires_grad_(False)

    @classmethod
    def from_range(cls, bit_width: int, low: float, high: float, **options: Any) -> FixedRange:
        """A grid that holds [low, high]: unsigned if low is 0, else signed.

        Raises:
            MixbitError: low > 0, high <= 0 on an unsigned grid, or the range is empty or not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
            raise MixbitError(f"low={low} and high={high}: expected finite numbers with low <= 0 <= high, low < high")
        quantizer = cls(bit_width, signed=low < 0, **options)
        smallest, largest = quantizer.quant_range()
        scale = max(low / smallest if smallest else 0.0, high / largest if largest else 0.0)
        quantizer.set_(torch.full((quantizer.channels,), scale))
        return quantizer


class StraightThrough(FixedRange):
    """A fixed grid through which gradients pass everywhere: values beyond its ends keep moving.

    The straight-through estimator as retraining at few bits may take it (the reconstruction of Kim et al., IEEE TNNLS
    32(7), 2021, leaves it open): a weight that is driven out of its grid by noise can come back.
    """

    fused = False  # the fused ops have the learned step's gradient

    def _passes(self, x: Tensor) -> Tensor:
        """Where the gradient passes; what is not finite gets none."""
        return torch.isfinite(x)

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        with torch.no_grad():
            y = super()._quantize(x, scale, zero_point)
        if not torch.is_grad_enabled():
            return y
        passed = torch.where(self._passes(x.detach()), x, torch.zeros_like(x))
        return y + (passed - passed.detach())  # the difference is exactly zero: it carries the gradient only


class ClippedStraightThrough(StraightThrough):
    """A fixed grid whose gradients pass up to a step beyond its outermost thresholds, on each side, and not beyond.

    In steps of the grid (of an element's own, with extra levels): where lo - 1/2 <= x / scale <= hi + 1/2. `LSQ` and
    `FixedRange` end at lo and hi.
    """

    def _passes(self, x: Tensor) -> Tensor:
        return self.within(x, 0.5)


#: Kinds by the names that `prepare_` takes.
KINDS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
    "lsq+": LSQPlus,
    "tqt": TQT,
    "pact": PACT,
    "fixed": FixedRange,
    "ste": StraightThrough,
    "ste_clip": ClippedStraightThrough,
    "plain": Quantizer,
}


@torch.no_grad()
def effective_scales(quantizers: Sequence[Quantizer]) -> list[Tensor]:
    """`effective_scale` of each quantizer, detached; those of the base formula are computed as one vector."""
    results: list[Any] = [None] * len(quantizers)
    common: dict[Any, list[tuple[int, Tensor, Tensor]]] = {}
    for i, q in enumerate(quantizers):
        if type(q).effective_scale is Quantizer.effective_scale:
            scale, calibrated = q.scale, q.calibrated_scale
            # Sharded ones are on their own.
            if type(scale) in (nn.Parameter, Tensor) and type(calibrated) is Tensor:
                common.setdefault((scale.device, scale.dtype), []).append((i, scale, calibrated))
                continue
        results[i] = q.effective_scale().detach()
    for members in common.values():
        indices, scales, calibrated_scales = zip(*members, strict=True)
        values = torch.maximum(torch.cat(scales), torch.cat(calibrated_scales) * SCALE_FLOOR)
        for i, value in zip(indices, values.split([len(scale) for scale in scales]), strict=True):
            results[i] = value
    return results


def check_extra_bits(extra_bits: Tensor, shape: Sequence[int], bit_width: int, max_bits: int = MAX_EXTRA_WIDTH) -> None:
    """Refuses a map of extra bits that does not fit a weight.

    Args:
        extra_bits: Expected uint8 of `shape`, each 0, 1 or 2.
        shape: Of the weight.
        bit_width: Of the base grid.
        max_bits: Most bits of an element that has extra ones.

    Raises:
        MixbitError: Says what came and what was expected.
    """
    if not isinstance(extra_bits, Tensor) or extra_bits.dtype != torch.uint8:
        found = extra_bits.dtype if isinstance(extra_bits, Tensor) else type(extra_bits).__name__
        raise MixbitError(f"extra_bits is {found}; expected a uint8 tensor")
    if tuple(extra_bits.shape) != tuple(shape):
        raise MixbitError(f"extra_bits has shape {list(extra_bits.shape)}; expected {list(shape)} like the weight")
    most = int(extra_bits.max()) if extra_bits.numel() else 0
    if most > ops.MAX_EXTRA_BITS:
        raise MixbitError(f"extra_bits holds {most}; expected whole numbers from 0 to {ops.MAX_EXTRA_BITS}")
    if most and bit_width + most > max_bits:
        raise MixbitError(
            f"extra_bits holds {most} beside bit_width={bit_width}; expected at most {max_bits} bits in all"
        )


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A parameter [1] or [channels], shaped to broadcast against x."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    return parameter.reshape(shape)


def _width_tensor(bit_width: int | Sequence[int], channels: int, device: torch.device | None) -> Tensor:
    """float32 [1], or [channels] for widths of single channels."""
    if isinstance(bit_width, Sequence):
        if len(bit_width) not in (1, channels):
            raise MixbitError(f"bit_width has {len(bit_width)} numbers; expected one, or {channels} (one a channel)")
        return torch.tensor([float(bits) for bits in bit_width], device=device)
    return torch.full((1,), float(bit_width), device=device)


def _largest_code(bit_width: Tensor, signed: bool) -> Tensor:
    """hi as a tensor; 1 for one signed bit, which has no positive level."""
    return (torch.exp2(bit_width - 1 if signed else bit_width) - 1).clamp(min=1)


def _fill_missing(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A float checkpoint has no quantizer keys: they keep their present values, so that it loads strictly.

    A state of this quantizer says whether there are extra levels, too: the buffer comes and goes with it.
    """
    assert isinstance(module, Quantizer)
    extra = state_dict.get(prefix + "extra_bits")
    width = state_dict.get(prefix + "bit_width")
    if extra is not None:
        try:
            if module.searching or module.shape is None:
                raise MixbitError("this quantizer takes no extra levels")
            bits = float((module.bit_width if width is None else width).max())
            if (module.bit_width if width is None else width).numel() > 1:
                raise MixbitError("extra levels beside bits of single channels; expected one of the two")
            # A width that is none is refused once it is loaded.
            check_extra_bits(extra, module.shape, int(bits) if math.isfinite(bits) else 0)
        except MixbitError as error:
            raise MixbitError(f"{prefix}extra_bits: {error}") from error
        if module.extra_bits is None:
            module.extra_bits = torch.zeros_like(extra, device=module.bit_width.device)
    elif width is not None:
        module.extra_bits = None
    # So does it say whether channels have bits of their own.
    known = not module.searching and width is not None and width.shape in ((1,), (module.channels,))
    if width is not None and known and width.shape != module.bit_width.shape:
        module.bit_width = width.detach().to(module.bit_width.device, torch.float32, copy=True)
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    for name, value in own.items():
        state_dict.setdefault(prefix + name, value.detach())


def _follow_buffers(module: nn.Module, _: Any) -> None:
    """Python flags follow the buffers: reading a buffer in the forward would break a compiled graph."""
    assert isinstance(module, Quantizer)
    module.check_bit_width()
    module.signed = bool(module.signed_flag.item())
    module.is_calibrated = bool(module.calibrated.item())
