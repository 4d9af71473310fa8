"""From the outputs of detectors to boxes: anchors, decoding, suppression of overlaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def decode_ssd(codes: Tensor, logits: Tensor, anchors: Tensor, *, score: float, overlap: float) -> list[Found]:
    """Box codes and class logits of SSD as boxes.

    Args:
        codes: [N, A, 4]: y, x, height, width, relative to the anchors with the variances 1/10 and 1/5.
        logits: [N, A, 1 + classes]; column 0 is the background and not used, scores are sigmoids.
        anchors: [A, 4].
        score: Smallest score that counts.
        overlap: Of the suppression.

    Returns:
        For each image its boxes; class 0 is the first column after the background.
    """
    anchors = anchors.to(codes)
    y = codes[..., 0] / 10 * anchors[:, 2] + anchors[:, 0]
    x = codes[..., 1] / 10 * anchors[:, 3] + anchors[:, 1]
    h = (codes[..., 2] / 5).exp() * anchors[:, 2]
    w = (codes[..., 3] / 5).exp() * anchors[:, 3]
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    scores = logits[..., 1:].sigmoid()
    found = []
    for own, confidence in zip(boxes, scores, strict=True):
        anchor, cls = (confidence > score).nonzero(as_tuple=True)
        found.append(suppress(own[anchor], confidence[anchor, cls], cls, overlap))
    return found


def decode_fastestdet(outputs: Tensor, *, score: float, overlap: float) -> list[Found]:
    """FastestDet's map as boxes: the centre is a tanh away from its cell, the size a sigmoid.

    Args:
        outputs: [N, 5 + classes, H, W]: objectness, four values, class shares.
        score: Smallest objectness times class share.
        overlap: Of the suppression.
    """
    height, width = outputs.shape[2:]
    rows = torch.arange(height).reshape(-1, 1)
    columns = torch.arange(width)
    x = (outputs[:, 1].tanh() + columns) / width
    y = (outputs[:, 2].tanh() + rows) / height
    w, h = outputs[:, 3].sigmoid(), outputs[:, 4].sigmoid()
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    best, classes = (outputs[:, :1] * outputs[:, 5:]).max(1)
    found = []
    for own, confidence, cls in zip(boxes, best, classes, strict=True):
        keep = confidence > score
        found.append(suppress(own[keep], confidence[keep], cls[keep], overlap))
    return found


def decode_yolov2(
    outputs: Tensor, anchors: tuple[tuple[float, float], ...], *, score: float, overlap: float
) -> list[Found]:
    """YOLOv2's map as boxes: sigmoid offsets in the cell, exponential sizes of the anchors, softmax classes.

    Args:
        outputs: [N, anchors (5 + classes), H, W].
        anchors: Width and height in cells.
        score: Smallest objectness times class share.
        overlap: Of the suppression.
    """
    count, (height, width) = outputs.shape[0], outputs.shape[2:]
    values = outputs.reshape(count, len(anchors), -1, height, width)
    shapes = torch.tensor(anchors).to(outputs)
    x = (values[:, :, 0].sigmoid() + torch.arange(width)) / width
    y = (values[:, :, 1].sigmoid() + torch.arange(height).reshape(-1, 1)) / height
    w = values[:, :, 2].exp() * shapes[:, 0].reshape(-1, 1, 1) / width
    h = values[:, :, 3].exp() * shapes[:, 1].reshape(-1, 1, 1) / height
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).reshape(count, -1, 4)
    best, classes = (values[:, :, 4:5].sigmoid() * values[:, :, 5:].softmax(2)).max(2)
    found = []
    for own, confidence, cls in zip(boxes, best.reshape(count, -1), classes.reshape(count, -1), strict=True):
        keep = confidence > score
        found.append(suppress(own[keep], confidence[keep], cls[keep], overlap))
    return found
