"""A search on two processes: run by test_distributed_search.py under torchrun, as distributed_search.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import mixbit
from mixbit import search
from mixbit.training import Images

STOP = 5


class Killed(Exception):
    """Stands for the end of both processes."""


class Net(nn.Module):
    """Two layers that read one tensor, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 3, padding=1)
        self.right = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))


def searched(checkpoint: Path | None = None, kill: int | None = None) -> tuple[nn.Module, search.Found]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (32,), generator=generator)
    torch.manual_seed(0)
    model = Net().eval()
    costs = mixbit.costs.bops(model, x[:2])
    mixbit.prepare_(model, search.Gates(), x[:2])
    mixbit.calibrate_(model, [x])
    # Every process draws samples of its own: what must agree are the parameters, not the draws.
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    calls = 0

    def objective(trained: nn.Module, item: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if kill is not None and calls > kill:
            raise Killed
        return nn.functional.cross_entropy(trained(item[0]), item[1])

    found = search.fit(
        model,
        Images(x, labels, 8, seed=1),
        costs,
        epochs=3,
        budget=0.4 * costs.uniform(8, 8),
        search_lr=0.1,
        objective=objective,
        checkpoint=checkpoint,
        checkpoint_every=1,
    )
    return model, found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    model, found = searched()
    state = model.state_dict()
    assert sum(name.endswith("gate_logits") for name in state) == 4 + 3
    for name, value in state.items():
        every = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(every, value.contiguous())
        assert torch.equal(every[0], every[1]), f"{name} differs between ranks"
    recipes: list[dict[str, object] | None] = [None, None]
    dist.all_gather_object(recipes, found.recipe.to_dict())
    assert recipes[0] == recipes[1]
    try:
        searched(folder / "run", kill=STOP)
    except Killed:
        pass
    else:
        raise AssertionError("was not killed")
    dist.barrier()
    again, resumed = searched(folder / "run")
    assert resumed.recipe == found.recipe
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    dist.destroy_process_group()
    print("ok", flush=True)


if __name__ == "__main__":
    main()
