"""Models under search: what they compute, how they train, and that a killed search goes on as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixbit
from mixbit import MixbitError, search
from mixbit.quantizers import quantized_layers
from mixbit.search.quantizers import DECIDED, WIDEST
from mixbit.training import Images, train

SPACES = {
    "gates": lambda: search.Gates(),
    "residual": lambda: search.Gates(form="residual", ranges="learned"),
    "tied": lambda: search.Gates(tie=True),
    "mixture": lambda: search.Mixture(),
    "gumbel": lambda: search.Mixture((2, 3, 8), gumbel=True),
    "fractional": lambda: search.Fractional((2, 4, 8)),
}


class Net(nn.Module):
    """Convolutions with batch norm, a shared input, and signed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        x = self.norm(self.stem(x)).relu()
        x = self.left(x) + self.right(x)
        return self.head(self.last(x).relu().mean((2, 3)))


def data(images: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose class is the strongest of four fixed patterns."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.einsum("nchw,kchw->nk", x, patterns).argmax(1)


def searching(kind: str, seed: int = 0) -> tuple[nn.Module, mixbit.CostTable]:
    torch.manual_seed(seed)
    model = Net().eval()
    x, _ = data()
    costs = mixbit.costs.bops(model, x[:2])
    mixbit.prepare_(model, SPACES[kind](), x[:2])
    mixbit.calibrate_(model, [x[:32]])
    return model, costs


@pytest.mark.parametrize("kind", list(SPACES))
def test_a_float_checkpoint_loads_and_keys_stay(kind: str) -> None:
    torch.manual_seed(1)
    plain = Net().eval()
    model, _ = searching(kind)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    own = "gate_logits" if kind in ("gates", "residual", "tied") else None
    if own is not None:
        assert f"left.weight_quantizer.{own}" in model.state_dict()
        assert dict(model.named_parameters())["left.weight_quantizer.gate_logits"].shape == (2,)
    assert "left.weight_quantizer.bit_width" in model.state_dict()
    mixbit.restore_(model)
    x, _ = data()
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("kind", list(SPACES))
def test_a_model_prepared_with_the_recipe_computes_the_same(kind: str) -> None:
    model, _ = searching(kind)
    x, _ = data()
    generator = torch.Generator().manual_seed(2)
    for quantizer in search.search_quantizers(model).values():
        quantizer.choose_(int(torch.randint(len(quantizer.candidates), (1,), generator=generator)))
    model.eval()
    searched = model(x)
    recipe = search.extract(model)
    widths = {p.weight for p in recipe.layers.values()} | {p.act for p in recipe.layers.values()}
    assert len(widths) > 1
    for name, layer in quantized_layers(model).items():
        assert int(layer.weight_quantizer.bit_width) == recipe[name].weight
        assert int(layer.act_quantizer.bit_width) == recipe[name].act
    assert recipe["left"].act == recipe["right"].act
    again = copy.deepcopy(model)
    mixbit.prepare_(again, recipe)
    assert not search.search_quantizers(again)
    assert torch.equal(again(x), searched)
    assert all(not p.narrow_range for p in recipe.layers.values())


@pytest.mark.parametrize("kind", list(SPACES))
def test_a_model_in_eval_mode_draws_nothing_once_it_is_prepared(kind: str) -> None:
    model, _ = searching(kind)  # prepared and calibrated in eval mode
    x, _ = data()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), mixbit.prepare_(copy.deepcopy(model), search.extract(model))(x))


def test_fractional_bits_beyond_the_candidates_are_the_nearest_one() -> None:
    model, costs = searching("fractional")
    x, _ = data()
    penalty = search.Penalty(model, costs, strength=1.0).eval()
    quantizer = model.get_submodule("left").weight_quantizer
    assert isinstance(quantizer, search.FractionalQuantizer)
    for end, beyond in ((2.0, 1.5), (8.0, 8.5)):
        for module in model.modules():
            module.training = isinstance(module, search.SearchQuantizer)
        found = []
        for bits in (end, beyond):
            quantizer.fractional_bits.data.fill_(bits)
            quantizer.fractional_bits.grad = None
            y = model(x)
            cost = penalty()
            cost.backward()
            assert quantizer.fractional_bits.grad != 0  # the way back stays open
            found.append((y.detach(), cost.detach()))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_frozen_stays_so() -> None:
    model, costs = searching("gates")
    x, y = data()
    penalty = search.Penalty(model, costs, strength=1.0, start_step=1)
    penalty()
    search.freeze_(model)
    penalty()
    assert all(q.phase == DECIDED for q in search.search_quantizers(model).values())
    with pytest.raises(MixbitError, match="every choice is frozen; call mixbit.search.unfreeze_"):
        search.fit(model, Images(x, y, 16), costs, epochs=1, strength=1.0)


@pytest.mark.parametrize("kind", ["gates", "residual", "mixture", "fractional"])
def test_phases(kind: str) -> None:
    model, _ = searching(kind)
    x, _ = data()
    quantizers = search.search_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.choose_(0)
    model.eval()
    narrow = model(x)
    assert torch.equal(model(x), narrow)

    def trained(phase: float | None) -> Tensor:
        if phase is not None:
            for quantizer in quantizers.values():
                quantizer.phase.fill_(phase)
        for module in model.modules():
            module.training = isinstance(module, search.SearchQuantizer)
        return model(x)

    assert torch.equal(trained(DECIDED), narrow)
    wide = trained(WIDEST)
    for quantizer in quantizers.values():
        quantizer.choose_(len(quantizer.candidates) - 1)
    model.eval()
    assert torch.equal(model(x), wide)
    assert not torch.equal(wide, narrow)


def test_gates_of_activations_are_drawn_for_each_image_and_of_weights_once() -> None:
    model, _ = searching("gates")
    layer = quantized_layers(model)["last"]
    layer.train()
    x = torch.randn(5, 8, 3, 3)
    acts = layer.act_quantizer.gates(x)
    assert acts.shape == (2, 5)
    assert len({tuple(c) for c in acts.T.tolist()}) > 1
    weights = layer.weight_quantizer.gates(layer.weight)
    assert weights.shape == (2,)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_ranges_follow_the_weights() -> None:
    model, _ = searching("gates")
    layer = quantized_layers(model)["last"]
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        layer.weight.mul_(3.0)
        layer.weight[0] = 0.0
    x = torch.randn(2, 8, 3, 3)
    layer(x)
    expected = layer.weight.detach().abs().amax((1, 2, 3))
    expected[0] = 1.0
    assert torch.equal(quantizer.range, expected)
    assert torch.equal(quantizer.effective_scale(), expected / 128)
    assert quantizer.range.requires_grad is False


@pytest.mark.parametrize("kind", list(SPACES))
def test_everything_that_trains_gets_a_gradient(kind: str) -> None:
    model, costs = searching(kind)
    model.train()
    penalty = search.Penalty(model, costs, strength=0.1)
    x, y = data()
    for quantizer in search.search_quantizers(model).values():
        if isinstance(quantizer, search.FractionalQuantizer):
            quantizer.fractional_bits.data.fill_(3.3)
        elif isinstance(quantizer, search.GatedQuantizer):
            quantizer.gate_logits.data.fill_(0.1)
    torch.manual_seed(0)
    (nn.functional.cross_entropy(model(x), y) + penalty()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_the_gradient_of_a_gate_is_that_of_the_mean_difference() -> None:
    """d loss / d gate of a weight, against differences of the forward, with the samples held."""
    model, _ = searching("gates")
    layer = quantized_layers(model)["last"]
    layer.act_quantizer = None
    layer.train()
    x = torch.randn(4, 8, 3, 3)
    g = torch.randn(4, 6, 3, 3)
    quantizer = layer.weight_quantizer
    quantizer.gate_logits.data.copy_(torch.tensor([0.2, -0.1]))

    def loss() -> Tensor:
        torch.manual_seed(11)
        return (layer(x).double() * g).sum()

    loss().backward()
    found = quantizer.gate_logits.grad.clone()
    for i in range(2):
        ends = []
        for sign in (1, -1):
            quantizer.gate_logits.data[i] += sign * 1e-2
            ends.append(loss().item())
            quantizer.gate_logits.data[i] -= sign * 1e-2
        assert found[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)


def run(kind: str, steps: int, **options: Any) -> tuple[nn.Module, mixbit.Recipe, mixbit.CostTable]:
    model, costs = searching(kind)
    x, y = data()
    batches = Images(x, y, 16, seed=1)
    given = {"lr": 0.02, "search_lr": 0.05} | options
    found = search.fit(model, batches, costs, epochs=-(-steps // len(batches)), **given)
    return model, found.recipe, costs


@pytest.mark.parametrize("kind", ["gates", "residual", "mixture", "fractional"])
def test_no_cost_keeps_the_widest_and_a_huge_one_takes_the_narrowest(kind: str) -> None:
    # Without a cost there is only the noise of the samples; a mixture, which starts undecided, follows it anywhere.
    _, free, costs = run(kind, 40, strength=0.0, search_lr=0.02)
    assert kind == "mixture" or costs.total(free) == costs.uniform(8, 8)
    _, dear, costs = run(kind, 80, strength=1000.0)
    assert costs.total(dear) == costs.uniform(2, 2)


@pytest.mark.parametrize("kind", list(SPACES))
def test_a_search_lands_on_its_budget(kind: str) -> None:
    _, costs = searching(kind)
    budget = 0.4 * costs.uniform(8, 8)
    _, recipe, costs = run(kind, 80, budget=budget)
    assert recipe.report["feasible"]
    assert 0.9 * budget <= costs.total(recipe) <= budget
    assert recipe.report["cost"] == costs.total(recipe)
    assert mixbit.Recipe.from_dict(recipe.to_dict()) == recipe


def test_after_a_search_the_model_is_the_recipe() -> None:
    model, costs = searching("gates")
    x, y = data()
    said: list[str] = []
    found = search.fit(
        model,
        Images(x, y, 16, seed=1),
        costs,
        epochs=10,
        budget=0.3 * costs.uniform(8, 8),
        search_lr=1e-4,
        say=said.append,
    )
    assert "is used" in said[0]
    model.eval()
    again = copy.deepcopy(model)
    mixbit.prepare_(again, found.recipe)
    assert torch.equal(again(x), model(x))
    assert search.extract(model).layers == found.recipe.layers
    assert not any(q.choice_parameter.requires_grad for q in search.search_quantizers(model).values())
    assert len(found.history.loss) == 40
    assert found.history.figures["weight left"][-1][1] in (2.0, 4.0, 8.0)
    search.unfreeze_(model)
    assert all(q.choice_parameter.requires_grad for q in search.search_quantizers(model).values())
    with pytest.raises(MixbitError, match="'stem' has weight=3"):
        search.freeze_(model, mixbit.Recipe.uniform(quantized_layers(model), weight=3, act=8))


def test_the_history_names_layers_by_the_table_and_knows_float_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("second", nn.Conv2d(4, 4, 1))
    model.add_module("first", nn.Conv2d(3, 4, 1))
    model.add_module("last", nn.Linear(4, 4))
    model.forward = lambda x: model.last(model.second(model.first(x).relu()).mean((2, 3)))  # type: ignore[method-assign]
    x, y = data()
    costs = mixbit.costs.bops(model.eval(), x[:2])
    mixbit.prepare_(model, search.Gates(frozen={"last": None}), x[:2])
    mixbit.calibrate_(model, [x])
    with torch.no_grad():
        model.second.weight_quantizer.gate_logits.fill_(-6.0)
    history = search.fit(model, Images(x, y, 32), costs, epochs=1, strength=0.0, search_lr=1e-6).history
    last = {name: values[-1][1] for name, values in history.figures.items() if name != "cost"}
    assert last == {
        "act first": 8,
        "weight first": 8,
        "act second": 8,
        "weight second": 2,
        "act last": 32,
        "weight last": 32,
    }


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    x, y = data()

    def go(**changed: Any) -> None:
        model, costs = searching("gates")
        options: dict[str, Any] = {"costs": costs, "epochs": 1, "strength": 0.5, "checkpoint": tmp_path / "state"}
        search.fit(model, Images(x, y, 32), **(options | changed))

    go()
    go()
    plain = mixbit.restore_(searching("gates")[0])
    teacher = copy.deepcopy(plain).eval()
    for name, changed in {
        "penalty": {"form": "separate"},
        "costs": {"costs": mixbit.costs.weight_memory(plain, x[:2])},
        "teacher": {"teacher": teacher},
        "clip_norm": {"clip_norm": 1.0},
    }.items():
        with pytest.raises(MixbitError, match=f"of another run: its {name} is"):
            go(**changed)


@pytest.mark.parametrize("kind", ["gates", "gumbel", "fractional"])
@pytest.mark.parametrize("stop", [1, 6, 11])
def test_a_killed_search_goes_on_to_the_same_recipe(kind: str, stop: int, tmp_path: Path) -> None:
    x, y = data()

    def start(folder: Path | None, killed: int | None = None) -> tuple[nn.Module, Any]:
        model, costs = searching(kind)
        calls = 0

        def objective(trained: nn.Module, item: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if killed is not None and calls > killed:
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(trained(item[0]), item[1])

        found = search.fit(
            model,
            Images(x, y, 16, seed=1),
            costs,
            epochs=3,
            budget=0.4 * costs.uniform(8, 8),
            search_lr=0.1,
            objective=objective,
            checkpoint=None if folder is None else folder / "search.safetensors",
            checkpoint_every=2,
        )
        return model, found

    expected_model, expected = start(None)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, stop)
    model, found = start(tmp_path)
    assert found.recipe == expected.recipe
    assert found.history == expected.history
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_the_search() -> None:
    model, costs = searching("gates")
    x, y = data()
    before = copy.deepcopy(model.state_dict())

    def objective(trained: nn.Module, item: Any) -> Tensor:
        return trained(item[0]).sum() * float("nan")

    with pytest.raises(MixbitError, match="step 1"):
        search.fit(model, Images(x, y, 16), costs, epochs=1, strength=1.0, objective=objective)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_loop_of_ones_own() -> None:
    model, costs = searching("gates")
    x, y = data()
    batches = Images(x, y, 16, seed=2)
    penalty = search.Penalty(model, costs, strength=3.0)
    weights = [p for n, p in model.named_parameters() if "quantizer" not in n]
    optimizer = torch.optim.Adam([{"params": weights}, *search.param_groups(model, lr=0.1)], lr=1e-3)
    history = train(
        model,
        batches,
        lambda m, item: nn.functional.cross_entropy(m(item[0]), item[1]) + penalty(),
        optimizer,
        epochs=12,
        modules={"penalty": penalty},
    )
    assert len(history.loss) == 48
    assert costs.total(search.extract(model)) < costs.uniform(8, 8)


def test_bit_widths_move_without_a_new_graph() -> None:
    model, costs = searching("gates")
    model.train()
    x, y = data()
    penalty = search.Penalty(model, costs, strength=5.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.Adam(search.param_groups(model, lr=0.6))
    counted = []
    for step in range(8):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(compiled(x), y) + penalty()).backward()
        optimizer.step()
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if step == 5:
            search.freeze_(model)
            search.unfreeze_(model)
    assert counted[-1] == counted[0]
    assert costs.total(search.extract(model)) < costs.uniform(8, 8)


def test_a_model_under_search_is_not_exported() -> None:
    model, _ = searching("gates")
    x, _ = data()
    with pytest.raises(MixbitError, match="under search"):
        mixbit.export.reference(model, x[:2])


def test_bad_input_of_fit() -> None:
    model, costs = searching("gates")
    x, y = data()
    batches = Images(x, y, 16)
    for options, said in (
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 2, "start_epoch": 2}, "start_epoch=2"),
        ({"epochs": 1, "lr": 0.0}, "lr=0.0"),
        ({"epochs": 1, "search_lr": -1.0}, "search_lr"),
        ({"epochs": 1, "lr": float("inf")}, "lr=inf"),
        ({"epochs": 1, "momentum": 1.0}, "momentum=1.0"),
        ({"epochs": 1, "weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"epochs": 1, "objective": lambda m, i: 0, "teacher": model}, "both given"),
    ):
        with pytest.raises(MixbitError, match=said):
            search.fit(model, batches, costs, strength=1.0, **options)
    with pytest.raises(MixbitError, match="no length"):
        search.fit(model, Endless(), costs, strength=1.0, epochs=1)
    fresh = Net().eval()
    mixbit.prepare_(fresh, search.Gates(), x[:2])
    with pytest.raises(MixbitError, match="no scales yet"):
        search.fit(fresh, batches, costs, strength=1.0, epochs=1)


class Endless:
    """Batches without a length."""

    def __iter__(self) -> Any:
        return iter([data(16)])


class Spare(Net):
    """A layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(8, 8, 1)


def test_layers_that_are_never_called_stay_float() -> None:
    model = Spare().eval()
    x, _ = data()
    mixbit.prepare_(model, mixbit.Recipe(default=mixbit.LayerPrecision(weight=4, act=4)))
    assert "spare" in quantized_layers(model)
    mixbit.prepare_(model, search.Gates(), x[:2])
    assert "spare" not in quantized_layers(model)
    mixbit.calibrate_(model, [x[:32]])


def test_a_recipe_that_does_not_fit_freezes_nothing() -> None:
    model, _ = searching("gates")
    before = copy.deepcopy(model.state_dict())
    recipe = mixbit.Recipe.uniform(quantized_layers(model), weight=2, act=8)
    recipe.layers["head"] = mixbit.LayerPrecision(weight=3, act=8)
    with pytest.raises(MixbitError, match="'head' has weight=3"):
        search.freeze_(model, recipe)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(MixbitError, match="frozen='head': expected a list"):
        search.Gates(frozen="head")
