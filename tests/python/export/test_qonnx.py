"""The QONNX dialect: what the nodes say, and what qonnx's own executor computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe
from mixbit.errors import MixbitError
from mixbit.export.lowering import lower

sys.path.insert(0, str(Path(__file__).resolve().parent))
from networks import Everything, Functions, ready, recipe_of, resnet8

onnx = pytest.importorskip("onnx")

DOMAIN = "qonnx.custom_op.general"


def test_nodes_say_the_grids_and_weights_their_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = Everything()
    recipe = recipe_of(model, x, "mixed")
    # Any width: no container is looked for.
    recipe.layers["linear"] = LayerPrecision(weight=12, act=11, narrow_range=False)
    recipe.tensors["cat*"] = {"act": 5}
    prepared = ready(model, [x], recipe, "maxabs")
    report = mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", dialect="qonnx", say=lambda text: None)
    assert (report.dialect, report.opset) == ("qonnx", 13)
    assert any("need a consumer that knows them" in limit for limit in report.limits)
    proto = onnx.load(tmp_path / "m.onnx")
    assert {o.domain: o.version for o in proto.opset_import} == {"": 13, DOMAIN: 1}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    quants = {node.output[0]: node for node in proto.graph.node if node.op_type == "Quant"}

    def said(name: str) -> tuple:
        node = quants[name]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.domain == DOMAIN
        assert attributes["rounding_mode"] == b"ROUND"
        scale, zero_point, bits = (constants[i] for i in node.input[1:])
        low = -(2 ** (int(bits) - 1)) + attributes["narrow"] if attributes["signed"] else 0
        high = 2 ** (int(bits) - 1) - 1 if attributes["signed"] else 2 ** int(bits) - 1
        return scale, float(zero_point), low, high

    network = lower(prepared, x)
    checked = 0
    for node in network.graph.nodes:
        if f"{node.name}_q" in quants:
            grid = network.grids[node.name]
            assert said(f"{node.name}_q") == (np.float32(grid.scale), grid.zero_point, grid.low, grid.high)
            checked += 1
        if node.op in ("conv2d", "linear"):
            layer = network.layers[node.name]
            scale, zero_point, low, high = said(f"{node.module}.w")
            assert (zero_point, (low, high)) == (0.0, layer.weight_range)
            levels = constants[f"{node.module}.weight"]
            assert np.array_equal(np.rint(levels / scale), layer.weight.numpy())
            if f"{node.module}.b" in quants:
                scale, _, low, high = said(f"{node.module}.b")
                assert (low, high) == (-(2**31), 2**31 - 1)
                assert np.array_equal(np.rint(constants[f"{node.module}.bias"] / scale), layer.bias.numpy())
    assert checked >= 8
    # Everything but the Quant nodes is standard ONNX.
    assert {node.domain for node in proto.graph.node} == {"", DOMAIN}


def test_one_signed_bit_has_no_form(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    recipe = Recipe(layers={"0": LayerPrecision(weight=1, act=8, narrow_range=False)})
    prepared = ready(model, [x], recipe, "maxabs")
    with pytest.raises(MixbitError, match="'0.w' has one signed bit.*nearest width that can be expressed is 2"):
        mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", dialect="qonnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["8/8", "mixed"])
def test_qonnx_computes_each_layer_within_a_code(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    model, batches, images, labels = resnet8(kind)
    mixbit.export.onnx(model, batches[0], tmp_path / "m.onnx", dialect="qonnx", say=lambda text: None)
    report = mixbit.export.verify(tmp_path / "m.onnx", model, [(images, labels)])
    assert report.kind.startswith("QONNX")
    assert report.in_class, report
    assert {layer.name for layer in report.layers} >= set(mixbit.quantizers.quantized_layers(model))
    # A layer whose scale is off is named.
    proto = onnx.load(tmp_path / "m.onnx")
    scale = next(t for t in proto.graph.initializer if t.name == "block1_conv2.scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    report = mixbit.export.verify(tmp_path / "bad.onnx", model, [images])
    assert not report.in_class
    assert report.first_layer == "block1_conv2"


def test_every_operation_in_qonnx(tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    torch.manual_seed(3)
    batches = [torch.randn(4, 3, 9, 9) for _ in range(2)]
    prepared = ready(Everything(), batches, recipe_of(Everything(), batches[0], "5/6"), "maxabs")
    mixbit.export.onnx(prepared, batches[0], tmp_path / "m.onnx", dialect="qonnx", say=lambda text: None)
    report = mixbit.export.verify(tmp_path / "m.onnx", prepared, [batches[1]])
    assert report.in_class, report
    x = torch.randn(3, 3, 6, 6)
    prepared = ready(Functions().eval(), [x], None, "maxabs")
    mixbit.export.onnx(prepared, x, tmp_path / "f.onnx", dialect="qonnx", say=lambda text: None)
    report = mixbit.export.verify(tmp_path / "f.onnx", prepared, [x])
    assert report.in_class, report


def test_the_executor_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 6)
    prepared = ready(nn.Sequential(nn.Linear(6, 3)).eval(), [x])
    mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", dialect="qonnx", say=lambda text: None)
    monkeypatch.setitem(sys.modules, "qonnx", None)
    for name in [n for n in sys.modules if n.startswith("qonnx.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MixbitError, match=r"pip install 'mixbit\[qonnx\]'"):
        mixbit.export.verify(tmp_path / "m.onnx", prepared, [x])
