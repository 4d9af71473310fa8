"""Average precision: written-out cases, pycocotools, a real detector, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixbit
from mixbit import zoo
from mixbit.errors import MixbitError
from mixbit.evaluation.detection import average_precision, coco_map, overlaps

BOX, FAR = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]


def found(*rows: tuple[float, int, list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([r[2] for r in rows]).reshape(-1, 4),
        torch.tensor([r[0] for r in rows]),
        torch.tensor([r[1] for r in rows], dtype=torch.int64),
    )


def truth(*rows: tuple[float, list[float]]) -> torch.Tensor:
    return torch.tensor([[float(c), *box] for c, box in rows]).reshape(-1, 5)


def test_overlap() -> None:
    a, b = torch.tensor([BOX, FAR]), torch.tensor([BOX, [0.3, 0.1, 0.7, 0.5]])
    assert overlaps(a, b).flatten().tolist() == pytest.approx([1.0, 1 / 3, 0.0, 0.0])


def test_precision_of_written_out_cases() -> None:
    everything = [truth((3, BOX), (3, FAR))]
    assert average_precision([found((0.9, 3, BOX), (0.8, 3, FAR))], everything) == pytest.approx(100)
    # A false box between: precision 1 up to recall 1/2, then 2/3.
    between = [found((0.9, 3, BOX), (0.85, 3, [0.0, 0.0, 0.05, 0.05]), (0.8, 3, FAR))]
    assert average_precision(between, everything) == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    # The second box on one object is wrong; another class does not help.
    twice = [found((0.9, 3, BOX), (0.8, 3, BOX), (0.95, 4, FAR))]
    assert average_precision(twice, everything) == pytest.approx(50)
    # The mean over classes with a true box; classes that nobody asks for are left out.
    two = [truth((3, BOX), (7, FAR))]
    assert average_precision([found((0.9, 3, BOX))], two) == pytest.approx(50)
    assert average_precision([found((0.9, 3, BOX))], two, classes=[3, 5]) == pytest.approx(100)
    assert average_precision([found()], two) == 0.0
    assert average_precision([found((0.9, 3, BOX))], [truth()]) == 0.0


def test_pycocotools_agrees_where_both_are_simple() -> None:
    everything = [truth((3, BOX), (3, FAR)), truth()]
    boxes = [found((0.9, 3, BOX), (0.8, 3, FAR)), found((0.1, 3, BOX))]
    assert coco_map(boxes, everything) == pytest.approx(100)
    assert average_precision(boxes, everything) == pytest.approx(100)
    # 0.4 x 0.4 against 0.4 x 0.3 overlaps by 3/4: right at 0.50 ... 0.75 alone.
    near = [found((0.9, 3, [0.1, 0.1, 0.5, 0.4])), found()]
    assert coco_map(near, [truth((3, BOX)), truth()]) == pytest.approx(60, abs=0.1)
    assert coco_map([found(), found()], everything) == 0.0
    assert coco_map(boxes, everything, classes=[4]) == 0.0


def detector() -> tuple[torch.nn.Module, list]:
    model = zoo.fastestdet(zoo.data_dir() / "weights/fastestdet_coco_fp32.npz")
    images, boxes = zoo.coco("val", network="fastestdet")
    return model, [(images[i : i + 16], boxes[i : i + 16]) for i in range(0, len(images), 16)]


def test_a_real_detector_float_and_quantized() -> None:
    model, loader = detector()
    exact = mixbit.evaluate(model, loader, "ap50")
    assert 20 < exact < 60  # 32 images; 32.3 on all 177
    assert 0.4 * exact < mixbit.evaluate(model, loader, "coco_map") < 0.8 * exact
    calibration, _ = zoo.coco("train", network="fastestdet")
    names = [layer.name for layer in mixbit.layers(model, calibration[:1])]
    mixbit.prepare_(model, mixbit.Recipe.uniform(names, weight=8, act=8), calibration[:1])
    mixbit.calibrate_(model, [calibration])
    assert mixbit.evaluate(model, loader, "ap50") == pytest.approx(exact, abs=5)


@pytest.mark.parametrize(
    ("boxes", "complaint"),
    [
        (None, "got a Tensor .* without boxes"),
        ([torch.zeros(0, 5)], "images: got 1 entries; expected one Tensor"),
        (torch.zeros(2, 5), "got a Tensor"),
        ([torch.zeros(0, 5), torch.zeros(3, 4)], r"boxes of image 1: got shape \(3, 4\); expected \[n, 5\]"),
        ([[], []], "boxes of image 0: got a list"),
        ([truth(), truth((80, BOX))], "boxes of image 1: class 80; expected a whole number from 0 to 79"),
        ([truth((-1, BOX)), truth()], "boxes of image 0: class -1; expected a whole number from 0"),
        ([truth((1.5, BOX)), truth()], "boxes of image 0: class 1.5; expected a whole number"),
        ([truth((float("nan"), BOX)), truth()], "boxes of image 0: class nan; expected a whole number"),
        ([truth((1, BOX), (1, [10.0, 20.0, 90.0, 80.0])), truth()], r"corners \(10, 20\).*expected .*not pixels"),
        ([truth(), truth((1, [0.5, 0.1, 0.1, 0.5]))], r"boxes of image 1: corners \(0.5, 0.1\).*expected x1 <= x2"),
        ([truth((1, [0.1, 0.1, float("nan"), 0.5])), truth()], r"corners \(0.1, 0.1\) and \(nan, 0.5\)"),
    ],
)
def test_bad_boxes_are_named(boxes, complaint: str) -> None:
    model = zoo.fastestdet()
    images = torch.zeros(2, 3, 32, 32)
    item = images if boxes is None else (images, boxes)
    with pytest.raises(MixbitError, match=complaint):
        mixbit.evaluate(model, [item], "ap50")


def test_a_classifier_is_no_detector() -> None:
    with pytest.raises(MixbitError, match=r"needs a model with decode\(outputs\); ResNet8 has none"):
        mixbit.evaluate(zoo.resnet8(), [(torch.zeros(1, 3, 32, 32), [torch.zeros(0, 5)])], "coco_map")


def test_a_detector_has_no_top1() -> None:
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        MixbitError, match="metric='top1' needs logits .*detectors have the metrics 'coco_map' and 'ap50'"
    ):
        mixbit.evaluate(zoo.fastestdet(), [(images, [torch.zeros(0, 5)])])


class Finds(nn.Module):
    """A detector that finds in each image the boxes that its first pixel names."""

    def __init__(self, *boxes) -> None:
        super().__init__()
        self.boxes = boxes
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, 0]

    def decode(self, outputs: torch.Tensor) -> list:
        return [self.boxes[int(value)] for value in outputs]


@pytest.mark.parametrize("metric", ["ap50", "coco_map"])
def test_an_image_without_boxes_counts_what_is_found_in_it_as_false(metric: str) -> None:
    model = Finds(found((0.8, 3, BOX)), found((0.9, 3, BOX)), found())
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)

    def score(picked: list[int], truths: list, batch: int = 3) -> float:
        x = images[picked]
        return mixbit.evaluate(
            model, [(x[i : i + batch], truths[i : i + batch]) for i in range(0, len(x), batch)], metric
        )

    right = truth((3, BOX))
    assert score([0], [right]) == pytest.approx(100)
    # The false box has the higher score: precision 1/2 at every recall, however the images are batched.
    assert score([0, 1], [right, truth()]) == pytest.approx(50)
    assert score([0, 1], [right, truth()], batch=1) == pytest.approx(50)
    # Nothing to find and nothing found changes nothing; without any true box there is no precision.
    assert score([0, 2], [right, truth()]) == pytest.approx(100)
    assert score([1, 2], [truth(), truth()]) == 0.0


def test_a_real_detector_on_an_image_without_boxes() -> None:
    model, _ = detector()
    images, boxes = zoo.coco("val", network="fastestdet")
    empty = next(i for i, own in enumerate(boxes) if len(own) == 0)
    assert mixbit.evaluate(model, [(images[empty : empty + 1], [boxes[empty]])], "ap50") == 0.0
    full = [(images[:4], boxes[:4])]
    with_empty = [*full, (images[empty : empty + 1], [boxes[empty]])]
    assert 0 < mixbit.evaluate(model, with_empty, "ap50") <= mixbit.evaluate(model, full, "ap50")
