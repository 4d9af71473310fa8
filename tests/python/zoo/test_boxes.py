"""Decoding of detectors: anchors, formulas on written-out cells, suppression."""

from __future__ import annotations

import math

import pytest
import torch

from mixbit import zoo
from mixbit.errors import MixbitError
from mixbit.zoo.boxes import decode_fastestdet, decode_ssd, decode_yolov2, ssd_anchors, suppress
from mixbit.zoo.yolov2 import VOC_ANCHORS


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
    ((boxes, scores, classes),) = decode_ssd(codes, logits, anchors, score=0.02, overlap=0.5)
    # centre y 0.52, centre x 0.38, height 0.4, width 0.1
    assert boxes.tolist() == [pytest.approx([0.33, 0.32, 0.43, 0.72])]
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])
    assert classes.tolist() == [1]


def test_fastestdet_boxes() -> None:
    out = torch.zeros(2, 7, 2, 4)
    out[0, 0, 1, 2] = 0.9
    out[0, 1, 1, 2] = math.atanh(0.5)
    out[0, 6, 1, 2] = 0.8
    first, second = decode_fastestdet(out, score=0.1, overlap=0.5)
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
    ((boxes, scores, classes),) = decode_yolov2(out, VOC_ANCHORS, score=0.1, overlap=0.5)
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
    with torch.no_grad(), pytest.raises(MixbitError, match="3000 anchors; decode knows the 1917"):
        model.decode(model(torch.zeros(1, 3, 300, 300)))
    model = zoo.ssdlite_mobilenet_v2("tensorflow")
    with torch.no_grad():
        assert len(model.decode(model(torch.zeros(2, 3, 300, 300)), score=0.6)) == 2
