"""How far weights are from the thresholds of their grids: values, histograms, errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mixbit
from mixbit.errors import MixbitError
from mixbit.report import distance_pictures
from mixbit.retrain import threshold_distances, threshold_histograms


def layer(weights: list[float], scale: float, bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    model.to(dtype)
    precision = mixbit.LayerPrecision(
        weight=bits, act=None, granularity="per_tensor", rounding="half_up", narrow_range=False
    )
    mixbit.prepare_(model, mixbit.Recipe(default=precision))
    model[0].weight_quantizer.set_(torch.tensor([scale]))
    return model


def test_golden_distances_of_the_specification() -> None:
    model = layer([0.25, 0.0, 0.3, -0.20, 0.125], 0.5, 4)
    (found,) = threshold_distances(model).values()
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.1, 0.1, 0.25]]))
    # With an extra bit the old threshold is a level, and new thresholds are at its sides.
    model[0].weight_quantizer.set_extra_bits_(torch.tensor([[1, 0, 0, 0, 1]], dtype=torch.uint8))
    (found,) = threshold_distances(model).values()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.1, 0.1, 0.0]]))


def test_beyond_the_outermost_threshold_it_is_the_distance_from_it() -> None:
    # The levels are -2 ... 1, the thresholds -1.5, -0.5, 0.5.
    (found,) = threshold_distances(layer([0.75, 0.9, 1.0, 40.0, -1.6, -7.0], 1.0, 2)).values()
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.4, 0.5, 0.5, 0.1, 0.5]]))


def test_a_histogram_counts_every_weight_once() -> None:
    model = layer([0.5, 0.5625, 0.625, 0.75, 0.99, 1.0, float("nan"), -1.5], 1.0, 2)
    assert threshold_histograms(model, 4) == {"0": [3, 1, 1, 3]}
    assert threshold_histograms(model, 1) == {"0": [8]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_of_low_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    model = layer([0.3, 0.7, -0.11], 1.0, 3, dtype)
    (found,) = threshold_distances(model).values()
    assert found.dtype == torch.float32
    v = model[0].weight.detach().float()
    assert torch.equal(found, (v - (torch.floor(v) + 0.5)).abs())


def test_layers_that_are_left_float_are_left_out() -> None:
    model = layer([0.1, 0.2], 1.0, 2)
    model[0].weight_quantizer.enabled = False
    assert threshold_distances(model) == {}
    assert threshold_histograms(nn.Linear(2, 2)) == {}


def test_pictures_show_every_bin_and_layer() -> None:
    histograms = {"before": {"one": [0, 10], "two": [5, 5]}, "after": {"one": [10, 0], "two": [0, 0]}}
    overall, each = distance_pictures(histograms)
    for text in ("25.0 %", "75.0 %", "100.0 %", "0.0 %", "0.00 to 0.25", "0.25 to 0.50"):
        assert text in overall, text
    assert ">one<" in each
    assert ">two<" not in each  # has no weights
    assert re.search("100 %", each)
    assert distance_pictures({"before": {}, "after": {}}) == []


def test_errors() -> None:
    model = layer([0.1, 0.2], 1.0, 2)
    for bins in (0, -1, 2.5, True):
        with pytest.raises(MixbitError, match=f"bins={bins!r}: expected a whole number above 0"):
            threshold_histograms(model, bins)  # type: ignore[arg-type]
    fresh = nn.Sequential(nn.Linear(2, 1))
    mixbit.prepare_(fresh, mixbit.Recipe(default=mixbit.LayerPrecision(weight=2, act=None)))
    with pytest.raises(MixbitError, match="layer '0': a quantizer has no scales yet"):
        threshold_distances(fresh)
