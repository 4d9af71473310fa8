"""Images in memory, in an order that only a seed and the epoch decide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixbit.errors import MixbitError, check_choice

#: What augmentation does to a batch: (images [N, C, H, W], generator) -> images of the same shape.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]

_PAD = 4


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Zero padding of 4, a random crop of the old size, and a horizontal flip of every second image on average.

    The usual augmentation of CIFAR-10 (He et al., arXiv 1512.03385, section 4.2); zeros are the mean colour of
    normalized images.

    Args:
        x: [N, C, H, W].
        generator: On the CPU.

    Returns:
        [N, C, H, W].
    """
    n, c, h, w = x.shape
    top, left = torch.randint(0, 2 * _PAD + 1, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(w)
    columns = torch.where(flip, columns.flip(0), columns) + left
    rows = torch.arange(h) + top
    padded = F.pad(x, (_PAD,) * 4)
    image, channel = torch.arange(n).reshape(n, 1, 1, 1), torch.arange(c).reshape(1, c, 1, 1)
    return padded[image, channel, rows.reshape(n, 1, h, 1), columns.reshape(n, 1, 1, w)]


AUGMENTATIONS: dict[str, Augmentation] = {"crop_flip": crop_flip}


class Images:
    """Shuffled batches of images in memory; any epoch can be made anew, on any number of processes.

    Order and augmentation are drawn from (seed, epoch). Under torch.distributed each process gets its share of every
    batch, so that all of them together see what one process would.

    Args:
        x: Images [N, C, H, W] (or any tensor whose first dimension counts samples, without augmentation).
        y: Labels, a Tensor [N, ...] or a list of N (boxes of detectors); None gives items without labels.
        batch: Images of a step, all processes together.
        seed: Of order and augmentation.
        augment: "crop_flip", a callable (images, generator) -> images, or None.
        drop_last: Whether images that fill no batch are left out of an epoch (others in each).
        rank: This process; None asks torch.distributed.
        world: Number of processes; None asks torch.distributed.

    Raises:
        MixbitError: Lengths differ, a number is out of range, or no whole batch exists.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | Sequence[Any] | None = None,
        batch: int = 128,
        *,
        seed: int = 0,
        augment: str | Augmentation | None = None,
        drop_last: bool = True,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1:
            raise MixbitError(f"x is a {type(x).__name__}; expected a Tensor of images [N, C, H, W]")
        if y is not None and len(y) != len(x):
            raise MixbitError(f"y has {len(y)} labels for {len(x)} images; expected one each")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise MixbitError(f"batch={batch!r}: expected a whole number of at least 1")
        if isinstance(augment, str):
            augment = AUGMENTATIONS[check_choice("augment", augment, AUGMENTATIONS)]
        if augment is crop_flip and x.dim() != 4:
            raise MixbitError(f"augment='crop_flip' needs images [N, C, H, W]; x has shape {tuple(x.shape)}")
        self.x, self.y, self.batch, self.seed = x, y, batch, seed
        self.augment = augment
        self.drop_last = drop_last
        joined = dist.is_available() and dist.is_initialized()
        self.world = world if world is not None else dist.get_world_size() if joined else 1
        self.rank = rank if rank is not None else dist.get_rank() if joined else 0
        if not 0 <= self.rank < self.world:
            raise MixbitError(f"rank={self.rank}: expected 0 to {self.world - 1} with world={self.world}")
        last = 0 if drop_last else len(x) % batch
        if batch % self.world or last % self.world:
            raise MixbitError(
                f"batches of {batch} images{f' and a last one of {last}' if last else ''} cannot be shared evenly by "
                f"{self.world} processes; expected multiples of {self.world}"
            )
        if len(self) == 0:
            raise MixbitError(f"x holds {len(x)} images, less than one batch of {batch}; expected a smaller batch")
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and augmentation of the next iteration."""
        self.epoch = epoch

    def describe(self) -> dict[str, Any]:
        """What decides the batches but for the images themselves; two runs on the same data agree in it."""
        name = None if self.augment is None else getattr(self.augment, "__name__", type(self.augment).__name__)
        return {"images": len(self.x), "batch": self.batch, "seed": self.seed, "augment": name, "last": self.drop_last}

    def __len__(self) -> int:
        return len(self.x) // self.batch if self.drop_last else -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        named = hashlib.blake2b(f"{self.seed} {self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(named, "little") >> 1)
        order = torch.randperm(len(self.x), generator=generator)
        for whole in order.split(self.batch)[: len(self)]:
            share = slice(self.rank * len(whole) // self.world, (self.rank + 1) * len(whole) // self.world)
            x = self.x[whole]
            if self.augment is not None:
                x = self.augment(x, generator)  # of the whole batch: the draws are the same for any number of processes
            x = x[share]
            if self.y is None:
                yield x
            else:
                chosen = whole[share]
                yield x, self.y[chosen] if isinstance(self.y, Tensor) else [self.y[int(i)] for i in chosen]
