"""SwitchTracker on two processes: run by test_distributed_switches.py under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from distributed_training import batch, loss_of, network

import mixbit
from mixbit.errors import MixbitError


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = network()
    mixbit.prepare_(model, mixbit.Recipe.uniform(["first", "second", "head"], weight=2, act=4))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    tracker = mixbit.retrain.SwitchTracker(model)

    def step(index: int) -> None:
        optimizer.zero_grad()
        loss_of(parallel, batch(index)[4 * rank : 4 * rank + 4]).backward()
        optimizer.step()
        tracker.update_()

    for index in range(8):
        step(index)
    given = tracker.assign_(fraction=0.2, per="network")
    assert sum(given.values()) > 0
    for name in tracker.layers:
        flags = tracker.flags(name).to(torch.uint8)
        both = [torch.empty_like(flags) for _ in range(2)]
        dist.all_gather(both, flags)
        assert torch.equal(both[0], both[1]), name
    step(8)  # trains on, extra levels and all
    # Ranks whose weights have drifted apart notice it, and nothing is assigned.
    with torch.no_grad():
        model.second.weight.add_(0.3 * rank)
    tracker.update_()
    before = model.second.weight_quantizer.extra_bits.clone()
    try:
        tracker.assign_(fraction=0.3)
        raise AssertionError("flags of other weights were not noticed")
    except MixbitError as error:
        assert "layer 'second': the ranks disagree" in str(error), error
    assert torch.equal(before, model.second.weight_quantizer.extra_bits)
    dist.barrier()
    dist.destroy_process_group()
    print("ok", flush=True)


if __name__ == "__main__":
    main()
