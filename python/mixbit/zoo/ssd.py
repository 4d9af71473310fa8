"""Single-shot detectors on MobileNetV2 (Liu et al., arXiv 1512.02325; Sandler et al., arXiv 1801.04381).

Three definitions: SSD-MobileNetV2 with Open Images weights (plain convolutions, batch normalization folded), and the
two public SSDlite-MobileNetV2 (depthwise-separable extras and heads), of pytorch-ssd and of TensorFlow's model zoo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixbit.errors import MixbitError, check_choice
from mixbit.files import PathLike
from mixbit.zoo.boxes import Detector, ssd_anchors, ssd_predictions
from mixbit.zoo.imagenet import MobileNetV2
from mixbit.zoo.layers import Convs, check_images
from mixbit.zoo.weights import Arrays, float_state, load_state, read_arrays

#: COCO class of the Open Images classes (columns 1 ... 23 of SSD-MobileNetV2's logits) that have one.
OPEN_IMAGES_TO_COCO = {
    1: 1, 3: 63, 4: 0, 5: 56, 6: 19, 8: 15, 9: 64, 10: 62, 12: 41, 15: 60, 16: 39, 20: 16, 21: 73, 23: 2
}  # fmt: skip
#: The block whose expanded tensor is the first map of the heads.
TAP = 14


class Inverted(Convs):
    """expand (unless the expansion is 1), dw, project; added to the input where shapes agree and it is asked for."""

    def __init__(
        self, channels: int, out: int, stride: int, hidden: int, *, residual: bool, batch_norm: bool, same: bool
    ) -> None:
        super().__init__(batch_norm=batch_norm, same=same, eps=1e-3 if same else 1e-5)
        self.expanded = hidden != channels or not residual
        if self.expanded:
            self.add("expand", channels, hidden, 1)
        self.add("dw", hidden, hidden, 3, stride, groups=hidden)
        self.add("project", hidden, out, 1)
        self.residual = residual and stride == 1 and channels == out

    def expand_only(self, x: Tensor) -> Tensor:
        """The expanded tensor."""
        return F.relu6(self.run("expand", x)) if self.expanded else x

    def finish(self, x: Tensor, expanded: Tensor) -> Tensor:
        """What follows the expansion."""
        y = self.run("project", F.relu6(self.run("dw", expanded)))
        return x + y if self.residual else y

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)]."""
        return self.finish(x, self.expand_only(x))


class Steps(Convs):
    """Named convolutions one after the other, each with ReLU6."""

    def __init__(self, *, batch_norm: bool, same: bool) -> None:
        super().__init__(batch_norm=batch_norm, same=same, eps=1e-3 if same else 1e-5)
        self.names: list[str] = []

    def then(self, name: str, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> Steps:
        """Adds one."""
        self.add(name, channels, out, kernel, stride, groups=groups)
        self.names.append(name)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the last one's output."""
        for name in self.names:
            x = F.relu6(self.run(name, x))
        return x


class Predictor(Convs):
    """`pw`, a 1x1 convolution with bias; before it, where asked for, `dw`, a depthwise 3x3 one with ReLU6."""

    def __init__(self, channels: int, out: int, *, depthwise: bool, batch_norm: bool, same: bool, bias: bool) -> None:
        super().__init__(batch_norm=batch_norm, same=same, bias=bias, eps=1e-3 if same else 1e-5)
        self.depthwise = depthwise
        if depthwise:
            self.add("dw", channels, channels, 3, groups=channels)
        self.add("pw", channels, out, 1, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out, H, W]."""
        return self.run("pw", F.relu6(self.run("dw", x)) if self.depthwise else x)


class SSD(Detector, nn.Module):
    """A MobileNetV2, extra maps and two predictors on each of six maps.

    Args:
        classes: Outputs of an anchor, background included.
        anchors: Anchors of a cell, for each map.
        extras: Modules that make the maps after the second.
        channels: Channels of the six maps.
        lite: Depthwise-separable heads: for each map whether it has a depthwise convolution.
        batch_norm: Whether batch normalization stands behind convolutions; else it is folded.
        same: TensorFlow's padding.
        head_bias: Whether the depthwise convolutions of the heads have biases beside batch normalization.
    """

    one_class = False
    least_score = 0.02
    largest_overlap = 0.5

    def __init__(
        self,
        classes: int,
        anchors: Sequence[int],
        extras: Sequence[nn.Module],
        channels: Sequence[int],
        lite: Sequence[bool],
        *,
        batch_norm: bool,
        same: bool,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.outputs, self.classes, self.anchors = classes, classes - 1, tuple(anchors)
        features: list[nn.Module] = []
        stem = Steps(batch_norm=batch_norm, same=same).then("conv", 3, 32, 3, 2)
        features.append(stem)
        width = 32
        for expansion, out, count, stride in MobileNetV2.SETTINGS:
            for i in range(count):
                features.append(
                    Inverted(
                        width, out, stride if i == 0 else 1, width * expansion, residual=True, batch_norm=batch_norm,
                        same=same,
                    )
                )  # fmt: skip
                width = out
        features.append(Steps(batch_norm=batch_norm, same=same).then("conv", width, 1280, 1))
        self.features = nn.ModuleList(features)
        self.extras = nn.ModuleList(extras)

        def heads(values: int) -> nn.ModuleList:
            return nn.ModuleList(
                Predictor(c, a * values, depthwise=dw, batch_norm=batch_norm, same=same, bias=head_bias)
                for c, a, dw in zip(channels, anchors, lite, strict=True)
            )

        self.cls, self.reg = heads(classes), heads(4)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The six maps that the heads read."""
        found: list[Tensor] = []
        for i, module in enumerate(self.features):
            if i == TAP:
                assert isinstance(module, Inverted)
                expanded = module.expand_only(x)
                found.append(expanded)
                x = module.finish(x, expanded)
            else:
                x = module(x)
        found.append(x)
        for extra in self.extras:
            found.append(extra(found[-1]))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, 300, 300] -> box codes [N, anchors, 4] and class logits [N, anchors, classes].

        Anchors in the order of maps, rows, columns, anchors of a cell.
        """
        boxes, logits = [], []
        for level, cls, reg in zip(self.maps(check_images(x)), self.cls, self.reg, strict=True):
            boxes.append(reg(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            logits.append(cls(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.outputs))
        return torch.cat(boxes, 1), torch.cat(logits, 1)

    def predictions(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes [N, 1917, 4] and scores [N, 1917, classes - 1] of the definitions with TensorFlow's anchors.

        Raises:
            MixbitError: The outputs have another number of anchors.
        """
        anchors = ssd_anchors()
        if outputs[0].shape[1] != len(anchors):
            raise MixbitError(
                f"outputs have {outputs[0].shape[1]} anchors; decoding knows the {len(anchors)} of TensorFlow's, for "
                "images of 300 x 300"
            )
        return ssd_predictions(outputs[0], outputs[1], anchors)

    def head_tensors(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Box codes and class logits."""
        return outputs[0], outputs[1]

    def confidence(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """For box codes and logits the best score of each anchor, [N, anchors, 1]."""
        best = outputs[1][..., 1:].sigmoid().amax(-1, keepdim=True)
        return best, best


def _plain_extras(same: bool, batch_norm: bool, *, depthwise: bool) -> tuple[list[nn.Module], list[int]]:
    """TensorFlow's extra maps: 1x1 down, 3x3 with stride 2 up, the latter depthwise-separable for SSDlite."""
    extras: list[nn.Module] = []
    channels = 1280
    for hidden, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        steps = Steps(batch_norm=batch_norm, same=same).then("reduce", channels, hidden, 1)
        if depthwise:
            steps.then("dw", hidden, hidden, 3, 2, groups=hidden).then("pw", hidden, out, 1)
        else:
            steps.then("conv", hidden, out, 3, 2)
        extras.append(steps)
        channels = out
    return extras, [576, 1280, 512, 256, 256, 128]


def ssd_mobilenet_v2(weights: PathLike | None = None) -> SSD:
    """SSD-MobileNetV2 300 x 300 for 23 Open Images classes (1917 anchors, batch normalization folded), in eval mode.

    Input [N, 3, 300, 300], RGB, x / 127.5 - 1, stretched.

    Args:
        weights: Path of a pack with the graph's L00 ... L71; None leaves random weights.

    Raises:
        MixbitError: The file is of another network.
    """
    extras, channels = _plain_extras(True, False, depthwise=False)
    model = SSD(24, (3, 6, 6, 6, 6, 6), extras, channels, [False] * 6, batch_norm=False, same=True)
    model.coco_classes = tuple(OPEN_IMAGES_TO_COCO.get(i, -1) for i in range(1, 24))
    if weights is not None:
        load_state(model, _ordered_state(model, read_arrays(weights)), weights)
    return model.eval()


def _ordered_state(model: SSD, arrays: Arrays) -> dict[str, Tensor]:
    """L00, L01, ... are the convolutions in the order of the graph: heads right behind the map that they read."""
    order: list[str] = []
    for i, module in enumerate(model.features):
        names = [f"features.{i}.{name}" for name in module._modules]
        if i == TAP:
            order += [names[0], "reg.0.pw", "cls.0.pw", *names[1:]]
        else:
            order += names
    order += ["reg.1.pw", "cls.1.pw"]
    for i in range(len(model.extras)):
        order += [f"extras.{i}.reduce", f"extras.{i}.conv", f"reg.{i + 2}.pw", f"cls.{i + 2}.pw"]
    named = {f"L{i:02}": name for i, name in enumerate(order)}
    state = {}
    for key, value in float_state({k: v for k, v in arrays.items() if k != "graph_json"}).items():
        layer, _, kind = key.partition(".")
        state[f"{named.get(layer, layer)}.{kind}"] = value
    return state


#: Definitions of SSDlite-MobileNetV2.
SSDLITE_VARIANTS = ("pytorch_ssd", "tensorflow")


def ssdlite_mobilenet_v2(
    variant: str = "pytorch_ssd", classes: int | None = None, weights: PathLike | None = None
) -> SSD:
    """SSDlite-MobileNetV2 300 x 300 with batch normalization, in eval mode.

    Args:
        variant: "pytorch_ssd" (VOC, six anchors a cell on maps of 19, 10, 5, 3, 2 and 1 cells: 3000) or "tensorflow"
            (COCO, 1917 anchors).
        classes: Background included; None is 21 and 91.
        weights: Path of a pack; None leaves random weights.

    Raises:
        MixbitError: An unknown variant, or a file of another network.
    """
    check_choice("variant", variant, SSDLITE_VARIANTS)
    if variant == "tensorflow":
        extras, channels = _plain_extras(True, True, depthwise=True)
        model = SSD(classes or 91, (3, 6, 6, 6, 6, 6), extras, channels, [True] * 6, batch_norm=True, same=True)
    else:
        channels = [576, 1280, 512, 256, 256, 64]
        extras = [
            Inverted(c, out, 2, hidden, residual=False, batch_norm=True, same=False)
            for c, out, hidden in zip(channels[1:-1], channels[2:], (256, 128, 128, 64), strict=True)
        ]
        lite = [True, True, True, True, True, False]
        model = SSD(classes or 21, [6] * 6, extras, channels, lite, batch_norm=True, same=False, head_bias=True)
    if weights is not None:
        load_state(model, float_state(read_arrays(weights)), weights)
    return model.eval()
