"""Equalization, bias correction and percentile ranges: exact where they must be, better on real networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixbit
from mixbit import zoo
from mixbit.errors import MixbitError
from mixbit.network import capture
from mixbit.quantizers import TensorStatistics, bypass, quantized_layers
from mixbit.quantizers.corrections import equalizable_pairs

WEIGHTS = zoo.data_dir() / "weights"


class Chain(nn.Module):
    """Pairs that may be equalized (also grouped ones), and pairs that may not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=8)
        self.c = nn.Conv2d(8, 6, 1, bias=False)
        self.d = nn.Conv2d(6, 6, 1, groups=2)
        self.e = nn.Conv2d(6, 6, 1)
        self.f = nn.Linear(6, 5)
        self.g = nn.Linear(5, 4)
        with torch.no_grad():
            for layer in (self.a, self.b, self.c, self.d):
                layer.weight.mul_(torch.logspace(-2, 1, layer.weight.shape[0]).reshape(-1, 1, 1, 1))
            self.a.weight[2] = 0.0  # a dead channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu())
        x = self.d(self.c(x).relu())
        x = nn.functional.relu6(self.e(x))
        return self.g(self.f(x.mean((2, 3))).relu())


def ranges(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().abs().flatten(1).amax(1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pairs_and_exactness(memory_format: torch.memory_format) -> None:
    model, x = Chain().eval().to(memory_format=memory_format), torch.randn(4, 3, 9, 9)
    pairs = equalizable_pairs(capture(model, x))
    assert pairs == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("f", "g")]
    expected, before = model(x), copy.deepcopy(model)
    assert mixbit.equalize_(model, x) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.a.weight[2], torch.zeros(3, 3, 3))
    # Both sides of a channel have one range now.
    behind = model.c.weight.detach().abs().amax((0, 2, 3))
    torch.testing.assert_close(torch.maximum(ranges(model.b.weight), model.b.bias.abs()), behind, rtol=0.02, atol=0)
    spread = [float(ranges(m.b.weight).max() / ranges(m.b.weight).min()) for m in (before, model)]
    assert spread[1] < 0.5 * spread[0]


def test_a_tensor_that_two_read_is_left_alone() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).relu()
            return self.b(y) + self.c(y)

    model, x = Split().eval(), torch.randn(3, 4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mixbit.equalize_(model, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def prepared(model: nn.Module, x: torch.Tensor, weight: int, act: int, **options) -> nn.Module:
    names = [layer.name for layer in mixbit.layers(model, x[:1])]
    default = mixbit.LayerPrecision(weight=weight, act=act, **options)
    mixbit.prepare_(model, mixbit.Recipe(layers={n: default for n in names}), x[:1])
    return mixbit.calibrate_(model, [x])


def sqnr(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        low = model(x).double()
        with bypass(model):
            exact = model(x).double()
    return float(10 * torch.log10(exact.square().sum() / (low - exact).square().sum()))


def test_equalization_saves_a_network_with_one_scale_per_tensor() -> None:
    x, _ = zoo.coco("train", network="vww")
    results = []
    for equalized in (False, True):
        model = zoo.vww_mobilenet(WEIGHTS / "mlperf_tiny_vww_mobilenetv1_0.25_96_fp32.npz")
        mixbit.fold_batchnorm_(model, x[:1])
        if equalized:
            mixbit.equalize_(model, x[:1])
        results.append(sqnr(prepared(model, x, 8, 8, granularity="per_tensor"), x))
    assert results[1] > results[0] + 5, results
    assert len(equalizable_pairs(capture(mixbit.restore_(model), x[:1]))) == 26  # every neighbour but the classifier


def test_bias_correction_removes_the_mean_error() -> None:
    x, _ = zoo.coco("train", network="vww")
    model = zoo.vww_mobilenet(WEIGHTS / "mlperf_tiny_vww_mobilenetv1_0.25_96_fp32.npz")
    mixbit.fold_batchnorm_(model, x[:1])
    prepared(model, x, 4, 8)
    before = sqnr(model, x)
    layer, seen = model.dw3, []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad(), bypass(model):
        model(x)
    handle.remove()

    def shift() -> float:
        with torch.no_grad():
            low = layer(seen[0])
            with bypass(model):
                exact = layer(seen[0])
        return float((low - exact).mean((0, 2, 3)).abs().max())

    exact_bias = layer.bias.detach().clone()
    assert shift() > 1e-3
    assert mixbit.correct_bias_(model, [x[:8], x[8:]]) is model
    # The float side now has the corrected bias, too: the shift is seen against the old one.
    moved = layer.bias.detach() - exact_bias
    with torch.no_grad():
        low = layer(seen[0])
        exact = nn.functional.conv2d(
            zoo.layers.pad_same(seen[0], 3, 1) if layer.padding != (0, 0) else seen[0], layer.weight, exact_bias,
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip
    assert float((low - exact).mean((0, 2, 3)).abs().max()) < 1e-4
    assert moved.abs().max() > 1e-3
    assert before < 30


def test_bias_correction_helps_a_real_network() -> None:
    images, labels = zoo.imagenet_compat(64, "mobilenet_v1", 128)
    calibration = images[:24]
    found = {}
    for corrected in (False, True):
        model = zoo.mobilenet_v1(0.25, WEIGHTS / "mobilenet_v1_0.25_128_qat_uint8.npz")
        with torch.no_grad():
            exact = model(images).double()
        prepared(model, calibration, 5, 8, granularity="per_tensor")
        if corrected:
            mixbit.correct_bias_(model, [calibration])
        with torch.no_grad():
            noise = (model(images).double() - exact).square().sum()
        found[corrected] = float(10 * torch.log10(exact.square().sum() / noise))
    assert found[True] > found[False] + 0.5, found
    assert len(labels) == 64


@pytest.mark.parametrize(("weight", "gain"), [(4, 1.5), (3, 3.0)])
def test_rounding_for_the_output_helps_a_real_network(weight: int, gain: float) -> None:
    pixels, _ = zoo.cifar10_pixels("train", 96)
    x = pixels.float()
    found = {}
    for rounded in (False, True):
        model = zoo.resnet8(WEIGHTS / "mlperf_tiny_resnet8_cifar10_fp32.npz")
        mixbit.fold_batchnorm_(model, x[:1])
        with torch.no_grad():
            exact = model(x).double()
        prepared(model, x[:48], weight, 8)
        if rounded:
            assert mixbit.optimize_rounding_(model, [x[:20], x[20:48]]) is model
        with torch.no_grad():  # images that the rounding did not see
            noise = (model(x)[48:].double() - exact[48:]).square().sum()
        found[rounded] = float(10 * torch.log10(exact[48:].square().sum() / noise))
    assert found[True] > found[False] + gain, found


class Mixed(nn.Module):
    """Layers of every form that rounding must unfold: groups, strides, dilation, string and reflected padding, 3-d."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 6, 3, stride=2, padding="valid")
        self.b = nn.Conv2d(6, 8, (3, 2), padding="same", dilation=(1, 2), groups=2)
        self.c = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
        self.d = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu().flatten(2).mT)


def test_rounding_lowers_the_error_of_every_kind_of_layer() -> None:
    model, x = Mixed().eval(), torch.randn(6, 3, 15, 15)
    prepared(model, x, 3, 8)
    inputs: dict[str, torch.Tensor] = {}
    layers = dict(model.named_children())
    handles = [
        m.register_forward_hook(lambda m, args, out, n=n: inputs.__setitem__(n, args[0])) for n, m in layers.items()
    ]
    with torch.no_grad(), bypass(model):
        model(x)
    for handle in handles:
        handle.remove()
    original = copy.deepcopy(model)

    def error(name: str, trained: nn.Module) -> float:
        """Of the output for the quantized input, against the float weight."""
        source, layer = original.get_submodule(name), trained.get_submodule(name)
        with torch.no_grad():
            seen = source.act_quantizer(inputs[name])
            exact = mixbit.quantizers.apply_layer(source, seen, source.weight)
            return float(
                (mixbit.quantizers.apply_layer(source, seen, layer.weight_quantizer(layer.weight)) - exact)
                .square()
                .sum()
            )

    mixbit.optimize_rounding_(model, [x[:4], x[4:]], damping=0.0)
    for name, layer in layers.items():
        # The first layer sees uncorrelated inputs, for which the nearest level is nearly the best.
        assert error(name, model) < (1.0 if name == "a" else 0.9) * error(name, original), name
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    # Wider layers are left alone.
    before = copy.deepcopy(original)
    mixbit.optimize_rounding_(original, [x], max_bits=2)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), original.parameters(), strict=True))


def test_rounding_in_several_passes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for memory in (2**30, 1):
        monkeypatch.setattr("mixbit.quantizers.rounding.MEMORY", memory)
        model, x = Mixed().eval(), torch.randn(6, 3, 15, 15, generator=torch.Generator().manual_seed(3))
        models.append(mixbit.optimize_rounding_(prepared(model, x, 3, 8), [x]))
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_percentiles() -> None:
    statistics = TensorStatistics()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=generator)
    x[7] = 300.0
    statistics.update(x[:100_000])
    statistics.update(x[100_000:])
    for share in (50.0, 99.0, 99.9):
        expected = float(x.abs().double().sort().values[round(share / 100 * len(x)) - 1])
        assert statistics.quantile(share, signed=True) == pytest.approx(expected, abs=0.1)
        expected = float(x.double().sort().values[round(share / 100 * len(x)) - 1])
        if share > 50:
            assert statistics.quantile(share, signed=False) == pytest.approx(expected, abs=0.1)
    assert statistics.quantile(100, signed=True) == 300
    scale = statistics.scales([8], signed=True, narrow_range=False, method="percentile", percentile=99.9)
    assert float(scale) == pytest.approx(3.29 / 127, rel=0.05)
    for bad in (0, 101):
        with pytest.raises(MixbitError, match="percentile="):
            statistics.quantile(bad, signed=True)
    empty = TensorStatistics()
    empty.update(torch.zeros(5))
    assert float(empty.scales([4], signed=False, narrow_range=False, method="percentile")) == 1.0


def test_percentile_ranges_calibrate_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(8, 3, 20, 20)
    x[0, 0, 0, 0] = 50.0
    reach = {}
    for method in ("maxabs", "percentile"):
        mixbit.restore_(model)
        mixbit.prepare_(model, mixbit.Recipe.uniform(["0"], weight=4, act=8))
        mixbit.calibrate_(model, [x], method=method, percentile=99.9)
        reach[method] = float(model[0].act_quantizer.scale) * 127
    assert reach["maxabs"] == pytest.approx(50, rel=0.01)
    assert 2.5 < reach["percentile"] < 5


def test_bad_input_is_named() -> None:
    model, x = Chain().eval(), torch.randn(1, 3, 9, 9)
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.correct_bias_(model, [x])
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.optimize_rounding_(model, [x])
    with pytest.raises(MixbitError, match="rounds=0"):
        mixbit.equalize_(model, x, rounds=0)
    with pytest.raises(MixbitError, match="eval"):
        mixbit.equalize_(Chain().train(), x)
    prepared(model, x, 4, 4)
    assert quantized_layers(model)
    with pytest.raises(MixbitError, match="prepared already"):
        mixbit.equalize_(model, x)
    with pytest.raises(MixbitError, match="empty"):
        mixbit.correct_bias_(model, [])
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).eval()
    prepared(bare, x, 4, 4)
    with pytest.raises(MixbitError, match="no prepared layer has a bias"):
        mixbit.correct_bias_(bare, [x])
