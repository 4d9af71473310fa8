"""`verify`: counts, the layer at fault, accuracy, artifacts of all kinds, and bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import Recipe
from mixbit.errors import MixbitError
from mixbit.export import Artifact

sys.path.insert(0, str(Path(__file__).resolve().parent))
from networks import Everything, Functions, ready, recipe_of, resnet8

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, _, images, labels = resnet8("4/8")
    return model, images, labels


def flipped(source: Path, target: Path, name: str, bit: int) -> None:
    """A copy of a file with one bit of an initializer turned over."""
    proto = onnx.load(source)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    raw = bytearray(tensor.raw_data)
    raw[bit // 8] ^= 1 << (bit % 8)
    tensor.raw_data = bytes(raw)
    onnx.save(proto, target)


def test_a_flipped_weight_is_found_and_named(network, tmp_path: Path) -> None:
    model, images, labels = network
    good = tmp_path / "m.onnx"
    mixbit.export.onnx(model, images, good, say=lambda text: None)
    report = mixbit.export.verify(good, model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert (report.mismatches, report.max_abs_diff, report.first_layer, report.in_class) == (0, 0.0, None, True)
    assert (report.images, report.values) == (8, 80)
    integer = mixbit.evaluate(model, [(images, labels)], integer=True)
    assert report.accuracy == report.reference_accuracy == integer
    # The highest bit of the third weight of a layer in the middle.
    flipped(good, tmp_path / "bad.onnx", "block2_conv2.weight", 11)
    report = mixbit.export.verify(tmp_path / "bad.onnx", model, [images])
    assert report.first_layer == "block2_conv2"
    assert report.mismatches > 0
    assert report.max_abs_diff > 0
    assert report.accuracy is None
    assert not report.in_class
    # Only there: what is behind is what the reference makes of the wrong codes.
    assert [layer.name for layer in report.layers if layer.mismatches] == ["block2_conv2"]
    assert "first layer that differs is 'block2_conv2'" in str(report)
    assert "BREAKS" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["first_layer"] == "block2_conv2"
    # A fault that no output shows on these images still breaks the promise of equality.
    flipped(good, tmp_path / "low.onnx", "stem.bias", 0)
    report = mixbit.export.verify(tmp_path / "low.onnx", model, [images[:1]])
    assert report.first_layer == "stem"
    assert not report.in_class
    # It is one code at most, though.
    assert mixbit.export.verify(tmp_path / "low.onnx", model, [images[:1]], promise="one_code").in_class


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    return ready(model, [x], Recipe.uniform(["0", "3"]), "maxabs"), x


def test_artifacts_of_other_kinds() -> None:
    model, x = small()
    reference = mixbit.export.reference(model, x)
    same = Artifact("the reference itself", "exact", lambda batch: reference(batch))
    report = mixbit.export.verify(same, model, [x])
    assert report.in_class
    assert report.layers is None
    assert report.first_layer is None

    step = reference.grids[reference.outputs[0]].scale

    def shifted(batch: torch.Tensor) -> list[np.ndarray]:
        values = reference(batch)
        values[0][0, 0] += 2 * step
        return values

    wrong = mixbit.export.verify(dataclasses.replace(same, outputs=shifted), model, [x, x])
    assert wrong.mismatches == 2
    assert wrong.max_abs_diff == pytest.approx(2 * step, rel=1e-4)
    assert not wrong.in_class
    # Four codes of an output are the bound for artifacts that promise one code a layer and show no layers.
    near = dataclasses.replace(same, promise="one_code", outputs=lambda batch: [reference(batch)[0] + 4 * step])
    assert mixbit.export.verify(near, model, [x]).in_class
    far = dataclasses.replace(near, outputs=lambda batch: [reference(batch)[0] - 5 * step])
    assert not mixbit.export.verify(far, model, [x]).in_class
    # NaN equals nothing and is in no class.
    nan = dataclasses.replace(same, promise="one_code", outputs=lambda batch: [reference(batch)[0] * np.nan])
    report = mixbit.export.verify(nan, model, [x])
    assert report.mismatches == report.values
    assert np.isnan(report.max_abs_diff)
    assert not report.in_class


@pytest.mark.parametrize("exact", [True, False])
def test_outputs_are_what_the_last_codes_mean(exact: bool, tmp_path: Path) -> None:
    model, x = small()
    mixbit.export.onnx(model, x, tmp_path / "m.onnx", exact=exact)
    assert mixbit.export.verify(tmp_path / "m.onnx", model, [x]).in_class
    proto = onnx.load(tmp_path / "m.onnx")
    last = next(node for node in proto.graph.node if node.output[0] == proto.graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.5), "wrong"))
    last.input[1] = "wrong"
    onnx.save(proto, tmp_path / "m.onnx")
    report = mixbit.export.verify(tmp_path / "m.onnx", model, [x])
    assert report.first_layer == "linear (output)"
    assert not report.in_class
    # A file of another tool shows no layers, whatever its tensors are called.
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "m.onnx")
    report = mixbit.export.verify(tmp_path / "m.onnx", model, [x])
    assert (report.promise, report.layers, report.in_class) == ("one_code", None, False)


def test_programs_are_verified_too(tmp_path: Path) -> None:
    model, x = small()
    torch.export.save(mixbit.export.program(model, x), tmp_path / "m.pt2")
    report = mixbit.export.verify(tmp_path / "m.pt2", model, [x])
    assert report.promise == "exact"
    assert report.in_class, report
    assert [layer.name for layer in report.layers] == ["input", "0", "relu", "view", "3", "linear (output)"]
    report = mixbit.export.verify(mixbit.export.program(model, x, "pt2e"), model, [x])
    assert report.promise == "one_code"
    assert report.in_class
    # A convolution that an activation follows is not quantized by itself.
    assert [layer.name for layer in report.layers] == ["input", "relu", "view", "3", "linear (output)"]
    other, _ = small()
    with torch.no_grad():
        other[3].weight.neg_()
    report = mixbit.export.verify(tmp_path / "m.pt2", other, [x])
    assert (report.fault, report.in_class) == ("3", False)


@pytest.mark.parametrize("dialect", mixbit.export.DIALECTS)
def test_a_program_shows_the_layer_at_fault(dialect: str, tmp_path: Path) -> None:
    model, batches, images, _ = resnet8("4/8")
    path = tmp_path / "m.pt2"
    torch.export.save(mixbit.export.program(model, batches[0], dialect), path)
    good = mixbit.export.verify(path, model, [images[:2]])
    assert good.in_class, good
    assert good.fault is None
    assert good.codes == sum(layer.values for layer in good.layers) > 100_000
    assert good.codes_that_differ <= (0 if dialect == "mixbit" else good.codes // 1000)
    program = torch.export.load(path)
    with torch.no_grad():
        program.state_dict["layers.block2_conv2.weight"][0, 0, 0, 1] ^= 4
    report = mixbit.export.verify(program, model, [images[:2]])
    named = "block2_conv2"
    assert report.fault == named, report
    assert not report.in_class
    assert f"{named!r}" in str(report)
    assert [layer.name for layer in report.layers if layer.largest > 1] == [named]
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["fault"], found["codes"]) == (named, good.codes)


@pytest.mark.parametrize("make", [Everything, Functions])
def test_programs_show_the_codes_of_every_operation(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 9, 9) if make is Everything else torch.randn(3, 3, 6, 6)
    model = ready(make().eval(), [x], recipe_of(make().eval(), x, "8/8"), "maxabs")
    nodes = mixbit.export.reference(model, x).nodes
    for dialect in mixbit.export.DIALECTS:
        report = mixbit.export.verify(mixbit.export.program(model, x, dialect), model, [x])
        assert report.in_class, report
        shown = {layer.name for layer in report.layers if not layer.name.endswith("(output)")}
        hidden = {node.op for node in nodes if node.name not in shown and node.module not in shown}
        # What does nothing has no operation; what an activation follows at once is quantized with it.
        fused = {"conv2d", "linear", "add", "avg_pool2d"} if dialect == "pt2e" else set()
        assert hidden <= {"identity"} | fused


def test_scales_of_a_program_that_are_wrong_are_found() -> None:
    model, x = small()
    program = mixbit.export.program(model, x, "pt2e")
    node = next(node for node in program.graph.nodes if node.name == "relu_q")
    node.args = (node.args[0], node.args[1] * 1.5, *node.args[2:])
    program.graph_module.recompile()
    assert mixbit.export.verify(program, model, [x]).fault == "relu"


def test_programs_of_others_show_outputs_alone() -> None:
    model, x = small()
    program = mixbit.export.program(model, x, "pt2e")
    for node in program.graph.nodes:
        node.name = node.name.removesuffix("_q")
    program.graph_module.recompile()
    report = mixbit.export.verify(program, model, [x])
    assert (report.promise, report.layers, report.fault, report.in_class) == ("one_code", None, None, True)


def test_programs_of_one_image_are_fed_one_at_a_time(tmp_path: Path) -> None:
    model, x = small()
    torch.export.save(mixbit.export.program(model, x, dynamic_batch=False), tmp_path / "m.pt2")
    assert mixbit.export.runner(tmp_path / "m.pt2").batch == 1
    report = mixbit.export.verify(tmp_path / "m.pt2", model, [x])
    assert (report.images, report.mismatches, report.in_class) == (3, 0, True)


def test_bad_input(tmp_path: Path) -> None:
    model, x = small()
    with pytest.raises(MixbitError, match="there is no file"):
        mixbit.export.verify(tmp_path / "m.onnx", model, [x])
    (tmp_path / "m.onnx").write_bytes(b"not a graph" * 9)
    with pytest.raises(MixbitError, match=r"m.onnx' is no ONNX file"):
        mixbit.export.verify(tmp_path / "m.onnx", model, [x])
    (tmp_path / "m.tflite").write_bytes(b"")
    with pytest.raises(MixbitError, match=r"of no known kind; expected a file of .mixbit, .onnx, .pt2"):
        mixbit.export.verify(tmp_path / "m.tflite", model, [x])
    mixbit.export.onnx(model, x, tmp_path / "m.onnx", force=True)
    with pytest.raises(MixbitError, match="batches"):
        mixbit.export.verify(tmp_path / "m.onnx", model, iter([x]))
    with pytest.raises(MixbitError, match="promise='maybe' is not known"):
        mixbit.export.verify(tmp_path / "m.onnx", model, [x], promise="maybe")
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.export.verify(tmp_path / "m.onnx", nn.Linear(2, 3).eval(), [torch.randn(2, 2)])
    # Another network's file.
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)).eval()
    other = ready(other, [x], Recipe.uniform(["0", "3"]), "maxabs")
    with pytest.raises(MixbitError, match=r"has shape \(3, 5\); the network has \(3, 6\)"):
        mixbit.export.verify(tmp_path / "m.onnx", other, [x])
    with pytest.raises(MixbitError, match="Got invalid dimensions"):
        mixbit.export.verify(
            tmp_path / "m.onnx", ready(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [x[:, :, 1:]]), [x[:, :, 1:]]
        )
