"""Extra levels of weights: given to quantizers, kept in states and recipes, trained, priced, run as integers."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mixbit
from mixbit import LayerPrecision, Recipe, ops
from mixbit.errors import MixbitError
from mixbit.export.grid import weight_codes, weight_grid
from mixbit.hw.mapper import network_bits
from mixbit.pipeline import _recipe_content
from mixbit.quantizers import KINDS, Quantizer, optimize_rounding_, quantized_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

NAMES = ["stem", "a", "b", "side", "head"]
WEIGHT_KINDS = [kind for kind in sorted(KINDS) if kind != "lsq+"]
RETRAINING = {"rounding": "half_up", "narrow_range": False}


def data(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def prepared(bits: int = 3, kind: str | None = None, **options) -> nn.Module:
    model = seeded(Residual)
    recipe = Recipe.uniform(NAMES, weight=bits, act=4, **{**RETRAINING, **options})
    mixbit.prepare_(model, recipe, data()[0], weight_quantizer=kind)
    return mixbit.calibrate_(model, data())


def random_map(weight: Tensor, most: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, weight.shape, dtype=torch.uint8, generator=generator)


def give(model: nn.Module, names: tuple[str, ...] = ("a", "head")) -> nn.Module:
    for name in names:
        module = model.get_submodule(name)
        module.weight_quantizer.set_extra_bits_(random_map(module.weight))
    return model


# On a quantizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_no_extra_bits_train_the_same_network_bit_by_bit(kind: str) -> None:
    found = []
    for with_map in (False, True):
        model = prepared(kind=kind)
        for module in quantized_layers(model).values():
            none = torch.zeros(module.weight.shape, dtype=torch.uint8)
            module.weight_quantizer.set_extra_bits_(none)
            assert module.weight_quantizer.extra_bits is None  # which is bit by bit the same by itself
            if with_map:
                module.weight_quantizer.extra_bits = none
        # With a gradient of its own the input takes no short cut in the fused backward.
        x = data()[0].requires_grad_()
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    if kind == "pact":  # whose clips get sums over ends of each element's grid: the same to rounding
        torch.testing.assert_close(found[0], found[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_forward_is_the_op_and_latents_stay() -> None:
    model = prepared()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    coarse = {name: m.weight_quantizer(m.weight).detach() for name, m in quantized_layers(model).items()}
    give(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    module = model.a
    quantizer = module.weight_quantizer
    expected = ops.extra_level_fake_quantize(
        module.weight, quantizer.scale, 3, quantizer.extra_bits, axis=0, rounding="half_up"
    )
    assert torch.equal(quantizer(module.weight), expected)
    # The fine grid holds the coarse one: no weight moves away from its value.
    error = (module.weight - expected).abs()
    assert (error <= (module.weight - coarse["a"]).abs()).all()
    assert (error < (module.weight - coarse["a"]).abs()).any()
    quantizer.clear_extra_bits_()
    assert torch.equal(quantizer(module.weight), coarse["a"])


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_codes_are_those_of_the_own_grid(narrow: bool, rounding: str) -> None:
    module = prepared(narrow_range=narrow, rounding=rounding).a
    quantizer = module.weight_quantizer
    coarse = quantizer.codes(module.weight)
    assert coarse.dtype == torch.int32
    low, high = quantizer.quant_range()
    assert low == int(coarse.min()) or narrow
    assert low <= int(coarse.min()) <= int(coarse.max()) <= high
    extra = random_map(module.weight)
    quantizer.set_extra_bits_(extra)
    codes = quantizer.codes(module.weight)
    scale = quantizer.scale.detach().reshape(-1, 1, 1, 1)
    assert torch.equal(codes * (scale / 2.0 ** extra.float()), quantizer(module.weight))
    assert torch.equal(codes[extra == 0], coarse[extra == 0])
    assert int(codes[extra == 2].max()) > high
    # On the finest grid, as exports have them.
    grid = weight_grid(quantizer)
    assert (grid.parts, grid.low) == (4, -16 + int(narrow))
    assert grid.high == 15
    step = quantizer.scale.detach() / 4
    whole = weight_codes(quantizer, grid, module.weight.detach(), step)
    assert grid.low <= int(whole.min()) <= int(whole.max()) <= grid.high
    assert torch.equal(whole * step.reshape(-1, 1, 1, 1), quantizer(module.weight))


def test_the_scale_learns_on_all_grids() -> None:
    model = give(prepared())
    optimizer = torch.optim.SGD(mixbit.training.param_groups(model, lr=0.05), momentum=0.9)
    x = data()[0]
    target = torch.randn(4, 5)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert float(model.a.weight_quantizer.scale.grad.abs().max()) > 0
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda w: torch.zeros(w.shape), "extra_bits is torch.float32; expected a uint8 tensor"),
        (lambda w: np.zeros(w.shape, np.uint8), "extra_bits is ndarray; expected a uint8 tensor"),
        (lambda w: torch.zeros(3, dtype=torch.uint8), r"extra_bits has shape \[3\]; expected \[8, 8, 3, 3\]"),
        (lambda w: torch.full(w.shape, 3, dtype=torch.uint8), "extra_bits holds 3; expected whole numbers from 0 to 2"),
    ],
)
def test_maps_that_do_not_fit_are_named(make, complaint: str) -> None:
    module = prepared().a
    with pytest.raises(MixbitError, match=complaint):
        module.weight_quantizer.set_extra_bits_(make(module.weight))
    assert module.weight_quantizer.extra_bits is None


def test_bits_in_all_are_bounded() -> None:
    module = prepared(bits=7).a
    two = torch.full(module.weight.shape, 2, dtype=torch.uint8)
    with pytest.raises(MixbitError, match="extra_bits holds 2 beside bit_width=7; expected at most 8 bits in all"):
        module.weight_quantizer.set_extra_bits_(two)
    module.weight_quantizer.set_extra_bits_(two // 2)
    with pytest.raises(MixbitError, match="expected at most 7 bits in all"):
        module.weight_quantizer.set_extra_bits_(two // 2, max_bits=7)
    with pytest.raises(MixbitError, match="max_bits=9: expected a whole number from 1 to 8"):
        module.weight_quantizer.set_extra_bits_(two // 2, max_bits=9)
    with pytest.raises(MixbitError, match="takes no extra levels: it is not that of a weight"):
        module.act_quantizer.set_extra_bits_(two)
    with pytest.raises(MixbitError, match="takes no extra levels: it is not that of a weight"):
        Quantizer(4).set_extra_bits_(two)
    model = mixbit.prepare_(seeded(Residual), mixbit.search.Gates(), data()[0])
    with pytest.raises(MixbitError, match="takes no extra levels: its bits are still being searched"):
        model.a.weight_quantizer.set_extra_bits_(two)


def test_corrections_of_rounding_are_refused() -> None:
    model = give(prepared())
    with pytest.raises(MixbitError, match="layer 'a' has extra levels; call optimize_rounding_ before"):
        optimize_rounding_(model, data())


# Memory, compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_no_quantized_copy_is_kept_for_the_backward(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1))
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    mixbit.prepare_(conv, Recipe.uniform(["0"], weight=3, act=4, **RETRAINING))
    mixbit.calibrate_(conv.eval(), [x.detach()])
    layer = conv[0]
    layer.weight_quantizer.set_extra_bits_(random_map(layer.weight))
    operands: list[StorageWeakRef] = []
    convolve = nn.functional.conv2d

    def watched(a: Tensor, w: Tensor, *rest) -> Tensor:
        operands.extend(StorageWeakRef(t.untyped_storage()) for t in (a, w))
        assert a.dtype == w.dtype == (torch.bfloat16 if bf16 else torch.float32)
        return convolve(a, w, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = conv(x)
    monkeypatch.undo()
    assert len(operands) == 2
    assert all(storage.expired() for storage in operands)
    y.float().square().mean().backward()
    found = [x.grad, layer.weight.grad, layer.weight_quantizer.scale.grad, layer.act_quantizer.scale.grad]
    # The same with the copies.
    for t in (x, layer.weight, layer.weight_quantizer.scale, layer.act_quantizer.scale):
        t.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a, w = layer.act_quantizer(x), layer.weight_quantizer(layer.weight)
        z = nn.functional.conv2d(a, w, layer.bias, padding=1)
    z.float().square().mean().backward()
    expected = [x.grad, layer.weight.grad, layer.weight_quantizer.scale.grad, layer.act_quantizer.scale.grad]
    assert torch.equal(y, z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    model = give(prepared())
    y = model(data()[0])
    with torch.no_grad():
        model.a.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_model_with_extra_levels_compiles_whole() -> None:
    model = give(prepared())
    x = data()[0]
    y = model(x)
    y.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    z = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    z.square().mean().backward()
    torch.testing.assert_close(z, y)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


# State ----------------------------------------------------------------------------------------------------------------


def test_a_state_brings_its_map_along() -> None:
    model = give(prepared())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {n for n in state if n.endswith("extra_bits")} == {f"{n}.weight_quantizer.extra_bits" for n in ("a", "head")}
    fresh = mixbit.prepare_(seeded(Residual), Recipe.uniform(NAMES, weight=3, act=4, **RETRAINING), data()[0])
    fresh.load_state_dict(state)
    x = data()[0]
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    # The copy is one: another map for the one is none for the other.
    fresh.a.weight_quantizer.clear_extra_bits_()
    assert model.a.weight_quantizer.extra_bits is not None


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_without_a_map_takes_it_away_and_a_float_state_does_not(strict: bool) -> None:
    plain = prepared()
    state = copy.deepcopy(plain.state_dict())
    model = give(prepared())
    floats = {name: value for name, value in state.items() if "_quantizer." not in name}
    model.load_state_dict(floats, strict=strict)
    assert model.a.weight_quantizer.extra_bits is not None
    model.load_state_dict(state, strict=strict)
    assert model.a.weight_quantizer.extra_bits is None
    assert torch.equal(model(data()[0]), plain(data()[0]))


def test_states_that_do_not_fit_are_named() -> None:
    model = give(prepared())
    state = copy.deepcopy(model.state_dict())
    key = "a.weight_quantizer.extra_bits"
    for value, complaint in (
        (state[key] + 1, "a.weight_quantizer.extra_bits: extra_bits holds 3"),
        (state[key][:1], r"a.weight_quantizer.extra_bits: extra_bits has shape \[1, 8, 3, 3\]"),
        (state[key].float(), "a.weight_quantizer.extra_bits: extra_bits is torch.float32"),
    ):
        with pytest.raises(MixbitError, match=complaint):
            prepared().load_state_dict({**state, key: value})
    act = {**state, "a.act_quantizer.extra_bits": state[key]}
    with pytest.raises(MixbitError, match=r"a.act_quantizer.extra_bits: this quantizer takes no extra levels"):
        prepared().load_state_dict(act)


def test_preparing_again_keeps_the_map_while_the_bits_stay() -> None:
    model = give(prepared())
    x = data()[0]
    before, kept = model(x), model.a.weight_quantizer.extra_bits.clone()
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=3, act=4, **RETRAINING))
    assert torch.equal(model(x), before)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=3, act=4, **RETRAINING), weight_quantizer="tqt")
    assert torch.equal(model.a.weight_quantizer.extra_bits, kept)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=4, act=4, **RETRAINING))
    assert model.a.weight_quantizer.extra_bits is None
    give(model)
    mixbit.restore_(model)
    assert not any("extra_bits" in name for name in model.state_dict())


def test_folding_batchnorm_keeps_codes_and_map() -> None:
    model = give(prepared(), ("stem",))
    with torch.no_grad():
        model.bn.weight.abs_()
    x = data()[0]
    codes, before = model.stem.weight_quantizer.codes(model.stem.weight), model(x)
    mixbit.fold_batchnorm_(model, x)
    assert isinstance(model.bn, nn.Identity)
    assert torch.equal(model.stem.weight_quantizer.codes(model.stem.weight), codes)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


# Recipe and cost ------------------------------------------------------------------------------------------------------


def test_a_recipe_carries_the_maps(tmp_path: Path) -> None:
    model = give(prepared())
    recipe = mixbit.search.extract(model)
    assert set(recipe.extra_maps) == {"a", "head"}
    assert recipe["a"].weight == 3
    assert recipe["a"].rounding == "half_up"
    path = tmp_path / "recipe.json"
    recipe.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.extra_levels.safetensors", "recipe.json"]
    assert json.loads(path.read_text())["layers"]["a"]["extra_levels"] == "recipe.extra_levels.safetensors"
    again = Recipe.load(path)
    assert set(again.extra_maps) == {"a", "head"}
    assert np.array_equal(again.extra_maps["a"], recipe.extra_maps["a"])
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(path)
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert Recipe.load(path) == again
    again.extra_maps["a"][0, 0, 0, 0] ^= 1
    assert Recipe.load(path) != again
    # A network prepared from the file computes what this one does.
    other = mixbit.prepare_(seeded(Residual), Recipe.load(path), data()[0])
    mixbit.calibrate_(other, data())
    assert torch.equal(other(data()[0]), model(data()[0]))
    mixbit.prepare_(model, recipe)
    assert torch.equal(other(data()[0]), model(data()[0]))


def test_extract_of_a_prepared_model_is_its_recipe() -> None:
    model = prepared()
    recipe = Recipe.uniform(NAMES, weight=3, act=4, signed_act=None, **RETRAINING)
    mixbit.prepare_(model, recipe)
    found = mixbit.search.extract(model)
    assert {n: (p.weight, p.act, p.rounding, p.narrow_range) for n, p in found.layers.items()} == {
        n: (3, 4, "half_up", False) for n in NAMES
    }
    assert found["stem"].signed_act is True
    assert found["head"].signed_act is False
    assert found.report["method"] == "prepared"
    mixbit.prepare_(model, Recipe(layers={**recipe.layers, "a": LayerPrecision(weight=None, act=4)}))
    assert mixbit.search.extract(model)["a"].weight is None
    with pytest.raises(MixbitError, match="nothing to search"):
        mixbit.search.extract(seeded(Residual))


def test_globs_and_one_file_for_several_recipes(tmp_path: Path) -> None:
    recipe = Recipe(default=LayerPrecision(weight=3, act=4, **RETRAINING))
    recipe.extra_maps = {"a": random_map(torch.zeros(8, 8, 3, 3)).numpy()}
    recipe.save(tmp_path / "one.json")
    document = json.loads((tmp_path / "one.json").read_text())
    assert list(document["layers"]) == ["a"]  # an entry of its own, to name the file
    document["layers"] = {"[ab]": document["layers"]["a"]}
    (tmp_path / "two.json").write_text(json.dumps(document))
    assert set(Recipe.load(tmp_path / "two.json").extra_maps) == {"a"}
    # b falls under the glob as well: that its levels are missing is said before anything is changed.
    with pytest.raises(MixbitError, match="layer 'b' names extra levels in 'one.extra_levels.safetensors'"):
        mixbit.prepare_(seeded(Residual), Recipe.load(tmp_path / "two.json"))


def test_bad_files_of_maps_are_named(tmp_path: Path) -> None:
    model = give(prepared())
    recipe = mixbit.search.extract(model)
    path, maps = tmp_path / "recipe.json", tmp_path / "recipe.extra_levels.safetensors"
    recipe.save(path)
    whole = maps.read_bytes()
    from safetensors.numpy import load, save

    tensors = load(whole)
    for content, complaint in (
        (whole[:-7], "'recipe.extra_levels.safetensors' is not a whole safetensors file"),
        (b"", "is not a whole safetensors file"),
        (save({"head": tensors["head"]}), "holds no layer 'a'"),
        (save({**tensors, "a": tensors["a"].astype(np.int64)}), "layer 'a': found int64; expected an array of uint8"),
        (save({**tensors, "a": tensors["a"] + 1}), "layer 'a': found 3 extra bits; expected 0 to 2"),
    ):
        maps.write_bytes(content)
        with pytest.raises(MixbitError, match=complaint):
            Recipe.load(path)
    maps.unlink()
    with pytest.raises(MixbitError, match=r"recipe.json.*cannot read it: No such file"):
        Recipe.load(path)
    with pytest.raises(MixbitError, match="layer 'a': found list; expected an array of uint8"):
        Recipe(layers=recipe.layers, extra_maps={"a": [1]}).save(path)


def test_maps_of_a_recipe_must_fit_the_model() -> None:
    recipe = Recipe.uniform(NAMES, weight=3, act=4)
    model = seeded(Residual)
    for maps, changes, complaint in (
        ({"aa": np.zeros(3, np.uint8)}, {}, "extra levels of 'aa': no such layer"),
        ({"a": np.zeros(3, np.uint8)}, {}, r"layer 'a': extra_bits has shape \[3\]; expected \[8, 8, 3, 3\]"),
        ({"a": np.zeros((8, 8, 3, 3))}, {}, "layer 'a': extra_bits is torch.float64"),
        ({"a": np.ones((8, 8, 3, 3), np.uint8)}, {"weight": 8}, "beside bit_width=8; expected at most 8"),
        ({"a": np.ones((8, 8, 3, 3), np.uint8)}, {"weight": None}, "has extra levels but float weights"),
        ({}, {"extra_levels": "x.safetensors"}, "layer 'a' names extra levels in 'x.safetensors', which the recipe"),
    ):
        own = LayerPrecision(**{"weight": 3, "act": 4, **changes})
        with pytest.raises(MixbitError, match=complaint):
            mixbit.prepare_(model, Recipe(layers={**recipe.layers, "a": own}, extra_maps=maps))
        assert not quantized_layers(model)


def test_costs_are_means_over_the_weights() -> None:
    model = seeded(Residual)
    x = data()[0]
    recipe = Recipe.uniform(NAMES, weight=3, act=4)
    extra = random_map(model.a.weight).numpy()
    recipe.extra_maps = {"a": extra}
    memory, bops = mixbit.costs.weight_memory(model, x), mixbit.costs.bops(model, x)
    plain = Recipe.uniform(NAMES, weight=3, act=4)
    # weight memory: the bits of all weights; what it takes to say which they are is not counted.
    assert memory.total(recipe) == pytest.approx(memory.total(plain) + extra.sum(), rel=1e-12)
    macs = {layer.name: layer.macs for layer in mixbit.layers(model, x)}
    assert bops.total(recipe) == pytest.approx(bops.total(plain) + macs["a"] * 4 * extra.mean(), rel=1e-12)
    narrow = mixbit.CostTable.from_arrays(["a"], np.ones((1, 1, 2)), [4], [3, 4])
    with pytest.raises(KeyError, match="layer 'a': no weight width 5"):
        narrow.total(recipe)
    with pytest.raises(MixbitError, match="layer 'a' has extra levels"):
        mixbit.refine(recipe, bops)
    with pytest.raises(MixbitError, match="gives layer 'a' extra levels, but a mapping has one width a layer"):
        network_bits(mixbit.hw.Workload.from_model(model, x), recipe)


def test_stages_tell_recipes_by_their_maps() -> None:
    recipe = Recipe.uniform(NAMES, weight=3, act=4)
    plain = _recipe_content(recipe)
    assert plain == recipe.to_dict()
    recipe.extra_maps = {"a": random_map(torch.zeros(8, 8, 3, 3)).numpy()}
    one = _recipe_content(recipe)
    recipe.extra_maps["a"][0] ^= 1
    assert len({json.dumps(content) for content in (plain, one, _recipe_content(recipe))}) == 3


# Integers -------------------------------------------------------------------------------------------------------------


def test_the_integer_network_has_one_finest_step_a_layer() -> None:
    model = mixbit.zoo.resnet8(weights=mixbit.zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz")
    images = mixbit.zoo.cifar10("train", 8)[0].split(4)
    mixbit.fold_batchnorm_(model, images[0])
    names = mixbit.layers(model, images[0]).names
    mixbit.prepare_(model, Recipe.uniform(names, weight=3, act=4, **RETRAINING), images[0])
    mixbit.calibrate_(model, images, example=images[0])
    for i, (name, module) in enumerate(quantized_layers(model).items()):
        if i % 4 < 3:  # no map, and maps of up to one and two bits
            module.weight_quantizer.set_extra_bits_(random_map(module.weight, i % 4, i))
        assert name in names
    reference, simulated = (make(model, images[0]) for make in (mixbit.export.reference, mixbit.export.simulation))
    codes, other = reference.tensors(images[0]), simulated.tensors(images[0])
    for name, value in codes.items():
        assert np.array_equal(value, other[name].numpy()), name
    # Layer by layer, on the codes that enter it, the integer layer is near the fake-quantized one.
    for node in reference.nodes:
        if node.op != "conv2d":
            continue
        module = model.get_submodule(str(node.module))
        act = module.act_quantizer
        x = torch.from_numpy(reference.entering(node, codes)).float() * act.effective_scale().detach()
        with torch.no_grad():
            y = module(x).numpy() / reference.grids[node.name].scale
        grid = reference.grids[node.name]
        # Half a code, and half a step of the accumulator that the bias is rounded to.
        slack = 0.51 + 0.5 * float(reference._multiplier[node.name].max())
        assert np.abs(np.clip(y, grid.low, grid.high) - codes[node.name]).max() <= slack, node.name
    assert mixbit.evaluate(model, list(zip(images, [torch.zeros(4).long()] * 2, strict=True)), integer=True) >= 0


def test_exports_are_made_of_the_finest_codes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = data()
    model = mixbit.fold_batchnorm_(seeded(Residual), x[0])
    mixbit.prepare_(model, Recipe.uniform(NAMES, weight=2, act=8, **RETRAINING), x[0])
    mixbit.calibrate_(model, x, example=x[0])
    give(model, ("stem", "b", "head"))
    path = tmp_path / "m.onnx"
    mixbit.export.onnx(model, x[0], path)
    for artifact in (str(path), mixbit.export.program(model, x[0])):
        assert mixbit.export.verify(artifact, model, x).mismatches == 0


def test_accumulators_are_checked_on_the_finest_grid() -> None:
    # As many weights of 6 bits as an accumulator takes at 16 bits of activation: one more bit is too much.
    short = (2**31 - 1) // (31 * 65535)
    recipe = Recipe(layers={"0": LayerPrecision(weight=6, act=16, narrow_range=False)})
    for extra, fits in ((0, True), (1, False)):
        model = nn.Sequential(nn.Linear(short, 1, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        x = torch.ones(1, short)
        mixbit.prepare_(model, recipe)
        mixbit.calibrate_(model.eval(), [x], method="maxabs", example=x)
        model[0].weight_quantizer.set_extra_bits_(torch.full((1, short), extra, dtype=torch.uint8))
        for make in (mixbit.export.reference, mixbit.export.simulation):
            if fits:
                make(model, x)
            else:
                with pytest.raises(MixbitError, match="accumulator"):
                    make(model, x)


def test_a_recipe_whose_default_names_a_file_can_be_saved_elsewhere(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.uint8)}, one / "maps.safetensors")
    text = '{"format": "mixbit-recipe", "version": 1, "default": {"weight": 2, "extra_levels": "maps.safetensors"}}'
    (one / "recipe.json").write_text(text)
    mixbit.Recipe.load(one / "recipe.json").save(other / "recipe.json")
    again = mixbit.Recipe.load(other / "recipe.json")
    assert np.array_equal(again.extra_maps["a"], np.ones((2, 3)))
    assert again["b"].weight == 2
    assert again["b"].extra_levels is None
