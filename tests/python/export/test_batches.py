"""Exporters take what loaders give: tensors, (x, y) pairs, dicts of one tensor; other items are refused with advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import Recipe
from mixbit.errors import MixbitError


class Keyword(nn.Module):
    """Called as model(pixel_values=...), and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, pixel_values, labels=None, scaled=False):
        x = torch.relu(self.norm(self.conv(pixel_values))).mean((2, 3))
        return {"logits": self.head(x) * (2 if scaled else 1)}


def prepared(batches: list[Any]) -> nn.Module:
    torch.manual_seed(0)
    model = mixbit.fold_batchnorm_(Keyword().eval(), batches[0])
    mixbit.prepare_(model, Recipe.uniform(mixbit.layers(model, batches[0]).names), batches[0])
    return mixbit.calibrate_(model, batches, example=batches[0])


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_dicts_of_one_tensor_go_all_the_way(tmp_path: Path) -> None:
    x, y = images(), torch.tensor([0, 1, 2, 3])
    item = {"pixel_values": x}
    model, plain = prepared([item]), prepared([(x, y)])
    expected = mixbit.export.reference(plain, x)(x)
    for batch in (item, (item, y), x, (x, y), [x, y]):
        for made in (mixbit.export.reference(model, item)(batch), mixbit.export.simulation(model, item)(batch)):
            assert np.array_equal(np.asarray(made[0]), expected[0])
        assert np.array_equal(mixbit.export.runner(mixbit.export.program(model, batch))(batch)[0], expected[0])
    mixbit.export.integer(model, item, tmp_path / "m.mixbit")
    assert np.array_equal(mixbit.runtime.Network(tmp_path / "m.mixbit")(x.numpy())[0], expected[0])
    report = mixbit.export.verify(tmp_path / "m.mixbit", model, [item, (item, y)])
    assert (report.images, report.mismatches, report.accuracy) == (8, 0, None)
    # Arguments that are no tensors are passed on.
    scaled = mixbit.export.reference(model, {"pixel_values": x, "scaled": False})
    assert np.array_equal(scaled(x)[0], expected[0])


def test_onnx_names_its_input_after_the_argument(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    item = {"pixel_values": images()}
    model = prepared([item])
    mixbit.export.onnx(model, item, tmp_path / "m.onnx")
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == ["pixel_values"]
    assert mixbit.export.verify(tmp_path / "m.onnx", model, [item]).mismatches == 0


def test_other_items_are_refused_with_advice() -> None:
    x = images()
    item = {"pixel_values": x}
    model = prepared([item])
    labelled = {"pixel_values": x, "labels": torch.zeros(4)}
    advice = (
        r"expected a Tensor \[N, \.\.\.\], a tuple whose first .* a dict of keyword arguments with one, as .*labels"
    )
    with pytest.raises(MixbitError, match=rf"example is a dict of 2 tensors \('pixel_values', 'labels'\).*{advice}"):
        mixbit.calibrate_(model, [labelled], example=labelled)
    with pytest.raises(MixbitError, match=rf"example is a dict of 2 tensors .*{advice}"):
        mixbit.export.program(model, labelled)
    with pytest.raises(MixbitError, match=rf"batches: an item is a dict of 2 tensors .*{advice}"):
        mixbit.export.reference(model, item)(labelled)
    with pytest.raises(MixbitError, match=r"example is a dict of 0 tensors \(none\)"):
        mixbit.export.reference(model, {"scaled": True})
    with pytest.raises(MixbitError, match="example is a list; an integer network has one input tensor"):
        mixbit.export.reference(model, ([x, x], 3))
