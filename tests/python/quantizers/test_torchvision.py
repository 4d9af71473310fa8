"""Twelve torchvision models: what is quantized, what stays float, prepare and back, analysis to recipe."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision

import mixbit
from mixbit import LayerPrecision, Recipe
from mixbit.network import call_model, flatten_outputs

# name: (layers, share of the multiply-accumulates, modules that stay float)
MODELS = {
    "resnet18": (21, 1.0, 0),
    "resnet50": (54, 1.0, 0),
    "mobilenet_v2": (53, 1.0, 0),
    "mobilenet_v3_large": (64, 1.0, 0),
    "efficientnet_b0": (82, 1.0, 0),
    "shufflenet_v2_x1_0": (57, 1.0, 0),
    "regnet_y_400mf": (86, 1.0, 0),
    "convnext_tiny": (59, 1.0, 18),
    "vit_b_16": (26, 0.6666, 26),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (73, 1.0, 0),
    "retinanet_resnet50_fpn": (71, 1.0, 0),
    "ssdlite320_mobilenet_v3_large": (98, 1.0, 0),
}
DETECTORS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large")


def build(name: str):
    torch.manual_seed(0)
    options = {"weights": None}
    size = 64
    if name in DETECTORS:
        options["weights_backbone"] = None
        size = 96
    if name == "retinanet_resnet50_fpn":
        options |= {"min_size": 96, "max_size": 128}
    if name == "vit_b_16":
        options["image_size"] = 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, **options).eval()
    x = torch.rand(2, 3, size, size)
    return model, ((list(x),) if name in DETECTORS else x)


@pytest.mark.parametrize("name", MODELS)
def test_a_torchvision_model_from_float_to_recipe_and_back(name: str) -> None:
    model, example = build(name)
    found = mixbit.layers(model, example)
    count, share, left_float = MODELS[name]
    assert len(found) == count
    assert found.quantized_share == pytest.approx(share, abs=2e-4)
    assert len(found.float_modules) == left_float
    if name == "vit_b_16":
        kinds = {m.kind for m in found.float_modules}
        assert {"MultiheadAttention", "NonDynamicallyQuantizableLinear"} <= kinds
        projection = next(m for m in found.float_modules if m.name.endswith("out_proj"))
        assert "never called" in projection.reason
    with torch.no_grad():
        expected = flatten_outputs(call_model(model, example))
    keys = list(model.state_dict())

    # Widths of two operands, one analysis, an exact budget.
    table = mixbit.analyze(model, [example], precisions=(4, 8), joint=True)
    costs = mixbit.costs.bops(model, example)
    recipe = mixbit.assign(table, costs, budget=0.6 * costs.uniform(8, 8), method="greedy")
    assert recipe.report["feasible"]
    assert set(recipe.layers) == set(found.names)
    assert {p.weight for p in recipe.layers.values()} == {4, 8}

    mixbit.prepare_(model, recipe, example)
    mixbit.calibrate_(model, [example])
    with torch.no_grad():
        outputs = flatten_outputs(call_model(model, example))
    assert all(t.isfinite().all() for _, t in outputs)
    mixbit.restore_(model)
    with torch.no_grad():
        again = flatten_outputs(call_model(model, example))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected, again, strict=True))
    assert list(model.state_dict()) == keys


def test_a_recipe_of_globs_reaches_into_a_model() -> None:
    model, example = build("mobilenet_v2")
    recipe = Recipe(layers={"classifier.*": LayerPrecision(weight=8, act=8)}, default=LayerPrecision(weight=4, act=8))
    mixbit.prepare_(model, recipe)
    mixbit.calibrate_(model, [example])
    widths = [int(m.weight_quantizer.bit_width) for m in mixbit.quantizers.quantized_layers(model).values()]
    assert widths == [4] * 52 + [8]
