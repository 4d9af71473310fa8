"""A small network and data for tests of the whole journey: what a user's own file looks like."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from nets import Residual, seeded


def network() -> nn.Module:
    """Five layers with a residual add."""
    return seeded(Residual)


def calibration() -> list[Tensor]:
    """Four batches of eight images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(4)]


def test() -> list[tuple[Tensor, Tensor]]:
    """Four labelled batches; the labels are the float network's own answers."""
    model = network()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(4)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in batches]
