"""FastestDet: an anchor-free detector on a small ShuffleNetV2, one map of predictions (dog-qiuqiu/FastestDet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.files import PathLike
from mixbit.zoo.boxes import Detector, fastestdet_predictions
from mixbit.zoo.layers import check_images
from mixbit.zoo.weights import float_state, load_state, read_arrays


def _conv(channels: int, out: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> list[nn.Module]:
    """A convolution without bias and its batch normalization."""
    groups = channels if depthwise else 1
    return [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]


class ShuffleBlock(nn.Module):
    """ShuffleNetV2's unit (Ma et al., arXiv 1807.11164): at stride 1 even channels pass and odd ones are processed."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = out // 2
        own = channels if stride == 2 else channels // 2
        self.branch_main = nn.Sequential(
            *_conv(own, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv(hidden, hidden, 3, stride, depthwise=True),
            *_conv(hidden, out - (channels if stride == 2 else channels // 2), 1),
            nn.ReLU(inplace=True),
        )
        self.branch_proj: nn.Sequential | None = None
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *_conv(channels, channels, 3, stride, depthwise=True),
                *_conv(channels, channels, 1),
                nn.ReLU(inplace=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H / stride, W / stride]."""
        if self.branch_proj is not None:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


class ShuffleNetV2(nn.Module):
    """Stages of 4, 8 and 4 units with 48, 96 and 192 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_conv(3, 24, 3, 2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 24
        for name, out, count in (("stage2", 48, 4), ("stage3", 96, 8), ("stage4", 192, 4)):
            units = [ShuffleBlock(channels, out, 2), *(ShuffleBlock(out, out, 1) for _ in range(count - 1))]
            self.add_module(name, nn.Sequential(*units))
            channels = out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 3, H, W] -> the outputs of the stages, H / 8, H / 16 and H / 32."""
        x = self.maxpool(self.first_conv(x))
        first = self.get_submodule("stage2")(x)
        second = self.get_submodule("stage3")(first)
        return first, second, self.get_submodule("stage4")(second)


class Conv1x1(nn.Module):
    """1x1 convolution, batch normalization, ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_conv(channels, out, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]."""
        return self.conv1x1(x)


class SPP(nn.Module):
    """One, two and three 5x5 depthwise convolutions beside each other, joined and added to their input."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.Conv1x1 = Conv1x1(channels, out)

        def chain(count: int) -> nn.Sequential:
            parts: list[nn.Module] = []
            for _ in range(count):
                parts += [*_conv(out, out, 5, depthwise=True), nn.ReLU(inplace=True)]
            return nn.Sequential(*parts)

        self.S1, self.S2, self.S3 = chain(1), chain(2), chain(3)
        self.output = nn.Sequential(*_conv(3 * out, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]."""
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class Head(nn.Module):
    """5x5 depthwise and 1x1 convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(
            *_conv(channels, channels, 5, depthwise=True), nn.ReLU(inplace=True), *_conv(channels, out, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]."""
        return self.conv5x5(x)


class DetectHead(nn.Module):
    """Objectness, box and class of every cell."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Conv1x1(channels, channels)
        self.obj_layers, self.reg_layers = Head(channels, 1), Head(channels, 4)
        self.cls_layers = Head(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 5 + classes, H, W]: sigmoid, four values, softmax."""
        x = self.conv1x1(x)
        return torch.cat([self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)], 1)


class FastestDet(Detector, nn.Module):
    """See the module's docstring; names are those of the published weights."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = ShuffleNetV2()
        self.avg_pool = nn.AvgPool2d(3, 2, 1)
        self.SPP = SPP(48 + 96 + 192, 96)
        self.detect_head = DetectHead(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] (multiples of 32; trained at 352) -> [N, 5 + classes, H / 16, W / 16]."""
        first, second, third = self.backbone(check_images(x, 32))
        x = torch.cat([self.avg_pool(first), second, F.interpolate(third, scale_factor=2.0, mode="nearest")], 1)
        return self.detect_head(self.SPP(x))

    #: All of COCO's.
    coco_classes = tuple(range(80))
    least_score = 0.005

    def predictions(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """All boxes [N, cells, 4] and their scores [N, cells, classes]."""
        return fastestdet_predictions(outputs)

    def head_tensors(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objectness, box values and class shares apart, [N, ., H, W] each."""
        return outputs[:, :1], outputs[:, 1:5], outputs[:, 5:]

    def confidence(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each tensor of `head_tensors` the best score of its cells, [N, 1, H, W]."""
        best = self.predictions(outputs)[1].amax(-1).reshape(outputs[:, :1].shape)
        return best, best, best


def fastestdet(weights: PathLike | None = None) -> FastestDet:
    """FastestDet (80 COCO classes) in eval mode; input [N, 3, 352, 352], BGR, x / 255.

    Args:
        weights: Path of a pack; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    model = FastestDet()
    if weights is not None:
        load_state(model, float_state(read_arrays(weights)), weights)
    return model.eval()
