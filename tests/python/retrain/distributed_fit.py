"""`retrain.fit` on two processes against one: run by test_distributed_fit.py under torchrun, as distributed_fit.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from distributed_training import network

import mixbit
from mixbit.training import History, Images

STOP = 3


class Killed(Exception):
    """Stands for the end of both processes."""


def fitted(checkpoint: Path | None = None, kill: int | None = None) -> tuple[nn.Module, History]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    data = Images(x, torch.randint(0, 5, (24,), generator=generator), 8, seed=2, augment="crop_flip")
    model = network().eval()

    def after(step: int, loss: float) -> None:
        if step == kill:
            raise Killed

    history = mixbit.retrain.fit(
        model, data, epochs=2, lr=0.02, checkpoint=checkpoint, checkpoint_every=1, after_step=after
    )
    return model, history


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    alone, expected = fitted()
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    model, history = fitted()
    start = dict(network().named_parameters())
    for name, parameter in alone.named_parameters():
        got = model.get_parameter(name).detach()
        difference = float((got - parameter).norm() / parameter.norm())
        assert difference < 1e-5, f"{name}: {difference} away from one process"
        assert not torch.equal(got, start[name]), f"{name} did not move"
        every = [torch.empty_like(got) for _ in range(2)]
        dist.all_gather(every, got.contiguous())
        assert torch.equal(every[0], every[1]), f"{name} differs between ranks"
    assert all(abs(a - b) < 1e-5 for a, b in zip(history.loss, expected.loss, strict=True))
    # Killed and resumed, both processes come to the bits of the unbroken run.
    try:
        fitted(folder / "run", kill=STOP)
        raise AssertionError("was not killed")
    except Killed:
        dist.barrier()
    resumed, again = fitted(folder / "run")
    assert again == history
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), f"{name} differs after a resume"
    dist.barrier()
    dist.destroy_process_group()
    print("ok", flush=True)


if __name__ == "__main__":
    main()
