"""The integer reference and its simulation: equal on every tensor; near the fake-quantized model."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe, zoo
from mixbit.errors import MixbitError
from mixbit.export.grid import Grid
from mixbit.export.reference import FixedPointReference, fixed_point
from mixbit.network import LAYER_OPS, capture
from mixbit.quantizers import bypass, record_tensors_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from nets import Residual, seeded
from networks import Functions


def ready(model: nn.Module, batches: list[torch.Tensor], recipe: Recipe | None = None) -> nn.Module:
    model = mixbit.fold_batchnorm_(copy.deepcopy(model), batches[0])
    mixbit.prepare_(model, recipe or Recipe.uniform(mixbit.layers(model, batches[0]).names))
    return mixbit.calibrate_(model, batches, example=batches[0])


def mixed(model: nn.Module, x: torch.Tensor) -> Recipe:
    """Different widths for weights and inputs, one input width a group."""
    acts: dict[int, int] = {}
    layers = {}
    for i, layer in enumerate(mixbit.layers(model, x)):
        act = acts.setdefault(layer.input_group, (8, 6, 7, 5)[i % 4])
        layers[layer.name] = LayerPrecision(weight=(8, 5, 6, 7)[i % 4], act=act)
    return Recipe(layers=layers)


def assert_equal_everywhere(model: nn.Module, x: torch.Tensor, built=None) -> dict[str, np.ndarray]:
    reference, simulated = built or (mixbit.export.reference(model, x), mixbit.export.simulation(model, x))
    codes, other = reference.tensors(x), simulated.tensors(x)
    assert list(codes) == list(other)
    for name, value in codes.items():
        assert np.array_equal(value, other[name].numpy()), name
        grid = reference.grids[name]
        assert value.min() >= grid.low
        assert value.max() <= grid.high
    for a, b in zip(reference(x), simulated(x), strict=True):
        assert np.array_equal(a, b.numpy())
    return codes


class Everything(nn.Module):
    """All operations of the integer network."""

    def __init__(self, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.grouped = nn.Conv2d(2 * channels, channels, (1, 3), 1, (0, 2), (1, 2), groups=groups)
        self.side = nn.Conv2d(3, channels, 1)
        self.linear = nn.Linear(channels, 7)

    def forward(self, x):
        y = F.relu6(self.conv(x))
        z = F.max_pool2d(F.relu(self.depthwise(y)), 3, 2, 1)
        w = F.avg_pool2d(F.pad(y, (0, 2, 0, 2)), 2)[:, :, : z.shape[2], : z.shape[3]]
        v = self.grouped(torch.cat([z, w], 1))
        v = v[:, :, : z.shape[2], : z.shape[3]] + z[:, :, : v.shape[2], : v.shape[3]]
        side = self.side(x).mean((2, 3))
        return self.linear(v.mean((2, 3)) + side), side


@settings(max_examples=8)
@given(
    st.sampled_from([4, 8]), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(0, 100), st.integers(2, 8)
)
def test_small_networks_are_equal_on_every_tensor(
    channels: int, groups: int, stride: int, seed: int, bits: int
) -> None:
    torch.manual_seed(seed)
    model = Everything(channels, groups, stride).eval()
    batches = [torch.randn(3, 3, 9, 9) for _ in range(2)]
    recipe = Recipe.uniform(mixbit.layers(model, batches[0]).names, weight=bits, act=bits)
    recipe.tensors["cat*"] = {"act": 5}
    assert_equal_everywhere(ready(model, batches, recipe), batches[1])


class Pooled(nn.Module):
    """Average pools with padding, and nearest upsampling back, read by a layer, a sum and the output."""

    def __init__(self, kernel, stride, padding, include: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(kernel, stride, padding, count_include_pad=include)
        self.head = nn.Conv2d(4, 5, 1)
        self.eval()

    def forward(self, x):
        y = self.pool(self.conv(x))
        up = F.interpolate(y, scale_factor=(2.0, 3.0), mode="nearest")
        return self.head(up), up + F.interpolate(F.relu(y), size=up.shape[2:])


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), ((2, 4), (1, 3), (1, 2)), (3, 1, 0), ((5, 3), None, (2, 0))]
)
def test_padded_average_pools_and_upsampling(kernel, stride, padding, include: bool) -> None:
    torch.manual_seed(0)
    model = Pooled(kernel, stride, padding, include)
    batches = [torch.randn(2, 3, 9, 11) + 0.5 for _ in range(2)]
    graph = capture(model, batches[0])
    assert [n.op for n in graph.nodes][:4] == ["input", "conv2d", "avg_pool2d", "repeat"]
    prepared = ready(model, batches)
    assert_equal_everywhere(prepared, batches[1])
    # Near torch's own pooling, border included, by a few steps of the grids.
    reference = mixbit.export.reference(prepared, batches[0])
    expected = model(batches[1])[1].detach().numpy()
    step = reference.grids[reference.outputs[1]].scale
    assert np.abs(reference(batches[1])[1] - expected).max() < 6 * step


def test_upsampling_by_other_factors_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=1.5)).eval()
    with pytest.raises(MixbitError, match=r"no nearest upsampling of 6 x 6 to 9 x 9 \(module '1'"):
        capture(model, torch.randn(2, 3, 6, 6))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, ceil_mode=True)).eval()
    with pytest.raises(MixbitError, match="no avg_pool2d with ceil_mode or divisor_override"):
        capture(model, torch.randn(2, 3, 6, 6))


def test_the_graph_names_modules_and_reduces_operations() -> None:
    model = mixbit.fold_batchnorm_(seeded(Residual), torch.randn(2, 3, 6, 6))
    graph = capture(model, torch.randn(1, 3, 6, 6))
    assert [n.op for n in graph.nodes] == [
        "input", "conv2d", "relu", "conv2d", "relu", "conv2d", "conv2d", "add", "relu", "avg_pool2d", "reshape", "linear",
    ]  # fmt: skip
    assert [n.module for n in graph.nodes if n.module] == ["stem", "a", "b", "side", "head"]


def test_one_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.75, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.3, -0.2]))
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.1, 0.9]])
    model = mixbit.prepare_(model, Recipe.uniform(["0"], weight=4, act=8))
    mixbit.calibrate_(model, [x], "maxabs", example=x)
    layer = model[0]
    sx = np.float32(layer.act_quantizer.scale.item())
    sw = layer.weight_quantizer.scale.detach().numpy()
    sy = model.mixbit_tensor_scales.numpy()[0]
    qx = np.rint(x.numpy() / sx).astype(int)
    qw = np.rint(layer.weight.detach().numpy() / sw[:, None]).astype(int)
    product = sx * sw
    acc = qx @ qw.T + np.rint(layer.bias.detach().numpy() / product).astype(int)
    expected = np.clip(np.rint(acc.astype(np.float32) * (product / sy)), -128, 127).astype(int)
    reference = mixbit.export.reference(model, x)
    assert np.array_equal(reference.tensors(x)["linear"], expected)
    assert np.allclose(reference(x)[0], model(x).detach().numpy(), atol=0.1)  # the largest output saturates


REAL = {
    "resnet20": lambda: (
        zoo.cifar_resnet(20, zoo.data_dir() / "weights/cifar10_resnet20_fp32.npz"),
        zoo.cifar10("train", 64)[0],
        zoo.cifar10("test", 64)[0],
    ),
    "mobilenet_v2": lambda: (
        zoo.mobilenet_v2(zoo.data_dir() / "weights/mobilenet_v2_1.0_224_qat_uint8.npz"),
        zoo.imagenet_compat(8)[0],
        zoo.imagenet_compat(64)[0],
    ),
    "squeezenet1_1": lambda: (
        zoo.squeezenet1_1(zoo.data_dir() / "weights/squeezenet1_1_fp16.npz"),
        zoo.imagenet_compat(8, "squeezenet1_1")[0],
        zoo.imagenet_compat(64, "squeezenet1_1")[0],
    ),
}


def check_real(name: str, kind: str, images: int) -> None:
    model, calibration, test = REAL[name]()
    folded = mixbit.fold_batchnorm_(copy.deepcopy(model), calibration[:2])
    recipe = mixed(folded, calibration[:2]) if kind == "mixed" else None
    model = ready(model, list(calibration.split(8)), recipe)
    different = dict.fromkeys(mixbit.quantizers.quantized_layers(model), 0)
    total = dict(different)
    built = mixbit.export.reference(model, test[:2]), mixbit.export.simulation(model, test[:2])
    for x in test[:images].split(16 if test.shape[-1] < 100 else 2):
        codes = assert_equal_everywhere(model, x, built)
        for layer, (wrong, count) in fake_quant_differences(model, x, codes, built[0]).items():
            different[layer] += wrong
            total[layer] += count
    shares = {layer: different[layer] / total[layer] for layer in total}
    print(name, kind, {layer: f"{100 * share:.2f} %" for layer, share in shares.items()})
    assert next(iter(shares.values())) == 0.0  # the first layer reads the image itself
    # The two networks drift apart with depth, since only one of them quantizes adds; most codes stay the same.
    assert np.mean(list(shares.values())) < 0.5


def fake_quant_differences(
    model: nn.Module, x: torch.Tensor, codes: dict[str, np.ndarray], reference: mixbit.export.IntegerReference
) -> dict[str, tuple[int, int]]:
    """Codes entering each layer that differ between the fake-quantized model and the integer network."""
    entered = {node.module: reference.entering(node, codes) for node in reference.nodes if node.op in LAYER_OPS}
    found = {}
    handles = []
    for name, layer in mixbit.quantizers.quantized_layers(model).items():

        def hook(module, args, name=name):
            quantizer = module.act_quantizer
            low, high = quantizer.quant_range()
            own = torch.round(args[0] / quantizer.effective_scale()).clamp(low, high).detach().numpy().astype(np.int64)
            found[name] = (int((own != entered[name]).sum()), own.size)

        handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["8/8", "mixed"])
@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_equal_on_every_tensor(name: str, kind: str) -> None:
    check_real(name, kind, 64 if name == "resnet20" else 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8/8", "mixed"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_real_networks_are_equal_on_64_images(name: str, kind: str) -> None:
    check_real(name, kind, 64)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m, x: m, "no prepared layers"),
        (
            lambda m, x: mixbit.calibrate_(mixbit.prepare_(m, Recipe.uniform(["stem"])), [x]),
            "layer 'a' is .*float in the recipe",
        ),
        (lambda m, x: mixbit.prepare_(m, _all()), "no scales yet; call mixbit.calibrate_"),
        (lambda m, x: mixbit.calibrate_(mixbit.prepare_(m, _all()), [x]), "have no ranges yet; call"),
    ],
)
def test_what_is_missing_is_named(change, complaint: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = change(mixbit.fold_batchnorm_(seeded(Residual), x), x)
    with pytest.raises(MixbitError, match=complaint):
        mixbit.export.reference(model, x)


@pytest.mark.parametrize("make", [mixbit.export.reference, mixbit.export.simulation])
def test_training_mode_and_weights_that_are_not_finite_are_named(make) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = mixbit.fold_batchnorm_(seeded(Residual), x)
    mixbit.calibrate_(mixbit.prepare_(model, _all()), [x], example=x)
    dropping = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()).eval()
    mixbit.calibrate_(mixbit.prepare_(dropping, Recipe.uniform(["0"])), [x], example=x)
    with pytest.raises(MixbitError, match=r"in training mode; call model.eval\(\) first"):
        make(dropping.train(), x)
    for what in ("weight", "bias"):
        for value in (float("nan"), float("inf")):
            broken = copy.deepcopy(model)
            with torch.no_grad():
                getattr(broken.a, what).view(-1)[1] = value
            with pytest.raises(MixbitError, match=rf"layer 'a': its {what} has values that are not finite"):
                make(broken, x)


def _all() -> Recipe:
    return Recipe.uniform(["stem", "a", "b", "side", "head"])


def test_batchnorm_and_unknown_operations_are_named() -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(MixbitError, match=r"module 'bn' is a batch normalization; call mixbit.fold_batchnorm_"):
        mixbit.calibrate_(mixbit.prepare_(seeded(Residual), _all()), [x], example=x)
    odd = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus()).eval()
    with pytest.raises(MixbitError, match=r"has no softplus.default \(module '1'"):
        mixbit.calibrate_(mixbit.prepare_(odd, Recipe.uniform(["0"])), [x], example=x)


def test_an_accumulator_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(200_000, 1)).eval()
    x = torch.randn(2, 200_000)
    mixbit.calibrate_(mixbit.prepare_(model, Recipe.uniform(["0"], weight=16, act=16)), [x], "maxabs", example=x)
    for make in (mixbit.export.reference, mixbit.export.simulation, mixbit.export.program):
        with pytest.raises(MixbitError, match="layer '0': its accumulator"):
            make(model, x)
    (entry,) = mixbit.export.report(model, x)
    assert entry.layer == "0"
    assert not entry.fits_int32
    assert not entry.exact_fp32
    assert entry.bits > 32


def test_accumulators_are_bounded_for_every_input() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.75, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.3, -0.2]))
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.1, 0.9]])
    layers = {"0": LayerPrecision(weight=4, act=8), "2": LayerPrecision(weight=16, act=10)}
    mixbit.calibrate_(mixbit.prepare_(model, Recipe(layers=layers)), [x], "maxabs", example=x)
    first, second = mixbit.export.report(model, x)
    reference = mixbit.export.reference(model, x)
    # Signed 8-bit inputs reach -128.
    sums = np.abs(reference._weights["linear"]).sum(1) * 128
    assert (first.products, first.reach) == (sums.max(), (sums + np.abs(reference._bias["linear"])).max())
    assert (first.layer, first.fits_int32, first.exact_fp32) == ("0", True, True)
    assert 2 ** (first.bits - 2) <= first.reach < 2 ** (first.bits - 1)
    assert second.products == np.abs(reference._weights["linear_1"]).sum() * 1023 == second.reach
    assert (second.fits_int32, second.exact_fp32) == (True, False)


@pytest.mark.parametrize("bits", [8, 3])
def test_functions_are_looked_up(bits: int) -> None:
    torch.manual_seed(0)
    model, x = Functions().eval(), torch.randn(3, 3, 6, 6)
    recipe = Recipe.uniform(mixbit.layers(model, x).names)
    recipe.tensors["default"] = {"act": bits}
    expected = model(x)
    prepared = ready(model, [x], recipe)
    assert_equal_everywhere(prepared, x)
    if bits == 8:
        reference = mixbit.export.reference(prepared, x)
        for name, mine, real in zip(reference.outputs, reference(x), expected, strict=True):
            # Steps of the function's grid, and of the grids it is computed from.
            assert np.abs(mine - real.detach().numpy()).max() < 0.1, name
        stem = next(n.name for n in reference.nodes if n.op == "conv2d")
        codes = reference.tensors(x)
        # By hand, in Python's own arithmetic.
        function = next(n for n in reference.nodes if n.options.get("function") == "sigmoid")
        old, new = reference.grids[stem], reference.grids[function.name]
        assert (new.low, new.high) == (0, 255)
        for code in (old.low, -7, 0, 1, 60, old.high):
            value = 1 / (1 + math.exp(-float(np.float32(code) * np.float32(old.scale))))
            wanted = min(255, round(float(np.float32(value) / np.float32(new.scale))))
            table = reference._lookup(function, new, (np.array([code]), old))
            assert table.tolist() == [wanted]
        assert codes[function.name].max() <= 255


def test_softmax_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).eval(), torch.randn(16, 3)
    reference = mixbit.export.reference(ready(model, [x]), x)
    codes = reference.tensors(x)
    linear, softmax = reference.nodes[1].name, reference.outputs[0]
    step, scale = reference.grids[linear].scale, np.float32(reference.grids[softmax].scale)
    for row, found in zip(codes[linear].tolist(), codes[softmax].tolist(), strict=True):
        powers = [round(65536 * math.exp(-(max(row) - q) * step)) for q in row]
        wanted = [min(255, round(float(np.float32(p) / np.float32(sum(powers)) / scale))) for p in powers]
        assert found == wanted
    assert np.abs(reference(x)[0].sum(1) - 1).max() < 0.02


def test_fastestdet_is_integer_up_to_its_decoding() -> None:
    model = zoo.fastestdet(zoo.data_dir() / "weights/fastestdet_coco_fp32.npz")
    x = zoo.coco("train", 2, "fastestdet", size=96)[0]
    mixbit.fold_batchnorm_(model, x[:1])
    mixbit.prepare_(model, Recipe.uniform(mixbit.layers(model, x[:1]).names))
    mixbit.calibrate_(model, [x], "maxabs", example=x)
    assert_equal_everywhere(model, x[:1])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: nn.GELU("tanh"), "no gelu with approximate='tanh'"),
        (lambda: nn.Softmax(0), "no softmax over the batch"),
        (lambda: nn.SELU(), "no .*elu"),
    ],
)
def test_functions_that_are_missing_are_named(make, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint + r".*module '1'"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 1), make()).eval(), torch.randn(2, 3, 4, 4))


class Joined(nn.Module):
    """Sums and concatenations as modules: one read by a layer and an output, one by a relu, one by a layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.add = mixbit.quantizers.Add()
        self.rectified = mixbit.quantizers.Add()
        self.cat = mixbit.quantizers.Cat()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.add(x, self.a(x))
        z = F.relu(self.rectified(y, self.b(y)))
        return self.head(self.cat(y, z)) + y


def test_joined_tensors_train_on_the_grid_of_the_integer_network() -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    x = torch.randn(8, 3, 8, 8)
    before = model(x)
    names = mixbit.layers(model, x).names
    mixbit.prepare_(model, Recipe.uniform(names))
    mixbit.calibrate_(model, [x])
    assert not model.add.output_quantizer.is_calibrated
    mixbit.calibrate_(model, [x], example=x)
    # Only values with grids of their own are quantized; the concatenation goes straight into a layer.
    assert model.add.output_quantizer.is_calibrated
    assert model.rectified.output_quantizer.is_calibrated
    assert not model.rectified.output_quantizer.signed
    assert not model.cat.output_quantizer.is_calibrated
    y = model.add(x[:, :1], x[:, 1:2])
    steps = y / model.add.output_quantizer.effective_scale()
    assert torch.allclose(steps, steps.round(), atol=1e-3)  # y / scale is not exact
    # A scale that training moved is the scale of the integer network.
    loss = model(x).square().sum()
    loss.backward()
    assert model.add.output_quantizer.scale.grad.abs() > 0
    with torch.no_grad():
        model.add.output_quantizer.scale.mul_(1.5)
    reference = mixbit.export.reference(model, x)
    moved = float(model.add.output_quantizer.scale.detach())
    assert any(grid.scale == moved for grid in reference.grids.values())
    assert_equal_everywhere(model, x)
    # Values on its grid up to a step: the fake-quantized network sees what the integer network computes.
    assert np.abs(reference(x)[0] - model(x).detach().numpy()).max() < 3 * moved
    state = model.state_dict()
    assert "add.output_quantizer.scale" in state
    copied = mixbit.prepare_(Joined(), Recipe.uniform(names))
    copied.load_state_dict({k: v for k, v in state.items() if not k.startswith("mixbit_tensor")})
    copied.eval()
    assert torch.equal(copied(x), model(x))
    # Other bits for the tensors keep the range; the recorded grids and the trained ones move alike.
    recorded = model.mixbit_tensor_scales.clone()
    mixbit.prepare_(model, Recipe(layers=Recipe.uniform(names).layers, tensors={"default": {"act": 6}}))
    assert float(model.add.output_quantizer.scale.detach()) == pytest.approx(moved * 4)
    assert (model.mixbit_tensor_bits == 6).all()
    ratio = torch.where(model.mixbit_tensor_signed.bool(), 4.0, 255 / 63)
    torch.testing.assert_close(model.mixbit_tensor_scales, recorded * ratio)
    assert_equal_everywhere(model, x)
    mixbit.restore_(model)
    assert torch.equal(model(x), before)


def test_tensors_are_recorded_in_the_float_or_the_quantized_network() -> None:
    model, x = seeded(Residual), torch.randn(16, 3, 8, 8)
    names = mixbit.layers(model, x).names
    model = ready(model, [x], Recipe.uniform(names, weight=2, act=2))
    for quantized in (False, True):
        record_tensors_(model, list(x.split(8)), x, "maxabs", quantized=quantized)
        with torch.no_grad(), contextlib.nullcontext() if quantized else bypass(model):
            y = model(x)
        assert y.min() < 0
        expected = torch.maximum(y.max() / 127, -y.min() / 128)
        # The output is the last in order of execution.
        assert float(model.mixbit_tensor_scales[-1]) == pytest.approx(float(expected), rel=0.02)
        assert_equal_everywhere(model, x)
    before = model.mixbit_tensor_scales.clone()
    mixbit.calibrate_(model, list(x.split(8)), "maxabs", example=x)
    assert not torch.equal(model.mixbit_tensor_scales, before)  # the ranges of 2 bits are others


def test_a_joining_module_used_twice_is_refused() -> None:
    class Twice(Joined):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.add(self.add(x, self.a(x)), self.b(x))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = mixbit.prepare_(Twice().eval(), Recipe.uniform(["stem", "a", "b"]))
    with pytest.raises(MixbitError, match="'add'.*called twice"):
        mixbit.calibrate_(model, [x], example=x)


def test_a_channel_that_is_dead_but_for_its_bias_takes_coarser_steps() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval(), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        model[0].weight[1] *= 1e-12
        model[0].weight[2] *= 1e-38
        model[0].bias[2] = 0
    prepared = ready(model, [x])
    codes = assert_equal_everywhere(prepared, x)
    reference = mixbit.export.reference(prepared, x)
    node = reference.nodes[1].name
    step = reference.grids[node].scale
    assert 2**29 <= abs(int(reference._bias[node][1])) <= 2**30
    assert (codes[node][:, 1] == round(model[0].bias[1].item() / step)).all()
    assert (codes[node][:, 2] == 0).all()
    assert np.abs(reference(x)[0] - prepared(x).detach().numpy()).max() < step


class Retina(nn.Module):
    """Unshuffled, permuted, joined per box, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(16, 6, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        y = self.stem(x)
        boxes = [z.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3) for z in (self.a(F.pixel_unshuffle(y, 2)), self.b(y))]
        return torch.cat(boxes, 1)


def test_boxes_of_several_maps_are_joined() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6)
    prepared = ready(Retina().eval(), [x])
    assert assert_equal_everywhere(prepared, x)["cat"].shape == (2, 60, 3)


def test_fixed_point_rounds_the_exact_product_half_up() -> None:
    rng = np.random.default_rng(0)
    grid = Grid(1.0, 3, -(2**15), 2**15 - 1)
    multipliers = np.exp(rng.uniform(-25, 2, 200)).astype(np.float32)
    multipliers[:3] = 0.5, 2.0**-60, 1e-30
    values = rng.integers(-(2**31) + 1, 2**31, 200)
    values[0] = -3  # a tie: -1.5 goes up
    factor, _ = fixed_point(multipliers)
    assert ((factor >= 2**30) & (factor < 2**31)).all()
    found = FixedPointReference._requantized(None, values, multipliers, grid)
    for v, m, code in zip(values.tolist(), multipliers.tolist(), found.tolist(), strict=True):
        exact = math.floor(Fraction(v) * Fraction(m) + Fraction(1, 2)) + 3
        assert code == min(max(exact, grid.low), grid.high)
    assert found[0] == -1 + 3
    with pytest.raises(MixbitError, match="too large for a fixed point"):
        fixed_point(np.float32(2.0**31))


def test_the_fixed_point_network_is_a_code_away_at_most_where_inputs_agree() -> None:
    torch.manual_seed(0)
    model, x = Everything(8, 2, 1).eval(), torch.randn(16, 3, 12, 12)
    mixbit.prepare_(model, Recipe.uniform(mixbit.layers(model, x).names))
    # Scales that are powers of two have many ties, which the two round apart.
    prepared = mixbit.calibrate_(model, [x], "qformat", example=x)
    reference = mixbit.export.reference(prepared, x)
    fixed = mixbit.export.reference(prepared, x, requantize="fixed_point")
    values = reference.tensors(x)
    apart = total = 0
    for node in reference.nodes:
        if node.op != "input":
            difference = np.abs(fixed.step(node, values) - values[node.name])
            assert difference.max() <= 1, node.name
            apart, total = apart + int((difference > 0).sum()), total + difference.size
    print(f"{apart} of {total} codes differ")
    assert 0 < apart < 0.1 * total
    # The sum by hand.
    node = next(n for n in reference.nodes if n.op == "add")
    a, b = (Fraction(reference.grids[name].scale / reference.grids[node.name].scale) for name in node.inputs)
    codes = [values[name] for name in node.inputs]
    grid = reference.grids[node.name]
    index = (0, 1, 2, 2)
    exact = a * int(codes[0][index]) + b * int(codes[1][index])
    assert abs(int(fixed.step(node, values)[index]) - min(max(exact, grid.low), grid.high)) <= Fraction(51, 100)
    with pytest.raises(MixbitError, match="requantize='fixedpoint'.*did you mean 'fixed_point'"):
        mixbit.export.reference(prepared, x, requantize="fixedpoint")
