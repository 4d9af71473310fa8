"""Recipes from QONNX files and AIMET's encodings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe
from mixbit.errors import MixbitError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from networks import Everything, ready, recipe_of

onnx = pytest.importorskip("onnx")


def test_what_was_exported_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(2, 3, 9, 9)
    recipe = recipe_of(model, x, "mixed")
    recipe.tensors |= {"cat": {"act": 5}, "add_1": {"act": 6}}
    prepared = ready(model, [x], recipe, "maxabs")
    mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", dialect="qonnx", say=lambda text: None)
    found = mixbit.export.recipe_from_qonnx(tmp_path / "m.onnx")
    assert set(found.layers) == set(recipe.layers)
    for name, precision in recipe.layers.items():
        layer = mixbit.quantizers.quantized_layers(prepared)[name]
        got = found[name]
        assert (got.weight, got.act) == (precision.weight, precision.act), name
        assert got.signed_act == layer.act_quantizer.signed, name
        assert (got.narrow_range, got.granularity) == (True, "per_channel"), name
    assert found.tensors["add_1"] == {"act": 6}
    # The recipe makes the same network again.
    again = ready(model, [x], Recipe.from_dict(found.to_dict()), "maxabs")
    assert torch.equal(again(x)[0], prepared(x)[0])


def graph(weight: dict[str, Any] | None = None, act: dict[str, Any] | None = None, named: bool = True) -> Any:
    """Quant -> Relu -> Gemm with a quantized weight, by another tool's hand."""
    given = {"bits": 4.0, "signed": 1, "narrow": 0, "rounding_mode": "ROUND", "scale": np.float32(0.1)}
    nodes, constants = [], []
    for name, source, options in (("x_quant", "x", {"bits": 6.0, **(act or {})}), ("w_quant", "w", weight or {})):
        said = {**given, **options}
        constants += [onnx.numpy_helper.from_array(np.asarray(said.pop("scale")), f"{name}_s")]
        constants += [onnx.numpy_helper.from_array(np.float32(0), f"{name}_z")]
        constants += [onnx.numpy_helper.from_array(np.float32(said.pop("bits")), f"{name}_b")]
        source = "fc.weight" if name == "w_quant" and named else source
        inputs = [source, f"{name}_s", f"{name}_z", f"{name}_b"]
        nodes.append(onnx.helper.make_node("Quant", inputs, [name], domain="qonnx.custom_op.general", **said))
    weights = onnx.numpy_helper.from_array(np.zeros((3, 5), np.float32), "fc.weight" if named else "w")
    nodes.append(onnx.helper.make_node("Relu", ["x_quant"], ["r"]))
    nodes.append(onnx.helper.make_node("Gemm", ["r", "w_quant"], ["y"], transB=1))
    value = onnx.helper.make_tensor_value_info
    proto = onnx.helper.make_graph(nodes, "g", [value("x", 1, [1, 5])], [value("y", 1, [1, 3])], [weights, *constants])
    return onnx.helper.make_model(proto)


def test_files_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(graph(), path)
    assert mixbit.export.recipe_from_qonnx(path).layers == {
        "fc": LayerPrecision(weight=4, act=6, signed_act=True, narrow_range=False, granularity="per_tensor")
    }
    onnx.save(graph({"scale": np.full((3, 1), 0.1, np.float32), "narrow": 1}, {"signed": 0}), path)
    assert mixbit.export.recipe_from_qonnx(path).layers == {"fc": LayerPrecision(weight=4, act=6, signed_act=False)}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"weight": {"rounding_mode": "FLOOR"}}, "the weight of 'fc' is rounded by 'FLOOR'"),
        ({"weight": {"bits": 2.5}}, "the weight of 'fc' has 2.5 bits; expected a whole number"),
        ({"weight": {"signed": 0}}, "the weight of 'fc' is unsigned"),
        ({"act": {"scale": np.ones((1, 5), np.float32)}}, "the input of 'fc' has 5 scales; a recipe has one"),
        ({"named": False}, "the Gemm that makes 'y' has no name to go by"),
    ],
)
def test_what_a_recipe_cannot_say(given: dict, complaint: str, tmp_path: Path) -> None:
    onnx.save(graph(**given), tmp_path / "m.onnx")
    with pytest.raises(MixbitError, match=complaint):
        mixbit.export.recipe_from_qonnx(tmp_path / "m.onnx")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(MixbitError, match="as ONNX"):
        mixbit.export.recipe_from_qonnx(tmp_path / "m.onnx")
    with pytest.raises(MixbitError, match="as JSON"):
        mixbit.export.recipe_from_aimet(tmp_path / "m.onnx", nn.Linear(2, 2))
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(MixbitError, match="expected AIMET's encodings"):
        mixbit.export.recipe_from_aimet(tmp_path / "m.json", nn.Linear(2, 2))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()


def encoding(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {
        "bitwidth": bits, "dtype": "int", "is_symmetric": str(symmetric), "max": 1.0, "min": -1.0,
        "offset": -(2 ** (bits - 1)), "scale": 0.1,
    }  # fmt: skip


OLD = {
    "version": "0.6.1",
    "activation_encodings": {"0": {"input": {"0": encoding(6, False)}, "output": {"0": encoding(8, False)}}},
    "param_encodings": {"0.weight": [encoding(4), encoding(4)], "0.bias": [encoding(8)], "3.weight": [encoding(5)]},
}
NEW = {
    "version": "1.0.0",
    "activation_encodings": [{"name": "/0/Conv_output_0", "bw": 8, "dtype": "INT", "is_sym": False, "scale": [0.1]}],
    "param_encodings": [
        {"name": "0.weight", "bw": 4, "dtype": "INT", "is_sym": True, "enc_type": "PER_CHANNEL", "scale": [0.1, 0.2]},
        {"name": "3.weight", "bw": 16, "dtype": "FLOAT"},
    ],
}


def test_aimet_encodings(tmp_path: Path) -> None:
    path = tmp_path / "m.encodings"
    path.write_text(json.dumps(OLD))
    recipe = mixbit.export.recipe_from_aimet(path, network(), act=7)
    assert recipe.layers == {
        "0": LayerPrecision(weight=4, act=6, narrow_range=False),
        "3": LayerPrecision(weight=5, act=7, narrow_range=False, granularity="per_tensor"),
    }
    assert recipe.made_by["version"] == "0.6.1"
    mixbit.prepare_(network(), recipe)
    path.write_text(json.dumps(NEW))
    assert mixbit.export.recipe_from_aimet(path, network()).layers == {
        "0": LayerPrecision(weight=4, act=8, narrow_range=False),
        "3": LayerPrecision(weight=None, act=8, narrow_range=False, granularity="per_tensor"),
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"0.wieght": [encoding(4)]}, "no parameter '0.wieght'; did you mean '0.weight'"),
        ({"0.weight": [encoding(40)]}, "'0.weight' has the bit-width 40; expected a whole number"),
        ({"0.weight": [encoding(4, False)]}, "'0.weight' is not symmetric"),
        ({"0.weight": []}, "an encoding is"),
        ({"0.bias": [encoding(8)]}, r"no encoding of a layer's weight; the model's layers are \['0', '3'\]"),
    ],
)
def test_bad_encodings(change: dict, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "m.encodings"
    path.write_text(json.dumps({**OLD, "param_encodings": change}))
    with pytest.raises(MixbitError, match=complaint):
        mixbit.export.recipe_from_aimet(path, network())
