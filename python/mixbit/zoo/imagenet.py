"""ImageNet classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.zoo.layers import Convs, SameConv, scaled
from mixbit.zoo.weights import float_state, integer_state, keras_state, load_state, read_arrays


class MobileNetV1(Convs):
    """MobileNetV1 (Howard et al., arXiv 1704.04861): conv1, dw1 ... dw13, pw1 ... pw13, fc.

    Args:
        width: Multiplies the channels, 0.25 ... 1.0.
        classes: Outputs.
        batch_norm: With batch normalization behind every convolution (`conv1_bn`, ...); else it is folded.
        bias: Whether convolutions have biases although a batch normalization follows.
        relu6: ReLU6 or ReLU.
        same: TensorFlow's padding, by operations of its own, or a symmetric one inside the convolutions.
    """

    CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(
        self,
        width: float = 1.0,
        classes: int = 1000,
        *,
        batch_norm: bool = True,
        bias: bool = False,
        relu6: bool = True,
        same: bool = True,
    ) -> None:
        super().__init__(batch_norm=batch_norm, same=same, bias=bias, eps=1e-3)
        self.relu6 = relu6
        channels = scaled(32, width)
        self.add("conv1", 3, channels, 3, 2)
        for i, (out, stride) in enumerate(zip(self.CHANNELS, self.STRIDES, strict=True), 1):
            self.add(f"dw{i}", channels, channels, 3, stride, groups=channels)
            self.add(f"pw{i}", channels, scaled(out, width), 1)
            channels = scaled(out, width)
        self.fc = nn.Linear(channels, classes)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        x = self.run(name, x)
        return F.relu6(x) if self.relu6 else F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes] logits."""
        x = self._layer("conv1", x)
        for i in range(1, len(self.CHANNELS) + 1):
            x = self._layer(f"pw{i}", self._layer(f"dw{i}", x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobilenet_v1(width: float = 1.0, weights: PathLike | None = None) -> MobileNetV1:
    """MobileNetV1 in eval mode; input [N, 3, H, W], RGB, x / 127.5 - 1.

    Args:
        width: 0.25, 0.5, 0.75 or 1.0.
        weights: Path of a pack of 8-bit codes (batch normalization folded) or of floats with batch normalization; None
            leaves random weights.

    Raises:
        MixbitError: The width is not positive, or the file is of another network.
    """
    if not width > 0:
        raise MixbitError(f"width={width}: expected a positive number, e.g. 0.25, 0.5, 0.75 or 1.0")
    if weights is None:
        return MobileNetV1(width).eval()
    arrays = read_arrays(weights)
    folded = "conv1.q" in arrays
    model = MobileNetV1(width, batch_norm=not folded)
    load_state(model, integer_state(arrays) if folded else float_state(arrays), weights)
    return model


def vww_mobilenet(weights: PathLike | None = None) -> MobileNetV1:
    """The person detector of MLPerf Tiny (a MobileNetV1 of width 0.25) in eval mode.

    Input [N, 3, 96, 96], RGB, x / 255, stretched; output 1 is "person".

    Args:
        weights: Path of a pack with Keras names; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    model = MobileNetV1(0.25, 2, bias=True, relu6=False)
    if weights is None:
        return model.eval()
    names = {"conv1": "conv2d", "conv1_bn": "batch_normalization", "fc": "dense"}
    for i in range(1, 14):
        names |= {
            f"dw{i}": "depthwise_conv2d" + (f"_{i - 1}" if i > 1 else ""),
            f"pw{i}": f"conv2d_{i}",
            f"dw{i}_bn": f"batch_normalization_{2 * i - 1}",
            f"pw{i}_bn": f"batch_normalization_{2 * i}",
        }
    load_state(model, keras_state(read_arrays(weights), names, weights), weights)
    return model


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
