"""Training at given bits in one call: what is learned, at which rates, what a kill and bad input do to it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

import mixbit
from mixbit.quantizers import PACT, TQT
from mixbit.training import History, Images, cross_entropy, distill, reestimate_batchnorm_


class Killed(Exception):
    """Stands for the end of a process: nothing after it runs."""


def float_network() -> nn.Module:
    return seeded(Residual)


def images(count: int = 64, seed: int = 1, batch: int = 16, augment: str | None = "crop_flip") -> Images:
    """Five noisy colours, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    colours = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(8))
    x = colours[labels] + 0.5 * torch.randn(count, 3, 16, 16, generator=generator)
    return Images(x, labels, batch, seed=3, augment=augment)


def network(bits: int = 2, kind: str | None = None, calibrated: bool = True) -> nn.Module:
    model = float_network()
    x = images().x
    recipe = mixbit.Recipe.uniform(mixbit.layers(model, x).names, act=bits, weight=bits)
    mixbit.prepare_(model, recipe, x[:2], weight_quantizer=kind, act_quantizer=kind)
    return mixbit.calibrate_(model, [x]) if calibrated else model


def scores(model: nn.Module, data: Images) -> float:
    return mixbit.evaluate(model, [(data.x, data.y)])


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["lsq", "tqt", "pact", "plain"])
def test_a_task_is_learned_at_three_bits(kind: str) -> None:
    data = images(augment=None)
    model = network(bits=3, kind=kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert scores(model, data) < 50
    # Plain sums of gradients, and those of clips, are large: their scales take a smaller step.
    scale_lr = None if kind in ("lsq", "tqt") else 2e-3
    history = mixbit.retrain.fit(model, data, epochs=15, lr=0.2, scale_lr=scale_lr)
    assert len(history.loss) == 60
    assert history.epochs[-1]["loss"] < 0.65 * history.epochs[0]["loss"]
    assert history.epochs[-1]["lr"] < 1e-9
    assert scores(model, data) > 70
    assert not model.training
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    learned = {"lsq": "scale", "plain": "scale", "tqt": "log2_threshold", "pact": "clip"}[kind]
    for name in ("stem.weight", "a.bias", "bn.running_mean", f"a.weight_quantizer.{learned}"):
        assert name in moved
    assert not any(name.endswith(("bit_width", "signed_flag", "zero_point")) for name in moved)


def test_rates_and_decays_of_the_groups() -> None:
    seen: list[list[dict[str, Any]]] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.append([{**group} for group in groups])
        return torch.optim.AdamW(groups)

    model = network()
    model.head.act_quantizer = PACT(2, batched=True).set_(model.head.act_quantizer.scale.detach(), signed=False)
    model.side.bias.requires_grad_(False)
    start = copy.deepcopy(model)
    mixbit.retrain.fit(model, images(), epochs=1, lr=0.02, scale_lr=0.003, weight_decay=0.05, optimizer=make)
    found = {group["name"]: group for group in seen[0]}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in found.items()} == {
        "weights": (0.02, 0.05),
        "biases": (0.02, 0.0),
        "scales": (0.003, 0.0),
        "clips": (0.003, 0.05),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {group: {names[id(p)] for p in entry["params"]} for group, entry in found.items()}
    assert held["weights"] == {f"{layer}.weight" for layer in ("stem", "a", "b", "side", "head")}
    assert held["biases"] == {"a.bias", "b.bias", "bn.weight", "bn.bias", "head.bias"}
    assert held["clips"] == {"head.act_quantizer.clip"}
    assert {"stem.weight_quantizer.scale", "b.act_quantizer.scale"} <= held["scales"]
    assert sum(len(entry["params"]) for entry in found.values()) == sum(p.requires_grad for p in model.parameters())
    assert torch.equal(model.side.bias, start.side.bias)


def test_gradients_of_trained_thresholds_are_normalized_before_each_step() -> None:
    model = network(kind="tqt")
    quantizer = model.a.weight_quantizer
    assert isinstance(quantizer, TQT)
    before = quantizer.log2_threshold.detach().clone()
    mixbit.retrain.fit(model, images(16), epochs=1, scale_lr=0.01, momentum=0.0)
    # tanh(g / sqrt(g^2)) = tanh(1) in the first step, whatever g, but for gradients near the 1e-5 of the formula.
    step = (before - quantizer.log2_threshold.detach()).abs() / 0.01
    assert float(step.max()) == pytest.approx(math.tanh(1), abs=5e-3)
    assert float(quantizer.gradient_steps) == 1


def test_a_teacher_is_learned_without_labels_and_stays_what_it_is() -> None:
    teacher, model = float_network(), network()
    before = copy.deepcopy(teacher)
    data = images(augment=None)
    unlabelled = Images(data.x, None, 16, seed=3)
    history = mixbit.retrain.fit(model, unlabelled, epochs=8, teacher=teacher, temperature=2.0)
    assert history.epochs[-1]["loss"] < 0.7 * history.epochs[0]["loss"]
    same(teacher, before)
    mixed = network()
    mixbit.retrain.fit(mixed, data, epochs=1, teacher=teacher, temperature=2.0, teacher_weight=0.3)
    by_hand = network()
    mixbit.retrain.fit(by_hand, data, epochs=1, objective=distill(teacher, 2.0, 0.3))
    same(mixed, by_hand)


def test_bf16_trains_near_float32() -> None:
    data = images(augment=None)
    losses = {}
    for bf16 in (False, True):
        losses[bf16] = mixbit.retrain.fit(network(bits=4), data, epochs=3, bf16=bf16).loss
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1, abs=0.05)


def test_statistics_are_averaged_anew_where_asked() -> None:
    data, other = images(), images(32, seed=5, augment=None)
    kept, averaged, elsewhere = network(), network(), network()
    mixbit.retrain.fit(kept, data, epochs=2, reestimate=False)
    mixbit.retrain.fit(averaged, data, epochs=2)
    mixbit.retrain.fit(elsewhere, data, epochs=2, reestimate=other)
    assert torch.equal(kept.stem.weight, averaged.stem.weight)
    assert not torch.equal(kept.bn.running_mean, averaged.bn.running_mean)
    data.set_epoch(2)
    same(averaged, reestimate_batchnorm_(copy.deepcopy(kept), data))
    other.set_epoch(2)
    same(elsewhere, reestimate_batchnorm_(copy.deepcopy(kept), other))


@pytest.mark.parametrize("kind", ["lsq", "tqt"])
def test_a_run_killed_anywhere_ends_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    def run(path: Path | None, kill: int | None) -> tuple[nn.Module, History]:
        torch.manual_seed(7)
        model = network(kind=kind)

        def after(step: int, loss: float) -> None:
            if step == kill:
                raise Killed

        teacher = float_network()
        history = mixbit.retrain.fit(
            model,
            images(),
            epochs=3,
            teacher=teacher,
            teacher_weight=0.5,
            clip_norm=1.0,
            checkpoint=path,
            checkpoint_every=2,
            after_step=after,
        )
        return model, history

    whole, history = run(None, None)
    path = tmp_path / "run"
    for kill in range(1, 13, 1):
        with pytest.raises(Killed):
            run(path if kill % 3 else tmp_path / f"alone-{kill}", kill)
    for own in (path, *tmp_path.glob("alone-*")):
        model, again = run(own, None)
        same(model, whole)
        assert again == history


class Broken(nn.Module):
    """A network whose second layer sees infinities from a step on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.calls, self.start = 0, start

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if self.training:
            self.calls += 1
            if self.calls >= self.start:
                y = y / 0
        return self.second(y)


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    data = [(torch.rand(6, 4), torch.randint(0, 3, (6,))) for _ in range(4)]
    model = Broken(start=7).eval()
    mixbit.prepare_(model, mixbit.Recipe.uniform(["first", "second"], act=4, weight=4))
    mixbit.calibrate_(model, [x for x, _ in data])
    good: list[dict[str, Tensor]] = []

    def keep(step: int, loss: float) -> None:
        good.append({name: value.clone() for name, value in model.state_dict().items()})

    path = tmp_path / "run"
    with pytest.raises(mixbit.MixbitError, match="step 7") as caught:
        mixbit.retrain.fit(model, data, epochs=2, checkpoint=path, checkpoint_every=3, after_step=keep)
    assert "layer 'second" in str(caught.value)
    assert "the state after step 6 is restored" in str(caught.value)
    assert len(good) == 6
    for name, value in model.state_dict().items():
        assert torch.equal(value, good[5][name]), name
    assert not model.training


def test_a_run_with_another_teacher_or_bound_is_not_resumed(tmp_path: Path) -> None:
    def attempt(**change: Any) -> None:
        teacher = float_network()
        with torch.no_grad():
            teacher.head.bias += change.pop("shift", 0.0)
        given = {"teacher": teacher, "temperature": 2.0, "clip_norm": 1.0, **change}
        mixbit.retrain.fit(network(), images(), epochs=1, checkpoint=tmp_path / "run", **given)

    attempt()
    attempt()
    for change, complaint in (
        ({"shift": 1.0}, "its teacher is"),
        ({"temperature": 3.0}, "its teacher is .*temperature 2, .*temperature 3"),
        ({"teacher_weight": 0.5}, "its teacher is"),
        ({"clip_norm": None}, "its clip_norm is 1.0, this run's is None"),
        ({"bf16": True}, "its bf16 is False"),
        ({"lr": 0.02}, "its optimizer is"),
    ):
        with pytest.raises(mixbit.MixbitError, match=complaint):
            attempt(**change)


def test_bits_that_are_still_searched_are_refused_until_they_are_frozen() -> None:
    model, data = float_network(), images()
    mixbit.prepare_(model, mixbit.search.Gates(precisions=(2, 4)), data.x[:2])
    mixbit.calibrate_(model, [data.x])
    with pytest.raises(mixbit.MixbitError, match=r"bits are still being searched; call mixbit\.prepare_"):
        mixbit.retrain.fit(model, data, epochs=1)
    mixbit.search.freeze_(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if "gate_logits" in name}
    mixbit.retrain.fit(model, data, epochs=1)
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def other_teacher() -> nn.Module:
    model = float_network()
    model.head = nn.Linear(8, 7)
    return model.eval()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": float_network}, "no prepared layers; call mixbit.prepare_"),
        ({"model": lambda: network(calibrated=False)}, "layer 'stem': .*calibrate_"),
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"epochs": True}, "epochs=True"),
        ({"lr": 0.0}, "lr=0.0: expected a positive number"),
        ({"lr": math.nan}, "lr=nan"),
        ({"scale_lr": -1.0}, "scale_lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([1])}, "one-shot iterator"),
        ({"batches": [torch.randn(4, 3, 16, 16)]}, "without labels"),
        ({"batches": [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 5]))]}, "labels run from 0 to 5; .* 0 to 4"),
        ({"batches": [(torch.randn(2, 3, 16, 16), torch.tensor([-1, 1]))]}, "labels run from -1 to 1"),
        ({"batches": [(torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1]))]}, "labels are a Tensor of torch.float32"),
        ({"batches": [(torch.randn(2, 3, 16, 16), torch.zeros(2, 5).long())]}, "labels have shape"),
        ({"teacher": other_teacher}, r"teacher returns \(16, 7\) where the model returns \(16, 5\)"),
        ({"teacher": lambda: float_network().train()}, "training mode"),
        ({"teacher": float_network, "objective": cross_entropy()}, "objective and teacher are both given"),
        ({"teacher": float_network, "temperature": 0.0}, "temperature=0.0"),
        ({"teacher": float_network, "teacher_weight": 2.0}, "weight=2.0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"reestimate": []}, "batches is empty"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], complaint: str) -> None:
    given: dict[str, Any] = {"model": network, "batches": images(), "epochs": 1, **change}
    model: Callable[[], nn.Module] = given.pop("model")
    if callable(given.get("teacher")):
        given["teacher"] = given["teacher"]()
    with pytest.raises(mixbit.MixbitError, match=complaint):
        mixbit.retrain.fit(model(), **given)


def test_batches_without_a_length_are_refused() -> None:
    class Stream:
        def __iter__(self):
            yield from images()

    with pytest.raises(mixbit.MixbitError, match="batches has no length"):
        mixbit.retrain.fit(network(), Stream(), epochs=1)
