"""ThresholdAware: the wrapped optimizer's own steps but for the multiplier, one state, hooks, scaler, errors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

import mixbit
from mixbit import ops
from mixbit.retrain import ThresholdAware

Make = Callable[[Any], torch.optim.Optimizer]


class OwnSGD(torch.optim.SGD):
    """No optimizer that the ops know."""


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.4, weight_decay=1e-2),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=1e-2),
    "own": lambda p: OwnSGD(p, lr=0.05, momentum=0.9),
}


def inputs() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def network(bits: int = 3, **precision: Any) -> nn.Module:
    model = seeded(Residual)
    x = inputs()
    recipe = mixbit.Recipe.uniform(mixbit.layers(model, x).names, act=8, weight=bits, **precision)
    return mixbit.calibrate_(mixbit.prepare_(model, recipe, x), [x]).train()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    x = inputs() + step
    loss = F.cross_entropy(model(x), torch.arange(8) % 5)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0) -> None:
    for step in range(first, first + steps):
        backward(model, optimizer, step)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_off_is_the_wrapped_optimizer_bit_for_bit(name: str) -> None:
    plain, wrapped = network(), network()
    train(plain, OPTIMIZERS[name](plain.parameters()))
    train(wrapped, ThresholdAware(OPTIMIZERS[name](wrapped.parameters()), wrapped, shape="off"))
    assert same(plain, wrapped)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_multiplier_of_one_everywhere_is_the_wrapped_optimizer(name: str) -> None:
    plain, wrapped = network(), network()
    train(plain, OPTIMIZERS[name](plain.parameters()))
    train(wrapped, ThresholdAware(OPTIMIZERS[name](wrapped.parameters()), wrapped, alpha=1.0))
    # Adam's square root is rounded better than torch's.
    assert same(plain, wrapped) or name.startswith("adam")
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("on_grad", [False, True])
def test_one_step_is_scaled_where_weights_are_quantized_and_nowhere_else(name: str, on_grad: bool) -> None:
    plain, wrapped = network(), network()
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    optimizer = OPTIMIZERS[name](plain.parameters())
    quantized = {f"{n}.weight" for n, m in plain.named_modules() if hasattr(m, "weight_quantizer")}
    aware = ThresholdAware(OPTIMIZERS[name](wrapped.parameters()), wrapped, shape="linear", on_grad=on_grad)
    backward(plain, optimizer, 0)
    backward(wrapped, aware, 0)
    grads = {n: p.grad.clone() for n, p in wrapped.named_parameters()}
    multipliers = {
        n: ops.threshold_multipliers(
            [plain.get_parameter(n)],
            [q.effective_scale().detach()],
            [q.bit_width],
            shape="linear",
            narrow_range=q.narrow_range,
        )[0]
        for n in quantized
        for q in [plain.get_submodule(n.removesuffix(".weight")).weight_quantizer]
    }
    if on_grad:
        for n, g in multipliers.items():
            plain.get_parameter(n).grad.mul_(g)
    optimizer.step()
    aware.step()
    for n, p in wrapped.named_parameters():
        full = plain.get_parameter(n).detach()
        if n not in quantized:
            assert torch.equal(p, full), n
        elif on_grad:
            assert torch.allclose(p, full, atol=1e-7, rtol=1e-6), n
        else:
            expected = before[n] + multipliers[n] * (full - before[n])
            assert torch.allclose(p, expected, atol=1e-7, rtol=1e-6), n
            assert not torch.equal(p, full)
        assert torch.equal(p.grad, grads[n])


REST = {
    "momentum": {"momentum": 0.9, "weight_decay": 1e-2},
    "plain": {},
    "dampened": {"momentum": 0.9, "dampening": 0.4, "maximize": True},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 1e-3},
    "foreach": {"momentum": 0.9, "foreach": True},
    "fused": {"momentum": 0.9, "fused": True},
}


@pytest.mark.parametrize("options", REST.values(), ids=list(REST))
def test_other_parameters_take_the_steps_of_torch_bit_for_bit(options: dict[str, Any]) -> None:
    """The same gradients on both sides, one parameter without any at first, one of another layout, one of float64."""
    generator = torch.Generator().manual_seed(5)
    fused = "fused" in options  # torch's own does not take a parameter that joins later
    plain, wrapped = network(), network()
    extra = [torch.randn(4, 3, 5, 5, generator=generator), torch.randn(7, generator=generator).double()]
    made = []
    for model in (plain, wrapped):
        more = [
            nn.Parameter(extra[0].clone().to(memory_format=torch.channels_last)),
            nn.Parameter(extra[1].clone()),
        ]
        optimizer = torch.optim.SGD([*model.parameters(), *more], lr=0.03, **options)
        made.append((optimizer, [*model.parameters(), *more]))
    aware = ThresholdAware(made[1][0], wrapped)
    quantized = {id(m.weight) for m in wrapped.modules() if hasattr(m, "weight_quantizer")}
    for step in range(4):
        for i, (a, b) in enumerate(zip(made[0][1], made[1][1], strict=True)):
            grad = torch.randn(a.shape, generator=generator).to(a.dtype)
            grad[..., ::3] *= 0  # signed zeros too
            a.grad, b.grad = (None, None) if i == 1 and step == 0 and not fused else (grad.clone(), grad.clone())
        made[0][0].step()
        aware.step()
        for a, b in zip(made[0][1], made[1][1], strict=True):
            if id(b) not in quantized:
                assert torch.equal(a.detach(), b.detach())
                states = [made[0][0].state[a].get("momentum_buffer"), aware.state[b].get("momentum_buffer")]
                assert (states[0] is None) == (states[1] is None)
                if states[0] is not None:
                    assert torch.equal(states[0], states[1])
                    assert torch.equal(states[0].signbit(), states[1].signbit())


@pytest.mark.parametrize("kind", ["lsq", "tqt", "pact", "fixed", "plain"])
def test_scales_of_all_layers_are_those_of_each(kind: str) -> None:
    model, x = seeded(Residual), inputs()
    recipe = mixbit.Recipe.uniform(mixbit.layers(model, x).names, act=8, weight=3)
    mixbit.calibrate_(mixbit.prepare_(model, recipe, x, weight_quantizer=kind), [x])
    quantizers = [m.weight_quantizer for m in model.modules() if getattr(m, "weight_quantizer", None) is not None]
    with torch.no_grad():
        quantizers[0].scale.mul_(-1)  # below the floor
    each = [q.effective_scale().detach() for q in quantizers]
    for a, b in zip(each, mixbit.quantizers.effective_scales(quantizers), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape


def test_extra_levels_move_the_thresholds() -> None:
    results = []
    for extra in (False, True):
        model = network()
        if extra:
            model.a.weight_quantizer.set_extra_bits_(torch.ones(model.a.weight.shape, dtype=torch.uint8))
        aware = ThresholdAware(torch.optim.SGD(model.parameters(), lr=0.05), model)
        quantizers = {"a": model.a, "b": model.b}
        for layer in quantizers.values():
            layer.weight.grad = torch.ones_like(layer.weight)
        aware.step()
        results.append({n: layer.weight.detach().clone() for n, layer in quantizers.items()})
    assert not torch.equal(results[0]["a"], results[1]["a"])
    assert torch.equal(results[0]["b"], results[1]["b"])


def test_layers_without_a_quantized_weight_take_the_plain_step() -> None:
    model = network()
    model.a.weight_quantizer.enabled = False
    aware = ThresholdAware(torch.optim.SGD(model.parameters(), lr=0.05), model, alpha=0.0, rho=0.5)
    before = model.a.weight.detach().clone(), model.b.weight.detach().clone()
    for layer in (model.a, model.b):
        layer.weight.grad = torch.ones_like(layer.weight)
    aware.step()
    assert torch.allclose(model.a.weight, before[0] - 0.05)
    assert (model.b.weight - before[1]).abs().max() <= 0.05
    assert not torch.allclose(model.b.weight, before[1] - 0.05)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_a_state_dict_goes_on_bit_for_bit_with_or_without_the_wrapper(name: str) -> None:
    unbroken, model = network(), network()
    train(unbroken, ThresholdAware(OPTIMIZERS[name](unbroken.parameters()), unbroken), 6)
    first = ThresholdAware(OPTIMIZERS[name](model.parameters()), model)
    train(model, first, 3)
    kept, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    assert kept.keys() == OPTIMIZERS[name](model.parameters()).state_dict().keys()
    again = network()
    again.load_state_dict(weights)
    second = ThresholdAware(OPTIMIZERS[name](again.parameters()), again)
    second.load_state_dict(kept)
    assert second.state is second.optimizer.state
    assert second.param_groups is second.optimizer.param_groups
    train(again, second, 3, first=3)
    assert same(unbroken, again)


def test_a_deep_copy_steps_its_own_model() -> None:
    model = network()
    aware = ThresholdAware(OPTIMIZERS["sgd"](model.parameters()), model)
    train(model, aware, 2)
    twin, twin_optimizer = copy.deepcopy((model, aware))
    train(model, aware, 2, first=2)
    train(twin, twin_optimizer, 2, first=2)
    assert same(model, twin)


def test_schedulers_groups_and_closures_are_the_wrapped_optimizers() -> None:
    model = network()
    inner = torch.optim.SGD(list(model.a.parameters()), lr=0.1)
    aware = ThresholdAware(inner, model)
    schedule = torch.optim.lr_scheduler.StepLR(aware, 1, gamma=0.5)
    aware.add_param_group({"params": list(model.b.parameters()), "lr": 0.4})
    assert len(inner.param_groups) == 2
    before = model.b.weight.detach().clone()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return backward(model, aware, 0)

    loss = aware.step(closure)
    assert loss.item() > 0
    assert calls == [1]
    assert not torch.equal(before, model.b.weight)
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.05
    aware.zero_grad()
    assert model.a.weight.grad is None


def test_hooks_of_both_run_around_the_whole_step() -> None:
    model, twin = network(), network()
    order = []
    for m, hooked in ((model, True), (twin, False)):
        aware = ThresholdAware(OPTIMIZERS["sgd"](m.parameters()), m)
        if hooked:

            def double(optimizer: Any, *_: Any) -> None:
                order.append(type(optimizer).__name__)
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad.mul_(2)

            aware.register_step_pre_hook(double)
            aware.optimizer.register_step_pre_hook(double)
            aware.optimizer.register_step_post_hook(lambda *_: order.append("after"))
            aware.register_step_post_hook(lambda *_: order.append("after all"))
        backward(m, aware, 0)
        if not hooked:
            for p in m.parameters():
                p.grad.mul_(4)
        aware.step()
    assert order == ["ThresholdAware", "SGD", "after", "after all"]
    assert same(model, twin)
    assert not aware.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_leaves_out_steps_that_are_not_finite(fused: bool) -> None:
    model, twin = network(), network()
    results = []
    for m, scaled in ((model, True), (twin, False)):
        inner = torch.optim.AdamW(m.parameters(), lr=0.02, fused=fused)
        aware = ThresholdAware(inner, m)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(3):
            aware.zero_grad()
            loss = F.cross_entropy(m(inputs() + step), torch.arange(8) % 5)
            scaler.scale(loss).backward()
            if step == 1:
                if not scaled:
                    continue
                m.a.weight.grad[0, 0, 0, 0] = torch.inf
            scaler.step(aware)
            scaler.update()
        results.append(inner.state[m.a.weight]["step"].item())
        assert not hasattr(inner, "grad_scale")
    assert results == [2.0, 2.0]
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_a_step_can_be_compiled() -> None:
    model, twin = network(), network()
    for m, compiled in ((model, True), (twin, False)):
        rate = torch.tensor(0.05)
        aware = ThresholdAware(torch.optim.SGD(m.parameters(), lr=rate, momentum=0.9), m)
        step = torch.compile(aware.step, backend="eager") if compiled else aware.step
        for value in (0.05, 0.02, 0.01):
            rate.fill_(value)
            backward(m, aware, 0)
            step()
    assert same(model, twin)


def test_late_switches_are_halved_at_a_small_rate() -> None:
    """Quantized linear regression at learning rate 1e-3, 2000 steps: the setting of our specification (B.1.2)."""
    switches = {}
    for shape in ("off", "step"):
        generator = torch.Generator().manual_seed(1)
        target = 0.2 * torch.randn(1, 256, generator=generator)
        layer = nn.Sequential(nn.Linear(256, 1, bias=False)).eval()
        with torch.no_grad():
            layer[0].weight.copy_(target + 0.05 * torch.randn(1, 256, generator=generator))
        recipe = mixbit.Recipe.uniform(["0"], act=None, weight=2, rounding="half_up", narrow_range=False)
        mixbit.prepare_(layer, recipe, torch.randn(2, 256), weight_quantizer="fixed")
        quantizer = layer[0].weight_quantizer
        quantizer.set_(torch.full_like(quantizer.scale, 0.25))
        optimizer = ThresholdAware(torch.optim.SGD(layer.parameters(), lr=1e-3), layer, shape=shape, rho=0.15)
        late, before = 0, quantizer(layer[0].weight).detach()
        for step in range(2000):
            x = torch.randn(64, 256, generator=generator)
            y = x @ target.t() + 0.1 * torch.randn(64, 1, generator=generator)
            optimizer.zero_grad()
            ((layer(x) - y) ** 2).mean().mul(0.5).backward()
            optimizer.step()
            now = quantizer(layer[0].weight).detach()
            late += int((now != before).sum()) if step >= 1500 else 0
            before = now
        switches[shape] = late / 500 / 256
    assert switches["off"] > 0.02
    assert switches["step"] < 0.5 * switches["off"]


def test_errors() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, message in (
        ((optimizer, model, "stop"), "shape='stop' is not known"),
        ((optimizer, model, "step", -0.1), "alpha=-0.1"),
        ((optimizer, model, "step", 0.1, 0.6), "rho=0.6"),
        ((model, model), "optimizer is a Residual; expected a torch.optim.Optimizer"),
        ((optimizer, seeded(Residual)), "model has no quantized weights; call mixbit.prepare_"),
        ((torch.optim.SGD(model.bn.parameters(), lr=0.1), model), "holds none of the model's quantized weights"),
    ):
        with pytest.raises(mixbit.errors.MixbitError, match=message):
            ThresholdAware(*arguments)
    fresh = seeded(Residual)
    mixbit.prepare_(fresh, mixbit.Recipe.uniform(mixbit.layers(fresh, inputs()).names, act=8, weight=4), inputs())
    with pytest.raises(mixbit.errors.MixbitError, match="layer 'stem': a quantizer has no scales yet"):
        ThresholdAware(torch.optim.SGD(fresh.parameters(), lr=0.1), fresh)
    searched = network().eval()
    mixbit.prepare_(searched, mixbit.search.Gates(precisions=(2, 4, 8)), inputs())
    with pytest.raises(mixbit.errors.MixbitError, match="its bits are still being searched"):
        ThresholdAware(torch.optim.SGD(searched.parameters(), lr=0.1), searched)


def test_restored_layers_take_the_plain_step_and_lbfgs_is_refused() -> None:
    torch.manual_seed(0)
    plain, model = network(), network()
    wrapped = ThresholdAware(torch.optim.SGD(model.parameters(), lr=0.1), model, alpha=0.0, rho=0.5)
    tracker = mixbit.retrain.SwitchTracker(model)
    mixbit.restore_(plain)
    mixbit.restore_(model)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), steps=1)
    train(model, wrapped, steps=1)
    assert same(plain, model)
    with pytest.raises(mixbit.MixbitError, match="has lost its weight quantizer"):
        tracker.update_()
    with pytest.raises(mixbit.MixbitError, match="momentum is None in the state|score is None in the state"):
        tracker.load_state_dict({})
    model = network()
    with pytest.raises(mixbit.MixbitError, match="optimizer is a LBFGS"):
        ThresholdAware(torch.optim.LBFGS(model.parameters()), model)
