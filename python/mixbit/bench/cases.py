"""What is measured, on what, and against which limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Tensors by name: shape, axis of the channels (None per tensor).
TENSORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "activations": ((32, 64, 56, 56), None),
    "weights": ((512, 512, 3, 3), 0),
    "64": ((64,), None),
    "4Ki": ((4096,), None),
    "64Ki": ((65536,), None),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Widths that quantization_noise measures at once.
NOISE_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
#: Widths between which the searches of the cases "gated" and "mixture" choose.
SEARCH_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: Key of the registry.
        about: One line.
        limit: The contender that moves the least bytes, which the others are divided by.
        gradient: Whether a backward belongs to it.
    """

    name: str
    about: str
    limit: str
    gradient: bool = False


CASES = {
    case.name: case
    for case in (
        Case("forward", "fake_quantize against out.copy_(x)", "copy"),
        Case("training", "forward + backward, learned scale, against copy_ and mul(out=)", "copy+mul", gradient=True),
        Case("fixed", "forward + backward, fixed scale, against copy_ and mul(out=)", "copy+mul", gradient=True),
        Case("gated", "gated_fake_quantize at 2, 4, 8 bits, forward + backward with gates", "copy+mul", gradient=True),
        Case("mixture", "mixture_fake_quantize at 2, 4, 8 bits, scales and weights learned", "copy+mul", gradient=True),
        Case("noise", "quantization_noise at 2...8 and 16 bits against one read, x.sum()", "x.sum()"),
        Case("weights", "fake_quantize of all weights of a ResNet-18, one call, against a copy of each", "copy"),
    )
}


@dataclass(frozen=True)
class Inputs:
    """What every contender gets.

    Attributes:
        x: The tensor; a leaf that requires a gradient in the cases that have one.
        gradient: Of the output.
        scale: float32 [1] or [channels].
        axis: Of the channels, None per tensor.
        bits: Bit-width; the grid is signed two's complement.
    """

    x: Tensor
    gradient: Tensor
    scale: Tensor
    axis: int | None
    bits: int

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    def broadcast_scale(self) -> Tensor:
        """The scale in a shape that broadcasts against x."""
        return self.scale if self.axis is None else self.scale.reshape(-1, *[1] * (self.x.dim() - 1))


def make_inputs(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, bits: int, *, gradient: bool, seed: int = 0
) -> Inputs:
    """Gaussian data and a scale that clips beyond three deviations."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    g = torch.randn(shape, generator=generator).to(dtype)
    channels = 1 if axis is None else shape[axis]
    scale = torch.full((channels,), 3.0 / 2 ** (bits - 1))
    return Inputs(x.requires_grad_(gradient), g, scale, axis, bits)


def resnet18_weights() -> list[tuple[int, ...]]:
    """Shapes of the 21 weights of a ResNet-18."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        shapes += [(outputs, inputs, 3, 3), *[(outputs, outputs, 3, 3)] * 3]
        if outputs != inputs:
            shapes.append((outputs, inputs, 1, 1))
        inputs = outputs
    return [*shapes, (1000, 512)]
