"""CIFAR-10 ResNets with parameter-free shortcuts (He et al., arXiv 1512.03385, section 4.2, option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError, check_choice
from mixbit.files import PathLike
from mixbit.zoo.layers import Convs
from mixbit.zoo.weights import float_state, keras_state, load_state, read_arrays


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that drops pixels and adds zero channels where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride]."""
        shortcut = x
        if self.stride > 1 or self.added:
            half = self.added // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """Depth 6 n + 2: a stem, three stages of n blocks with 16, 32 and 64 channels, a linear classifier."""

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise MixbitError(f"depth={depth}: expected 6 n + 2, e.g. 20, 32 or 56")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] -> [N, 10] logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)


def cifar_resnet(depth: int = 20, weights: PathLike | None = None) -> CifarResNet:
    """A CIFAR-10 ResNet in eval mode.

    Args:
        depth: 20, 32, 56, ...
        weights: Path of a weight pack; None leaves random weights.

    Raises:
        MixbitError: The depth does not fit, or the file is of another network.
    """
    model = CifarResNet(depth)
    if weights is None:
        return model.eval()
    load_state(model, float_state(read_arrays(weights)), weights)
    return model


class ResNet8(Convs):
    """The CIFAR-10 network of MLPerf Tiny: a stem and three blocks of 16, 32 and 64 channels, TensorFlow padding.

    Convolutions have biases; the 1x1 shortcuts have no batch normalization.
    """

    def __init__(self) -> None:
        super().__init__(same=True, bias=True, eps=1e-3)
        self.add("stem", 3, 16, 3)
        channels = 16
        for i, out in enumerate((16, 32, 64), 1):
            stride = 1 if i == 1 else 2
            self.add(f"block{i}_conv1", channels, out, 3, stride)
            self.add(f"block{i}_conv2", out, out, 3)
            if stride == 2:
                self.add(f"block{i}_shortcut", channels, out, 1, 2, norm=False)
            channels = out
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32], 0 ... 255 -> [N, 10] logits."""
        x = F.relu(self.run("stem", x))
        for i in (1, 2, 3):
            y = self.run(f"block{i}_conv2", F.relu(self.run(f"block{i}_conv1", x)))
            x = F.relu(y + (x if i == 1 else self.run(f"block{i}_shortcut", x)))
        return self.dense(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet8(weights: PathLike | None = None) -> ResNet8:
    """ResNet-8 of MLPerf Tiny in eval mode; input [N, 3, 32, 32], RGB, 0 ... 255 (not normalized).

    Args:
        weights: Path of a pack with Keras names; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    model = ResNet8()
    if weights is None:
        return model.eval()
    names = {"stem": "conv2d", "stem_bn": "batch_normalization", "dense": "dense"}
    convs = ["block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2", "block2_shortcut"]
    convs += ["block3_conv1", "block3_conv2", "block3_shortcut"]
    norms = [f"block{i}_conv{j}_bn" for i in (1, 2, 3) for j in (1, 2)]
    names |= {name: f"conv2d_{i}" for i, name in enumerate(convs, 1)}
    names |= {name: f"batch_normalization_{i}" for i, name in enumerate(norms, 1)}
    load_state(model, keras_state(read_arrays(weights), names, weights), weights)
    return model


#: Stages of (channels, convolutions) and hidden linear layers of the definitions of VGG-9.
VGG9_VARIANTS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "bnn": (((128, 2), (256, 2), (512, 2)), (1024, 1024)),
    "snn": (((64, 2), (128, 2), (256, 3)), (1024,)),
}


class VGG9(nn.Module):
    """VGG-9 for CIFAR-10.

    "bnn" (the binarized-network definition): 2 x 128, 2 x 256, 2 x 512 channels with a pool after each pair, three
    linear layers of 1024, 1024 and 10. "snn": 2 x 64, 2 x 128, 3 x 256 channels, two linear layers of 1024 and 10.
    Every hidden layer has batch normalization and ReLU.

    Args:
        variant: "bnn" or "snn".
        width: Multiplies the channels of all hidden layers.
    """

    def __init__(self, variant: str = "bnn", width: float = 1.0) -> None:
        super().__init__()
        check_choice("variant", variant, VGG9_VARIANTS)
        if not width > 0:
            raise MixbitError(f"width={width}: expected a positive number")
        stages, hidden = VGG9_VARIANTS[variant]
        channels, number = 3, 0
        self.stages: list[list[str]] = []
        for out, count in stages:
            names = []
            for _ in range(count):
                number += 1
                out_channels = round(out * width)
                names.append(f"conv{number}")
                self.add_module(names[-1], nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
                self.add_module(f"bn{number}", nn.BatchNorm2d(out_channels))
                channels = out_channels
            self.stages.append(names)
        features, self.hidden = channels * 16, []
        for i, out in enumerate(hidden, 1):
            self.hidden.append(f"fc{i}")
            self.add_module(f"fc{i}", nn.Linear(features, round(out * width), bias=False))
            self.add_module(f"fc{i}_bn", nn.BatchNorm1d(round(out * width)))
            features = round(out * width)
        self.last = f"fc{len(hidden) + 1}"
        self.add_module(self.last, nn.Linear(features, 10))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 32, 32] -> [N, 10] logits."""
        for names in self.stages:
            for name in names:
                x = F.relu(self.get_submodule(name.replace("conv", "bn"))(self.get_submodule(name)(x)))
            x = F.max_pool2d(x, 2)
        x = x.flatten(1)
        for name in self.hidden:
            x = F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return self.get_submodule(self.last)(x)


def vgg9(variant: str = "bnn", width: float = 1.0, weights: PathLike | None = None) -> VGG9:
    """VGG-9 in eval mode; input [N, 3, 32, 32], normalized like the ResNets'.

    Args:
        variant: "bnn" (three linear layers) or "snn" (two).
        width: Multiplies the channels of all hidden layers.
        weights: Path of a pack; None leaves random weights.

    Raises:
        MixbitError: An unknown variant, a width that is not positive, or a file of another network.
    """
    model = VGG9(variant, width)
    if weights is not None:
        load_state(model, float_state(read_arrays(weights)), weights)
    return model.eval()
