"""CIFAR-10 ResNets with parameter-free shortcuts (He et al., arXiv 1512.03385, section 4.2, option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.zoo.weights import float_state, load_state, read_arrays


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
