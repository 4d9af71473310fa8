"""Choices, penalties, budgets and recipes of a search: golden values of the specification, properties, bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixbit
from mixbit import CostTable, LayerPrecision, MixbitError, search
from mixbit.quantizers import quantized_layers
from mixbit.search.quantizers import GatedQuantizer, gate_threshold


class Net(nn.Module):
    """Five layers; `left` and `right` read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5]."""
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


def small(space: Any = None, seed: int = 0) -> tuple[nn.Module, Tensor, CostTable]:
    torch.manual_seed(seed)
    model = Net().eval()
    x = torch.randn(4, 3, 8, 8)
    costs = mixbit.costs.bops(model, x)
    mixbit.prepare_(model, search.Gates() if space is None else space, x)
    return model, x, costs


def logits(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.endswith("gate_logits")}


def test_gates_have_the_closed_forms_of_the_specification() -> None:
    table = [(-6, 0.008154, False), (-2, 0.309800, False), (-1, 0.549574, False), (-0.5, 0.667954, True),
             (0, 0.768338, True), (1, 0.900155, True), (2, 0.960795, True), (6, 0.999253, True)]  # fmt: skip
    like = [GatedQuantizer((4, 8), gate_init=0.0, temperature=0.5, form="difference", learned=False, follows=False)]
    for value, share, on in table:
        parameter = torch.tensor([[float(value)]])
        assert GatedQuantizer.open_shares(parameter, like).item() == pytest.approx(share, abs=1e-6)
        assert GatedQuantizer.decided(parameter, like).item() == int(on)
    assert gate_threshold(0.5) == pytest.approx(-0.5356534189889, abs=1e-12)
    assert gate_threshold(2 / 3) == pytest.approx(-0.9353026311220, abs=1e-12)


def test_a_closed_gate_closes_all_above_it() -> None:
    like = [GatedQuantizer((2, 4, 8), gate_init=0.0, temperature=0.5, form="difference", learned=False, follows=False)]
    given_logits = torch.tensor([[-0.54, 9.0], [-0.53, -0.54], [-0.53, -0.53], [-5.0, 5.0]])
    assert GatedQuantizer.decided(given_logits, like * 4).tolist() == [0, 1, 2, 0]


@pytest.fixture(scope="module")
def mobilenet() -> tuple[nn.Module, Tensor, CostTable]:
    model = mixbit.zoo.mobilenet_v1(width=0.75).eval()
    x = torch.zeros(1, 3, 224, 224)
    return model, x, mixbit.costs.bops(model, x)


def test_the_published_regularizers(mobilenet: tuple[nn.Module, Tensor, CostTable]) -> None:
    model, x, costs = mobilenet
    for tie in (False, True):
        mixbit.prepare_(model, search.Gates(tie=tie), x)
        assert len({id(p) for p in logits(model).values()}) == (28 if tie else 55)
        separate = search.Penalty(model, costs, strength=1.0, form="separate")
        value = separate()
        assert value.item() == pytest.approx(249.67833, rel=1e-5)
        value.backward()
        layers = quantized_layers(model)
        names = list(layers)
        factor = 2.0 if tie else 1.0
        expected = {0: [0.1238076, 0.0814308], 6: [0.4402047, 0.2895318], 27: [0.0116976, 0.0076938]}
        for index, gradient in expected.items():
            found = layers[names[index]].weight_quantizer.gate_logits.grad
            own = 1.0 if index == 0 else factor  # the first layer's input has no gates
            assert found.tolist() == pytest.approx([own * g for g in gradient], abs=1e-6)
        if not tie:
            joint = search.Penalty(model, costs, strength=1.0, form="joint")
            assert joint().item() == pytest.approx(1409.25234, rel=1e-5)
            assert search.Penalty(model, costs, strength=0.18, form="separate")().item() == pytest.approx(
                44.94210, rel=1e-5
            )
            for parameter in logits(model).values():
                parameter.data.fill_(30.0)
            assert separate().item() == pytest.approx(266.84088, rel=1e-5)
    mixbit.restore_(model)


#: Specification T8, all logits 2: separate sum, joint sum, separate with all gates open.
SUMS = {
    "MobileNetV1 1.0": (lambda: mixbit.zoo.mobilenet_v1(width=1.0), 246.20674, 1387.87888, 263.13061),
    "MobileNetV2": (mixbit.zoo.mobilenet_v2, 330.46725, 1869.74071, 353.18311),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_published_regularizers_of_other_networks(name: str) -> None:
    make, separate, joint, opened = SUMS[name]
    model, x = make().eval(), torch.zeros(1, 3, 224, 224)
    costs = mixbit.costs.bops(model, x)
    mixbit.prepare_(model, search.Gates(), x)
    penalty = search.Penalty(model, costs, strength=1.0, form="separate")
    assert penalty().item() == pytest.approx(separate, rel=1e-5)
    assert search.Penalty(model, costs, strength=0.18, form="separate")().item() == pytest.approx(
        0.18 * separate, rel=1e-5
    )
    assert search.Penalty(model, costs, strength=1.0, form="joint")().item() == pytest.approx(joint, rel=1e-5)
    for parameter in logits(model).values():
        parameter.data.fill_(30.0)
    assert penalty().item() == pytest.approx(opened, rel=1e-5)


def test_gradients_of_the_joint_form_and_nearly_closed_gates(mobilenet: tuple[nn.Module, Tensor, CostTable]) -> None:
    model, x, costs = mobilenet
    mixbit.prepare_(model, search.Gates(), x)
    search.Penalty(model, costs, strength=1.0, form="joint")().backward()
    layers = quantized_layers(model)
    names = list(layers)
    for index, gradient in {6: [4.942703, 3.250917], 0: [0.990461, 0.651446]}.items():
        found = layers[names[index]].weight_quantizer.gate_logits.grad
        assert found.tolist() == pytest.approx(gradient, abs=2e-5)
    # 4 c + 8 c^2 = 0.0331481 of each quantizer at logits of -6, 11.2281896 at 2: the sums are in that ratio.
    separate = search.Penalty(model, costs, strength=1.0, form="separate")
    for parameter in logits(model).values():
        parameter.data.fill_(-6.0)
    assert separate().item() == pytest.approx(249.67833 * 0.0331481 / 11.2281896, rel=1e-5)
    # Nothing before the search has started.
    assert search.Penalty(model, costs, strength=1.0, form="separate", start_step=3)().item() == 0.0
    mixbit.restore_(model)


def test_the_expected_latency_of_one_pair() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    latency = {
        (2, 2): 100,
        (2, 4): 140,
        (2, 8): 220,
        (4, 2): 180,
        (4, 4): 150,
        (4, 8): 230,
        (8, 2): 400,
        (8, 4): 380,
        (8, 8): 300,
    }
    values = np.zeros((2, 3, 3))
    for (act, weight), cycles in latency.items():
        values[1, (2, 4, 8).index(act), (2, 4, 8).index(weight)] = cycles
    costs = CostTable.from_arrays(["0", "2"], values, (2, 4, 8), (2, 4, 8), unit="cycles")
    mixbit.prepare_(model, search.Gates(), x)
    value = search.Penalty(model, costs, strength=1.0)()
    assert value.item() == pytest.approx((0.2001378 * 1000 + 100) / 300, abs=1e-6)
    value.backward()
    layer = quantized_layers(model)["2"]
    assert layer.weight_quantizer.gate_logits.grad.tolist() == pytest.approx([-3.1291 / 300, -2.4502 / 300], abs=1e-6)
    assert layer.act_quantizer.gate_logits.grad.tolist() == pytest.approx([3.4444 / 300, 2.9644 / 300], abs=1e-6)


@pytest.mark.parametrize("space", [search.Gates(), search.Mixture(), search.Fractional((2, 4, 8))])
def test_decided_choices_cost_what_the_table_says(space: Any) -> None:
    model, _, costs = small(space)
    generator = torch.Generator().manual_seed(3)
    penalty = search.Penalty(model, costs, strength=1.0).eval()
    for _ in range(5):
        for quantizer in search.search_quantizers(model).values():
            parameter = quantizer.choice_parameter.data
            if quantizer.choice_parameter.numel() == 1:
                parameter.fill_([2.0, 4.0, 8.0][int(torch.randint(3, (1,), generator=generator))])
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).sign() * 40)
        recipe = search.extract(model)
        total = costs.total(recipe)
        assert penalty.costs()["bops"] == pytest.approx(total, rel=1e-6)
        # Saturated choices leave nothing to expect but the decided cost (ties of mixtures aside).
        if not isinstance(space, search.Mixture):
            assert penalty().item() == pytest.approx(total / costs.uniform(8, 8), rel=1e-5)
        assert recipe["left"].act == recipe["right"].act
        assert recipe["stem"].act == 8


def test_the_expected_cost_is_the_mean_over_draws() -> None:
    model, _, costs = small()
    for i, parameter in enumerate(logits(model).values()):
        parameter.data.copy_(torch.tensor([0.3 * i - 1.0, 0.5 - 0.2 * i]))
    penalty = search.Penalty(model, costs, strength=1.0).eval()
    quantizers = search.search_quantizers(model)
    generator = np.random.default_rng(0)
    totals = []
    for _ in range(4000):
        widths = {}
        for quantizer in quantizers.values():
            share = torch.sigmoid(quantizer.gate_logits.detach() - 0.5 * np.log(0.1 / 1.1)).numpy()
            first = generator.random() < share[0]
            widths[id(quantizer)] = (2, 4, 8)[int(first) + int(first and generator.random() < share[1])]
        total = 0.0
        for name, layer in quantized_layers(model).items():
            act = widths.get(id(layer.act_quantizer), 8)
            total += costs.entry(name, act, widths[id(layer.weight_quantizer)])
        totals.append(total / costs.uniform(8, 8))
    assert penalty().item() == pytest.approx(np.mean(totals), abs=4 * np.std(totals) / np.sqrt(len(totals)))


def test_strength_multiplies_the_weights_of_several_costs() -> None:
    model, x, costs = small()
    memory = mixbit.costs.weight_memory(mixbit.restore_(copy.deepcopy(model)), x)
    full = search.Penalty(model, {costs: 0.3, memory: 2.0}, strength=1.0)()
    assert search.Penalty(model, {costs: 0.3, memory: 2.0}, strength=0.5)().item() == pytest.approx(full.item() / 2)
    assert search.Penalty(model, {costs: 1.0}, strength=0.2)().item() == search.Penalty(model, costs, strength=0.2)()


def test_shares_of_the_published_forms_are_those_of_operations() -> None:
    # Whatever the candidates, and although a float layer costs sixteen times what it does at 8 bits.
    for space in (search.Gates(), search.Gates((2, 4)), search.Gates(frozen={"head": None})):
        model, x, costs = small(space)
        macs = [layer.macs for layer in mixbit.layers(mixbit.restore_(copy.deepcopy(model)), x)]
        separate = search.Penalty(model, costs, strength=1.0, form="separate").eval()
        for parameter in logits(model).values():
            parameter.data.fill_(40.0)
        widest = max(q.candidates[-1] for q in search.search_quantizers(model).values())
        ends = sum(b for b in (2, 4, 8) if 2 < b <= widest)
        searched = [(n != "stem") + 1 if n in quantized_layers(model) else 0 for n in costs.layers]
        expected = sum(m / max(macs) * s * ends for m, s in zip(macs, searched, strict=True))
        assert separate().item() == pytest.approx(expected, rel=1e-6)


def test_a_penalty_follows_its_model_to_another_device() -> None:
    model, _, costs = small()
    for options in ({"strength": 1.0}, {"budget": 0.5 * costs.uniform(8, 8), "total_steps": 4}):
        moved = copy.deepcopy(model)
        penalty = search.Penalty(moved, costs, **options).eval()
        moved.to("meta")
        assert penalty().device.type == "meta"
        parts = [*penalty.buffers(), *(b for cost in penalty._costs for b in cost.buffers())]
        assert {b.device.type for b in parts} == {"meta"}


def test_several_costs_and_outputs_that_depend_on_their_reader() -> None:
    model, x, costs = small()
    plain = mixbit.restore_(copy.deepcopy(model))
    memory = mixbit.costs.weight_memory(plain, x)
    both = search.Penalty(model, {costs: 0.3, memory: 2.0}, strength=1.0)()
    apart = search.Penalty(model, costs, strength=0.3)() + search.Penalty(model, memory, strength=2.0)()
    assert both.item() == pytest.approx(apart.item(), rel=1e-6)
    arch = mixbit.hw.Architecture.load("eyeriss")
    energy = mixbit.costs.mapper(arch, plain, x, objective="energy")
    penalty = search.Penalty(model, energy, strength=1.0).eval()
    for parameter in logits(model).values():
        parameter.data.copy_(torch.tensor([40.0, -40.0]))
    recipe = search.extract(model)
    assert penalty().item() == pytest.approx(energy.total(recipe) / energy.uniform(8, 8), rel=1e-5)
    peak = mixbit.costs.activation_memory(plain, x)
    assert search.Penalty(model, peak, strength=1.0).eval()().item() == pytest.approx(
        peak.total(recipe) / peak.uniform(8, 8), rel=1e-5
    )


@given(st.integers(0, 10_000), st.floats(0.08, 0.98), st.booleans())
def test_a_budget_is_kept_and_used(seed: int, share: float, tie: bool) -> None:
    model, _, costs = small(search.Gates(tie=tie))
    generator = torch.Generator().manual_seed(seed)
    for parameter in logits(model).values():
        parameter.data.copy_(torch.randn(2, generator=generator) * 3)
    least, most = costs.uniform(2, 2), costs.uniform(8, 8)
    budget = least + share * (most - least)
    search.Penalty(model, costs, budget=budget, total_steps=10)
    recipe = search.extract(model)
    assert recipe.report["feasible"]
    assert recipe.report["cost"] == pytest.approx(costs.total(recipe))
    assert costs.total(recipe) <= budget * (1 + 1e-9)
    assert costs.total(recipe) >= 0.99 * largest_below(model, costs, budget)
    if tie:
        assert all(recipe[n].act == recipe[n].weight for n in ("left", "right", "last", "head"))
    again = search.extract(model)
    assert again == recipe


def largest_below(model: nn.Module, costs: CostTable, budget: float) -> float:
    """By trying every combination of the candidates."""
    layers = quantized_layers(model)
    operands: list[Any] = []
    for layer in layers.values():
        for quantizer in (layer.act_quantizer, layer.weight_quantizer):
            if isinstance(quantizer, search.GatedQuantizer) and not any(
                quantizer.gate_logits is other.gate_logits for other in operands
            ):
                operands.append(quantizer)
    grids = np.stack(np.meshgrid(*[np.arange(3)] * len(operands), indexing="ij")).reshape(len(operands), -1)
    total = np.zeros(grids.shape[1])

    def rows(quantizer: Any) -> Any:
        if not isinstance(quantizer, search.GatedQuantizer):
            return np.full(grids.shape[1], 2)
        return grids[next(i for i, q in enumerate(operands) if q.gate_logits is quantizer.gate_logits)]

    for name, layer in layers.items():
        entries = np.array([[costs.entry(name, a, w) for w in (2, 4, 8)] for a in (2, 4, 8)])
        total += entries[rows(layer.act_quantizer), rows(layer.weight_quantizer)]
    return float(total[total <= budget * (1 + 1e-12)].max())


def test_float_layers_count_in_a_budget() -> None:
    model, _, costs = small(search.Gates(frozen={"last": None}))
    head = 32 * 32 / 64 * costs.entry("last", 8, 8)
    budget = head + 0.5 * (costs.uniform(8, 8) - costs.entry("last", 8, 8))
    search.Penalty(model, costs, budget=budget, total_steps=10)
    recipe = search.extract(model)
    assert recipe["last"].weight is None
    assert recipe.report["feasible"]
    assert 0.99 * budget <= costs.total(recipe) <= budget


def test_the_ends_of_costs_that_fall_with_more_bits() -> None:
    model, x, _ = small()
    plain = mixbit.restore_(copy.deepcopy(model))
    cycles = mixbit.costs.pulp("xpulpv2", plain, x)  # unpacks narrow operands in software
    acts = [[8] if name == "stem" else [2, 4, 8] for name in cycles.layers]
    totals = []
    for left in (2, 4, 8):  # the width that left and right share
        rows = [[left] if name in ("left", "right") else own for name, own in zip(cycles.layers, acts, strict=True)]
        entries = [
            [cycles.entry(name, a, w) for a in own for w in (2, 4, 8)]
            for name, own in zip(cycles.layers, rows, strict=True)
        ]
        totals += [sum(min(own) for own in entries), sum(max(own) for own in entries)]
    least, most = min(totals), max(totals)
    assert least < cycles.uniform(2, 2)
    assert search.reachable(model, cycles) == pytest.approx((least, most), rel=1e-12)
    for budget in (0.99 * least, 1.01 * most):
        with pytest.raises(MixbitError, match=f"reach {least:g} to {most:g}"):
            search.Penalty(model, cycles, budget=budget, total_steps=5)
    for budget in (least, 0.5 * (least + most)):
        search.Penalty(model, cycles, budget=budget, total_steps=5)
        report = search.extract(model).report
        assert report["feasible"]
        assert report["cost"] <= budget


def test_a_choice_that_uses_the_budget_is_not_touched() -> None:
    model, _, costs = small()
    for parameter in logits(model).values():
        parameter.data.copy_(torch.tensor([5.0, -5.0]))
    wanted = costs.total(search.extract(model))
    search.Penalty(model, costs, budget=wanted * 1.001, total_steps=10)
    recipe = search.extract(model)
    assert recipe.report["moved"] == []
    assert costs.total(recipe) == wanted
    assert recipe.report["average_bits"]["weight"] == 4.0


def test_frozen_layers_keep_their_bits_and_give_them_to_their_input() -> None:
    model, _, costs = small(search.Gates(frozen={"left": LayerPrecision(weight=3, act=5), "head": None}))
    recipe = search.extract(model)
    assert (recipe["left"].weight, recipe["left"].act) == (3, 5)
    assert recipe["right"].act == 5
    assert recipe["right"].weight == 8
    assert "head" not in quantized_layers(model)
    assert search.Penalty(model, costs, strength=1.0).costs()["bops"] == pytest.approx(costs.total(recipe), rel=1e-6)


def test_param_groups_hold_everything_once() -> None:
    model, _, _ = small(search.Mixture())
    before = {id(p) for n, p in model.named_parameters() if "quantizer" not in n}
    groups = search.param_groups(model, lr=0.01, scale_lr=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("search", 0.01, 0.0), ("scales", 0.1, 0.0)]
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) | before == {id(p) for p in model.parameters()}
    assert not set(held) & before
    gated, _, _ = small()
    assert search.param_groups(gated, lr=1e-4, total_steps=100)[0]["lr"] == pytest.approx(3 * 2.5356534 / 100)
    assert search.param_groups(gated, lr=1e-4, total_steps=10**6)[0]["lr"] == 1e-4


def test_parameters_outside_the_optimizer_are_noticed() -> None:
    model, _, costs = small()
    penalty = search.Penalty(model, costs, strength=1.0)
    weights = torch.optim.SGD([p for n, p in model.named_parameters() if "quantizer" not in n], lr=0.1)
    with pytest.raises(MixbitError, match="not in the optimizer"):
        for _ in range(40):
            penalty().backward()
            weights.step()
    model, _, costs = small()
    penalty = search.Penalty(model, costs, strength=1.0)
    optimizer = torch.optim.Adam(search.param_groups(model, lr=0.1))
    for _ in range(6):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert all((p < 2.0).all() for p in logits(model).values())
    model, _, costs = small()
    penalty = search.Penalty(model, costs, strength=1.0)
    for _ in range(8):  # gradients that are accumulated
        penalty().backward()


def test_a_gate_moves_by_its_learning_rate_each_step() -> None:
    model, _, _ = small()
    optimizer = torch.optim.Adam(search.param_groups(model, lr=1e-3))
    for _ in range(1000):
        optimizer.zero_grad()
        sum(p.sum() for p in logits(model).values()).backward()
        optimizer.step()
    assert all(p.tolist() == pytest.approx([1.0, 1.0], abs=2e-3) for p in logits(model).values())


def test_the_clock_starts_the_search() -> None:
    model, _, costs = small()
    penalty = search.Penalty(model, costs, strength=2.0, start_step=2, warmup_steps=4)
    full = search.Penalty(model, costs, strength=2.0).eval()().item()
    phases, values = [], []
    for _ in range(8):
        phases.append(float(next(iter(search.search_quantizers(model).values())).phase))
        values.append(penalty().item() / full)
    assert phases == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert values == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_temperature_of_a_mixture_falls_in_equal_ratios() -> None:
    model, _, costs = small(search.Mixture(temperature=2.0))
    penalty = search.Penalty(model, costs, strength=1.0, total_steps=4, final_temperature=0.125)
    mixture = next(iter(search.search_quantizers(model).values()))
    found = []
    for _ in range(5):
        penalty()
        found.append(float(mixture.temperature))
    assert found == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.125])


def test_the_state_of_a_penalty_goes_on() -> None:
    model, _, costs = small()
    budget = 0.4 * costs.uniform(8, 8)

    def make() -> Any:
        return search.Penalty(model, costs, budget=budget, total_steps=20)

    one, other = make(), make()
    values = [one().item() for _ in range(12)]
    again = [other().item() for _ in range(5)]
    state = other.state_dict()
    third = make()
    third.load_state_dict(state)
    again += [third().item() for _ in range(7)]
    assert again == values
    assert values[-1] > values[0]


def test_bad_input() -> None:
    model, x, costs = small()
    eight, two = costs.uniform(8, 8), costs.uniform(2, 2)
    for budget in (two * 0.9, eight * 1.1):
        with pytest.raises(MixbitError, match="the candidates reach"):
            search.Penalty(model, costs, budget=budget, total_steps=5)
    for options, said in (
        ({}, "expected exactly one"),
        ({"strength": 1.0, "budget": eight}, "expected exactly one"),
        ({"budget": eight}, "total_steps is None"),
        ({"strength": float("nan")}, "strength=nan: expected a finite number"),
        ({"strength": -1.0}, "strength=-1.0: expected a finite number >= 0"),
        ({"strength": 1.0, "form": "seperate"}, "separate"),
        ({"strength": 1.0, "total_steps": 0}, "total_steps=0"),
        ({"strength": 1.0, "total_steps": 3, "start_step": 3}, "start_step=3"),
        ({"budget": eight, "total_steps": 3, "form": "joint"}, "a budget is about a cost"),
    ):
        with pytest.raises(MixbitError, match=said):
            search.Penalty(model, costs, **options)
    other = mixbit.costs.bops(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), x)
    with pytest.raises(MixbitError, match="costs have no layer 'stem'"):
        search.Penalty(model, other, strength=1.0)
    with pytest.raises(MixbitError, match="nothing to search"):
        search.Penalty(mixbit.restore_(copy.deepcopy(model)), costs, strength=1.0)
    with pytest.raises(MixbitError, match="nothing to search"):
        search.extract(mixbit.restore_(copy.deepcopy(model)))
    mixture, _, _ = small(search.Mixture())
    with pytest.raises(MixbitError, match="defined for gates"):
        search.Penalty(mixture, costs, strength=1.0, form="separate")
    next(iter(logits(model).values())).data[0] = float("nan")
    with pytest.raises(MixbitError, match="expected finite numbers"):
        search.extract(model)
    for make, said in (
        (lambda: search.Gates((4, 2)), "ascending"),
        (lambda: search.Gates((2, 2, 4)), "without duplicates"),
        (lambda: search.Gates((2, 17)), "from 1 to 16"),
        (lambda: search.Gates((2, 4.5)), "whole numbers"),
        (lambda: search.Gates((8,)), "at least two"),
        (lambda: search.Gates(form="direct"), "difference"),
        (lambda: search.Gates(ranges="learned"), 'expected "residual"'),
        (lambda: search.Gates((2, 3), form="residual"), "multiple"),
        (lambda: search.Gates(tie=True, act_precisions=(4, 8)), "same candidates"),
        (lambda: search.Gates(temperature=0.0), "temperature"),
        (lambda: search.Gates(gate_init=float("inf")), "gate_init"),
        (lambda: search.Mixture(temperature=-1.0), "temperature"),
        (lambda: search.Gates(granularity="per_row"), "granularity"),
        (lambda: mixbit.prepare_(Net().eval(), search.Gates()), "example is None"),
        (lambda: mixbit.prepare_(Net().eval(), search.Gates(frozen=["haed"]), x), "head"),
        (lambda: mixbit.prepare_(Net().eval(), search.Gates(), x, act_quantizer="lsq"), "quantizers of its own"),
    ):
        with pytest.raises(MixbitError, match=said):
            make()


def test_two_costs_of_one_unit_keep_both_budgets() -> None:
    model, x, _ = small()
    first, second = (mixbit.costs.pulp(target, Net().eval(), x) for target in ("xpulpnn", "xpulpnn-mixed"))
    budget = {first: 0.95 * first.uniform(8, 8), second: 0.9 * second.uniform(8, 8)}
    penalty = search.Penalty(model, {first: 1.0, second: 1.0}, budget=budget, total_steps=10)
    assert len(penalty.costs()) == len(penalty.units()) == 2
    report = search.extract(model).report
    assert list(report["budget"].values()) == list(budget.values())
    assert len(report["cost"]) == 2
    for name, limit in report["budget"].items():
        assert report["cost"][name] <= limit
