"""Weights that are cut over processes (FSDP2): the part of this process, and the whole."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from mixbit.errors import MixbitError
from mixbit.quantizers import Quantizer, effective_scales


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is cut over processes."""
    return isinstance(t, DTensor)


def local(t: Any) -> Any:
    """This process's part of a DTensor; anything else as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """All of a tensor on every process; of a DTensor all processes have to ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole_like(part: Tensor, weight: Tensor) -> Tensor:
    """All of a tensor of which this process has the part that it has of a weight; all processes have to ask for it."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    ).full_tensor()


def local_scales(quantizers: Sequence[Quantizer]) -> list[Tensor]:
    """Scales as they go with the local parts of their weights; see `effective_scales`."""
    if not any(isinstance(p, DTensor) for q in quantizers for p in q.parameters()):
        return effective_scales(quantizers)
    with _mixed():
        return [local_scale(scale) for scale in effective_scales(quantizers)]


@contextlib.contextmanager
def _mixed() -> Iterator[None]:
    """Buffers are whole where parameters are cut; torch takes them together here, and warns of those of one number."""
    with implicit_replication(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found a non-scalar tensor with numel=1")
        yield


def local_scale(t: Tensor) -> Tensor:
    """The part of a scale that goes with the part of its weight: rows are cut alike; one scale is everyone's."""
    if isinstance(t, DTensor):
        return t.full_tensor() if t.numel() == 1 else t.to_local()
    return t


def local_extra(weight: Tensor, quantizer: Quantizer) -> Tensor | None:
    """The extra bits of this process's part of a weight: buffers are whole where parameters are cut by rows.

    Raises:
        MixbitError: The weight is cut along another dimension.
    """
    extra = getattr(quantizer, "extra_bits", None)
    if extra is None or not isinstance(weight, DTensor) or isinstance(extra, DTensor):
        return local(extra)
    for i, placement in enumerate(weight.placements):
        if placement.is_shard(0):
            size, rank = weight.device_mesh.size(i), weight.device_mesh.get_local_rank(i)
            parts = extra.chunk(size)
            extra = parts[rank] if rank < len(parts) else extra[:0]
        elif not placement.is_replicate():
            raise MixbitError(f"weight is placed as {placement}: expected parts along dimension 0, or copies")
    return extra


def local_quantizer(weight: Tensor, quantizer: Quantizer) -> Quantizer:
    """What quantizes the local part of a weight, without learning: the quantizer itself where the weight is whole."""
    if not isinstance(weight, DTensor):
        return quantizer
    scale = local_scales([quantizer])[0].detach()
    made = Quantizer(
        int(quantizer.bit_width),
        channels=scale.numel(),
        signed=quantizer.signed,
        narrow_range=quantizer.narrow_range,
        axis=quantizer.axis,
        rounding=quantizer.rounding,
        device=scale.device,
    )
    made.set_(scale)
    made.extra_bits = local_extra(weight, quantizer)
    return made


def whole_scales(quantizers: Sequence[Quantizer]) -> list[Tensor]:
    """All scales of each quantizer; of sharded ones all processes have to ask for them."""
    if not any(isinstance(p, DTensor) for q in quantizers for p in q.parameters()):
        return effective_scales(quantizers)
    with _mixed():
        return [whole(scale) for scale in effective_scales(quantizers)]


def all_sums(counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Counts of the parts [..., weights] added up over the processes that share each weight."""
    meshes = {id(w.device_mesh): w.device_mesh for w in weights if isinstance(w, DTensor)}
    for key, mesh in meshes.items():
        own = torch.tensor([isinstance(w, DTensor) and id(w.device_mesh) == key for w in weights], device=counts.device)
        # Copies of a dimension of the mesh hold the same counts.
        sharded = next(w for w in weights if isinstance(w, DTensor) and id(w.device_mesh) == key).placements
        total = counts.clone()
        for i, placement in enumerate(sharded):
            if placement.is_shard():
                torch.distributed.all_reduce(total, group=mesh.get_group(i))
        counts = torch.where(own, total, counts)
    return counts
