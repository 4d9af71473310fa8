"""Mechanisms of `retrain.fit`: what each does to a run, its figures, what a kill does to it, errors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

import mixbit
from mixbit.retrain import Mechanisms
from mixbit.retrain.mechanisms import Retraining
from mixbit.training import History, Images

EVERYTHING = Mechanisms(
    threshold_aware="step",
    count="adj",
    assign_at=(0.4, 0.8),
    fraction=0.3,
    window=1.0,
    freeze=(0.2, 0.05),
    freeze_begin=0.3,
    freeze_momentum=0.1,
    dampen=0.05,
)

#: Rates at which weights go back and forth within a few steps.
NOISY = {"lr": 1.0, "momentum": 0.0, "scale_lr": 1e-4}


class Killed(Exception):
    """Stands for the end of a process: nothing after it runs."""


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 5
    colours = torch.randn(5, 3, 1, 1, generator=generator)
    x = colours[labels] + 0.5 * torch.randn(48, 3, 12, 12, generator=generator)
    return Images(x, labels, 16, seed=3, augment="crop_flip")


def network(stem: int = 2) -> nn.Module:
    """All weights at 2 bits but those of the first layer."""
    model = seeded(Residual)
    x = images().x
    recipe = mixbit.Recipe.uniform(
        mixbit.layers(model, x).names, act=8, weight=2, rounding="half_up", narrow_range=False
    )
    recipe.layers["stem"] = dataclasses.replace(recipe["stem"], weight=stem)
    mixbit.prepare_(model, recipe, x[:2])
    return mixbit.calibrate_(model, [x])


def fit(mechanisms: Mechanisms | None, stem: int = 2, **options: Any) -> tuple[nn.Module, History]:
    torch.manual_seed(7)
    model = network(stem)
    options = {"lr": 0.05} | options
    return model, mixbit.retrain.fit(model, images(), epochs=4, mechanisms=mechanisms, reestimate=False, **options)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def extra(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: q for n, q in model.state_dict().items() if n.endswith("extra_bits")}


def test_none_and_off_are_plain_training() -> None:
    plain, history = fit(None)
    assert history.figures == {}
    for given in (Mechanisms(), Mechanisms(threshold_aware="off")):
        model, again = fit(given)
        assert torch.equal(weights(model), weights(plain))
        assert again == history


def test_counting_changes_nothing_and_tells_switches() -> None:
    plain, _ = fit(None)
    model, history = fit(Mechanisms(count="adj"))
    assert torch.equal(weights(model), weights(plain))
    steps, rates = zip(*history.figures["switches"], strict=True)
    assert steps == tuple(range(1, 13))
    assert all(0 <= r <= 1 for r in rates)
    assert max(rates) > 0


def test_smaller_steps_switch_less() -> None:
    def switches(shape: str) -> float:
        _, history = fit(Mechanisms(threshold_aware=shape, alpha=0.0, rho=0.25, count="adj"))
        return sum(rate for _, rate in history.figures["switches"])

    assert switches("step") < switches("off")


def test_levels_are_assigned_at_shares_of_the_run() -> None:
    model, history = fit(Mechanisms(assign_at=(0.5, 0.75), fraction=0.25))
    maps = extra(model)
    assert maps
    assert all(m.dtype == torch.uint8 and int((m > 0).sum()) > 0 for m in maps.values())
    flagged = {n: points for n, points in history.figures.items() if n.startswith("flagged:")}
    assert {n.removeprefix("flagged:") for n in flagged} == {
        n for n, _ in model.named_modules() if n in ("stem", "a", "b", "side", "head")
    }
    for name, points in flagged.items():
        assert [step for step, _ in points] == [6, 9]
        assert points[0][1] <= 0.25 + 1e-9
        final = maps.get(f"{name.removeprefix('flagged:')}.weight_quantizer.extra_bits")
        share = 0.0 if final is None else float((final > 0).float().mean())
        assert points[1][1] == pytest.approx(share)
    for name in ("loss_before_assignment", "loss_after_assignment"):
        assert [step for step, _ in history.figures[name]] == [6, 9]
    # What was assigned is a recipe.
    assert mixbit.search.extract(model).extra_maps.keys() == {n.split(".")[0] for n in maps}


def test_weights_with_levels_are_held_at_them_where_asked() -> None:
    model, history = fit(Mechanisms(assign_at=(0.5,), fraction=0.25, extra="mid_frozen"), lr=0.2)
    maps = extra(model)
    flagged = sum(int(m.sum()) for m in maps.values())
    counted = sum(q.weight.numel() for q in mixbit.quantizers.quantized_layers(model).values())
    assert flagged > 0
    frozen = dict(history.figures["frozen"])
    assert frozen[6.0] == 0
    assert frozen[7.0] == frozen[12.0] == pytest.approx(flagged / counted)
    for name, layer in mixbit.quantizers.quantized_layers(model).items():
        held = layer.weight_quantizer.extra_bits
        if held is not None:
            codes = layer.weight_quantizer.codes(layer.weight)[held > 0]
            assert (codes % 2 != 0).all(), name
    plain, _ = fit(Mechanisms(assign_at=(0.5,), fraction=0.25), lr=0.2)
    assert any(not torch.equal(extra(plain)[n], m) for n, m in maps.items()) or not torch.equal(
        weights(plain), weights(model)
    )


@pytest.mark.parametrize(("stem", "most", "given"), [(8, 4, False), (5, 4, False), (5, 6, True)])
def test_levels_are_held_beside_layers_of_any_width(stem: int, most: int, given: bool) -> None:
    held = Mechanisms(assign_at=(0.5,), fraction=0.25, extra="mid_frozen", max_bits=most)
    model, history = fit(held, stem=stem, lr=0.2)
    assert history.figures["frozen"][-1][1] > 0
    assert ("stem.weight_quantizer.extra_bits" in extra(model)) == given


def test_levels_by_squared_gradients() -> None:
    model, history = fit(Mechanisms(assign_at=(0.5,), fraction=0.005, per="network", by="score_gradient"), **NOISY)
    other, _ = fit(Mechanisms(assign_at=(0.5,), fraction=0.005, per="network"), **NOISY)
    assert extra(model)
    one, two = ({n: m.nonzero().tolist() for n, m in extra(each).items()} for each in (model, other))
    assert one != two
    assert len(history.loss) == 12


def test_runs_from_before_an_option_go_on() -> None:
    described = Mechanisms(assign_at=(0.5,)).describe()
    assert "by" not in described
    assert "extra" not in described
    assert Mechanisms(assign_at=(0.5,), extra="mid_frozen").describe()["extra"] == "mid_frozen"


def test_freezing_and_dampening_act() -> None:
    plain, _ = fit(None, **NOISY)
    frozen, history = fit(Mechanisms(freeze=(0.05, 0.01), freeze_begin=0.1, freeze_momentum=0.2), **NOISY)
    shares = [share for _, share in history.figures["frozen"]]
    assert shares == sorted(shares)
    assert shares[-1] > 0
    damped, _ = fit(Mechanisms(dampen=0.5, dampen_begin=0.0), **NOISY)
    assert not torch.equal(weights(frozen), weights(plain))
    assert not torch.equal(weights(damped), weights(plain))


@pytest.mark.parametrize("change", [{}, {"extra": "mid_frozen", "by": "score_gradient", "freeze": None}], ids=str)
def test_a_run_with_everything_killed_anywhere_ends_in_the_same_bits(change: dict[str, Any], tmp_path: Path) -> None:
    if change:
        change = {**change, "freeze_begin": 0.25, "freeze_momentum": 0.01}
    everything = dataclasses.replace(EVERYTHING, **change)

    def attempt(path: Path | None, kill: int | None) -> tuple[nn.Module, History]:
        def after(step: int, loss: float) -> None:
            if step == kill:
                raise Killed

        return fit(everything, checkpoint=path, checkpoint_every=1, after_step=after, **NOISY)

    whole, history = attempt(None, None)
    assert extra(whole)
    assert history.figures["frozen"][-1][1] > 0
    path = tmp_path / "run"
    for kill in (2, 3, 5, 6, 9, 11, 12):
        with pytest.raises(Killed):
            attempt(path, kill)
    model, again = attempt(path, None)
    assert again == history
    for (name, a), (other, b) in zip(whole.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    with pytest.raises(mixbit.MixbitError, match="mechanisms"):
        fit(dataclasses.replace(everything, fraction=0.2), checkpoint=path, **NOISY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold_aware": "stop"}, "threshold_aware='stop' is not known"),
        ({"count": "adjacent"}, "count='adjacent' is not known"),
        ({"assign_at": (0.5, 0.5)}, r"assign_at=\[0.5, 0.5\]: expected ascending shares"),
        ({"assign_at": (1.0,)}, r"assign_at=\[1.0\]"),
        ({"assign_at": 0.5}, "assign_at=0.5: expected a list"),
        ({"fraction": 0.2}, "fraction=0.2 without assign_at"),
        ({"assign_at": (0.5,), "fraction": 0.2, "rate": 0.2}, "fraction and rate given"),
        ({"assign_at": (0.5,), "fraction": 0.7}, "fraction=0.7: expected a share above 0, at most 0.5"),
        ({"assign_at": (0.5,), "rate": 2}, "rate=2"),
        ({"per": "layers"}, "per='layers' is not known"),
        ({"assign_at": (0.5,), "by": "random"}, "by='random' is not known"),
        ({"assign_at": (0.5,), "extra": "range"}, "extra='range' is not known"),
        ({"assign_at": (0.5,), "rate": 0.2, "by": "score_gradient"}, "rate with by='score_gradient'"),
        ({"max_bits": 2.5}, "max_bits=2.5"),
        ({"group": 0}, "group=0"),
        ({"window": 0}, "window=0"),
        ({"freeze": (0.1,)}, r"freeze=\[0.1\]: expected two thresholds"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mixbit.MixbitError, match=message):
        Mechanisms(**options)


def test_what_only_the_run_can_tell_is_refused_before_it_starts() -> None:
    for given, message in (
        (Mechanisms(threshold_aware="step", alpha=2.0), "alpha=2.0"),
        (Mechanisms(freeze=(2.0, 0.1)), "threshold="),
        (Mechanisms(assign_at=(0.5,), max_bits=2), "max_bits=2: no weight may have another bit"),
        (Mechanisms(dampen=-1.0), "strength="),
    ):
        with pytest.raises(mixbit.MixbitError, match=message):
            fit(given)
    # Weights of 7 bits cannot be held; with thresholds of its own freezing leaves those of 5 bits alone.
    held = Mechanisms(assign_at=(0.5,), extra="mid_frozen", max_bits=8)
    for given, stem in ((held, 7), (dataclasses.replace(held, freeze=(0.1, 0.1)), 5)):
        with pytest.raises(mixbit.MixbitError, match="layer 'stem' is not watched by this IterativeFreezing"):
            Retraining(given, network(stem), 12, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"on_grad": True},
        {"group": 4},
        {"window": 2.0},
        {"by": "score_gradient"},
        {"extra": "mid_frozen"},
        {"freeze_begin": 0.5},
        {"dampen_begin": 0.0},
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(mixbit.MixbitError, match=f"{name}=.* has no effect without"):
        Mechanisms(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assign_at": (0.5,), "fraction": "0.2"}, "fraction='0.2': expected a number"),
        ({"threshold_aware": "step", "alpha": None}, "alpha=None: expected a number"),
        ({"freeze": ("a", 0.1)}, "freeze='a': expected a number"),
        ({"assign_at": (0.5,), "max_bits": 9}, "max_bits=9: expected a whole number from 1 to 8"),
    ],
)
def test_options_that_are_no_numbers_or_too_many_bits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mixbit.MixbitError, match=message):
        Mechanisms(**options)


def test_the_window_of_a_second_round_leaves_the_first_alone() -> None:
    def resets(steps: int, *shares: float) -> set[int]:
        return Retraining(Mechanisms(assign_at=shares), network(), steps, 10)._resets

    assert resets(100, 0.5, 0.55) == {40}
    assert resets(100, 0.5, 0.6) == {40}
    assert resets(100, 0.5, 0.75) == {40, 65}
    assert resets(100, 0.05, 0.5) == {40}


@pytest.mark.parametrize("shares", [(0.5, 0.51), (0.99,)])
def test_assignments_at_one_step_or_after_the_last_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(mixbit.MixbitError, match="a run of 12 steps would assign levels after the steps"):
        fit(Mechanisms(assign_at=shares))
