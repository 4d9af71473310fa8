"""The training loop: what a kill, a NaN or a wrong checkpoint does to it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

import mixbit
from mixbit.training import History, Images, cross_entropy, train


class Killed(Exception):
    """Stands for the end of a process: nothing after it runs."""


class Tracker:
    """State beside the model: counts steps."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict:
        return {"count": self.count, "pair": (1, [2.5, None])}

    def load_state_dict(self, state: dict) -> None:
        assert state["pair"] == (1, [2.5, None])
        self.count = state["count"]


def images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    return Images(x, torch.randint(0, 5, (count,), generator=generator), 8, seed=1, augment="crop_flip")


def loader() -> torch.utils.data.DataLoader:
    """Its order comes from torch's global random state."""
    data = images()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=8, shuffle=True)


def network() -> nn.Module:
    model = seeded(Residual)
    model.head = nn.Sequential(nn.Dropout(0.2), model.head).eval()  # draws from the random state in every step
    x = images().x[:8]
    recipe = mixbit.Recipe.uniform(mixbit.layers(model, x).names, act=4, weight=4)
    return mixbit.calibrate_(mixbit.prepare_(model, recipe, x), [x])


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}


def run(
    optimizer: str, batches: Callable, checkpoint: Path | None, every: int | None, kill: int | None
) -> tuple[nn.Module, History, Tracker]:
    torch.manual_seed(5)
    model, tracker = network(), Tracker()
    torch.manual_seed(6)
    made = OPTIMIZERS[optimizer](model)

    def after(step: int, loss: float) -> dict[str, float]:
        if step == kill:
            raise Killed
        tracker.count += 1
        return {"double": 2 * loss}

    history = train(
        model,
        batches(),
        cross_entropy(),
        made,
        epochs=3,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(made, 15),
        modules={"tracker": tracker},
        checkpoint=checkpoint,
        checkpoint_every=every,
        after_step=after,
    )
    return model, history, tracker


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


@pytest.mark.parametrize("batches", [images, loader])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_killed_anywhere_ends_in_the_same_bits(optimizer: str, batches: Callable, tmp_path: Path) -> None:
    whole, history, tracker = run(optimizer, batches, None, None, None)
    assert len(history.loss) == 15
    assert tracker.count == 15
    for every, kills in ((None, (1, 6, 15)), (2, (3, 5, 8)), (1, (2, 11))):
        path = tmp_path / f"{optimizer}-{every}"
        for kill in kills:
            with pytest.raises(Killed):
                run(optimizer, batches, path, every, kill)
        model, again, count = run(optimizer, batches, path, every, None)
        assert_equal(model, whole)
        assert again == history
        assert count.count == 15
        finished, last, _ = run(optimizer, batches, path, every, 1)  # nothing is left to do
        assert_equal(finished, whole)
        assert last == history


def test_training_moves_weights_scales_and_statistics_and_keeps_modes() -> None:
    model, history, _ = run("sgd", images, None, None, None)
    start = network()
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, start.state_dict()[n])}
    assert {"stem.weight", "stem.weight_quantizer.scale", "a.act_quantizer.scale", "bn.running_mean"} <= moved
    assert not model.training
    assert not model.bn.training
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    assert [e["steps"] for e in history.epochs] == [5, 10, 15]
    assert math.isclose(history.epochs[0]["loss"], sum(history.loss[:5]) / 5)
    assert history.epochs[-1]["lr"] < 1e-9 < history.epochs[0]["lr"] < 0.05
    assert history.figures["double"][2] == [3, 2 * history.loss[2]]
    lines = history.to_csv().splitlines()
    assert lines[0] == "step,loss,double"
    assert [float(v) for v in lines[3].split(",")] == [3, history.loss[2], 2 * history.loss[2]]
    assert len(lines) == 16


def test_parts_that_the_user_froze_stay_frozen() -> None:
    model = network().train()
    model.bn.eval()
    before = model.bn.running_mean.clone()
    train(model, images(), cross_entropy(), OPTIMIZERS["sgd"](model), epochs=1)
    assert torch.equal(model.bn.running_mean, before)
    assert model.training
    assert not model.bn.training


class Broken(nn.Module):
    """Divides by zero in the backward, or the forward, from a step on."""

    def __init__(self, where: str, start: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.where, self.start, self.calls = where, start, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.first(x)
        if self.calls >= self.start:
            y = y / 0 if self.where == "forward" else y + (y - y.detach()).abs().sqrt()
        return self.second(y)


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("forward", "the first output that is not finite is that of layer 'second'"),
        ("backward", "the first gradient that is not finite is that of the output of layer 'first'"),
    ],
)
def test_a_loss_that_is_not_finite_stops_and_restores_the_last_good_state(
    where: str, complaint: str, tmp_path: Path
) -> None:
    data = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(4)]
    torch.manual_seed(0)
    model = Broken(where, start=4)
    seen: list[dict[str, Tensor]] = []

    def keep(step: int, loss: float) -> None:
        seen.append({n: v.clone() for n, v in model.state_dict().items()})

    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    path = tmp_path / "run"
    with pytest.raises(mixbit.MixbitError, match="step 4") as caught:
        train(model, data, cross_entropy(), optimizer, epochs=1, checkpoint=path, checkpoint_every=2, after_step=keep)
    assert complaint in str(caught.value)
    assert "the state after step 2 is restored" in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(seen) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[1][name]), name
        assert not torch.equal(value, seen[2][name]), name
    assert float(next(iter(optimizer.state.values()))["step"]) == 2


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda model, x: x.fill_(math.inf), "the batch's input is not finite"),
        (lambda model, x: model.second.bias.data.fill_(math.nan), "parameter 'second.bias' is not finite"),
    ],
)
def test_what_was_never_finite_is_named(spoil: Callable, complaint: str) -> None:
    model, x = Broken("forward", start=9), torch.randn(6, 4)
    spoil(model, x)
    with pytest.raises(mixbit.MixbitError, match=complaint):
        train(model, [(x, torch.zeros(6).long())], cross_entropy(), torch.optim.SGD(model.parameters(), 0.1), epochs=1)


def test_an_objective_that_is_not_finite_by_itself_is_named() -> None:
    model = Broken("forward", start=9)
    with pytest.raises(mixbit.MixbitError, match="the objective itself"):
        train(
            model,
            [torch.randn(6, 4)],
            lambda model, item: model(item).sum() * math.inf,
            torch.optim.SGD(model.parameters(), 0.1),
            epochs=1,
        )


def test_clipping_bounds_the_step() -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    data = [(torch.randn(6, 4) * 100, torch.randint(0, 3, (6,)))]
    train(model, data, cross_entropy(), torch.optim.SGD(model.parameters(), 1.0), epochs=1, clip_norm=0.01)
    moved = (model.weight.detach() - before).norm()
    assert 0 < float(moved) <= 0.01 * (1 + 1e-5)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))

    def attempt(
        model: nn.Module | None = None, lr: float = 0.1, epochs: int = 1, seed: int = 0, identity: dict | None = None
    ) -> None:
        torch.manual_seed(0)
        own = nn.Linear(4, 3) if model is None else model
        train(
            own,
            Images(x, y, 8, seed=seed),
            cross_entropy(),
            torch.optim.SGD(own.parameters(), lr),
            epochs=epochs,
            checkpoint=path,
            identity=identity,
        )

    attempt(identity={"recipe": "a"})
    attempt(identity={"recipe": "a"})
    for other, complaint in (
        ({"model": nn.Sequential(nn.Linear(4, 3))}, "its model is 'Linear', this run's is 'Sequential'"),
        ({"model": nn.Linear(4, 3)}, "its state before training is"),
        ({"lr": 0.2}, "its optimizer is"),
        ({"epochs": 2}, "its epochs is 1, this run's is 2"),
        ({"seed": 1}, "its data is"),
        ({"identity": {"recipe": "b"}}, "its recipe is 'a', this run's is 'b'"),
    ):
        with pytest.raises(mixbit.MixbitError, match=complaint):
            attempt(**{"identity": {"recipe": "a"}, **other})
    whole = path.read_bytes()
    for damaged, complaint in ((whole[: len(whole) // 2], "cannot be read"), (b"", "cannot be read")):
        path.write_bytes(damaged)
        with pytest.raises(mixbit.MixbitError, match=complaint):
            attempt()
    from safetensors.torch import save

    path.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(mixbit.MixbitError, match="has the format None"):
        attempt()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"batches": iter([])}, "one-shot iterator"),
        ({"batches": []}, "batches is empty"),
        ({"modules": {"penalty": 3}}, "modules\\['penalty'\\] is a int"),
        ({"modules": {"model": Tracker()}}, "under a name other than model, optimizer"),
        ({"checkpoint": "/no/such/folder/run"}, "its folder does not exist"),
        ({"objective": lambda model, item: model(item[0])}, "objective returned shape"),
        ({"objective": lambda model, item: 1.0}, "objective returned a float"),
    ],
)
def test_bad_arguments_are_named(change: dict, complaint: str) -> None:
    model = nn.Linear(4, 3)
    arguments = {
        "batches": [(torch.randn(6, 4), torch.zeros(6).long())],
        "objective": cross_entropy(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "epochs": 1,
        **change,
    }
    with pytest.raises(mixbit.MixbitError, match=complaint):
        train(model, **arguments)


def test_state_that_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    class Odd(Tracker):
        def state_dict(self) -> dict:
            return {"value": object()}

    model = nn.Linear(4, 3)
    with pytest.raises(mixbit.MixbitError, match="state.parts.odd.value is a object"):
        train(
            model,
            [(torch.randn(6, 4), torch.zeros(6).long())],
            cross_entropy(),
            torch.optim.SGD(model.parameters(), 0.1),
            epochs=1,
            modules={"odd": Odd()},
            checkpoint=tmp_path / "run",
        )


def test_statistics_are_found_on_the_device_of_the_model() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.seen: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.device.type)
            return self.norm(torch.arange(6.0).reshape(3, 2))

    probe = Probe()
    mixbit.training.reestimate_batchnorm_(probe, [(torch.zeros(3, 2), torch.zeros(3))])
    assert probe.seen == ["meta"]
    assert probe.norm.running_mean.tolist() == [2.0, 3.0]
