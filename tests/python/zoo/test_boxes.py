"""Decoding of detectors: anchors, formulas on written-out cells, suppression."""

from __future__ import annotations

import math

import pytest
import torch

from mixbit import zoo
from mixbit.errors import MixbitError
from mixbit.zoo.boxes import (
    Detector,
    detection_loss,
    fastestdet_predictions,
    ssd_anchors,
    ssd_predictions,
    suppress,
    yolov2_predictions,
)
from mixbit.zoo.yolov2 import VOC_ANCHORS


class Predicted(Detector):
    """A detector whose outputs are its predictions."""

    def predictions(self, outputs):
        return outputs


def decoded(predictions, score: float, overlap: float = 0.5, one_class: bool = True):
    detector = Predicted()
    detector.one_class = one_class
    return detector.decode(predictions, score, overlap)


def test_anchors() -> None:
    anchors = ssd_anchors()
    assert anchors.shape == (1917, 4)
    assert anchors[0].tolist() == pytest.approx([0.5 / 19, 0.5 / 19, 0.1, 0.1])
    assert anchors[1].tolist() == pytest.approx([0.5 / 19, 0.5 / 19, 0.2 / math.sqrt(2), 0.2 * math.sqrt(2)])
    first_of_second = 19 * 19 * 3
    assert anchors[first_of_second].tolist() == pytest.approx([0.05, 0.05, 0.35, 0.35])
    assert anchors[first_of_second + 5, 2] == pytest.approx(math.sqrt(0.35 * 0.5))
    assert anchors[-1].tolist() == pytest.approx([0.5, 0.5, math.sqrt(0.95), math.sqrt(0.95)])


def test_ssd_boxes() -> None:
    anchors = torch.tensor([[0.5, 0.4, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1]])
    codes = torch.tensor([[[1.0, -2.0, 5 * math.log(2), 0.0], [0.0, 0.0, 0.0, 0.0]]])
    logits = torch.tensor([[[9.0, -9.0, 2.0], [9.0, -9.0, -9.0]]])
    ((boxes, scores, classes),) = decoded(ssd_predictions(codes, logits, anchors), 0.02, one_class=False)
    # centre y 0.52, centre x 0.38, height 0.4, width 0.1
    assert boxes.tolist() == [pytest.approx([0.33, 0.32, 0.43, 0.72])]
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])
    assert classes.tolist() == [1]


def test_fastestdet_boxes() -> None:
    out = torch.zeros(2, 7, 2, 4)
    out[0, 0, 1, 2] = 0.9
    out[0, 1, 1, 2] = math.atanh(0.5)
    out[0, 6, 1, 2] = 0.8
    first, second = decoded(fastestdet_predictions(out), 0.1)
    # centre ((0.5 + 2) / 4, (0 + 1) / 2), size 0.5 x 0.5
    assert first[0].tolist() == [pytest.approx([0.375, 0.25, 0.875, 0.75])]
    assert first[1].tolist() == pytest.approx([0.72])
    assert first[2].tolist() == [1]
    assert len(second[0]) == 0


def test_yolov2_boxes() -> None:
    out = torch.full((1, 5 * 7, 3, 3), -20.0)
    values = out.view(1, 5, 7, 3, 3)
    values[0, 1, :4, 0, 2] = torch.tensor([0.0, 0.0, math.log(0.5), 0.0])
    values[0, 1, 4:, 0, 2] = torch.tensor([20.0, 20.0, -20.0])
    ((boxes, scores, classes),) = decoded(yolov2_predictions(out, VOC_ANCHORS), 0.1)
    w, h = VOC_ANCHORS[1][0] / 2 / 3, VOC_ANCHORS[1][1] / 3
    x, y = 2.5 / 3, 0.5 / 3
    assert boxes.tolist() == [pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], rel=1e-5)]
    assert scores.tolist() == pytest.approx([1.0])
    assert classes.tolist() == [0]


def test_overlaps_are_suppressed_class_by_class() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.9], [0.5, 0.5, 0.6, 0.6]])
    scores = torch.tensor([0.5, 0.9, 0.4, 0.1])
    kept = suppress(boxes, scores, torch.tensor([0, 0, 1, 0]), 0.5)
    assert kept[1].tolist() == pytest.approx([0.9, 0.4, 0.1])
    assert len(suppress(boxes, scores, torch.zeros(4, dtype=torch.int64), 0.5, limit=1)[0]) == 1
    assert len(suppress(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5)[0]) == 0


def test_only_the_definition_with_known_anchors_is_decoded() -> None:
    model = zoo.ssdlite_mobilenet_v2()
    with torch.no_grad(), pytest.raises(MixbitError, match="3000 anchors; decoding knows the 1917"):
        model.decode(model(torch.zeros(1, 3, 300, 300)))
    model = zoo.ssdlite_mobilenet_v2("tensorflow")
    with torch.no_grad():
        assert len(model.decode(model(torch.zeros(2, 3, 300, 300)), score=0.6)) == 2


def test_classes_are_mapped_and_a_box_may_have_several() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])
    scores = torch.tensor([[[0.9, 0.6, 0.0], [0.2, 0.1, 0.7]]])
    (found,) = decoded((boxes, scores), 0.5, one_class=False)
    assert found[2].tolist() == [0, 2, 1]
    (found,) = decoded((boxes, scores), 0.5)
    assert found[2].tolist() == [0, 2]
    detector = Predicted()
    detector.coco_classes = (17, -1, -1)
    (found,) = detector.decode((boxes, scores), 0.5)
    assert found[2].tolist() == [17]


def test_the_loss_is_the_written_out_sum() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.4], [0.6, 0.6, 1.0, 1.0], [0.7, 0.0, 1.0, 0.2]]])
    scores = torch.tensor([[[0.8, 0.1], [0.4, 0.3], [0.2, 0.6], [0.3, 0.05]]])
    truth = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5]])
    # Both boxes of the first corner overlap by more than one half; two are background, both taken as hard negatives.
    expected = -math.log(0.8) - math.log(0.4) + 0.0 + (1 - 0.8) - math.log(1 - 0.6) - math.log(1 - 0.3)
    assert float(detection_loss(boxes, scores, [truth])) == pytest.approx(expected, rel=1e-5)
    # Without a true box the highest score is the one negative; a lone true box takes what overlaps it most.
    assert float(detection_loss(boxes, scores, [truth[:0]])) == pytest.approx(-math.log(1 - 0.8), rel=1e-5)
    far = torch.tensor([[1.0, 0.55, 0.55, 0.7, 0.7]])
    overlap = 0.1 * 0.1 / (0.15**2 + 0.4**2 - 0.1**2)
    wanted = -math.log(0.6) + (1 - overlap) - sum(math.log(1 - s) for s in (0.8, 0.4, 0.3))
    assert float(detection_loss(boxes, scores, [far])) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["ssd_mobilenet_v2", "fastestdet", "yolov2"])
def test_heads_confidence_and_loss_of_each_detector(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(zoo, name)()
    size = {"ssd_mobilenet_v2": 300, "fastestdet": 352, "yolov2": 64}[name]
    outputs = model(torch.randn(2, 3, size, size))
    heads, confidence = model.head_tensors(outputs), model.confidence(outputs)
    whole = outputs if isinstance(outputs, torch.Tensor) else torch.cat([o.flatten() for o in outputs])
    assert sum(h.numel() for h in heads) == whole.numel()
    best = model.predictions(outputs)[1].amax(-1)
    for head, weight in zip(heads, confidence, strict=True):
        assert torch.broadcast_shapes(head.shape, weight.shape) == head.shape
        assert torch.equal(weight.flatten(1).sort(1).values, best.sort(1).values)
    truths = [torch.tensor([[0.0, 0.1, 0.1, 0.6, 0.7]]), torch.zeros(0, 5)]
    loss = model.loss(outputs, truths)
    loss.backward()
    assert math.isfinite(float(loss))
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n.endswith("weight")
    )


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("fastestdet", (1, 3, 350, 352), r"shape \(1, 3, 350, 352\); expected images .* multiples of 32"),
        ("fastestdet", (1, 1, 352, 352), r"shape \(1, 1, 352, 352\); expected images \[N, 3, H, W\]"),
        ("fastestdet", (3, 352, 352), r"shape \(3, 352, 352\); expected images \[N, 3, H, W\]"),
        ("yolov2", (1, 3, 64, 65), "multiples of 32"),
        ("ssd_mobilenet_v2", (1, 300, 300, 3), r"shape \(1, 300, 300, 3\); expected images \[N, 3, H, W\]$"),
    ],
)
def test_images_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], complaint: str) -> None:
    with torch.no_grad(), pytest.raises(MixbitError, match=complaint):
        getattr(zoo, name)()(torch.zeros(shape))


def test_labels_have_the_classes_of_coco_or_of_the_network() -> None:
    assert zoo.fastestdet().label_classes == 80
    assert zoo.ssd_mobilenet_v2().label_classes == 80  # 23 Open Images classes, 14 of them COCO's
    assert zoo.ssdlite_mobilenet_v2().label_classes == 20
    assert zoo.yolov2(3).label_classes == 3


def test_truths_that_do_not_fit_the_outputs_are_named() -> None:
    boxes, scores = torch.zeros(2, 3, 4), torch.full((2, 3, 2), 0.5)
    none = torch.zeros(0, 5)
    with pytest.raises(MixbitError, match="truths hold boxes of 1 images; expected 2"):
        detection_loss(boxes, scores, [none])
    with pytest.raises(MixbitError, match="truths of image 1: classes run from 0 to 2; expected 0 to 1"):
        detection_loss(boxes, scores, [none, torch.tensor([[0.0, 0, 0, 1, 1], [2.0, 0, 0, 1, 1]])])
