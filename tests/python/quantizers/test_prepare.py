"""prepare_, calibrate_, restore_, fold_batchnorm_: the contract's Models paragraph, on small networks."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mixbit
from mixbit import LayerPrecision, Recipe
from mixbit.errors import MixbitError
from mixbit.quantizers import PACT, QuantizedConv2d, bypass, quantized_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, Shared, seeded

NAMES = ["stem", "a", "b", "side", "head"]


def data(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def prepared(recipe: Recipe | None = None, **options) -> nn.Module:
    model = seeded(Residual)
    mixbit.prepare_(model, recipe or Recipe.uniform(NAMES), **options)
    return mixbit.calibrate_(model, data())


def test_parameters_and_keys_stay_and_quantizers_are_added() -> None:
    model = seeded(Residual)
    before, objects = list(model.state_dict()), dict(model.named_parameters())
    assert mixbit.prepare_(model, Recipe.uniform(NAMES)) is model
    after = model.state_dict()
    assert [k for k in after if "quantizer" not in k] == before
    for key in ("scale", "zero_point", "bit_width", "calibrated_scale", "signed_flag", "calibrated"):
        assert f"stem.weight_quantizer.{key}" in after
        assert f"stem.act_quantizer.{key}" in after
    assert all(dict(model.named_parameters())[name] is p for name, p in objects.items())
    assert after["stem.weight_quantizer.scale"].shape == (8,)
    assert after["stem.weight_quantizer.bit_width"].shape == (1,)
    assert isinstance(model.stem, QuantizedConv2d)
    assert isinstance(model.stem, nn.Conv2d)


def test_forward_is_the_quantized_operation() -> None:
    model = prepared(Recipe.uniform(NAMES, weight=4, act=5))
    layer, x = model.a, torch.randn(2, 8, 5, 5).relu()
    wq, xq = layer.weight_quantizer(layer.weight), layer.act_quantizer(x)
    assert not layer.act_quantizer.signed
    assert torch.equal(layer(x), nn.functional.conv2d(xq, wq, layer.bias, padding=1))
    assert len(wq[0].unique()) <= 15
    assert model.stem.act_quantizer.signed


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, (2, 4), padding="same"),
        nn.Conv2d(3, 4, 3, padding="valid"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"),
        nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, stride=2),
    ],
    ids=str,
)
def test_every_padding(conv: nn.Conv2d) -> None:
    model = nn.Sequential(conv).eval()
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    mixbit.prepare_(model, Recipe.uniform(["0"], weight=16, act=16))
    mixbit.calibrate_(model, [x], "maxabs")
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("weight", "act"), [(4, None), (None, 4)])
def test_one_operand_may_stay_float(weight: int | None, act: int | None) -> None:
    model = prepared(Recipe.uniform(NAMES, weight=weight, act=act))
    x = data(1)[0]
    with bypass(model):
        expected = model(x)
    assert not torch.equal(model(x), expected)
    assert (model.a.weight_quantizer is None) == (weight is None)


def test_inputs_of_another_shape_are_named() -> None:
    model = mixbit.prepare_(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), Recipe.uniform(["0", "2"])
    )
    for shape in ((2, 6, 6), (1, 1, 3, 6, 6), (6,), (2, 4, 6, 6)):
        with pytest.raises(MixbitError, match=r"x has shape \(.*\); expected \[N, 3, H, W\]"):
            model[0](torch.zeros(shape))
    for shape in ((), (2, 63)):
        with pytest.raises(MixbitError, match=r"x has shape \(.*\); expected \[\.\.\., 64\]"):
            model[2](torch.zeros(shape))


def test_restore_gives_back_the_very_model() -> None:
    model = seeded(Residual)
    x, keys = data(1)[0], list(seeded(Residual).state_dict())
    expected = model(x)
    kinds = [type(m) for m in model.modules()]
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=3, act=3))
    mixbit.calibrate_(model, data())
    assert not torch.equal(model(x), expected)
    assert mixbit.restore_(model) is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == set(vars(seeded(Residual)))


def test_layers_that_read_one_tensor_share_their_quantizer() -> None:
    model = prepared()
    assert model.a.act_quantizer is model.side.act_quantizer
    assert model.a.act_quantizer is not model.b.act_quantizer
    early = mixbit.prepare_(seeded(Residual), Recipe.uniform(NAMES), example=data(1)[0])
    assert early.a.act_quantizer is early.side.act_quantizer
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=4, act=4), act_quantizer="pact")
    assert isinstance(model.a.act_quantizer, PACT)
    assert model.a.act_quantizer is model.side.act_quantizer
    partly = Recipe.uniform([name for name in NAMES if name != "a"], weight=4, act=4)
    mixbit.prepare_(model, partly, act_quantizer="lsq")
    assert type(model.a) is nn.Conv2d
    searched = mixbit.prepare_(seeded(Residual), mixbit.search.Gates(), data(1)[0])
    mixbit.prepare_(mixbit.calibrate_(searched, data()), mixbit.search.extract(searched))
    assert searched.a.act_quantizer is searched.side.act_quantizer
    assert searched.a.act_quantizer.is_calibrated


def test_shared_inputs_that_ask_different_bits_are_refused_and_nothing_is_changed() -> None:
    recipe = Recipe.uniform(NAMES)
    recipe.layers["side"] = LayerPrecision(weight=8, act=4)
    model = seeded(Residual)
    with pytest.raises(MixbitError, match="'a' and 'side' read the same tensor but ask act=8 and act=4"):
        mixbit.prepare_(model, recipe, example=data(1)[0])
    assert not quantized_layers(model)
    with pytest.raises(MixbitError, match="read the same tensor"):
        mixbit.calibrate_(mixbit.prepare_(model, recipe), data())
    tied = prepared()
    bits = tied.a.act_quantizer.bit_width.clone()
    with pytest.raises(MixbitError, match="'a' and 'side' read the same tensor but ask act=8 and act=4"):
        mixbit.prepare_(tied, recipe)
    assert torch.equal(tied.a.act_quantizer.bit_width, bits)


def test_a_shared_module_is_wrapped_once() -> None:
    model = seeded(Shared)
    mixbit.prepare_(model, Recipe.uniform(["first", "again"]))
    assert model.again is model.alias
    assert list(quantized_layers(model)) == ["first", "again"]
    x = torch.randn(5, 6)
    mixbit.calibrate_(model, [{"values": x}])
    assert model(x)["out"].shape == (5, 6)
    mixbit.restore_(model)
    assert type(model.alias) is nn.Linear


def test_a_layer_the_data_never_reaches_is_named() -> None:
    model = mixbit.prepare_(seeded(Shared), Recipe.uniform(["first", "unused"]))
    with pytest.raises(MixbitError, match="layer 'unused' was never reached by the data"):
        mixbit.calibrate_(model, [torch.randn(2, 6)])


def test_a_float_state_dict_loads_strictly() -> None:
    model, other = prepared(), seeded(Residual)
    scale = model.stem.weight_quantizer.scale.clone()
    with torch.no_grad():
        other.stem.weight.mul_(2)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.stem.weight, other.stem.weight)
    assert torch.equal(model.stem.weight_quantizer.scale, scale)


def test_a_calibrated_state_moves_to_a_fresh_model() -> None:
    model = prepared()
    fresh = mixbit.prepare_(seeded(Residual), Recipe.uniform(NAMES), example=data(1)[0])
    with pytest.raises(MixbitError, match="call mixbit.calibrate_"):
        fresh(data(1)[0])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(data(1)[0]), model(data(1)[0]))
    assert not fresh.a.act_quantizer.signed


def test_copies_pickles_and_averages() -> None:
    model, x = prepared(), data(1)[0]
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model, use_buffers=True)):
        assert torch.equal(other(x), expected)
    assert copy.deepcopy(model).a.act_quantizer is not model.a.act_quantizer
    twin = copy.deepcopy(model)
    assert twin.a.act_quantizer is twin.side.act_quantizer


def test_preparing_again_moves_the_scales() -> None:
    model = prepared()
    layer = model.a
    weight, act = layer.weight_quantizer.scale.clone(), layer.act_quantizer.scale.clone()
    signed = model.stem.act_quantizer.scale.clone()
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=4, act=3))
    torch.testing.assert_close(layer.weight_quantizer.scale, weight * 127 / 7)
    torch.testing.assert_close(layer.act_quantizer.scale, act * 255 / 7)
    torch.testing.assert_close(model.stem.act_quantizer.scale, signed * 2**5)
    assert model(data(1)[0]).isfinite().all()
    mixbit.prepare_(model, Recipe.uniform(["a"]))
    assert type(model.stem) is nn.Conv2d
    torch.testing.assert_close(layer.weight_quantizer.scale, weight)


def test_a_scale_cannot_be_driven_through_zero() -> None:
    quantizer = prepared().a.weight_quantizer
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    effective = quantizer.effective_scale()
    assert torch.equal(effective, quantizer.calibrated_scale * 2.0**-20)
    effective.sum().backward()
    assert torch.equal(quantizer.scale.grad, torch.ones_like(quantizer.scale))


def test_training_moves_weights_and_scales() -> None:
    model = prepared(Recipe.uniform(NAMES, weight=4, act=4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(data(1)[0]).square().sum().backward()
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert "a.weight" in moved
    assert "a.weight_quantizer.scale" in moved
    assert "a.act_quantizer.scale" in moved


@pytest.mark.parametrize("method", ["mse", "maxabs", "qformat"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_calibration_methods(method: str, granularity: str) -> None:
    model = seeded(Residual)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=6, act=6, granularity=granularity))
    mixbit.calibrate_(model, data(), method)
    for layer in quantized_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            assert (quantizer.scale > 0).all()
            if method == "qformat":
                assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())
    if method == "maxabs":
        largest = model.a.weight.abs().amax((1, 2, 3)) if granularity == "per_channel" else model.a.weight.abs().max()
        torch.testing.assert_close(model.a.weight_quantizer.scale, (largest / 31).reshape(-1))


def test_one_bit_and_zero_channels() -> None:
    model = seeded(Residual)
    with torch.no_grad():
        model.a.weight[2] = 0
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=1, act=1, narrow_range=False))
    mixbit.calibrate_(model, data())
    assert model(data(1)[0]).isfinite().all()
    assert model.a.weight_quantizer.scale[2].item() == 1.0


def test_several_batches_calibrate_like_one() -> None:
    batches = [data(1)[0] * s for s in (0.3, 1.0, 5.0)]
    models = [mixbit.prepare_(seeded(Residual), Recipe.uniform(NAMES)) for _ in range(2)]
    mixbit.calibrate_(models[0], batches)
    mixbit.calibrate_(models[1], [torch.cat(batches)])
    for a, b in zip(*(quantized_layers(m).values() for m in models), strict=True):
        torch.testing.assert_close(a.act_quantizer.scale, b.act_quantizer.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("negative", [True, False])
def test_batchnorm_folds_exactly(negative: bool) -> None:
    model, x = seeded(Residual), data(1)[0]
    if not negative:
        model.bn.weight.data.abs_()
    expected = model(x)
    assert mixbit.fold_batchnorm_(model, x) is model
    assert isinstance(model.bn, nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lsq", "tqt", "pact"])
@pytest.mark.parametrize("bits", [2, 8])
def test_batchnorm_folds_into_prepared_layers_and_keeps_their_codes(kind: str, bits: int) -> None:
    model, x = seeded(Residual), data(1)[0]
    with torch.no_grad():
        model.bn.weight[3] = 0.0  # a channel that is switched off
    assert model.bn.weight.min() < 0
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=bits, act=8), x, weight_quantizer=kind)
    mixbit.calibrate_(model, data())

    def codes() -> torch.Tensor:
        scale = model.stem.weight_quantizer.scale.detach().reshape(-1, 1, 1, 1)
        return (model.stem.weight_quantizer(model.stem.weight) / scale).round().detach()

    gain, before, expected = model.bn.weight.detach().sign(), codes(), model(x).detach()
    mixbit.fold_batchnorm_(model, x)
    assert isinstance(model.bn, nn.Identity)
    assert torch.equal(codes(), before * gain.reshape(-1, 1, 1, 1))
    # A code of an input may fall on the other side of a tie.
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_scales_that_cannot_take_up_batchnorm_are_refused() -> None:
    model, x = seeded(Residual), data(1)[0]
    recipe = Recipe(layers={"stem": mixbit.LayerPrecision(weight=4, act=8, granularity="per_tensor")})
    mixbit.calibrate_(mixbit.prepare_(model, recipe, x), data())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MixbitError, match="'stem' is prepared already, with one weight scale for all its channels"):
        mixbit.fold_batchnorm_(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = seeded(Residual)
    mixbit.prepare_(model, Recipe.uniform(NAMES), x, weight_quantizer="tqt")
    model.stem.weight_quantizer.power_of_two = True
    mixbit.calibrate_(model, data())
    with pytest.raises(MixbitError, match="powers of two"):
        mixbit.fold_batchnorm_(model, x)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: mixbit.prepare_(m, Recipe.uniform(["stm"])), "no layer 'stm'; did you mean 'stem'"),
        (lambda m: mixbit.prepare_(m, Recipe.uniform(["bn"])), r"layer 'bn' \(BatchNorm2d\) cannot be quantized"),
        (lambda m: mixbit.prepare_(m, {"a": 4}), "recipe is a dict; expected a mixbit.Recipe"),
        (lambda m: mixbit.calibrate_(m, data()), "no prepared layers; call mixbit.prepare_"),
        (lambda m: mixbit.calibrate_(_ready(m), []), "batches is empty"),
        (lambda m: mixbit.calibrate_(_ready(m), iter(data())), "one-shot iterator"),
        (lambda m: mixbit.calibrate_(_ready(m).train(), data()), "training mode"),
        (lambda m: mixbit.calibrate_(_ready(m), data(), "mean"), "method='mean' is not known"),
        (lambda m: mixbit.calibrate_(_ready(m), [data(1)[0] * float("nan")]), "layer 'stem': its input holds NaN"),
        (lambda m: mixbit.calibrate_(_spoiled(_ready(m)), data()), "layer 'a': weight holds NaN"),
        (lambda m: mixbit.fold_batchnorm_(_ready(m), data(1)[0]), "a quantizer has no scales yet"),
    ],
)
def test_bad_input_is_named(change, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        change(seeded(Residual))


def _ready(model: nn.Module) -> nn.Module:
    return mixbit.prepare_(model, Recipe.uniform(NAMES))


def _spoiled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = float("nan")
    return model
