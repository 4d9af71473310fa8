"""evaluate: metrics, integer simulation, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixbit
from mixbit import Recipe, zoo
from mixbit.errors import MixbitError


class Fixed(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, x):
        return self.logits[: len(x)]


LOGITS = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5], [1, 0, 0, 0, 0, 9]])
X = torch.zeros(3, 1)


def test_named_metrics_are_percent() -> None:
    labels = torch.tensor([0, 1, 5])
    assert mixbit.evaluate(Fixed(LOGITS), [(X, labels)]) == pytest.approx(200 / 3)
    assert mixbit.evaluate(Fixed(LOGITS), [(X, labels)], metric="top5") == pytest.approx(100)


def test_callables_are_averaged_over_images() -> None:
    loader = [(X, 0), (X[:1], 0)]
    each = mixbit.evaluate(Fixed(LOGITS), loader, metric=lambda out, item: out[:, 0])
    assert each == pytest.approx((3 + 0 + 1 + 3) / 4)
    mean = mixbit.evaluate(Fixed(LOGITS), loader, metric=lambda out, item: float(out[:, 0].mean()))
    assert mean == pytest.approx(each)


def test_resnet20_at_eight_bits_keeps_its_accuracy() -> None:
    model = zoo.cifar_resnet(20, zoo.data_dir() / "weights/cifar10_resnet20_fp32.npz")
    images, labels = zoo.cifar10("test")
    loader = list(zip(images.split(100), labels.split(100), strict=True))
    calibration = list(zoo.cifar10("train", 128)[0].split(64))
    reference = mixbit.evaluate(model, loader)
    quantized = mixbit.fold_batchnorm_(copy.deepcopy(model), images[:2])
    mixbit.prepare_(quantized, Recipe.uniform(mixbit.layers(quantized, images[:2]).names))
    mixbit.calibrate_(quantized, calibration, example=images[:2])
    assert abs(mixbit.evaluate(quantized, loader) - reference) <= 1.0
    assert abs(mixbit.evaluate(quantized, loader, integer=True) - reference) <= 1.0


@pytest.mark.parametrize(
    ("loader", "options", "complaint"),
    [
        ([], {}, "loader is empty"),
        (iter([1]), {}, "one-shot iterator"),
        ([X], {}, "needs items .input, labels."),
        ([(X, torch.tensor([0, 1, 6]))], {}, "labels run from 0 to 6; expected classes from 0 to 5"),
        ([(X, torch.tensor([0, -1, 2]))], {}, "labels run from -1"),
        ([(X, torch.tensor([0, 1]))], {}, "labels have shape"),
        ([(X, torch.tensor([0, 1, 2]))], {"metric": "top2"}, "did you mean"),
        ([(X, 0)], {"metric": lambda out, item: out[:2, 0]}, "2 scores for 3 images"),
        ([(X, 0)], {"metric": lambda out, item: float("nan")}, "metric returned NaN"),
        ([(X, torch.tensor([0, 1, 2]))], {"integer": True}, "no prepared layers"),
    ],
)
def test_bad_input_is_named(loader, options: dict, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        mixbit.evaluate(Fixed(LOGITS), loader, **options)


def test_bad_models_are_named() -> None:
    good = [(X, torch.tensor([0, 1, 2]))]
    with pytest.raises(MixbitError, match="training mode"):
        mixbit.evaluate(Fixed(LOGITS).train(), good)
    with pytest.raises(MixbitError, match="output holds NaN"):
        mixbit.evaluate(Fixed(LOGITS * float("nan")), good)
    with pytest.raises(MixbitError, match=r"needs logits"):
        mixbit.evaluate(Fixed(LOGITS[:, 0]), good)
