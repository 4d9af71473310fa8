"""Pieces that several networks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError


def check_images(x: Tensor, multiple: int = 1) -> Tensor:
    """Returns x if it holds images whose height and width are multiples of a number.

    Raises:
        MixbitError: It has another shape than [N, 3, H, W], or a size that does not fit.
    """
    if x.dim() != 4 or x.shape[1] != 3 or any(size < multiple or size % multiple for size in x.shape[2:]):
        sizes = "" if multiple == 1 else f" with H and W multiples of {multiple}"
        raise MixbitError(f"the input has shape {tuple(x.shape)}; expected images [N, 3, H, W]{sizes}")
    return x


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """x padded as TensorFlow's SAME has it: the extra pixel goes after."""
    amounts: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts) if any(amounts) else x


class Convs(nn.Module):
    """Convolutions by name, each with what belongs to it: padding, batch normalization, activation.

    Args:
        batch_norm: Whether `NAME_bn` stands behind every convolution that is not added with `norm=False`.
        same: TensorFlow's padding instead of a symmetric one.
        bias: Whether convolutions have biases although a batch normalization follows.
        eps: Of the batch normalizations.
    """

    def __init__(self, *, batch_norm: bool = True, same: bool = False, bias: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.batch_norm, self.same, self.bias, self.eps = batch_norm, same, bias, eps

    def add(
        self, name: str, channels: int, out: int, kernel: int, stride: int = 1, *, groups: int = 1, norm: bool = True
    ) -> None:
        """Adds the convolution NAME and, where it belongs, NAME_bn."""
        norm = norm and self.batch_norm
        padding = 0 if self.same else kernel // 2
        conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=self.bias or not norm)
        self.add_module(name, conv)
        if norm:
            self.add_module(f"{name}_bn", nn.BatchNorm2d(out, eps=self.eps))

    def run(self, name: str, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)], before the activation."""
        conv = getattr(self, name)
        if self.same:
            x = pad_same(x, conv.kernel_size[0], conv.stride[0])
        x = conv(x)
        norm = getattr(self, f"{name}_bn", None)
        return x if norm is None else norm(x)


class SameConv(nn.Sequential):
    """Padding as TensorFlow has it, a convolution with bias, optionally ReLU6."""

    def __init__(
        self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        conv = nn.Conv2d(channels_in, channels, kernel, stride, groups=groups)
        super().__init__(conv, *([nn.ReLU6(inplace=True)] if activation else []))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        return super().forward(pad_same(x, self.kernel, self.stride))


def scaled(channels: int, width: float) -> int:
    """A number of channels times the width, as the MobileNet papers' code rounds it (to a multiple of 8)."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded
