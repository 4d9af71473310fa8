"""Bits of single output channels: searched by groups, kept in recipes, trained, audited, and run on integers."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixbit
from mixbit import LayerPrecision, MixbitError, Recipe, ops, search
from mixbit.pipeline import _recipe_content
from mixbit.quantizers import quantized_layers
from mixbit.quantizers.quantizer import KINDS
from mixbit.training import Images

GROUP = 3
NAMES = ("stem", "left", "right", "last", "head")
#: Bits of the channels of `left` (8), `right` (8) and `head` (4) in recipes of these tests.
MAPS = {
    "left": [2, 2, 2, 8, 8, 8, 4, 4],
    "right": [8, 4, 4, 4, 4, 2, 2, 2],
    "head": [4, 2, 4, 3],
}


class Net(nn.Module):
    """Convolutions with a shared input, depthwise too, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        x = self.stem(x).relu()
        x = self.left(x) + self.right(x)
        return self.head(self.last(x.relu()).relu().mean((2, 3)))


def data(images: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose class is the strongest of four fixed patterns."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.einsum("nchw,kchw->nk", x, patterns).argmax(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def searching(group: int = GROUP, **options: Any) -> tuple[nn.Module, mixbit.CostTable]:
    model = net()
    x, _ = data()
    costs = mixbit.costs.bops(model, x[:2])
    mixbit.prepare_(model, search.Gates(granularity_bits="per_channel", group=group, **options), x[:2])
    return mixbit.calibrate_(model, [x[:32]]), costs


def by_channel(act: int = 6) -> Recipe:
    maps = {name: np.asarray(bits, np.uint8) for name, bits in MAPS.items()}
    layers = {name: LayerPrecision(weight=8, act=act, narrow_range=False) for name in NAMES}
    layers |= {n: LayerPrecision(weight=int(m.max()), act=act, narrow_range=False) for n, m in maps.items()}
    return Recipe(layers=layers, channel_maps=maps)


def prepared(recipe: Recipe | None = None, **options: Any) -> nn.Module:
    model = mixbit.prepare_(net(), recipe or by_channel(), **options)
    x = data()[0]
    return mixbit.calibrate_(model, [x[:32]], example=x[:2])


def choose(model: nn.Module, seed: int = 1) -> None:
    """A random choice everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for quantizer in search.search_quantizers(model).values():
        count = len(quantizer.choices)
        quantizer.choose_(torch.randint(len(quantizer.candidates), (count,), generator=generator).tolist())
    model.eval()


# The search -----------------------------------------------------------------------------------------------------------


def test_each_group_of_channels_has_gates_of_its_own() -> None:
    model, _ = searching()
    layers = quantized_layers(model)
    shapes = {name: tuple(layer.weight_quantizer.gate_logits.shape) for name, layer in layers.items()}
    assert shapes == {"stem": (2, 3), "left": (2, 3), "right": (2, 3), "last": (2, 2), "head": (2, 2)}
    assert tuple(layers["left"].act_quantizer.gate_logits.shape) == (2,)
    assert layers["left"].act_quantizer.bit_width.shape == (1,)
    quantizer = layers["left"].weight_quantizer
    quantizer.choose_([1, 0, 2])
    model.eval()
    assert quantizer.bit_width.tolist() == [4, 4, 4, 2, 2, 2, 8, 8]
    assert quantizer.check_bit_width() == 8
    weight = layers["left"].weight.detach()
    limits = weight.abs().amax((1, 2, 3))
    expected = ops.fake_quantize(weight, limits / torch.exp2(quantizer.bit_width - 1), 0, quantizer.bit_width, axis=0)
    assert torch.equal(quantizer(weight), expected)
    for name in ("left", "right"):
        assert layers[name].act_quantizer is layers["right"].act_quantizer


def test_the_gradient_of_a_group_is_that_of_its_channels() -> None:
    """d loss / d logit, written out: sum over a group's channels of g (Q_(j+1) - Q_j) times the other gates."""
    model, _ = searching()
    layer = quantized_layers(model)["left"]
    quantizer, weight = layer.weight_quantizer.train(), layer.weight
    quantizer.gate_logits.data.copy_(torch.tensor([[0.2, 0.9, -0.3], [-0.1, 0.4, 0.0]]))
    g = torch.randn_like(weight)
    torch.manual_seed(4)
    quantizer(weight).backward(g)
    torch.manual_seed(4)
    noise = torch.rand(2, 3)
    limits = weight.detach().abs().amax((1, 2, 3))
    levels = [ops.fake_quantize(weight.detach(), limits / 2 ** (b - 1), 0, b, axis=0) for b in (2, 4, 8)]
    sums = [((wide - narrow).double() * g).flatten(1).sum(1) for narrow, wide in itertools.pairwise(levels)]
    s = torch.sigmoid((torch.log(noise / (1 - noise)) + quantizer.gate_logits.detach()) / 0.5).double()
    z = (s * 1.2 - 0.1).clamp(0, 1)
    slope = torch.where((z > 0) & (z < 1), s * (1 - s) / 0.5 * 1.2, 0.0)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for group, channels in enumerate((slice(0, 3), slice(3, 6), slice(6, 8))):
        first, second = (part[channels].sum() for part in sums)
        expected[0, group] = slope[0, group] * (first + z[1, group] * second)
        expected[1, group] = slope[1, group] * z[0, group] * second
    torch.testing.assert_close(quantizer.gate_logits.grad.double(), expected, rtol=1e-4, atol=1e-5)
    v = weight.detach() / (limits / 128)[:, None, None, None]
    assert torch.equal(weight.grad, torch.where((v >= -128) & (v <= 127), g, 0.0))


def test_one_group_of_all_channels_computes_what_one_width_does() -> None:
    """The same draws, values and gradients of weights, bit for bit; gates up to the order of a sum."""
    x, y = data()
    found = []
    for options in ({"granularity_bits": "per_channel", "group": 100}, {}):
        model = net()
        costs = mixbit.costs.bops(model, x[:2])
        mixbit.prepare_(model, search.Gates(**options), x[:2])
        mixbit.calibrate_(model, [x[:32]]).train()
        penalty = search.Penalty(model, costs, strength=0.1)
        for quantizer in search.search_quantizers(model).values():
            quantizer.gate_logits.data.fill_(0.3)
        torch.manual_seed(2)
        loss = nn.functional.cross_entropy(model(x), y) + penalty()
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[1][1].items():
        if name.endswith("weight_quantizer.gate_logits"):
            torch.testing.assert_close(found[0][1][name][:, 0], grad, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(found[0][1][name], grad), name


def test_the_expected_cost_is_that_of_the_groups() -> None:
    model, _ = searching()
    x, _ = data()
    generator = torch.Generator().manual_seed(3)
    for quantizer in search.search_quantizers(model).values():
        quantizer.gate_logits.data.copy_(torch.randn(quantizer.gate_logits.shape, generator=generator))
    layers = quantized_layers(model)
    for costs in (mixbit.costs.bops(model, x[:2]), mixbit.costs.weight_memory(model, x[:2])):
        penalty = search.Penalty(model, costs, strength=1.0).eval()
        expected = 0.0
        for name, layer in layers.items():
            acts = {8: 1.0}
            if isinstance(layer.act_quantizer, search.SearchQuantizer):
                acts = dict(zip((2, 4, 8), chances(layer.act_quantizer.gate_logits), strict=True))
            quantizer, channels = layer.weight_quantizer, layer.weight.shape[0]
            for channel in range(channels):
                for bits, p in zip((2, 4, 8), chances(quantizer.gate_logits[:, channel // GROUP]), strict=True):
                    for act, q in acts.items():
                        expected += p * q * costs.entry(name, act, bits) / channels
        assert float(penalty().detach()) == pytest.approx(expected / costs.uniform(8, 8), rel=1e-5)
        choose(model)
        recipe = search.extract(model)
        assert recipe.channel_maps
        assert penalty.costs()[costs.unit] == pytest.approx(costs.total(recipe), rel=1e-5)
        act, weight = penalty.bits()
        for name, bits in zip(penalty.layers, weight, strict=True):
            assert bits == pytest.approx(float(layers[name].weight_quantizer.bit_width.mean()))
    model.train()
    penalty().backward()
    assert all(layer.weight_quantizer.gate_logits.grad.any() for layer in layers.values())


def chances(logits: Tensor) -> list[float]:
    """P of 2, 4 and 8 bits from two logits."""
    first, second = torch.sigmoid(logits.detach().double() + 0.5 * np.log(11.0)).tolist()
    return [1 - first, first * (1 - second), first * second]


def run(budget_share: float, epochs: int = 10, **options: Any) -> tuple[nn.Module, Recipe, mixbit.CostTable, Any]:
    model, costs = searching(**options)
    x, y = data()
    found = search.fit(
        model,
        Images(x, y, 16, seed=1),
        costs,
        epochs=epochs,
        budget=budget_share * costs.uniform(8, 8),
        lr=0.02,
        search_lr=0.05,
    )
    return model, found.recipe, costs, found.history


@pytest.mark.parametrize("group", [1, 3])
def test_a_search_lands_on_its_budget_and_the_audit_counts_channels(group: int) -> None:
    model, recipe, costs, history = run(0.25, group=group)
    budget = 0.25 * costs.uniform(8, 8)
    assert recipe.report["feasible"]
    # Many groups: nearly all of the budget can be used.
    assert 0.99 * budget <= costs.total(recipe) <= budget
    assert recipe.report["cost"] == costs.total(recipe)
    assert recipe.channel_maps
    by_hand = 0
    for layer in mixbit.layers(net(), data()[0][:2]):
        bits = recipe.channel_maps.get(layer.name, np.full(layer.shapes[1][0], recipe[layer.name].weight))
        assert int(bits.max()) == recipe[layer.name].weight
        by_hand += layer.macs // len(bits) * recipe[layer.name].act * int(bits.sum())
    assert costs.total(recipe) == by_hand  # whole numbers, exactly
    x, _ = data()
    model.eval()
    assert torch.equal(mixbit.prepare_(copy.deepcopy(model), recipe)(x), model(x))
    again = search.extract(model)
    assert again.layers == recipe.layers
    assert all(np.array_equal(again.channel_maps[name], bits) for name, bits in recipe.channel_maps.items())
    averages = [
        float(recipe.channel_maps[n].mean()) if n in recipe.channel_maps else float(recipe[n].weight) for n in NAMES
    ]
    assert recipe.report["average_bits"]["weight"] == pytest.approx(np.mean(averages))
    assert history.figures["weight left"][0][1] == 8.0


def test_reachable_costs_are_those_of_the_widest_and_narrowest() -> None:
    model, costs = searching()
    assert search.reachable(model, costs) == (costs.uniform(2, 2), costs.uniform(8, 8))
    with pytest.raises(MixbitError, match="the candidates reach"):
        search.Penalty(model, costs, budget=1.0, total_steps=5)


def test_a_budget_of_memory_lands_too() -> None:
    model, _ = searching(group=2)
    x, y = data()
    memory = mixbit.costs.weight_memory(model, x[:2])
    budget = 0.45 * memory.uniform(8, 8)
    found = search.fit(model, Images(x, y, 16), memory, epochs=4, budget=budget, search_lr=0.1)
    assert 0.97 * budget <= memory.total(found.recipe) <= budget
    weights = {layer.name: layer.weights for layer in mixbit.layers(net(), x[:2])}
    bits = {n: search.extract(model).channel_maps.get(n, np.array([found.recipe[n].weight])) for n in NAMES}
    biased = memory.total(found.recipe) - sum(weights[n] * bits[n].astype(float).mean() for n in NAMES)
    plain = Recipe.uniform(NAMES, weight=8, act=8)
    assert biased == pytest.approx(memory.total(plain) - 8 * sum(weights.values()))


def test_a_recipe_without_a_budget_computes_what_the_search_does(tmp_path: Path) -> None:
    model, costs = searching()
    choose(model)
    x, _ = data()
    searched = model(x)
    recipe = search.extract(model)
    assert set(recipe.channel_maps) >= {"stem"}
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    again = mixbit.prepare_(copy.deepcopy(model), loaded)
    assert not search.search_quantizers(again)
    assert torch.equal(again(x), searched)
    assert costs.total(loaded) == costs.total(recipe)
    # Of the prepared model the same recipe comes again.
    present = search.extract(again)
    assert present.layers == recipe.layers
    assert present.report["average_bits"] == pytest.approx(recipe.report["average_bits"])
    assert all(np.array_equal(present.channel_maps[n], bits) for n, bits in recipe.channel_maps.items())


def test_freezing_takes_a_recipe_of_groups_alone() -> None:
    model, _ = searching()
    choose(model)
    recipe = search.extract(model)
    choose(model, seed=9)
    search.freeze_(model, recipe)
    model.eval()
    assert all(np.array_equal(search.extract(model).channel_maps[n], bits) for n, bits in recipe.channel_maps.items())
    name = next(iter(recipe.channel_maps))
    bits = recipe.channel_maps[name].copy()
    bits[:3] = (2, 8, 2)
    bits[3:6] = 8
    recipe.layers[name] = LayerPrecision(weight=8, act=recipe[name].act, narrow_range=False)
    recipe.channel_maps[name] = bits
    with pytest.raises(MixbitError, match=rf"layer '{name}' has channels of \[2, 8\] bits in group 0"):
        search.freeze_(model, recipe)
    recipe.channel_maps[name] = bits[:5]
    with pytest.raises(MixbitError, match=f"channel bits of layer '{name}' hold 5 numbers"):
        search.freeze_(model, recipe)


def test_a_killed_search_goes_on_to_the_same_recipe(tmp_path: Path) -> None:
    x, y = data()

    def searched(checkpoint: Path | None, stop: int | None) -> tuple[nn.Module, Any]:
        model, costs = searching()
        calls = 0

        def objective(trained: nn.Module, item: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if stop is not None and calls > stop:
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(trained(item[0]), item[1])

        torch.manual_seed(7)
        found = search.fit(
            model,
            Images(x, y, 16, seed=2),
            costs,
            epochs=3,
            budget=0.4 * costs.uniform(8, 8),
            search_lr=0.1,
            objective=objective,
            checkpoint=checkpoint,
            checkpoint_every=1,
        )
        return model, found

    whole, expected = searched(None, None)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "search.pt", 5)
    resumed, found = searched(tmp_path / "search.pt", None)
    assert found.recipe == expected.recipe
    assert found.recipe.channel_maps
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_search_step_compiles_as_one_graph() -> None:
    model, _costs = searching()
    x, _ = data()
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        compiled(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert quantized_layers(model)["left"].weight_quantizer.gate_logits.grad.any()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"group": 0}, "group=0: expected a whole number of channels, at least 1"),
        ({"group": -2}, "group=-2"),
        ({"group": 2.5}, r"group=2\.5"),
        ({"group": True}, "group=True"),
        ({"granularity": "per_tensor"}, "granularity='per_tensor' with granularity_bits=\"per_channel\""),
        ({"tie": True}, 'tie=True with granularity_bits="per_channel"'),
        ({"weight_precisions": [4]}, r"weight_precisions=\[4\] with granularity_bits"),
        ({"granularity_bits": "per_chanel"}, "granularity_bits='per_chanel'.*'per_channel'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        search.Gates(**{"granularity_bits": "per_channel", **options})


def test_tables_that_do_not_tell_what_channels_cost_are_refused(tmp_path: Path) -> None:
    model, bops = searching()
    x, _ = data()
    few = mixbit.CostTable.from_arrays(bops.layers, np.ones((5, 2, 2)), [4, 8], [4, 8], input_group=bops.input_group)
    tables = {
        "are not linear in the weights' bits": mixbit.CostTable.from_arrays(
            bops.layers, mixbit.costs.ops(model, x[:2]).values, bops.act_bits, bops.weight_bits
        ),
        "too few to be seen as linear": few,
        "totalled by maximum and depend": mixbit.CostTable.from_arrays(
            bops.layers, bops.values, bops.act_bits, bops.weight_bits, reduce="max"
        ),
        "mappings with one width a tensor": mixbit.CostTable.from_arrays(
            bops.layers,
            bops.values,
            bops.act_bits,
            bops.weight_bits,
            values_out=np.repeat(bops.values[..., None], len(bops.act_bits), 3),
        ),
    }
    for complaint, table in tables.items():
        with pytest.raises(MixbitError, match=f"{complaint}.* single channels of layer 'stem'"):
            search.Penalty(model, table, strength=1.0)
        with pytest.raises(MixbitError, match=f"{complaint}.* single channels of layer 'left'"):
            table.total(by_channel(act=4))
        with pytest.raises(MixbitError, match=complaint):
            search.reachable(model, table)
    # A table says itself whether channels add up, in its file, too.
    ops_table = mixbit.costs.ops(model, x[:2])
    ops_table.save(tmp_path / "ops.json")
    macs = {layer.name: layer.macs for layer in mixbit.layers(net(), x[:2])}
    every = {name: MAPS.get(name, [8]) for name in NAMES}
    by_hand = sum(macs[n] // len(bits) * sum(max(4, b) for b in bits) for n, bits in every.items())
    assert mixbit.CostTable.load(tmp_path / "ops.json").total(by_channel(act=4)) == by_hand
    # What does not depend on the weights is linear in them.
    memory = mixbit.costs.activation_memory(model, x[:2])
    plain = Recipe(layers=by_channel(act=4).layers)
    assert memory.total(by_channel(act=4)) == memory.total(plain)


# Recipes --------------------------------------------------------------------------------------------------------------


def test_a_recipe_carries_the_maps(tmp_path: Path) -> None:
    recipe = by_channel()
    path = tmp_path / "recipe.json"
    recipe.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.channel_bits.safetensors", "recipe.json"]
    entry = json.loads(path.read_text())["layers"]["left"]
    assert entry["channel_bits"] == "recipe.channel_bits.safetensors"
    assert entry["weight"] == 8
    loaded = Recipe.load(path)
    assert loaded == recipe
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    loaded.save(path)
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert _recipe_content(loaded) == _recipe_content(recipe) != _recipe_content(Recipe(layers=recipe.layers))
    loaded.channel_maps["left"][0] = 3
    assert loaded != recipe
    assert _recipe_content(loaded) != _recipe_content(recipe)
    # Beside extra levels of another layer.
    both = by_channel()
    both.extra_maps = {"last": np.ones((6, 8, 1, 1), np.uint8)}
    both.layers["last"] = LayerPrecision(weight=3, act=6, narrow_range=False)
    both.save(tmp_path / "both.json")
    again = Recipe.load(tmp_path / "both.json")
    assert again == both
    assert again["last"].extra_levels == "both.extra_levels.safetensors"
    assert again["left"].extra_levels is None
    # A glob or the default may speak for the layers.
    whole = Recipe(default=LayerPrecision(weight=4, act=4), channel_maps={"left": np.array([4, 2] * 4, np.uint8)})
    whole.save(tmp_path / "whole.json")
    assert np.array_equal(Recipe.load(tmp_path / "whole.json").channel_maps["left"], [4, 2] * 4)


def test_costs_count_the_channels() -> None:
    recipe, x = by_channel(), data()[0][:2]
    model = net()
    bops, memory = mixbit.costs.bops(model, x), mixbit.costs.weight_memory(model, x)
    narrow = {name: float(np.mean(bits)) - max(bits) for name, bits in MAPS.items()}
    plain = Recipe(layers=recipe.layers)
    found = {layer.name: layer for layer in mixbit.layers(model, x)}
    assert bops.total(recipe) == bops.total(plain) + sum(found[n].macs * 6 * d for n, d in narrow.items())
    assert memory.total(recipe) == memory.total(plain) + sum(found[n].weights * d for n, d in narrow.items())
    table = mixbit.SensitivityTable.from_arrays(["head"], [[[6.0, 12.0, 18.0]]], [6], [2, 3, 4])
    ratios = [10 ** -(6.0 * (bits - 1) / 10) for bits in MAPS["head"]]
    assert table.predicted_sqnr_db(recipe) == pytest.approx(-10 * np.log10(np.mean(ratios)))
    with pytest.raises(MixbitError, match="channels of layer 'left' have bits of their own"):
        mixbit.refine(recipe, bops)
    with pytest.raises(MixbitError, match="channels of layer 'left' have bits of their own"):
        mixbit.hw.map_network(
            mixbit.hw.Architecture.load("eyeriss"), mixbit.hw.Workload.from_model(model, x), bits=recipe
        )


def changed(name: str = "left", **change: Any) -> Recipe:
    recipe = by_channel()
    if "bits" in change:
        recipe.channel_maps[name] = change["bits"]
    if "precision" in change:
        recipe.layers[name] = LayerPrecision(act=6, **change["precision"])
    return recipe


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (changed(bits=np.full(7, 8, np.uint8)), "channel bits of layer 'left' hold 7 numbers; expected 8"),
        (changed(bits=np.full(8, 8)), "found int64"),
        (changed(bits=np.full((8, 1), 8, np.uint8)), r"found uint8 \[8, 1\]"),
        (changed(bits=[8] * 8), "found list"),
        (changed(bits=np.array([0, 8] * 4, np.uint8)), "found 0 to 8; expected whole numbers of bits from 1 to 16"),
        (changed(bits=np.array([2, 17] * 4, np.uint8)), "found 2 to 17"),
        (changed(bits=np.array([2, 4] * 4, np.uint8)), "the widest is 4, but the layer has weight=8"),
        (changed(precision={"weight": None}), "the widest is 8, but the layer has weight=None"),
        (changed(precision={"weight": 8, "granularity": "per_tensor"}), "its granularity is 'per_tensor'"),
        (changed(bits=np.array([1, 8] * 4, np.uint8), precision={"weight": 8}), "1 bit with narrow_range"),
        (changed(name="stems", bits=np.full(8, 8, np.uint8)), "channel bits of 'stems': no such layer.*'stem'"),
        (
            Recipe(layers={"left": LayerPrecision(channel_bits="x.safetensors")}),
            "names the bits of its channels in 'x.safetensors', which the recipe does not carry",
        ),
    ],
)
def test_maps_that_do_not_fit_are_named_and_nothing_is_changed(recipe: Recipe, complaint: str) -> None:
    model = net()
    with pytest.raises(MixbitError, match=complaint):
        mixbit.prepare_(model, recipe)
    assert type(model.stem) is nn.Conv2d
    extra = by_channel()
    extra.extra_maps = {"head": np.ones((4, 6), np.uint8)}
    with pytest.raises(MixbitError, match="the layer has extra levels, too"):
        mixbit.prepare_(net(), extra)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, maps = tmp_path / "recipe.json", tmp_path / "recipe.channel_bits.safetensors"
    by_channel().save(path)
    whole = maps.read_bytes()
    maps.write_bytes(whole[:-3])
    with pytest.raises(MixbitError, match=r"channel_bits='recipe.channel_bits.safetensors' is not a whole safetensors"):
        Recipe.load(path)
    maps.unlink()
    with pytest.raises(MixbitError, match="cannot read it"):
        Recipe.load(path)
    maps.write_bytes(whole)
    text = path.read_text()
    path.write_text(text.replace('"weight": 8', '"weight": 6'))
    with pytest.raises(MixbitError, match="the widest is 8, but the layer has weight=6"):
        Recipe.load(path)
    path.write_text(text.replace('"recipe.channel_bits.safetensors"', "7"))
    with pytest.raises(MixbitError, match="channel_bits=7: expected a path or null"):
        Recipe.load(path)
    with pytest.raises(MixbitError, match="found list"):
        changed(bits=[8] * 8).save(path)


# Prepared networks ----------------------------------------------------------------------------------------------------


def test_channels_are_calibrated_at_their_own_widths() -> None:
    model = prepared()
    layers = quantized_layers(model)
    for name, bits in MAPS.items():
        quantizer = layers[name].weight_quantizer
        assert quantizer.bit_width.tolist() == bits
        for width in set(bits):
            alone = mixbit.prepare_(net(), Recipe.uniform(NAMES, weight=width, act=6, narrow_range=False))
            mixbit.calibrate_(alone, [data()[0][:32]])
            own = quantized_layers(alone)[name].weight_quantizer
            same = torch.tensor(bits) == width
            assert torch.equal(quantizer.scale[same], own.scale[same])
            assert torch.equal(quantizer(layers[name].weight)[same], own(layers[name].weight)[same])
            assert torch.equal(quantizer.codes(layers[name].weight)[same], own.codes(layers[name].weight)[same])
            assert torch.equal(quantizer.within(layers[name].weight)[same], own.within(layers[name].weight)[same])
    assert layers["stem"].weight_quantizer.bit_width.tolist() == [8]
    assert "[2, 4, 8] by channel" in repr(layers["left"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lsq+"])
def test_every_kind_of_quantizer_trains_channels_like_layers(kind: str) -> None:
    """Values and gradients of each channel are those of a layer with its width alone."""
    x, y = data()
    model = prepared(weight_quantizer=kind).train()
    nn.functional.cross_entropy(model(x), y).backward()
    layer = quantized_layers(model)["left"]
    weight, g = layer.weight.detach(), torch.randn_like(layer.weight)
    for width in set(MAPS["left"]):
        same = torch.tensor(MAPS["left"]) == width
        results = []
        for widths in (MAPS["left"], width):
            quantizer = KINDS[kind](widths, channels=8, axis=0, shape=weight.shape)
            bits = quantizer.bit_width.expand(8)
            quantizer.set_(0.9 * weight.abs().amax((1, 2, 3)) / torch.exp2(bits - 1))
            leaf = weight.clone().requires_grad_()
            value = quantizer(leaf)
            value.backward(g)
            learned = [p.grad[same] for p in quantizer.parameters() if p.grad is not None]
            results.append([value.detach()[same], leaf.grad[same], *learned])
        assert len(results[0]) == len(results[1])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_another_recipe_keeps_the_ranges() -> None:
    model = prepared()
    quantizer = quantized_layers(model)["left"].weight_quantizer
    before = quantizer.scale.detach().clone()
    plain = Recipe(layers={n: LayerPrecision(weight=4, act=6, narrow_range=False) for n in NAMES})
    mixbit.prepare_(model, plain)
    assert quantized_layers(model)["left"].weight_quantizer.bit_width.tolist() == [4]
    factors = torch.tensor([2.0 ** (b - 4) for b in MAPS["left"]])
    assert torch.equal(quantized_layers(model)["left"].weight_quantizer.scale, before * factors)
    mixbit.prepare_(model, by_channel())
    again = quantized_layers(model)["left"].weight_quantizer
    assert again.bit_width.tolist() == MAPS["left"]
    torch.testing.assert_close(again.scale.detach(), before)
    # One width for all is no map.
    even = by_channel()
    even.channel_maps["left"][:] = 8
    mixbit.prepare_(model, even)
    assert quantized_layers(model)["left"].weight_quantizer.bit_width.tolist() == [8]
    assert "left" not in search.extract(model).channel_maps


def test_states_say_whether_channels_have_bits_of_their_own() -> None:
    x, _ = data()
    model = prepared()
    plain = prepared(Recipe(layers=by_channel().layers))
    state, flat = model.state_dict(), copy.deepcopy(plain.state_dict())
    expected = model(x)
    plain.load_state_dict(state)
    assert torch.equal(plain(x), expected)
    model.load_state_dict(flat)
    assert model.get_submodule("left.weight_quantizer").bit_width.tolist() == [8]
    wrong = {**state, "left.weight_quantizer.bit_width": torch.ones(5)}
    with pytest.raises(RuntimeError, match="size mismatch for left.weight_quantizer.bit_width"):
        prepared().load_state_dict(wrong)
    state = {**state, "left.weight_quantizer.bit_width": torch.full((8,), 2.5)}
    with pytest.raises(MixbitError, match=r"bit_width=2\.5: expected a whole number"):
        prepared().load_state_dict(state)


def test_corrections_work_and_levels_of_single_weights_are_refused() -> None:
    x, _ = data()
    model = prepared()
    before = model.head.weight.detach().clone()
    mixbit.optimize_rounding_(model, [x[:32]])  # of layers of at most 4 bits
    quantizer = quantized_layers(model)["head"].weight_quantizer
    codes = quantizer.codes(model.head.weight)
    assert not torch.equal(model.head.weight, before)
    half = torch.exp2(quantizer.bit_width - 1)[:, None]
    assert bool(((codes >= -half) & (codes < half)).all())
    assert torch.allclose(quantizer(model.head.weight), model.head.weight.detach(), atol=1e-6)
    mixbit.correct_bias_(model, [x[:32]])
    for make in (
        lambda: mixbit.retrain.SwitchTracker(model),
        lambda: mixbit.retrain.storage.layer_codes(model),
        lambda: quantizer.set_extra_bits_(torch.ones_like(model.head.weight, dtype=torch.uint8)),
    ):
        with pytest.raises(MixbitError, match="channels have bits of their own"):
            make()


# Integers -------------------------------------------------------------------------------------------------------------


def test_the_integer_network_is_exact_and_its_forms_hold_the_widest(tmp_path: Path) -> None:
    x, _ = data(16)
    model = prepared()
    reference, simulated = mixbit.export.reference(model, x[:2]), mixbit.export.simulation(model, x[:2])
    codes, other = reference.tensors(x), simulated.tensors(x)
    for name, value in codes.items():
        assert np.array_equal(value, other[name].numpy()), name
    layers = quantized_layers(model)
    for node in reference.nodes:
        if node.module in MAPS:
            layer = layers[str(node.module)]
            own = layer.weight_quantizer.codes(layer.weight).numpy()
            assert np.array_equal(reference._weights[node.name], own), node.module
            half = 2 ** (np.asarray(MAPS[str(node.module)]) - 1)
            rows = own.reshape(len(own), -1)
            assert (rows.min(1) >= -half).all()
            assert (rows.max(1) < half).all()
    # A form that multiplies codes is exact; what it stores is the widest of a layer, and it says so.
    with pytest.warns(UserWarning, match=r"channels of 3 layer\(s\) have bits of their own \(the first is 'left'"):
        path = mixbit.export.integer(model, x[:2], tmp_path / "net.mixbit")
    report = mixbit.export.verify(path, model, [x])
    assert report.mismatches == 0
    said: list[str] = []
    written = mixbit.export.onnx(model, x[:2], tmp_path / "net.onnx", say=said.append)
    assert any("each layer is stored at its widest" in text for text in said)
    assert any("each layer is stored at its widest" in text for text in written.limits)
    assert written.stored["left"] == 8
    assert mixbit.export.verify(tmp_path / "net.onnx", model, [x]).mismatches == 0
    program = mixbit.export.program(model, x[:2])
    assert mixbit.export.verify(program, model, [x]).mismatches == 0
    report = mixbit.export.report(model, x[:2])
    assert all(entry.fits_int32 for entry in report)


def test_a_layer_alone_equals_its_fake_quantized_twin() -> None:
    """One layer on one input grid: fake-quantized outputs are (accumulator) times scales, up to the order of sums."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6, bias=False)).eval()
    x = torch.randn(40, 12)
    bits = np.array([2, 3, 4, 5, 6, 8], np.uint8)
    recipe = Recipe(layers={"0": LayerPrecision(weight=8, act=5, narrow_range=False)}, channel_maps={"0": bits})
    mixbit.calibrate_(mixbit.prepare_(model, recipe), [x], example=x)
    reference = mixbit.export.reference(model, x)
    entering = reference.entering(reference.nodes[-1], reference.tensors(x))
    act, weight = model[0].act_quantizer, model[0].weight_quantizer
    assert np.array_equal(act.codes(x).numpy(), entering)
    acc = entering @ reference._weights[reference.nodes[-1].name].T
    exact = acc * (float(act.effective_scale().detach()) * weight.effective_scale().detach().double().numpy())
    torch.testing.assert_close(model(x).detach().double(), torch.from_numpy(exact), rtol=1e-5, atol=1e-5)


# End to end -----------------------------------------------------------------------------------------------------------


def test_shipped_images_from_search_to_verified_package(tmp_path: Path) -> None:
    model = mixbit.zoo.resnet8(weights=mixbit.zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz").eval()
    x, y = mixbit.zoo.cifar10_pixels("train", 64)
    x, example = x.float(), x[:2].float()
    costs = mixbit.costs.bops(model, example)
    budget = 0.4 * costs.uniform(8, 8)
    space = search.Gates(precisions=(2, 4, 8), granularity_bits="per_channel", group=16)
    mixbit.prepare_(model, space, example)
    mixbit.calibrate_(model, x.split(32))
    found = search.fit(model, Images(x, y, batch=32), costs, epochs=3, budget=budget, lr=0.002)
    assert 0.99 * budget <= costs.total(found.recipe) <= budget
    assert found.recipe.channel_maps
    assert all(len(np.unique(bits)) > 1 for bits in found.recipe.channel_maps.values())
    found.recipe.save(tmp_path / "recipe.json")
    recipe = Recipe.load(tmp_path / "recipe.json")
    assert recipe == found.recipe
    model.eval()
    searched = model(x)
    mixbit.prepare_(model, recipe)
    assert torch.equal(model(x), searched)
    mixbit.fold_batchnorm_(model, example)
    mixbit.calibrate_(model, x.split(32), example=example)
    with pytest.warns(UserWarning, match="stored at its widest"):
        path = mixbit.export.integer(model, example, tmp_path / "net.mixbit")
    assert mixbit.export.verify(path, model, [x[:8]]).mismatches == 0
