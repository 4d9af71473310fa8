"""ONNX files: ONNX Runtime computes the integer reference; what is stored; what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe, zoo
from mixbit.errors import MixbitError
from mixbit.export.lowering import lower

sys.path.insert(0, str(Path(__file__).resolve().parent))
from networks import Everything, Functions, ready, recipe_of, resnet8

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def assert_equal(path: Path, model: nn.Module, x: torch.Tensor) -> mixbit.export.VerifyReport:
    report = mixbit.export.verify(path, model, [x])
    assert report.promise == "exact"
    assert report.mismatches == 0, report
    assert report.first_layer is None, report
    assert report.in_class
    return report


@pytest.mark.parametrize("kind", ["8/8", "4/4", "mixed"])
def test_a_real_network_is_equal_under_onnx_runtime(kind: str, tmp_path: Path) -> None:
    model, batches, images, _ = resnet8(kind)
    mixbit.export.onnx(model, batches[0], tmp_path / "m.onnx", say=lambda text: None)
    report = assert_equal(tmp_path / "m.onnx", model, images)
    assert report.values == 8 * 10
    # Every layer is among what was compared.
    assert {d.name for d in report.layers} >= set(mixbit.quantizers.quantized_layers(model))


@pytest.mark.parametrize(("bits", "act"), [(8, {}), (5, {"act_quantizer": "lsq+"}), (2, {})])
def test_every_operation_is_equal(bits: int, act: dict, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    model = Everything()
    batches = [torch.randn(4, 3, 9, 9) for _ in range(2)]
    recipe = recipe_of(model, batches[0], f"{bits}/{bits}")
    recipe.tensors |= {"default": {"act": bits}, "cat*": {"act": 6}}
    prepared = ready(model, batches, recipe, "maxabs", **act)
    mixbit.export.onnx(prepared, batches[0], tmp_path / "m.onnx", say=lambda text: None)
    report = assert_equal(tmp_path / "m.onnx", prepared, batches[1])
    assert len(report.outputs) == 2
    assert {node.op for node in mixbit.export.reference(prepared, batches[0]).nodes} == {
        "input", "conv2d", "linear", "relu", "relu6", "add", "cat", "avg_pool2d", "max_pool2d", "reshape", "slice",
        "pad", "repeat", "identity",
    }  # fmt: skip
    # The plain patterns keep each layer within a code.
    mixbit.export.onnx(prepared, batches[0], tmp_path / "p.onnx", exact=False, say=lambda text: None)
    plain = mixbit.export.verify(tmp_path / "p.onnx", prepared, [batches[1]])
    assert plain.promise == "one_code"
    assert plain.in_class, plain


@pytest.mark.parametrize("bits", [8, 4])
def test_functions_products_and_softmax_are_equal(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    recipe = recipe_of(Functions().eval(), x, "8/8")
    recipe.tensors["default"] = {"act": bits}
    prepared = ready(Functions().eval(), [x], recipe, "maxabs")
    mixbit.export.onnx(prepared, x, tmp_path / "m.onnx")
    assert len(assert_equal(tmp_path / "m.onnx", prepared, x).outputs) == 12
    if bits == 4:  # an opset whose reductions take their axes otherwise
        mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", opset=21, force=True)
        assert_equal(tmp_path / "m.onnx", prepared, x)
        return
    mixbit.export.onnx(prepared, x, tmp_path / "p.onnx", exact=False)
    plain = mixbit.export.verify(tmp_path / "p.onnx", prepared, [x])
    assert plain.in_class, plain


class Twice(nn.Module):
    """One layer on two tensors of different grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.shared(torch.relu(self.stem(x)))
        return self.shared(torch.relu(y)), y


def test_a_layer_that_is_called_twice_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    prepared = ready(Twice().eval(), [x], Recipe.uniform(["stem", "shared"], weight=4), "maxabs")
    report = mixbit.export.onnx(prepared, x, tmp_path / "m.onnx", say=lambda text: None)
    assert report.bytes.weights == (3 * 4 * 9 + 4 * 4 * 9) // 2
    assert_equal(tmp_path / "m.onnx", prepared, x)


def test_kernels_are_integer_and_weights_packed(tmp_path: Path) -> None:
    model, batches, *_ = resnet8("mixed")
    report = mixbit.export.onnx(model, batches[0], tmp_path / "m.onnx", say=lambda text: None)
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == 9
    assert ops.count("QGemm") == 1
    assert not {"Conv", "Gemm"} & set(ops)
    proto = onnx.load(tmp_path / "m.onnx")
    assert [o.version for o in proto.opset_import] == [25] == [report.opset]
    kinds = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}
    reference = lower(model, batches[0])
    by_name = {t.name: t for t in proto.graph.initializer}
    packed = 0
    for node in reference.graph.nodes:
        if node.op not in ("conv2d", "linear"):
            continue
        tensor, stored = by_name[f"{node.module}.weight"], report.stored[node.module]
        assert tensor.data_type == kinds[stored]
        assert len(tensor.raw_data) == -(-np.prod(tensor.dims) * stored // 8)
        packed += len(tensor.raw_data)
        width = int(mixbit.quantizers.quantized_layers(model)[node.module].weight_quantizer.bit_width)
        assert stored == next(b for b in (2, 4, 8) if b >= width)
        codes = onnx.numpy_helper.to_array(tensor).astype(np.int64)
        assert np.array_equal(codes, reference.layers[node.name].weight.numpy())
    assert packed == report.bytes.weights
    assert sum(report.bytes) == (tmp_path / "m.onnx").stat().st_size


def test_mobilenet_v1_has_little_beside_its_weights(tmp_path: Path) -> None:
    model = zoo.mobilenet_v1(0.25, zoo.data_dir() / "weights/mobilenet_v1_0.25_128_qat_uint8.npz")
    images = zoo.imagenet_compat(4, "mobilenet_v1", 128)[0]
    prepared = ready(model, [images], None, "maxabs")
    size = mixbit.export.onnx(prepared, images, tmp_path / "m.onnx").bytes
    weights = sum(m.weight.numel() for m in mixbit.quantizers.quantized_layers(prepared).values())
    channels = sum(len(m.weight) for m in mixbit.quantizers.quantized_layers(prepared).values())
    assert size.weights == weights
    assert size.biases == 4 * channels
    assert size.scales == 2 * 4 * channels
    assert size.total <= 1.03 * (size.weights + size.biases + size.scales)
    assert_equal(tmp_path / "m.onnx", prepared, images[:1])


def test_patterns_that_recur_become_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    modules: list[nn.Module] = [nn.Conv2d(3, 6, 3), nn.ReLU()]
    for stride in (1, 2, 1, 1, 1):
        modules += [nn.Conv2d(6, 6, 3, stride, 1, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(150, 5)).eval()
    model = ready(model, [x], recipe_of(model, x, "4/4"), "maxabs")
    plain = mixbit.export.onnx(model, x, tmp_path / "m.onnx", say=lambda text: None)
    said: list[str] = []
    report = mixbit.export.onnx(model, x, tmp_path / "c.onnx", compact=True, say=said.append)
    assert report.bytes[:3] == plain.bytes[:3]
    assert report.bytes.overhead < 0.9 * plain.bytes.overhead
    assert any("functions of the file" in limit for limit in said)
    proto = onnx.load(tmp_path / "c.onnx")
    onnx.checker.check_model(proto, full_check=True)
    calls = {node.name: node for node in proto.graph.node if node.domain == "mixbit"}
    assert {"4", "8", "10", "12"} <= set(calls)  # layers by their paths
    assert "pads" in {a.name for a in calls["10"].attribute}  # layers differ in them
    assert 0 < len(proto.functions) < len(calls)
    assert_equal(tmp_path / "c.onnx", model, x)
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(str(tmp_path / "c.onnx"), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (ops.count("QLinearConv"), ops.count("QGemm")) == (11, 1)
    with pytest.raises(MixbitError, match=r"compact=True: the dialect 'qonnx' has no functions; expected .* 'qdq'"):
        mixbit.export.onnx(model, x, tmp_path / "q.onnx", dialect="qonnx", compact=True)
    assert not (tmp_path / "q.onnx").exists()


def test_any_batch_or_one(tmp_path: Path) -> None:
    model, batches, images, _ = resnet8()
    mixbit.export.onnx(model, batches[0], tmp_path / "m.onnx")
    for n in (1, 5):
        assert_equal(tmp_path / "m.onnx", model, images[:n])
    mixbit.export.onnx(model, batches[0], tmp_path / "one.onnx", dynamic_batch=False)
    shape = onnx.load(tmp_path / "one.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 32, 32]
    assert_equal(tmp_path / "one.onnx", model, images[:3])


def test_limits_are_said_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, batches, images, _ = resnet8("2/8")
    said = []
    report = mixbit.export.onnx(model, batches[0], path, say=lambda text: said.append((text, path.exists())))
    assert said == [(limit, False) for limit in report.limits]
    assert any("int2 weights need opset 25" in text for text, _ in said)
    with pytest.warns(UserWarning, match="2-bit weights are stored in 4 bits, the nearest width .* that opset 21 has"):
        older = mixbit.export.onnx(model, batches[0], path, opset=21, force=True)
    assert set(older.stored.values()) == {4}
    assert older.opset == 21
    assert_equal(path, model, images[:2])
    with pytest.warns(UserWarning, match="2-bit weights are stored in 8 bits, the nearest width .* that opset 13 has"):
        mixbit.export.onnx(model, batches[0], path, opset=13, force=True)
    assert_equal(path, model, images[:2])


def test_an_older_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = calibrated(width=2)
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 22)
    with pytest.raises(MixbitError, match=r"opset 25 is newer than onnx .* has \(22\); upgrade onnx"):
        mixbit.export.onnx(model, x, tmp_path / "m.onnx", say=lambda text: None)
    assert not list(tmp_path.iterdir())
    mixbit.export.onnx(model, x, tmp_path / "m.onnx", opset=21, say=lambda text: None)
    assert_equal(tmp_path / "m.onnx", model, x)


def calibrated(width: int = 8, act: int = 8) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    recipe = Recipe(layers={"0": LayerPrecision(weight=8, act=8), "3": LayerPrecision(weight=width, act=act)})
    return ready(model, [x], recipe, "maxabs"), x


def test_widths_that_cannot_be_expressed_name_the_nearest(tmp_path: Path) -> None:
    model, x = calibrated(width=9)
    with pytest.raises(MixbitError, match="layer '3' has weights of 9 bits.*nearest width .* is 8"):
        mixbit.export.onnx(model, x, tmp_path / "m.onnx")
    model, x = calibrated(act=10)
    with pytest.raises(MixbitError, match="codes 0 ... 1023.*nearest width .* is 8"):
        mixbit.export.onnx(model, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Sigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = calibrated()
    path = tmp_path / "m.onnx"
    with pytest.raises(MixbitError, match="dialect='qqd' is not known.*did you mean 'qdq'"):
        mixbit.export.onnx(model, x, path, dialect="qqd")
    with pytest.raises(MixbitError, match="opset=26: expected one from 13 to 25"):
        mixbit.export.onnx(model, x, path, opset=26)
    with pytest.raises(MixbitError, match="folder .* does not exist"):
        mixbit.export.onnx(model, x, tmp_path / "no" / "m.onnx")
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.export.onnx(nn.Linear(2, 3).eval(), torch.randn(2, 2), path)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(MixbitError, match="no scales yet"):
        mixbit.export.onnx(mixbit.prepare_(plain, Recipe.uniform(["0"])), x, path)
    odd = Sigmoid().eval()
    mixbit.prepare_(odd, Recipe.uniform(["body.0"]))
    mixbit.calibrate_(odd, [x])
    with pytest.raises(MixbitError, match=r"no .*softplus.* \(module 'body.1'"):
        mixbit.export.onnx(odd, x, path)
    searched = mixbit.prepare_(nn.Sequential(nn.Linear(4, 3)).eval(), mixbit.search.Gates((2, 4, 8)), torch.randn(2, 4))
    with pytest.raises(MixbitError, match=r"under search.*mixbit.prepare_\(model, mixbit.search.extract"):
        mixbit.export.onnx(searched, torch.randn(2, 4), path)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(MixbitError, match="exists; pass force=True"):
        mixbit.export.onnx(model, x, path)
    assert path.read_text() == "mine"
    mixbit.export.onnx(model, x, path, force=True)
    assert_equal(path, model, x)
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MixbitError, match=r"'onnx', which is not installed: pip install 'mixbit\[onnx\]'"):
        mixbit.export.onnx(model, x, path, force=True)
    with pytest.raises(MixbitError, match="'onnx', which is not installed"):
        mixbit.export.verify(path, model, [x])


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model, x = calibrated(width=4)
    mixbit.export.onnx(model, x, tmp_path / "m.onnx", say=lambda text: None)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.producer_name == "mixbit"
    assert json.loads(proto.metadata_props[0].value) == {"version": 1, "dialect": "qdq", "class": "exact"}
    assert [d.dim_param or d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == ["N", 5]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    known = {v.name for v in [*inferred.graph.value_info, *inferred.graph.output]}
    assert known >= {output for node in proto.graph.node for output in node.output}
    # The same model gives the same bytes.
    mixbit.export.onnx(model, x, tmp_path / "again.onnx", say=lambda text: None)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_an_input_may_be_called_as_one_likes(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, c0):
            return self.conv(c0)

    x = torch.randn(2, 3, 4, 4)
    model = ready(Net().eval(), [x], method="maxabs")
    assert mixbit.export.onnx(model, x, tmp_path / "m.onnx").opset == 13
    assert mixbit.export.verify(tmp_path / "m.onnx", model, [x]).mismatches == 0


def test_a_convolution_that_is_called_twice_is_verified(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    x = torch.randn(2, 3, 4, 4)
    model = ready(Net().eval(), [x], method="maxabs")
    mixbit.export.onnx(model, x, tmp_path / "m.onnx")
    assert mixbit.export.verify(tmp_path / "m.onnx", model, [x]).mismatches == 0
