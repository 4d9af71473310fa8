"""Trains a prepared network on two processes and checks it against one process: run by test_distributed.py.

Usage: distributed_training.py {ddp|fsdp} RANK RENDEZVOUS_FILE
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mixbit
from mixbit.quantizers import quantized_layers

WORLD, STEPS, RATE = 2, 4, 0.05


class Plain(nn.Module):
    """No batch normalization: its statistics would differ between one process and several."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 3, padding=1)  # odd: ranks hold different shares
        self.second = nn.Conv2d(7, 8, 3, stride=2)
        self.head = nn.Linear(8 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.flatten(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Plain().eval()
    recipe = mixbit.Recipe.uniform(["first", "second", "head"], weight=4, act=4)
    recipe.layers["head"] = mixbit.LayerPrecision(weight=3, act=4, granularity="per_tensor")
    mixbit.prepare_(model, recipe, act_quantizer="lsq+")
    return mixbit.calibrate_(model, [batch(0)]).train()


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train(model: nn.Module, share: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step)[share]).backward()
        optimizer.step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def main() -> None:
    kind, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    share = slice(rank * 4, rank * 4 + 4)
    model = network()
    alone = network()
    train(alone, slice(0, 8))
    if kind == "ddp":
        train(DistributedDataParallel(model), share)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in quantized_layers(model).values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        check_list_ops_on_shards(model)
        train(model, share)
    for name, parameter in alone.named_parameters():
        expected = parameter.detach()
        got = full(model.get_parameter(name))
        difference = float((got - expected).norm() / expected.norm())
        assert difference < 1e-5, f"{name}: {difference} away from one process"
        start = dict(network().named_parameters())[name]
        assert not torch.equal(got, start), f"{name} did not move"
        if "quantizer" in name:
            every = [torch.empty_like(got) for _ in range(WORLD)]
            dist.all_gather(every, got.contiguous())
            assert torch.equal(every[0], every[1]), f"{name} differs between ranks"
    dist.barrier()
    dist.destroy_process_group()
    print("ok", flush=True)
    # Background threads of the process groups that FSDP makes may still be joinable when the interpreter tears down
    # ("terminate called without an active exception"); everything that counts has been checked.
    os._exit(0)


def check_list_ops_on_shards(model: nn.Module) -> None:
    """A list op outside the forward works on the shards of weights and scales, which are cut alike."""
    layers = [layer for layer in quantized_layers(model).values() if layer.weight_quantizer.axis == 0]
    weights = [layer.weight.to_local() for layer in layers]
    scales = [layer.weight_quantizer.scale.to_local() for layer in layers]
    ys = mixbit.ops.fake_quantize_foreach(weights, scales, [0] * 2, [4] * 2, narrow_range=True, axis=0)
    alone = network()
    for y, name in zip(ys, ("first", "second"), strict=True):
        layer = alone.get_submodule(name)
        whole = layer.weight_quantizer(layer.weight).detach()
        local = whole.chunk(WORLD)[dist.get_rank()]
        assert torch.equal(y.detach(), local), name


if __name__ == "__main__":
    main()
