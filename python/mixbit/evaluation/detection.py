"""Average precision of detections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Boxes of one image as a detector's `decode` gives them: [n, 4], scores [n], classes [n].
Found = tuple[Tensor, Tensor, Tensor]


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [n, 4] and [m, 4] as [n, m]."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(t[:, 2:] - t[:, :2]).clamp(min=0).prod(-1) for t in (a, b)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp(min=1e-12)


def average_precision(
    found: Sequence[Found], truths: Sequence[Tensor], classes: Sequence[int] | None = None, overlap: float = 0.5
) -> float:
    """Mean over classes of the area under the precision-recall curve, in percent.

    All-point interpolation: at each recall the best precision at that recall or beyond (VOC since 2010). A box is right
    if it overlaps a yet unfound one of its class in its image; boxes are taken by falling score.

    Args:
        found: Boxes of each image.
        truths: For each image float [n, 5], class first.
        classes: Classes that count; None takes all. Those without a true box are left out of the mean.
        overlap: Smallest intersection over union that counts as found.

    Returns:
        Percent; 0 if no class has a true box.
    """
    present = sorted({int(c) for own in truths for c in own[:, 0].tolist()})
    wanted = [c for c in present if classes is None or c in set(classes)]
    return 100.0 * sum(_one_class(found, truths, c, overlap) for c in wanted) / max(1, len(wanted))


def _one_class(found: Sequence[Found], truths: Sequence[Tensor], cls: int, overlap: float) -> float:
    scores: list[float] = []
    right: list[bool] = []
    total = 0
    for (boxes, confidences, classes), own in zip(found, truths, strict=True):
        true = own[own[:, 0] == cls, 1:]
        total += len(true)
        mine = classes == cls
        order = confidences[mine].argsort(descending=True, stable=True)
        taken = torch.zeros(len(true), dtype=torch.bool)
        matrix = overlaps(boxes[mine][order], true)
        for row, score in zip(matrix, confidences[mine][order].tolist(), strict=True):
            best = int(row.argmax()) if len(true) else -1
            hit = best >= 0 and float(row[best]) >= overlap and not bool(taken[best])
            if hit:
                taken[best] = True
            scores.append(score)
            right.append(hit)
    if total == 0 or not scores:
        return 0.0
    order = torch.tensor(scores).argsort(descending=True, stable=True)
    hits = torch.tensor(right, dtype=torch.float64)[order].cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    recall = hits / total
    # The best precision from here on.
    precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision * torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))).sum())


def coco_map(found: Sequence[Found], truths: Sequence[Tensor], classes: Sequence[int] | None = None) -> float:
    """COCO's mean average precision over overlaps 0.50 ... 0.95 in percent, by pycocotools.

    Args:
        found: Boxes of each image, as shares of width and height.
        truths: For each image float [n, 5], class first.
        classes: Classes that count; None takes all.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    side = 1000.0  # areas matter only to the breakdown by size, which is not used
    allowed = None if classes is None else set(classes)

    def entry(image: int, cls: int, box: list[float]) -> dict[str, Any]:
        x1, y1, x2, y2 = (side * v for v in box)
        return {"image_id": image, "category_id": cls, "bbox": [x1, y1, x2 - x1, y2 - y1]}

    annotations: list[dict[str, Any]] = []
    for i, own in enumerate(truths):
        for row in own.tolist():
            if allowed is None or int(row[0]) in allowed:
                box = entry(i, int(row[0]), row[1:])
                area = box["bbox"][2] * box["bbox"][3]
                annotations.append(box | {"id": len(annotations) + 1, "iscrowd": 0, "area": area})
    results = [
        entry(i, int(cls), box) | {"score": float(score)}
        for i, (boxes, scores, labels) in enumerate(found)
        for box, score, cls in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        if allowed is None or int(cls) in allowed
    ]
    if not annotations or not results:
        return 0.0
    categories = sorted({a["category_id"] for a in annotations} | {r["category_id"] for r in results})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": c} for c in categories],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100.0 * max(0.0, float(evaluation.stats[0]))
