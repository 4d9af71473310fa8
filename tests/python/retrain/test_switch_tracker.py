"""SwitchTracker: what is counted, who gets levels, what an assignment leaves alone, resume, errors."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixbit
from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.retrain import IterativeFreezing, SwitchTracker, storage, threshold_histograms
from mixbit.training.checkpoint import read_checkpoint, write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import HALF_UP, Residual, Two, on_one_grid, seeded


def play(tracker: SwitchTracker, layer: nn.Module, counts: Tensor) -> None:
    """Lets weight i switch counts[i] times between the codes 0 and 1."""
    for step in range(int(counts.max())):
        with torch.no_grad():
            layer.weight.copy_(torch.where(step < counts, (step + 1) % 2 * 1.0, counts % 2 * 1.0))
        tracker.update_()


COUNTS = torch.tensor([[0, 3, 1, 5, 5, 0, 2, 5, 4, 1]] * 4)
COUNTS[1:] = 0


def test_counts_flags_and_rates_of_a_played_walk() -> None:
    model = on_one_grid()
    tracker = SwitchTracker(model)
    assert tracker.layers == ("a", "b")
    play(tracker, model.a, COUNTS)
    assert tracker.scores("a").dtype == torch.float32
    assert torch.equal(tracker.scores("a"), COUNTS.float())
    assert not tracker.scores("b").any()
    assert tracker.steps == 5
    assert tracker.rates() == {"a": pytest.approx(COUNTS.sum().item() / (5 * 40)), "b": 0.0}
    assert tracker.history().shape == (5, 2)
    assert tracker.history().sum(0).tolist() == [int(COUNTS.sum()), 0]
    latent = {n: p.detach().clone() for n, p in model.named_parameters()}
    # A tenth of 40: the three weights with 5 switches, and the one with 4.
    assert tracker.assign_(fraction=0.1) == {"a": 4, "b": 0}
    flags = tracker.flags("a")
    assert flags.dtype == torch.bool
    assert flags.nonzero().tolist() == [[0, 3], [0, 4], [0, 7], [0, 8]]
    assert torch.equal(model.a.weight_quantizer.extra_bits, flags.to(torch.uint8))
    assert not tracker.flags("b").any()
    assert model.b.weight_quantizer.extra_bits is None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, latent[name]), name
    # A new window: nothing is counted, least of all the change of grids.
    assert tracker.steps == 0
    assert not tracker.scores("a").any()
    assert tracker.rates() == {"a": 0.0, "b": 0.0}
    assert tracker.update_().tolist() == [0, 0]
    assert len(tracker.history()) == 6


def test_ties_go_to_the_lower_index_and_zero_is_never_flagged() -> None:
    model = on_one_grid()
    tracker = SwitchTracker(model)
    counts = torch.zeros(4, 10, dtype=torch.int64)
    counts[2, 3:9] = 2
    play(tracker, model.a, counts)
    tracker.assign_(fraction=0.1)
    assert tracker.flags("a").nonzero().tolist() == [[2, 3], [2, 4], [2, 5], [2, 6]]
    play(tracker, model.a, counts)
    # Half of the weights is more than have switched.
    assert tracker.assign_(fraction=0.5, max_bits=3) == {"a": 2, "b": 0}
    assert tracker.flags("a").nonzero().tolist() == [[2, i] for i in range(3, 9)]


def test_second_round_stops_at_the_most_bits() -> None:
    model = on_one_grid()
    tracker = SwitchTracker(model)
    for round_ in range(3):
        with torch.no_grad():
            model.a.weight.zero_()
        tracker.reset_()
        for code in (1.0, 0.0):
            with torch.no_grad():
                model.a.weight[1, :4] = code / 2**round_  # contiguous on the grid that the weights have by now
            tracker.update_()
        if round_ < 2:
            assert tracker.assign_(fraction=0.1, max_bits=4) == {"a": 4, "b": 0}
    extra = model.a.weight_quantizer.extra_bits
    assert extra[1].tolist() == [2] * 4 + [0] * 6
    assert int(extra.sum()) == 8
    assert tracker.scores("a").count_nonzero() == 4
    # Those that switch have all they may have; the others do not switch.
    assert tracker.assign_(fraction=0.1, max_bits=4) == {"a": 0, "b": 0}
    tracker.update_()
    with pytest.raises(MixbitError, match="max_bits=2: no watched weight may have another bit"):
        tracker.assign_(max_bits=2)


def test_over_the_network_by_rate_and_within_a_number_of_bits() -> None:
    counts = torch.zeros(2, 4, dtype=torch.int64)
    counts[0] = torch.tensor([5, 1, 0, 0])

    def played() -> tuple[nn.Module, SwitchTracker]:
        model = on_one_grid()
        tracker = SwitchTracker(model)
        for step in range(5):
            with torch.no_grad():
                model.a.weight.copy_(torch.where(step < COUNTS, (step + 1) % 2 * 1.0, COUNTS % 2 * 1.0))
                model.b.weight.copy_(torch.where(step < counts, (step + 1) % 2 * 1.0, counts % 2 * 1.0))
            tracker.update_()
        return model, tracker

    _, tracker = played()
    assert tracker.assign_(fraction=0.1, per="network") == {"a": 3, "b": 1}  # 4 of 48, ties by layer
    assert tracker.flags("b").nonzero().tolist() == [[0, 0]]
    _, tracker = played()
    assert tracker.assign_(rate=0.8) == {"a": 4, "b": 1}
    model, tracker = played()
    # 48 weights of 2 bits; 3 more bits.
    assert tracker.assign_(bits=2 * 48 + 3.9) == {"a": 3, "b": 0}
    with pytest.raises(MixbitError, match="bits=98.0: the codes of the watched weights have 99 already"):
        tracker.update_()
        tracker.assign_(bits=98.0)
    # Groups of three inputs, of which the last has one: the mean decides, 1.33 3.33 3.67 1 in the first row of a.
    _, tracker = played()
    tracker.assign_(fraction=0.15, group=3)
    assert tracker.flags("a")[0].tolist() == [False] * 3 + [True] * 6 + [False]
    assert not tracker.flags("a")[1:].any()
    assert model is not None


@pytest.mark.parametrize("group", [1, 2, 5])
def test_groups_of_a_convolution_are_along_its_input_channels(group: int) -> None:
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    model = on_one_grid(conv, bits=2)
    with torch.no_grad():
        conv[0].weight.zero_()
    tracker = SwitchTracker(model)
    with torch.no_grad():
        conv[0].weight[1, 1, 2, 0] = 1.0
    tracker.update_()
    given = tracker.assign_(fraction=0.5, group=group)
    flagged = tracker.flags("0").nonzero().tolist()
    first = 1 // group * group
    assert flagged == [[1, i, 2, 0] for i in range(first, min(first + group, 4))]
    assert given == {"0": len(flagged)}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.sampled_from(["layer", "network"]),
    st.sampled_from([1, 3]),
    st.sampled_from(["adj", "osc", "ema", "pair"]),
    st.sampled_from(["score", "snapshot", "random"]),
)
def test_an_assignment_never_moves_a_weight_away_from_its_latent(
    seed: int, fraction: float, per: str, group: int, score: str, by: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = on_one_grid(bits=2, scale=0.5)
    tracker = SwitchTracker(model, score)
    latents = {}
    for _ in range(6):
        with torch.no_grad():
            for layer in (model.a, model.b):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.6)
        tracker.update_()
    scores = {n: tracker.scores(n) for n in tracker.layers}
    layers = {"a": model.a, "b": model.b}
    latents = {n: m.weight.detach().clone() for n, m in layers.items()}
    before = {n: (m.weight_quantizer(m.weight) - m.weight).abs().detach() for n, m in layers.items()}
    given = tracker.assign_(fraction=fraction, per=per, group=group, by=by)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, latents[name])
        flags = tracker.flags(name)
        assert given[name] == int(flags.sum())
        after = (layer.weight_quantizer(layer.weight) - layer.weight).abs()
        assert bool((after <= before[name]).all())
        assert torch.equal(after[~flags], before[name][~flags])
        if by == "score" and group == 1:
            assert not flags[scores[name] == 0].any()
            if per == "layer" and flags.any():
                assert scores[name][flags].min() >= scores[name][~flags].max()
        if per == "layer" and group == 1:
            assert given[name] <= fraction * flags.numel()


def test_the_grid_is_the_models_own() -> None:
    torch.manual_seed(0)
    for precision in ({"rounding": "half_even", "narrow_range": True}, HALF_UP):
        model = seeded(Residual)
        mixbit.prepare_(model, mixbit.Recipe.from_dict({"default": {"weight": 3, "act": 8, **precision}}))
        mixbit.calibrate_(model, [torch.randn(4, 3, 8, 8)])
        tracker = SwitchTracker(model, "osc")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        tracker.update_()
        tracker.assign_(by="random", fraction=0.5)
        for name in tracker.layers:
            module = model.get_submodule(name)
            codes = tracker._weights.state[name]["codes"]
            assert torch.equal(codes.int(), module.weight_quantizer.codes(module.weight)), name
            assert module.weight_quantizer.rounding == precision["rounding"]
            assert module.weight_quantizer.narrow_range is precision["narrow_range"]


def trained(
    stop: int | None = None, state: dict[str, Any] | None = None
) -> tuple[nn.Module, SwitchTracker, dict[str, Any]]:
    """Ten steps with an assignment at the fifth; stopped and started again where a state is given."""
    model = seeded(Residual)
    mixbit.prepare_(model, mixbit.Recipe.from_dict({"default": {"weight": 2, "act": 8, **HALF_UP}}))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    y = torch.randint(0, 5, (16,), generator=generator)
    mixbit.calibrate_(model, [x])
    optimizer = torch.optim.SGD(mixbit.training.param_groups(model, lr=0.3), momentum=0.9)
    tracker = SwitchTracker(model, "pair")
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tracker.load_state_dict(state["tracker"])
        first = state["step"]
    for step in range(first, 10):
        if step == stop:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        tracker.update_()
        if step == 4:
            tracker.assign_(fraction=0.3)
    kept = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tracker": tracker.state_dict(),
        "step": stop or 10,
    }
    return model, tracker, kept


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, stop: int) -> None:
    model, tracker, _ = trained()
    assert sum(int(tracker.flags(n).sum()) for n in tracker.layers) > 0
    *_, state = trained(stop=stop)
    write_checkpoint(tmp_path / "run", state)
    again, same, _ = trained(state=read_checkpoint(tmp_path / "run"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(tracker.history(), same.history())
    assert tracker.steps == same.steps
    for name in tracker.layers:
        assert torch.equal(tracker.scores(name), same.scores(name))
        assert torch.equal(tracker.flags(name), same.flags(name))


def halfway(weights: list[float], bits: int = 2) -> nn.Module:
    """One layer with these weights on a grid of step 1."""
    model = on_one_grid(nn.Sequential(nn.Linear(len(weights), 1, bias=False)), bits=bits)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    return model


def test_weights_with_a_level_can_be_held_at_it() -> None:
    model = halfway([0.3, -0.7, 0.9, -9.0, 0.45])
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    freezing = IterativeFreezing(model, 0.0)
    tracker = SwitchTracker(model)
    for step in range(4):
        with torch.no_grad():
            weight[0, :4] += 0.6 * (-1) ** step  # the first two switch
        tracker.update_()
    assert tracker.assign_(fraction=0.5, freezing=freezing) == {"0": 2}
    flags = tracker.flags("0")
    assert flags.tolist() == [[True, True, False, False, False]]
    assert torch.equal(freezing.frozen("0"), flags)
    # At the thresholds next to them, which are levels now; the others are where they were.
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.5, -0.5, 0.9, -9.0, 0.45]]))
    assert quantizer.codes(weight)[0, :2].tolist() == [1, -1]
    assert torch.equal(quantizer(weight)[0, :2], torch.tensor([0.5, -0.5]))
    with torch.no_grad():
        weight += 0.4
    assert freezing.update_().tolist() == [2]
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.5, -0.5, 1.3, -8.6, 0.85]]))
    assert tracker.update_().tolist() == [1]  # the last one crossed a threshold
    # They follow a scale, and get no second bit.
    with torch.no_grad():
        quantizer.scale.mul_(1.5)
    freezing.update_()
    torch.testing.assert_close(weight.detach()[0, :2], torch.tensor([0.75, -0.75]))
    tracker.assign_(fraction=0.5, by="random", freezing=freezing)
    assert quantizer.extra_bits[0, :2].tolist() == [1, 1]
    # Stored, they sit on odd levels only.
    codes, extra = quantizer.codes(weight), quantizer.extra_bits
    packed = storage.encode(codes, extra, 2, index="oddlevel")
    assert torch.equal(torch.as_tensor(storage.decode(packed)[0]), codes)


def test_levels_that_cannot_be_held_are_refused_and_nothing_changes() -> None:
    model = on_one_grid(bits=2)
    model.b.weight_quantizer.set_bit_width_(5)
    weights = [model.a.weight.detach().clone(), model.b.weight.detach().clone()]
    freezing, tracker = IterativeFreezing(model, 0.0), SwitchTracker(model)
    assert freezing.layers == ("a",)
    with pytest.raises(MixbitError, match="layer 'b' is not watched by this IterativeFreezing, which has a; expected"):
        tracker.assign_(by="random", max_bits=8, freezing=freezing)
    assert model.a.weight_quantizer.extra_bits is None
    assert torch.equal(model.a.weight, weights[0])
    assert torch.equal(model.b.weight, weights[1])
    # Where it has as many bits as weights may have it is not in the way.
    assert tracker.assign_(by="random", max_bits=4, freezing=freezing)["b"] == 0


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12), st.sampled_from([2, 3]), st.booleans(), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_held_weights_are_at_the_nearest_threshold_of_their_grid(
    weights: list[float], bits: int, narrow: bool, extra: int
) -> None:
    model = on_one_grid(nn.Sequential(nn.Linear(len(weights), 1, bias=False)), bits=bits, narrow_range=narrow)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
    quantizer = model[0].weight_quantizer
    if extra:
        quantizer.set_extra_bits_(torch.full((1, len(weights)), extra, dtype=torch.uint8))
    before = model[0].weight.detach().clone()
    step = 0.5**extra
    low, high = (quantizer.quant_range()[0] - narrow) / step + narrow, (quantizer.quant_range()[1] + 1) / step - 1
    thresholds = (torch.arange(low, high) + 0.5) * step
    freezing = IterativeFreezing(model, 0.0)
    freezing.hold_("0", torch.ones_like(before, dtype=torch.bool))
    held = model[0].weight.detach()
    assert torch.isin(held, thresholds).all()
    nearest = (before.reshape(-1, 1) - thresholds).abs().amin(1)
    torch.testing.assert_close((before - held).abs().flatten(), nearest)


def test_the_gradient_decides_between_layers_of_equal_switching() -> None:
    model = on_one_grid()
    tracker = SwitchTracker(model, gradients=True)
    shape = model.a.weight.shape
    for step in range(4):
        for layer, gradient in ((model.a, 0.1), (model.b, 1.0)):
            with torch.no_grad():
                layer.weight.copy_(torch.full_like(layer.weight, float(step % 2 == 0)))
            layer.weight.grad = torch.full_like(layer.weight, gradient)
        tracker.update_()
    torch.testing.assert_close(tracker.gradients("a"), torch.full(shape, 0.01))
    torch.testing.assert_close(tracker.gradients("b"), torch.ones_like(model.b.weight))
    many = model.b.weight.numel()
    codes = 2 * (model.a.weight.numel() + many)
    plain, weighted = copy.deepcopy((model, tracker)), (model, tracker)
    assert plain[1].assign_(bits=codes + many)["a"] > 0  # the first ones of equal score
    assert weighted[1].assign_(bits=codes + many, by="score_gradient") == {"a": 0, "b": many}
    assert not tracker.gradients("a").any()  # a new window


def test_gradients_are_part_of_the_state_and_of_the_errors() -> None:
    model = on_one_grid()
    tracker = SwitchTracker(model, gradients=True)
    with pytest.raises(
        MixbitError, match=r"gradients=True and no watched weight has a gradient: call update_\(\) betw"
    ):
        tracker.update_()
    model.a.weight.grad = torch.rand_like(model.a.weight)
    tracker.update_()
    again = SwitchTracker(model, gradients=True)
    again.load_state_dict(tracker.state_dict())
    assert torch.equal(again.gradients("a"), tracker.gradients("a"))
    plain = SwitchTracker(model)
    with pytest.raises(MixbitError, match="gradients are not added up; expected SwitchTracker"):
        plain.gradients("a")
    plain.update_()
    with pytest.raises(MixbitError, match='by="score_gradient": gradients are not added up'):
        plain.assign_(by="score_gradient")
    freezing = IterativeFreezing(model, 0.0)
    with pytest.raises(MixbitError, match=r"layer 'a': flags are torch.float32 \[4, 10\]; expected torch.bool"):
        freezing.hold_("a", torch.zeros(4, 10))
    model.a.weight_quantizer.set_extra_bits_(torch.full((4, 10), 2, dtype=torch.uint8))
    with pytest.raises(MixbitError, match="layer 'a': weights with 2 extra bits cannot get a level more"):
        freezing.hold_("a", torch.ones(4, 10, dtype=torch.bool))


def test_wrapped_models_have_the_names_of_the_model_inside() -> None:
    class Wrapper(nn.parallel.DistributedDataParallel):
        """Holds the model as the real one does, without processes."""

        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = on_one_grid()
    names = SwitchTracker(model).layers
    compiled = torch.compile(model)
    for wrapped in (Wrapper(model), compiled, torch.compile(Wrapper(model)), Wrapper(compiled)):
        tracker = SwitchTracker(wrapped)
        assert tracker.layers == names
        tracker.load_state_dict(SwitchTracker(model).state_dict())
        assert IterativeFreezing(wrapped, 0.1).layers == names
        assert [*threshold_histograms(wrapped)] == [*names]
    inner = nn.Sequential(on_one_grid())
    inner[0].a = torch.compile(inner[0].a)
    assert SwitchTracker(inner).layers == ("0.a", "0.b")


def test_another_model_is_refused_on_resume() -> None:
    tracker = SwitchTracker(on_one_grid())
    state = tracker.state_dict()
    for other, complaint in (
        (on_one_grid(Two(11)), r"layer 'a': codes is torch.int8 \[4, 10\] in the state; expected torch.int8 \[4, 11\]"),
        (on_one_grid(bits=3), "layer 'a' has 3 bits and 2 in the state"),
        (on_one_grid(nn.Sequential(nn.Linear(10, 4))), "layer '0' of the model is not in the state"),
    ):
        with pytest.raises(MixbitError, match=complaint):
            SwitchTracker(other).load_state_dict(state)
    fewer = copy.deepcopy(state)
    del fewer["layers"]["b"]
    with pytest.raises(MixbitError, match="layer 'b' of the model is not in the state"):
        tracker.load_state_dict(fewer)
    with pytest.raises(MixbitError, match="score is 'adj' in the state and 'osc' here"):
        SwitchTracker(on_one_grid(), "osc").load_state_dict(state)


def test_errors_name_what_came_and_what_was_expected() -> None:
    with pytest.raises(MixbitError, match="no quantized weights; call mixbit.prepare_"):
        SwitchTracker(Two())
    raw = Two()
    mixbit.prepare_(raw, mixbit.Recipe.from_dict({"default": {"weight": 2}}))
    with pytest.raises(MixbitError, match="layer 'a': a quantizer has no scales yet; call mixbit.calibrate_"):
        SwitchTracker(raw)
    with pytest.raises(MixbitError, match="no quantized weights of at most 8 bits"):
        SwitchTracker(on_one_grid(bits=9))
    with pytest.raises(MixbitError, match="score='swaps'"):
        SwitchTracker(on_one_grid(), "swaps")
    with pytest.raises(MixbitError, match="momentum=0"):
        SwitchTracker(on_one_grid(), "ema", momentum=0)
    tracker = SwitchTracker(on_one_grid())
    with pytest.raises(MixbitError, match="nothing is counted yet in this window"):
        tracker.assign_()
    tracker.update_()
    for arguments, complaint in (
        ({"fraction": 0.0}, "fraction=0.0: expected a share above 0, at most 0.5"),
        ({"fraction": 0.6}, "fraction=0.6: expected a share above 0, at most 0.5"),
        ({"fraction": 0.1, "rate": 0.1}, "fraction and rate given; expected one"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": 0.1, "by": "random"}, "only scores have a rate"),
        ({"bits": float("nan")}, "bits=nan"),
        ({"per": "model"}, "per='model'"),
        ({"by": "luck"}, "by='luck'"),
        ({"group": 0}, "group=0: expected a whole number above 0"),
        ({"max_bits": 9}, "max_bits=9: expected a whole number from 1 to 8"),
        ({"max_bits": 2}, r"max_bits=2: no watched weight may have another bit; the layers have \[2\] bits"),
    ):
        with pytest.raises(MixbitError, match=complaint):
            tracker.assign_(**arguments)
    with pytest.raises(MixbitError, match="layer 'c' is not one of the watched layers"):
        tracker.scores("c")
    with pytest.raises(MixbitError, match="layer 'c' is not one of the watched layers"):
        tracker.flags("c")


class Regression(nn.Module):
    """Independent quantized regressions: one for each row, seeds side by side."""

    def __init__(self, inputs: int, seeds: int) -> None:
        super().__init__()
        self.fit = nn.Linear(inputs, seeds, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fit(x)


def test_extra_levels_by_switching_beat_those_by_distance_and_by_chance() -> None:
    inputs, seeds, steps, scale = 256, 8, 1600, 0.25
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(seeds, inputs, generator=generator) * 0.2
    runs = {}
    for by in ("none", "random", "snapshot", "score"):
        model = on_one_grid(Regression(inputs, seeds), bits=2, scale=scale)
        with torch.no_grad():
            model.fit.weight.zero_()
        runs[by] = (model, SwitchTracker(model), torch.optim.SGD(model.parameters(), lr=0.02))
    for step in range(steps):
        x = torch.randn(64, inputs, generator=generator)
        y = x @ truth.t() + 0.1 * torch.randn(64, seeds, generator=generator)
        rate = 0.02 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for by, (model, tracker, optimizer) in runs.items():
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().mean(0).sum()).backward()
            optimizer.step()
            if by == "score" or step > steps // 2:
                tracker.update_()
            if step == steps // 4:
                tracker.reset_()  # the window before the assignment
            if step == steps // 2 and by != "none":
                tracker.assign_(fraction=0.2, by=by)
    error = {
        by: float((m.fit.weight_quantizer(m.fit.weight) - truth).square().mean()) for by, (m, _, _) in runs.items()
    }
    late = {by: t.rates()["fit"] for by, (_, t, _) in runs.items()}
    assert error["score"] < error["snapshot"] < error["random"] < error["none"], error
    assert late["score"] < late["snapshot"] < late["random"] < late["none"], late


def test_scores_of_all_kinds_name_the_ops_own() -> None:
    for score in ops.SWITCH_SCORES:
        model = on_one_grid()
        tracker = SwitchTracker(model, score)
        play(tracker, model.a, COUNTS)
        top = tracker.scores("a")[0]
        assert top.argmax().item() in (3, 4, 7)
        assert tracker.assign_(fraction=0.05)["a"] == 2
