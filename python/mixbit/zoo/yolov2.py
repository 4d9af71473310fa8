"""YOLOv2 (Redmon and Farhadi, arXiv 1612.08242) for VOC, as in darknet's cfg/yolov2-voc.cfg."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixbit.errors import MixbitError
from mixbit.files import PathLike
from mixbit.zoo.boxes import Detector, yolov2_predictions
from mixbit.zoo.layers import Convs, check_images
from mixbit.zoo.weights import float_state, load_state, read_arrays

#: Width and height of the anchors in cells.
VOC_ANCHORS = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071))


class YoloV2(Detector, Convs):
    """Darknet-19 with a passthrough: conv1 ... conv23, batch normalization and leaky ReLU behind all but the last.

    Args:
        classes: Classes; the output has 5 (5 + classes) channels.
    """

    #: (output channels, kernel) of conv1 ... conv20; "M" is a pool by 2.
    TRUNK = (
        (32, 3), "M", (64, 3), "M", (128, 3), (64, 1), (128, 3), "M", (256, 3), (128, 1), (256, 3), "M",
        (512, 3), (256, 1), (512, 3), (256, 1), (512, 3), "M",
        (1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3), (1024, 3), (1024, 3),
    )  # fmt: skip
    #: Its output goes around the rest.
    PASSTHROUGH = "conv13"

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.classes = classes
        channels, number = 3, 0
        self.order: list[str] = []
        for entry in self.TRUNK:
            if isinstance(entry, str):
                self.order.append(entry)
                continue
            number += 1
            out, kernel = entry
            self.add(f"conv{number}", channels, out, kernel)
            self.order.append(f"conv{number}")
            channels = out
        self.add("conv21", 512, 64, 1)
        self.add("conv22", 4 * 64 + 1024, 1024, 3)
        self.add("conv23", 1024, len(VOC_ANCHORS) * (5 + classes), 1, norm=False)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.leaky_relu(self.run(name, x), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] (multiples of 32) -> [N, 5 (5 + classes), H / 32, W / 32]."""
        around = x = check_images(x, 32)
        for name in self.order:
            x = F.max_pool2d(x, 2) if name == "M" else self._layer(name, x)
            if name == self.PASSTHROUGH:
                around = x
        around = F.pixel_unshuffle(self._layer("conv21", around), 2)
        x = self._layer("conv22", torch.cat([around, x], 1))
        return self.run("conv23", x)

    def predictions(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """All boxes [N, 5 H W, 4] and their scores [N, 5 H W, classes]."""
        return yolov2_predictions(outputs, VOC_ANCHORS)

    def head_tensors(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Box values, objectness and class logits apart, [N, 5, ., H, W] each."""
        values = outputs.reshape(outputs.shape[0], len(VOC_ANCHORS), -1, *outputs.shape[2:])
        return values[:, :, :4], values[:, :, 4:5], values[:, :, 5:]

    def confidence(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each tensor of `head_tensors` the best score of its anchors, [N, 5, 1, H, W]."""
        best = self.predictions(outputs)[1].amax(-1).reshape(self.head_tensors(outputs)[1].shape)
        return best, best, best


def yolov2(classes: int = 20, weights: PathLike | None = None) -> YoloV2:
    """YOLOv2 in eval mode; input [N, 3, 416, 416] (any multiple of 32), RGB, x / 255.

    Args:
        classes: 20 for VOC, 80 for COCO (whose anchors differ).
        weights: Path of a pack; None leaves random weights.

    Raises:
        MixbitError: No classes, or a file of another network.
    """
    if classes < 1:
        raise MixbitError(f"classes={classes}: expected at least 1")
    model = YoloV2(classes)
    if weights is not None:
        load_state(model, float_state(read_arrays(weights)), weights)
    return model.eval()
