"""Small networks that several tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixbit


class Residual(nn.Module):
    """Conv, batch norm, functional relu and add, pooling, two outputs if asked."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.side = nn.Conv2d(channels, channels, 1)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.a(x))
        x = F.relu(self.b(y) + self.side(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shared(nn.Module):
    """One layer used twice, a loop, dict output, keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.alias = self.again
        self.unused = nn.Linear(6, 6)

    def forward(self, values: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.first(values)
        for _ in range(2):
            x = torch.relu(self.again(x))
        if scale is not None:
            x = x * scale
        return {"out": self.alias(x), "hidden": [x, x.argmax(1)]}


def seeded(make, *args):
    """A network in eval mode with seeded weights and non-trivial statistics."""
    torch.manual_seed(0)
    model = make(*args).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model


#: Grids as retraining with extra levels has them: thresholds belong to the upper level.
HALF_UP = {"rounding": "half_up", "narrow_range": False}


class Two(nn.Module):
    """Two linear layers on one input."""

    def __init__(self, inputs: int = 10, outputs: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(inputs, outputs, bias=False)
        self.b = nn.Linear(outputs, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def on_one_grid(model: nn.Module | None = None, bits: int = 2, scale: float = 1.0, **precision: Any) -> nn.Module:
    """Float activations, weights on one grid of step `scale`; all zeros if no model is given."""
    made = Two() if model is None else model
    recipe = {"default": {"weight": bits, "act": None, "granularity": "per_tensor", **HALF_UP, **precision}}
    mixbit.prepare_(made, mixbit.Recipe.from_dict(recipe), weight_quantizer="fixed")
    for module in mixbit.quantizers.quantized_layers(made).values():
        module.weight_quantizer.set_(torch.full((module.weight_quantizer.channels,), scale))
        if model is None:
            nn.init.zeros_(module.weight)
    return made
