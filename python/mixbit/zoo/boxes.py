"""From the outputs of detectors to boxes: anchors, decoding, suppression of overlaps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixbit.errors import MixbitError

#: Boxes of one image: float32 [n, 4] (x1, y1, x2, y2 as shares of width and height), scores [n], classes int64 [n].
Found = tuple[Tensor, Tensor, Tensor]


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, overlap: float, limit: int = 300) -> Found:
    """Greedy suppression of overlapping boxes of one class; the best first.

    Args:
        boxes: float32 [n, 4].
        scores: float32 [n].
        classes: int64 [n].
        overlap: Largest intersection over union that stays.
        limit: At most so many boxes.
    """
    from torchvision.ops import batched_nms

    keep = batched_nms(boxes, scores, classes, overlap)[:limit]
    return boxes[keep], scores[keep], classes[keep]


def ssd_anchors(sizes: tuple[int, ...] = (19, 10, 5, 3, 2, 1)) -> Tensor:
    """Anchors of TensorFlow's SSD: [anchors, 4] as centre y, centre x, height, width.

    Scales run from 0.2 to 0.95; a cell of the first map has (0.1, ratio 1), (0.2, 2), (0.2, 1/2), one of the others its
    scale at the ratios 1, 2, 1/2, 3, 1/3 and the mean of its and the next scale at 1.
    """
    scales = [0.2 + 0.15 * k for k in range(len(sizes))] + [1.0]
    rows = []
    for k, size in enumerate(sizes):
        s = scales[k]
        shapes = [(0.1, 1.0), (s, 2.0), (s, 0.5)]
        if k > 0:
            shapes = [(s, r) for r in (1.0, 2.0, 0.5, 3.0, 1 / 3)] + [(math.sqrt(s * scales[k + 1]), 1.0)]
        for row in range(size):
            for column in range(size):
                for scale, ratio in shapes:
                    width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
                    rows.append(((row + 0.5) / size, (column + 0.5) / size, height, width))
    return torch.tensor(rows)


def ssd_predictions(codes: Tensor, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Box codes and class logits of SSD as boxes and scores.

    Args:
        codes: [N, A, 4]: y, x, height, width, relative to the anchors with the variances 1/10 and 1/5.
        logits: [N, A, 1 + classes]; column 0 is the background and not used, scores are sigmoids.
        anchors: [A, 4].

    Returns:
        boxes [N, A, 4] and scores [N, A, classes]; class 0 is the first column after the background.
    """
    anchors = anchors.to(codes)
    y = codes[..., 0] / 10 * anchors[:, 2] + anchors[:, 0]
    x = codes[..., 1] / 10 * anchors[:, 3] + anchors[:, 1]
    h = (codes[..., 2] / 5).exp() * anchors[:, 2]
    w = (codes[..., 3] / 5).exp() * anchors[:, 3]
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1), logits[..., 1:].sigmoid()


def fastestdet_predictions(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """FastestDet's map as boxes and scores: the centre is a tanh away from its cell, the size a sigmoid.

    Args:
        outputs: [N, 5 + classes, H, W]: objectness, four values, class shares.

    Returns:
        boxes [N, H W, 4] and scores [N, H W, classes], objectness times class share.
    """
    height, width = outputs.shape[2:]
    rows = torch.arange(height).reshape(-1, 1)
    columns = torch.arange(width)
    x = (outputs[:, 1].tanh() + columns) / width
    y = (outputs[:, 2].tanh() + rows) / height
    w, h = outputs[:, 3].sigmoid(), outputs[:, 4].sigmoid()
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    return boxes.flatten(1, 2), (outputs[:, :1] * outputs[:, 5:]).flatten(2).mT


def yolov2_predictions(outputs: Tensor, anchors: tuple[tuple[float, float], ...]) -> tuple[Tensor, Tensor]:
    """YOLOv2's map as boxes and scores: sigmoid offsets in the cell, exponential sizes of the anchors, softmax classes.

    Args:
        outputs: [N, anchors (5 + classes), H, W].
        anchors: Width and height in cells.

    Returns:
        boxes [N, anchors H W, 4] and scores [N, anchors H W, classes], objectness times class share.
    """
    count, (height, width) = outputs.shape[0], outputs.shape[2:]
    values = outputs.reshape(count, len(anchors), -1, height, width)
    shapes = torch.tensor(anchors).to(outputs)
    x = (values[:, :, 0].sigmoid() + torch.arange(width)) / width
    y = (values[:, :, 1].sigmoid() + torch.arange(height).reshape(-1, 1)) / height
    w = values[:, :, 2].exp() * shapes[:, 0].reshape(-1, 1, 1) / width
    h = values[:, :, 3].exp() * shapes[:, 1].reshape(-1, 1, 1) / height
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).reshape(count, -1, 4)
    scores = values[:, :, 4:5].sigmoid() * values[:, :, 5:].softmax(2)
    return boxes, scores.movedim(2, -1).reshape(count, boxes.shape[1], -1)


def detection_loss(boxes: Tensor, scores: Tensor, truths: list[Tensor], *, negatives: int = 3) -> Tensor:
    """A loss of a detector's predictions, the same for every kind of detector: what `analysis.fisher` differentiates.

    Every true box takes the prediction that overlaps it most and all that overlap it by more than one half; each pays
    -log of the score of the class and one minus the overlap. Of the predictions that overlap no true box by 0.4, the
    `negatives` times as many with the highest scores (at least one) pay -log(1 - score): hard negatives, as in SSD
    (arXiv 1512.02325, section 2.2).

    Args:
        boxes: float32 [N, A, 4], of `predictions`.
        scores: float32 [N, A, classes].
        truths: For each image float32 [n, 5], class first, in the classes of `scores`.
        negatives: Hard negatives for each positive.

    Returns:
        float32 [], the sum over images.

    Raises:
        MixbitError: There are boxes for another number of images, or a class that the scores do not have.
    """
    from torchvision.ops import box_iou

    if len(truths) != len(scores):
        raise MixbitError(f"truths hold boxes of {len(truths)} images; expected {len(scores)}, as the outputs have")
    for i, true in enumerate(truths):
        if len(true) and not (float(true[:, 0].min()) >= 0 and float(true[:, 0].max()) < scores.shape[2]):
            raise MixbitError(
                f"truths of image {i}: classes run from {true[:, 0].min():g} to {true[:, 0].max():g}; expected 0 to "
                f"{scores.shape[2] - 1}"
            )

    least = 1e-6  # keeps the logarithms finite
    total = scores.new_zeros(())
    for own, confidence, true in zip(boxes, scores, truths, strict=True):
        overlaps = box_iou(own, true[:, 1:])
        taken = overlaps > 0.5
        if len(true):
            taken[overlaps.argmax(0), torch.arange(len(true))] = True
        anchor, match = taken.nonzero(as_tuple=True)
        classes = true[match, 0].long()
        total = total - confidence[anchor, classes].clamp(min=least).log().sum() + (1 - overlaps[anchor, match]).sum()
        free = ~taken.any(1) & ~(overlaps > 0.4).any(1)
        background = confidence[free].amax(1)
        hard = background.topk(min(max(negatives * len(anchor), 1), len(background))).values
        total = total - (1 - hard).clamp(min=least).log().sum()
    return total


class Detector:
    """What the detectors share: decoding, a loss, and how confident each part of the output is.

    A detector says how its outputs become boxes (`predictions`), and which tensors of the output mean one thing each
    (`head_tensors`), for analyses that compare outputs.

    Attributes:
        coco_classes: COCO's class for each class of the scores, -1 where it has none; None if the classes are not
            COCO's.
        classes: How many classes the scores have.
        one_class: Whether a box is of its best class only, or of every class with the score.
        least_score: Smallest score that counts, if `decode` is not told otherwise.
        largest_overlap: Of boxes of one class that both stay, if `decode` is not told otherwise.
    """

    coco_classes: tuple[int, ...] | None = None
    classes: int
    one_class = True
    least_score = 0.01
    largest_overlap = 0.45

    @property
    def label_classes(self) -> int:
        """How many classes labels may have: all of COCO's where `coco_classes` is set, though it may lack some."""
        return self.classes if self.coco_classes is None else 80

    def predictions(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """What `forward` returns as boxes float32 [N, A, 4] and scores [N, A, classes]."""
        raise NotImplementedError

    def head_tensors(self, outputs: Any) -> tuple[Tensor, ...]:
        """The tensors of the output that mean one thing each."""
        raise NotImplementedError

    def confidence(self, outputs: Any) -> tuple[Tensor, ...]:
        """For each tensor of `head_tensors` the best score of its cells or anchors; of a shape that broadcasts."""
        raise NotImplementedError

    def decode(self, outputs: Any, score: float | None = None, overlap: float | None = None) -> list[Found]:
        """Boxes of each image, best first; classes are COCO's where `coco_classes` is set, others are left out.

        Args:
            outputs: What `forward` returns.
            score: Smallest score that counts.
            overlap: Of the suppression, class by class.
        """
        score = self.least_score if score is None else score
        overlap = self.largest_overlap if overlap is None else overlap
        names = None if self.coco_classes is None else torch.tensor(self.coco_classes)
        found = []
        for own, confidence in zip(*self.predictions(outputs), strict=True):
            if self.one_class:
                best, cls = confidence.max(1)
                kept = best > score
                boxes, scores, classes = suppress(own[kept], best[kept], cls[kept], overlap)
            else:
                anchor, cls = (confidence > score).nonzero(as_tuple=True)
                boxes, scores, classes = suppress(own[anchor], confidence[anchor, cls], cls, overlap)
            if names is not None:
                classes = names[classes]
                kept = classes >= 0
                boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
            found.append((boxes, scores, classes))
        return found

    def loss(self, outputs: Any, truths: list[Tensor]) -> Tensor:
        """`detection_loss` of the outputs; truths float32 [n, 5] for each image, in COCO's classes where those are set.

        Boxes of classes that the network does not know are left out.
        """
        boxes, scores = self.predictions(outputs)
        if self.coco_classes is not None:
            own = {c: i for i, c in enumerate(self.coco_classes) if c >= 0}
            truths = [
                torch.tensor([[own[int(row[0])], *row[1:]] for row in true.tolist() if int(row[0]) in own]).reshape(
                    -1, 5
                )
                for true in truths
            ]
        return detection_loss(boxes, scores, truths)
