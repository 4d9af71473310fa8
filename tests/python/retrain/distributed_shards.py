"""Trackers and steps of weights that FSDP2 cuts: run by test_distributed_switches.py under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from distributed_training import Plain, batch, full, loss_of

import mixbit
from mixbit.quantizers import quantized_layers
from mixbit.retrain import Dampening, IterativeFreezing, SwitchTracker, ThresholdAware, threshold_histograms


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Plain().eval()
    recipe = mixbit.Recipe.uniform(["first", "second", "head"], weight=2, act=4, rounding="half_up")
    recipe.layers["head"] = mixbit.LayerPrecision(weight=3, act=4, granularity="per_tensor")
    mixbit.prepare_(model, recipe)
    return mixbit.calibrate_(model, [batch(0)]).train()


def set_(model: nn.Module, name: str, value: Tensor, grad: bool = False) -> None:
    """Sets a parameter or its gradient, cut or not."""
    parameter = model.get_parameter(name)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    if grad:
        parameter.grad = value
    else:
        with torch.no_grad():
            parameter.copy_(value)


def walk(model: nn.Module, step: int) -> None:
    """Weights at step `step` of a random walk that is the same everywhere."""
    for name in ("first", "second", "head"):
        start = dict(network().named_parameters())[f"{name}.weight"].detach()
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        set_(model, f"{name}.weight", start + 0.3 * start.std() * noise)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone, cut = network(), network()
    for layer in quantized_layers(cut).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(cut, mesh=mesh)
    pairs = [(SwitchTracker(m, "osc"), IterativeFreezing(m, 0.05, momentum=0.2)) for m in (alone, cut)]
    for step in range(8):
        for model, (tracker, _) in zip((alone, cut), pairs, strict=True):
            walk(model, step)
            tracker.update_()
    (one, one_freezes), (many, many_freezes) = pairs
    assert int(one.history().sum()) > 0
    assert torch.equal(one.history(), many.history())
    assert one.rates() == many.rates()
    for name in one.layers:
        assert torch.equal(one.scores(name), many.scores(name)), name
    assert one.assign_(fraction=0.2, per="network") == many.assign_(fraction=0.2, per="network")
    one.update_(), many.update_()
    assert one.assign_(fraction=0.1, by="snapshot") == many.assign_(fraction=0.1, by="snapshot")
    for name in one.layers:
        assert torch.equal(one.flags(name), many.flags(name)), name
    assert threshold_histograms(alone) == threshold_histograms(cut)
    for step in range(8, 16):
        for model, (_, freezing) in zip((alone, cut), pairs, strict=True):
            walk(model, step)
            freezing.update_()
    assert any(one_freezes.frozen(name).any() for name in one.layers)
    for name in one.layers:
        assert torch.equal(one_freezes.frozen(name), many_freezes.frozen(name)), name
        assert torch.equal(full(alone.get_submodule(name).weight), full(cut.get_submodule(name).weight)), name
    check_dampening(alone, cut)
    check_steps(alone, cut)
    # With extra levels and all it trains.
    loss_of(cut, batch(1)).backward()
    assert all(p.grad is not None and torch.isfinite(full(p.grad)).all() for p in cut.parameters())
    state = many.state_dict()
    many.load_state_dict(state)
    assert torch.equal(one.history(), many.history())
    for build, complaint in (
        (lambda: many_freezes.hold_("head", torch.ones(5, 72, dtype=torch.bool)), "its weight is sharded"),
    ):
        try:
            build()
            raise AssertionError("sharded weights were taken")
        except mixbit.MixbitError as error:
            assert complaint in str(error), error
    dist.barrier()
    dist.destroy_process_group()
    print("ok", flush=True)
    os._exit(0)  # see distributed_training.py


def check_dampening(alone: nn.Module, cut: nn.Module) -> None:
    """The term of cut weights is that of whole ones, and so are its gradients, beside those of the network."""
    for aggregation in ("kernel_mean", "mean", "sum"):
        terms = [Dampening(model, 0.3, aggregation=aggregation) for model in (alone, cut)]
        for with_loss in (False, True):
            values = []
            for model, term in zip((alone, cut), terms, strict=True):
                values.append(term())
                loss = values[-1] + loss_of(model, batch(1)) if with_loss else values[-1]
                loss.backward()
            torch.testing.assert_close(*values)
            for name in ("first", "second", "head"):
                grads = [full(model.get_parameter(f"{name}.weight").grad) for model in (alone, cut)]
                assert grads[0].any()
                torch.testing.assert_close(grads[1], grads[0])
            for model in (alone, cut):
                model.zero_grad(set_to_none=True)


def check_steps(alone: nn.Module, cut: nn.Module) -> None:
    """A threshold-aware step of cut weights has the bits of one of whole weights."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ):
        optimizers = [ThresholdAware(make(m.parameters()), m, "linear", rho=0.3) for m in (alone, cut)]
        for step in range(2):
            for name in ("first", "second", "head"):
                shape = full(alone.get_parameter(f"{name}.weight")).shape
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
                for model in (alone, cut):
                    set_(model, f"{name}.weight", grad, grad=True)
            for optimizer in optimizers:
                optimizer.step()
        for name in ("first", "second", "head"):
            weights = [full(m.get_parameter(f"{name}.weight")) for m in (alone, cut)]
            assert torch.equal(*weights), name
        for model in (alone, cut):
            model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
