"""ImageNet classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.files import PathLike
from mixbit.zoo.weights import float_state, integer_state, load_state, read_arrays


class SameConv(nn.Sequential):
    """Padding as TensorFlow has it (the extra pixel goes after), a convolution with bias, optionally ReLU6."""

    def __init__(
        self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        conv = nn.Conv2d(channels_in, channels, kernel, stride, groups=groups)
        super().__init__(conv, *([nn.ReLU6(inplace=True)] if activation else []))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        amounts: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max(0, (-(-size // self.stride) - 1) * self.stride + self.kernel - size)
            amounts += [total // 2, total - total // 2]
        if any(amounts):
            x = F.pad(x, amounts)
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project; added to the input where shapes agree (Sandler et al., arXiv 1801.04381)."""

    def __init__(self, channels_in: int, channels: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels_in * expand
        parts: list[nn.Module] = [SameConv(channels_in, hidden, 1)] if expand != 1 else []
        parts += [SameConv(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, channels, 1)]
        self.conv = nn.Sequential(*parts)
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 with folded batch normalization, TensorFlow padding and torchvision's layer names."""

    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        features: list[nn.Module] = [SameConv(3, 32, 3, 2)]
        channels = 32
        for expand, out, count, stride in self.SETTINGS:
            for i in range(count):
                features.append(InvertedResidual(channels, out, stride if i == 0 else 1, expand))
                channels = out
        features.append(SameConv(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes] logits."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(x)


def mobilenet_v2(weights: PathLike | None = None) -> MobileNetV2:
    """MobileNetV2 (width 1.0) in eval mode; input [N, 3, 224, 224], RGB, x / 127.5 - 1.

    Args:
        weights: Path of a pack of 8-bit codes; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    model = MobileNetV2()
    if weights is None:
        return model.eval()
    load_state(model, integer_state(read_arrays(weights)), Path(weights))
    return model


def squeezenet1_1(weights: PathLike | None = None) -> Any:
    """SqueezeNet 1.1 (torchvision's) in eval mode; input [N, 3, 227, 227], BGR, minus (104, 117, 123).

    Args:
        weights: Path of a weight pack; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    from torchvision.models import squeezenet1_1 as build

    model = build(weights=None)
    return model.eval() if weights is None else load_state(model, float_state(read_arrays(weights)), weights)
