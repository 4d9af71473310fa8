"""The kinds of quantizers: golden values, gradients against what the papers write, state, and training."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import mixbit
from mixbit import Recipe
from mixbit.errors import MixbitError
from mixbit.quantizers import KINDS, LSQ, PACT, TQT, FixedRange, LSQPlus, Quantizer, quantized_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

NAMES = ["stem", "a", "b", "side", "head"]
ACT_KINDS = sorted(KINDS)
FIXED = ("fixed", "ste", "ste_clip")
WEIGHT_KINDS = [kind for kind in ACT_KINDS if kind != "lsq+"]


def data(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def prepared(weight: str | None = None, act: str | None = None, bits: int = 4) -> nn.Module:
    model = seeded(Residual)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=bits, act=bits), weight_quantizer=weight, act_quantizer=act)
    return mixbit.calibrate_(model, data())


def learned(quantizer: Quantizer) -> list[nn.Parameter]:
    return [p for p in quantizer.parameters() if p.requires_grad]


# Golden values and formulas -------------------------------------------------------------------------------------------


def test_tqt_golden_unsigned() -> None:
    quantizer = TQT(2, signed=False)
    quantizer.set_(torch.tensor([2.0]))
    assert float(quantizer.log2_threshold.exp2()) == pytest.approx(6.0, rel=1e-6)
    x = torch.tensor([0.5, 1.2, 3.3, 5.0, 7.0], requires_grad=True)
    for step in range(2):
        quantizer.log2_threshold.grad = None
        x.grad = None
        y = quantizer(x)
        y.sum().backward()
        torch.testing.assert_close(y, torch.tensor([0.0, 2, 4, 4, 6]))
        assert x.grad.tolist() == [1, 1, 1, 1, 0]
        assert float(quantizer.log2_threshold.grad) == pytest.approx(4.158885, rel=1e-5)
        quantizer.normalize_gradient_()
        assert float(quantizer.log2_threshold.grad) == pytest.approx(0.761593, abs=2e-6), step


def test_tqt_golden_signed() -> None:
    quantizer = TQT(4).set_(torch.tensor([0.125]))
    assert float(quantizer.log2_threshold) == 0.0
    x = torch.tensor([-1.3, -0.4, 0.03, 0.6, 0.95], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [-1, -0.375, 0, 0.625, 0.875]
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert float(quantizer.log2_threshold.grad) == pytest.approx(-0.0727805, rel=1e-5)
    quantizer.normalize_gradient_()
    assert float(quantizer.log2_threshold.grad) == pytest.approx(-0.761536, abs=2e-6)


def test_tqt_powers_of_two() -> None:
    quantizer = TQT(4, signed=False, power_of_two=True).set_(torch.tensor([0.3]))
    assert float(quantizer.scale) == 0.5  # 0.3 * 16 = 4.8 rounds up to 8, in 16 steps
    quantizer(torch.tensor([1.0, 9.0])).sum().backward()
    assert quantizer.log2_threshold.grad.abs() > 0
    quantizer.log2_threshold.grad = None
    quantizer.normalize_gradient_()
    assert quantizer.log2_threshold.grad is None
    assert float(quantizer.gradient_steps) == 0


def test_pact_golden() -> None:
    quantizer = PACT(4, signed=False).set_(torch.tensor([0.4]))
    assert float(quantizer.clip) == pytest.approx(6.0)
    with torch.no_grad():
        quantizer.clip.fill_(6.0)
    x = torch.tensor([-1.0, 0.5, 3.0, 6.0, 7.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([0.0, 0.4, 3.2, 6.0, 6.0]))
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    assert float(quantizer.clip.grad) == 2


@given(clip=st.floats(0.01, 100), bits=st.integers(1, 16), signed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_pact_gradient_is_the_sum_of_the_clipped(clip: float, bits: int, signed: bool) -> None:
    quantizer = PACT(bits, signed=signed)
    quantizer.set_(torch.tensor([clip]) / quantizer._range_steps(bits))
    x = torch.linspace(-2 * clip, 2 * clip, 41).requires_grad_()
    g = torch.linspace(1, 2, 41)
    y = quantizer(x)
    low, high = quantizer.quant_range()
    with torch.no_grad():
        expected = mixbit.ops.fake_quantize(x, quantizer.scale, 0, bits, signed=signed)
    assert torch.equal(y, expected)
    y.backward(g)
    scale = float(quantizer.scale)
    above, below = (x >= quantizer.scale * high).detach(), (x < quantizer.scale * low).detach()
    share = {True: high / 2 ** (bits - 1), False: 1.0}[signed]
    expected_gradient = float(g[above].sum()) * share - (float(g[below].sum()) if signed else 0.0)
    assert float(quantizer.clip.grad) == pytest.approx(expected_gradient, rel=1e-4, abs=1e-4)
    assert torch.equal(x.grad, torch.where(above | below, 0, g))
    assert scale > 0


def test_pact_gradient_of_channels_and_of_the_lower_end() -> None:
    quantizer = PACT(3, channels=2, axis=0, narrow_range=True).set_(torch.tensor([1.0, 0.5]))
    x = torch.tensor([[-3.5, -3.0, 2.9, 3.0], [-1.0, -1.6, 1.4, 9.0]], requires_grad=True)
    quantizer(x).backward(torch.tensor([[1.0, 2, 4, 8], [16, 32, 64, 128]]))
    # clip = 3 scale on a symmetric grid: the scale's gradient is sum g end over the clipped, the clip's a third of it.
    assert quantizer.clip.grad.tolist() == [8 - 1, 128 - 32]
    assert x.grad.tolist() == [[0, 2, 4, 0], [16, 0, 64, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pact_layers_are_fused_and_equal_quantized_operands(dtype: torch.dtype) -> None:
    layers = {}
    for fused in (True, False):
        model = prepared("pact", "pact", 3)
        layer = model.a
        for quantizer in (layer.act_quantizer, layer.weight_quantizer):
            quantizer.fused = fused
        layers[fused] = layer
    x = torch.randn(2, layers[True].in_channels, 5, 5, generator=torch.Generator().manual_seed(3))
    results = []
    for fused, layer in layers.items():
        given = x.clone().requires_grad_()
        kept: list[torch.Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            y = layer(given)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        act, weight = layer.act_quantizer.clip, layer.weight_quantizer.clip
        results.append([y.detach(), given.grad, layer.weight.grad, act.grad, weight.grad])
        if fused:
            large = [t for t in kept if t.numel() >= min(x.numel(), layer.weight.numel())]
            assert {t.data_ptr() for t in large} == {given.data_ptr(), layer.weight.data_ptr()}
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_straight_through_passes_everywhere_and_its_clip_a_step_beyond_the_thresholds() -> None:
    # Two bits, step 1: the levels are -2 ... 1, the outermost thresholds -1.5 and 0.5.
    x = torch.tensor([-9.0, -2.6, -2.5, -2.0, 0.3, 1.0, 1.5, 1.6, 9.0, math.inf, math.nan])
    g = torch.arange(1.0, 12.0)
    expected = mixbit.ops.fake_quantize(x, torch.ones(1), 0, 2, rounding="half_up")
    found = {}
    for kind in ("ste", "ste_clip"):
        leaf = x.clone().requires_grad_()
        quantizer = KINDS[kind](2, rounding="half_up").set_(torch.ones(1))
        y = quantizer(leaf)
        assert torch.equal(y.detach().nan_to_num(7.0), expected.nan_to_num(7.0))
        y.backward(g)
        assert not quantizer.scale.requires_grad
        found[kind] = leaf.grad.tolist()
    assert found == {"ste": [*range(1, 10), 0, 0], "ste_clip": [0, 0, 3, 4, 5, 6, 7, 0, 0, 0, 0]}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_the_reach_of_a_clipped_straight_through_gradient(signed: bool, narrow: bool) -> None:
    quantizer = KINDS["ste_clip"](3, signed=signed, narrow_range=narrow).set_(torch.tensor([0.5]))
    low, high = quantizer.quant_range()
    x = torch.linspace(-4, 4, 65).requires_grad_()
    quantizer(x).sum().backward()
    v = x.detach() / 0.5
    assert torch.equal(x.grad, ((v >= low - 0.5) & (v <= high + 0.5)).float())


def test_the_reach_follows_extra_levels() -> None:
    # The base grid is -2 ... 1, with an extra bit -2, -1.5 ... 1.5: gradients pass from -2.25 to 1.75 there.
    quantizer = KINDS["ste_clip"](2, shape=(6,)).set_(torch.ones(1))
    quantizer.set_extra_bits_(torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.uint8))
    x = torch.tensor([-2.4, -2.4, 1.4, 1.7, 1.6, 1.8]).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("signed", [True, False])
def test_lsq_is_the_plain_gradient_times_its_factor(signed: bool) -> None:
    x, g = torch.randn(8, 5, 4, 4), torch.randn(8, 5, 4, 4)
    made = [k(3, signed=signed, batched=True).set_(torch.tensor([0.3])) for k in (Quantizer, LSQ)]
    for quantizer in made:
        quantizer(x).backward(g)
    hi = 3 if signed else 7
    factor = 1 / math.sqrt(5 * 4 * 4 * hi)
    assert torch.equal(made[0](x), made[1](x))
    assert float(made[1].scale.grad) == pytest.approx(float(made[0].scale.grad) * factor, rel=1e-5)
    weights = LSQ(4, channels=8, axis=0).set_(torch.full((8,), 0.2))
    plain = Quantizer(4, channels=8, axis=0).set_(torch.full((8,), 0.2))
    for quantizer in (weights, plain):
        quantizer(x).backward(g)
    torch.testing.assert_close(weights.scale.grad, plain.scale.grad / math.sqrt(5 * 4 * 4 * 7))


def test_lsq_starts_as_published() -> None:
    x = torch.randn(6, 100)
    weights = LSQ(4, channels=6, axis=0).initialize_(x)
    torch.testing.assert_close(weights.scale.detach(), 2 * x.abs().mean(1) / math.sqrt(7))
    acts = LSQ(4, batched=True).initialize_(x.relu())
    assert not acts.signed
    torch.testing.assert_close(acts.scale.detach(), 2 * x.relu().mean().reshape(1) / math.sqrt(15))
    assert torch.equal(LSQ(4).initialize_(torch.zeros(3)).scale, torch.ones(1))
    # One signed bit has no positive level: nothing is divided by zero.
    one = LSQ(1).initialize_(x)
    one(x).sum().backward()
    assert torch.isfinite(one.scale.grad).all()


def test_lsq_plus_has_the_gradients_of_its_paper() -> None:
    scale, offset, bits = 0.25, -1.5, 3
    quantizer = LSQPlus(bits, batched=True).set_(torch.tensor([scale]), signed=False, zero_point=-offset / scale)
    assert float(quantizer.zero_point) == 6.0
    x = torch.linspace(-4, 4, 33).reshape(1, 33).requires_grad_()
    g = torch.linspace(0.5, 1.5, 33).reshape(1, 33)
    y = quantizer(x)
    y.backward(g)
    v = (x.detach() - offset) / scale
    inside = (v >= 0) & (v <= 7)
    torch.testing.assert_close(y.detach(), torch.round(v.clamp(0, 7)) * scale + offset)
    factor = 1 / math.sqrt(33 * 7)
    # Equations 3 and 4: inside, round(v) - v and 0; outside, the bound and 1.
    expected = (g * torch.where(inside, torch.round(v) - v, v.clamp(0, 7))).sum() * factor
    torch.testing.assert_close(quantizer.scale.grad, expected.reshape(1))
    torch.testing.assert_close(quantizer.offset.grad, (g * ~inside).sum().reshape(1) * factor)
    assert torch.equal(x.grad, g * inside)


def test_lsq_plus_covers_skewed_data_better_than_a_symmetric_grid() -> None:
    x = nn.functional.silu(torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0)) * 2)
    model = nn.Sequential(nn.Conv2d(8, 4, 3)).eval()
    errors = {}
    for kind in ("lsq", "lsq+"):
        mixbit.restore_(model)
        mixbit.prepare_(model, Recipe.uniform(["0"], weight=8, act=4), act_quantizer=kind)
        mixbit.calibrate_(model, [x])
        with torch.no_grad():
            errors[kind] = float((model[0].act_quantizer(x) - x).square().mean())
    assert errors["lsq+"] < 0.6 * errors["lsq"]
    mixbit.calibrate_(model, [x], method="maxabs")
    low, high = model[0].act_quantizer.quant_range()
    quantizer = model[0].act_quantizer
    zero = float(torch.round(quantizer.zero_point))
    step = float(quantizer.scale)
    assert (low - zero) * step <= float(x.min()) + step / 2
    assert (high - zero) * step >= float(x.max()) - step / 2
    with pytest.raises(MixbitError, match="qformat"):
        mixbit.calibrate_(model, [x], method="qformat")


def test_fixed_ranges() -> None:
    image = FixedRange.from_range(8, 0.0, 1.0)
    assert not image.signed
    assert float(image.scale) == pytest.approx(1 / 255)
    assert not image.scale.requires_grad
    both = FixedRange.from_range(4, -1.0, 2.0)
    assert both.quant_range() == (-8, 7)
    assert float(both.scale) == pytest.approx(2 / 7)
    kept = []
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        both(x).sum().backward()
    assert sum(t.nbytes for t in kept) == 13
    for low, high in ((1.0, 2.0), (0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(MixbitError, match="low="):
            FixedRange.from_range(4, low, high)


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACT_KINDS)
def test_every_kind_sets_moves_copies_and_loads(kind: str) -> None:
    quantizer = KINDS[kind](8, batched=True).set_(torch.tensor([0.02]), signed=False)
    x = torch.rand(2, 3, 4) * 5
    torch.testing.assert_close(quantizer.effective_scale().detach(), torch.tensor([0.02]))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    fresh = KINDS[kind](8, batched=True)
    with pytest.raises(MixbitError, match="no scales yet"):
        fresh(x)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    reach = float(quantizer.scale) * 255
    quantizer.set_bit_width_(4)
    assert quantizer.quant_range() == (0, 15)
    assert float(quantizer.scale) * 15 == pytest.approx(reach, rel=1e-5)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(MixbitError, match="scale: expected positive"):
            quantizer.set_(torch.tensor([bad]))
    if kind != "lsq+":
        with pytest.raises(MixbitError, match="expected 0"):
            quantizer.set_(torch.tensor([0.1]), zero_point=3)


@pytest.mark.parametrize("kind", ACT_KINDS)
def test_every_kind_initializes_itself_on_a_tensor(kind: str) -> None:
    x = torch.randn(4, 50)
    quantizer = KINDS[kind](6, batched=True).initialize_(x)
    assert float((quantizer(x) - x).abs().mean()) < 0.1
    assert quantizer.initialize_(torch.zeros(3)).is_calibrated


@pytest.mark.parametrize("kind", ["tqt", "pact"])
def test_no_optimizer_step_makes_a_scale_negative(kind: str) -> None:
    quantizer = KINDS[kind](4).set_(torch.tensor([0.1]))
    for p in learned(quantizer):
        with torch.no_grad():
            p.sub_(50.0)
    assert float(quantizer.scale) > 0
    assert torch.isfinite(quantizer(torch.randn(5))).all()


# On models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHT_KINDS)
@pytest.mark.parametrize("act", ACT_KINDS)
def test_every_pair_of_kinds_trains(weight: str, act: str) -> None:
    model = prepared(weight, act).train()
    for layer in quantized_layers(model).values():
        assert type(layer.weight_quantizer) is KINDS[weight]
        assert type(layer.act_quantizer) is KINDS[act]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(data(1)[0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        fixed = (".weight_quantizer." in name and weight in FIXED) or (".act_quantizer." in name and act in FIXED)
        if fixed:
            assert torch.equal(p, before[name])
    moved = [n for n, p in model.named_parameters() if "quantizer" in n and not torch.equal(p, before[n])]
    assert bool(moved) == (weight not in FIXED or act not in FIXED)


def test_the_default_is_lsq_and_a_kind_is_kept_when_bits_move() -> None:
    model = prepared()
    assert type(model.a.weight_quantizer) is LSQ
    assert type(model.a.act_quantizer) is LSQ
    model = prepared("tqt", "pact")
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=6, act=6))
    assert type(model.a.weight_quantizer) is TQT
    assert type(model.a.act_quantizer) is PACT
    assert model.a.act_quantizer.quant_range() == (0, 63)


def test_changing_the_kind_keeps_the_grid() -> None:
    model, x = prepared("lsq", "lsq"), data(1)[0]
    expected = model(x)
    for kind in ("tqt", "pact", "fixed", "plain", "lsq"):
        mixbit.prepare_(
            model,
            Recipe.uniform(NAMES, weight=4, act=4),
            weight_quantizer=kind,
            act_quantizer=kind,
            example=x,
        )
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=4, act=4), act_quantizer="lsq+")
    with pytest.raises(MixbitError, match="no scales yet"):
        model(x)


@pytest.mark.parametrize("bits", [0.0, 17.0, 2.5, float("nan"), float("inf")])
def test_a_width_that_no_op_would_refuse_on_a_gpu_is_caught_in_load_and_calibrate(bits: float) -> None:
    model = prepared()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["a.act_quantizer.bit_width"].fill_(bits)
    with pytest.raises(MixbitError, match=r"bit_width=.*expected a whole number from 1 to 16"):
        prepared().load_state_dict(state)
    model.b.weight_quantizer.bit_width.fill_(bits)
    with pytest.raises(MixbitError, match=r"bit_width=.*expected a whole number"):
        mixbit.calibrate_(model, data())


def test_unknown_kinds_are_named() -> None:
    model = seeded(Residual)
    for option, value in (("weight_quantizer", "lsq+"), ("act_quantizer", "lqs")):
        with pytest.raises(MixbitError, match=f"{option}"):
            mixbit.prepare_(model, Recipe.uniform(NAMES), **{option: value})
    assert not quantized_layers(model)


def test_an_offset_grid_survives_into_the_integer_network() -> None:
    images = data()
    model = mixbit.fold_batchnorm_(seeded(Residual), images[0])
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=6, act=6), act_quantizer="lsq+")
    mixbit.calibrate_(model, images, example=images[0])
    assert any(float(q.act_quantizer.zero_point) >= 0.5 for q in quantized_layers(model).values())
    reference = mixbit.export.reference(model, images[0])
    from mixbit.export.simulation import IntegerSimulation

    simulated = IntegerSimulation(model, images[0])(images[1])[0]
    torch.testing.assert_close(torch.as_tensor(reference(images[1].numpy())[0]), simulated, rtol=0, atol=0)


def test_exponential_averages_follow_a_model_under_training() -> None:
    model = seeded(Residual)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=4, act=4), data(1)[0])
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))  # before the scales exist
    mixbit.calibrate_(model, data())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        model(data(1)[0]).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    model.eval()
    average.eval()
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=3, act=4))
    average.update_parameters(model)
    x = data(1)[0]
    assert torch.isfinite(average(x)).all()
    assert int(average.module.a.weight_quantizer.bit_width) == 3
    assert average.module.a.act_quantizer.signed == model.a.act_quantizer.signed
    scale, own = average.module.a.act_quantizer.scale, model.a.act_quantizer.scale
    assert float((scale - own).abs() / own) < 0.2


def test_state_needs_no_pickle(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = prepared("tqt", "lsq+")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for loaded in (load_file(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt", weights_only=True)):
        fresh = seeded(Residual)
        mixbit.prepare_(fresh, Recipe.uniform(NAMES, weight=4, act=4), weight_quantizer="tqt", act_quantizer="lsq+")
        fresh.load_state_dict(loaded, strict=True)
        assert torch.equal(fresh(data(1)[0]), model(data(1)[0]))


def test_autocast_trains_in_bfloat16() -> None:
    model = prepared().train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(data(1)[0])
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.dtype == torch.float32 for g in got.values())
    model.zero_grad()
    model(data(1)[0]).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad.norm() > 1e-3 and "quantizer" not in name:
            assert torch.nn.functional.cosine_similarity(got[name].flatten(), p.grad.flatten(), dim=0) > 0.8, name


def test_bits_move_in_a_compiled_training_step_without_a_new_graph() -> None:
    model = prepared("lsq", "lsq").train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = data(1)[0]
    for bits in (8, 6, 4, 3, 2):
        mixbit.prepare_(model, Recipe.uniform(NAMES, weight=bits, act=bits))
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            levels = len(model.a.weight_quantizer(model.a.weight)[0].unique())
        assert levels <= 2**bits - 1
    assert len(graphs) == 1
