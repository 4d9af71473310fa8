"""IterativeFreezing, Dampening and Schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixbit
from mixbit.errors import MixbitError
from mixbit.retrain import Dampening, IterativeFreezing, Schedule, SwitchTracker
from mixbit.training.checkpoint import read_checkpoint, write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import HALF_UP, Two, on_one_grid


def test_a_schedule_waits_and_then_follows_its_shape() -> None:
    cosine = Schedule(0.1, 0.01, steps=1000, begin=0.25)
    assert [cosine(s) for s in (0, 249)] == [0.0, 0.0]
    assert cosine(250) == 0.1
    assert cosine(625) == pytest.approx(0.055)
    assert cosine(437.5) == pytest.approx(0.01 + 0.09 * (1 + 0.5**0.5) / 2)  # a quarter of the way
    assert cosine(1000) == cosine(5000) == pytest.approx(0.01)
    linear = Schedule(0.0, 2.0, steps=10, begin=0.0, shape="linear")
    assert [linear(s) for s in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert Schedule(1.0, 2.0, steps=4, begin=0.5, before=7.0)(1) == 7.0
    for change, complaint in (
        ({"steps": 0}, "steps=0"),
        ({"begin": 1.0}, "begin=1.0"),
        ({"first": float("inf")}, "first=inf"),
        ({"shape": "step"}, "shape='step'"),
    ):
        with pytest.raises(MixbitError, match=complaint):
            Schedule(**{"first": 1.0, "last": 0.0, "steps": 10} | change)


def walk(model: nn.Module, codes: list[float]) -> Any:
    for code in codes:
        with torch.no_grad():
            model.a.weight[0, 0] = code
        yield


def test_a_weight_that_oscillates_is_held_where_it_mostly_was() -> None:
    model = on_one_grid()
    freezing = IterativeFreezing(model, 0.25, momentum=0.1)
    assert freezing.layers == ("a", "b")
    counts = []
    # Codes 1 0 1 0 ...: an oscillation a step from the second on; f = 0.1, 0.19, 0.271 at the fourth.
    for _ in walk(model, [1.0, 0.0, 1.0]):
        counts.append(freezing.update_().tolist())
    assert freezing.steps == 3
    assert not freezing.frozen("a").any()
    assert float(freezing.frequencies("a")[0, 0]) == pytest.approx(0.19)
    for _ in walk(model, [0.4]):  # below the threshold between 0 and 1
        counts.append(freezing.update_().tolist())
    assert counts == [[0, 0]] * 3 + [[1, 0]]
    # The average of the codes 0 1 0 1 is 0.181: held at 0.
    assert model.a.weight[0, 0].item() == 0.0
    assert freezing.frozen("a").nonzero().tolist() == [[0, 0]]
    for _ in walk(model, [1.0, -1.0]):
        assert freezing.update_().tolist() == [1, 0]
        assert model.a.weight[0, 0].item() == 0.0
    assert not freezing.frozen("b").any()


def test_extra_levels_given_on_the_way_change_no_count() -> None:
    model = on_one_grid()
    freezing = IterativeFreezing(model, Schedule(0.2, 0.2, steps=8, begin=0.75), momentum=0.1)
    for _ in walk(model, [1.0, 0.0, 1.0, 0.0]):
        freezing.update_()
    before = freezing.frequencies("a")
    with torch.no_grad():
        model.a.weight[0, 0] = 0.0
    extra = torch.zeros(4, 10, dtype=torch.uint8)
    extra[0, 0] = 1
    model.a.weight_quantizer.set_extra_bits_(extra)
    freezing.update_()
    assert torch.equal(freezing.frequencies("a"), before * torch.tensor(0.9))  # no oscillation in this step
    assert not freezing.frozen("a").any()
    # On the finer grid the weight oscillates on, between 0 and 1/2, and is held at a level of that grid.
    for _ in walk(model, [0.5, 0.0, 0.5, 0.0]):
        freezing.update_()
    assert freezing.frozen("a")[0, 0]
    assert model.a.weight[0, 0].item() in (0.0, 0.5)


def sgd_run(freezing: bool, steps: int = 300) -> tuple[nn.Module, Tensor]:
    """Noisy quantized regression; the switches of the last hundred steps."""
    generator = torch.Generator().manual_seed(0)
    model = on_one_grid(Two(64, 8), bits=2, scale=0.25)
    truth = torch.randn(8, 64, generator=generator) * 0.2
    with torch.no_grad():
        model.a.weight.copy_(truth)
    optimizer = torch.optim.SGD([model.a.weight], lr=0.02)
    tracker = SwitchTracker(model)
    held = IterativeFreezing(model, Schedule(0.1, 0.03, steps=steps), momentum=0.02) if freezing else None
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        optimizer.zero_grad()
        (0.5 * (model.a(x) - x @ truth.t()).square().mean(0).sum()).backward()
        optimizer.step()
        if held is not None:
            held.update_()
        tracker.update_()
    return model, tracker.history()[-100:, 0].sum()


def test_freezing_ends_most_switching() -> None:
    _, plain = sgd_run(freezing=False)
    model, frozen = sgd_run(freezing=True)
    assert int(frozen) < 0.2 * int(plain)
    assert model.a.weight.requires_grad


@pytest.mark.parametrize("precision", [HALF_UP, {"rounding": "half_even", "narrow_range": True}])
@pytest.mark.parametrize("aggregation", ["sum", "mean", "kernel_mean"])
@pytest.mark.parametrize("extra", [False, True])
def test_dampening_is_its_formula_and_gradient(precision: dict[str, Any], aggregation: str, extra: bool) -> None:
    model = on_one_grid(Two(), bits=3, scale=0.3, **precision)
    torch.manual_seed(0)
    losses = []
    for layer in (model.a, model.b):
        with torch.no_grad():
            layer.weight.normal_()
        e = torch.zeros_like(layer.weight)
        if extra:
            e = (torch.arange(e.numel()) % 2).view(e.shape).float()
            layer.weight_quantizer.set_extra_bits_(e.to(torch.uint8))
        step = 0.3 / 2**e
        high = 2 ** (2 + e) - 1
        low = -high if precision["narrow_range"] else -high - 1
        w = layer.weight.detach().clone().requires_grad_()
        level = layer.weight_quantizer(w).detach()
        squares = (level - torch.where(w > high * step, level, torch.where(w < low * step, level, w))).square()
        losses.append(
            (
                w,
                {"sum": squares.sum, "mean": squares.mean, "kernel_mean": lambda s=squares: s.sum(0).mean()}[
                    aggregation
                ](),
            )
        )
    expected = 0.7 * (losses[0][1] + losses[1][1])
    expected.backward()
    dampening = Dampening(model, 0.7, aggregation=aggregation)
    found = dampening()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for layer, (w, _) in zip((model.a, model.b), losses, strict=True):
        assert torch.allclose(layer.weight.grad, w.grad, rtol=1e-4, atol=1e-6)
        assert layer.weight_quantizer.scale.grad is None


@pytest.mark.parametrize("kind", sorted(set(mixbit.quantizers.KINDS) - {"lsq+"}))
@pytest.mark.parametrize("extra", [False, True])
def test_dampening_leaves_weights_outside_of_every_kind_of_grid_alone(kind: str, extra: bool) -> None:
    # The levels are -2 ... 1 (the last weight has those between, too); "ste" passes gradients beyond them.
    model = on_one_grid(nn.Sequential(nn.Linear(5, 1, bias=False)), bits=2)
    mixbit.prepare_(model, mixbit.search.extract(model), weight_quantizer=kind)
    model[0].weight_quantizer.set_(torch.ones(1))
    if extra:
        model[0].weight_quantizer.set_extra_bits_(torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.uint8))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, -9.0, 1.4, 0.3, 1.3]]))
    term = Dampening(model, 1.0, aggregation="sum")()
    term.backward()
    assert term.item() == pytest.approx(0.3**2 + (0.2**2 if extra else 0.0), rel=1e-5)
    assert model[0].weight.grad[0].tolist() == pytest.approx([0, 0, 0, 0.6, -0.4 if extra else 0], abs=1e-6)


def test_dampening_grows_with_its_schedule_and_draws_weights_to_levels() -> None:
    model = on_one_grid(Two(), bits=3, scale=0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        model.a.weight.normal_(std=0.3)
        model.b.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dampening = Dampening(model, Schedule(0.0, 1.0, steps=40), aggregation="sum")
    distances = []
    for step in range(60):
        loss = dampening()
        if step < 15:
            assert (float(loss) == 0.0) == (step <= 10)
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        distances.append(float((model.a.weight_quantizer(model.a.weight) - model.a.weight).abs().mean()))
    assert distances[10] == distances[0]
    assert distances[-1] < 0.1 * distances[0]
    state = dampening.state_dict()
    again = Dampening(model, Schedule(0.0, 1.0, steps=40))
    again.load_state_dict(state)
    assert again.steps == 60
    with pytest.raises(MixbitError, match="layer '0' is in only one|layer 'a' is in only one|layer 'b' is in only one"):
        Dampening(on_one_grid(nn.Sequential(nn.Linear(4, 4))), 1.0).load_state_dict(state)


def frozen_run(stop: int | None = None, state: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    model = on_one_grid(Two(), bits=2, scale=0.3)
    with torch.no_grad():
        for parameter in (model.a.weight, model.b.weight):
            parameter.normal_(std=0.3, generator=generator)
    data = [torch.randn(8, 10, generator=generator) for _ in range(30)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    freezing = IterativeFreezing(model, Schedule(0.2, 0.05, steps=30), momentum=0.1)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        freezing.load_state_dict(state["freezing"])
    for step in range(freezing.steps, 30):
        if step == stop:
            break
        optimizer.zero_grad()
        (model(data[step]) - data[step][:, :2]).square().mean().backward()
        optimizer.step()
        count = freezing.update_()
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "freezing": freezing.state_dict()}
    return model, kept | {"count": count.tolist()}


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path) -> None:
    model, kept = frozen_run()
    assert sum(kept["count"]) > 0
    _, state = frozen_run(stop=17)
    write_checkpoint(tmp_path / "run", state)
    again, same = frozen_run(state=read_checkpoint(tmp_path / "run"))
    assert same["count"] == kept["count"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_errors_name_what_came_and_what_was_expected() -> None:
    for arguments, complaint in (
        ({"threshold": 1.5}, "threshold=1.5: expected frequencies from 0 to 1"),
        ({"threshold": Schedule(2.0, 0.1, steps=3)}, "expected frequencies from 0 to 1"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"max_bits": 7}, "max_bits=7: expected a whole number from 1 to 6"),
    ):
        with pytest.raises(MixbitError, match=complaint):
            IterativeFreezing(on_one_grid(), **{"threshold": 0.1} | arguments)
    with pytest.raises(MixbitError, match="no quantized weights of at most 4 bits"):
        IterativeFreezing(on_one_grid(bits=5), 0.1)
    with pytest.raises(MixbitError, match="no quantized weights; call"):
        Dampening(Two(), 0.1)
    with pytest.raises(MixbitError, match="strength=-1"):
        Dampening(on_one_grid(), -1)
    with pytest.raises(MixbitError, match="aggregation='max'"):
        Dampening(on_one_grid(), 1.0, aggregation="max")
    freezing = IterativeFreezing(on_one_grid(), 0.1)
    with pytest.raises(MixbitError, match="momentum is 0.01 in the state and 0.1 here"):
        IterativeFreezing(on_one_grid(), 0.1, momentum=0.1).load_state_dict(freezing.state_dict())
    with pytest.raises(MixbitError, match="layer 'a': codes is .*expected torch.int8"):
        IterativeFreezing(on_one_grid(Two(9)), 0.1).load_state_dict(freezing.state_dict())
    with pytest.raises(MixbitError, match="layer 'c' is not one"):
        freezing.frozen("c")
    assert mixbit.retrain.IterativeFreezing is IterativeFreezing
