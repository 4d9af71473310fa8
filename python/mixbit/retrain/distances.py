"""How far weights are from the decision thresholds of their grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.errors import MixbitError
from mixbit.quantizers import Quantizer
from mixbit.retrain.shards import whole, whole_scales
from mixbit.retrain.thresholds import check_grid, named_layers

#: The largest distance, in steps of the grid.
FARTHEST = 0.5


def threshold_distances(model: nn.Module) -> dict[str, Tensor]:
    """How far each quantized weight of a model is from the nearest decision threshold of its own grid.

    In steps of that grid, scale / 2^e of a weight with e extra bits: 0 at a threshold, 1/2 at a level; beyond the
    outermost thresholds it is the distance from the outermost one, at most 1/2 (the d of `ThresholdAware`). Weights
    near 0 are those that noise switches.

    Args:
        model: Prepared and calibrated. Layers whose weight quantizer is None or off are left out.

    Returns:
        float32 of the weight's shape, by layer; of sharded weights (FSDP2) whole ones, for which all processes have to
        call this.

    Raises:
        MixbitError: A layer is not calibrated, or its bits are still being searched.
    """
    layers: dict[str, Any] = {}
    for name, layer in named_layers(model).items():
        quantizer = layer.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            continue
        check_grid(name, quantizer)
        layers[name] = layer
    weights = [layer.weight for layer in layers.values()]
    found = distances_of(weights, [layer.weight_quantizer for layer in layers.values()])
    return dict(zip(layers, found, strict=True))


def threshold_histograms(model: nn.Module, bins: int = 10) -> dict[str, list[int]]:
    """How many weights of each layer are how far from their nearest threshold.

    Args:
        model: As in `threshold_distances`.
        bins: Of equal width, from 0 to half a step.

    Returns:
        Weights in each bin by layer. A distance at an edge is in the upper bin, 1/2 in the last one; weights that are
        not finite count as far.

    Raises:
        MixbitError: `bins` is no whole number above 0, or what `threshold_distances` raises.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise MixbitError(f"bins={bins!r}: expected a whole number above 0")
    counts = {}
    for name, distances in threshold_distances(model).items():
        index = (distances.flatten() * (bins / FARTHEST)).to(torch.int64).clamp(max=bins - 1)
        counts[name] = torch.bincount(index, minlength=bins).tolist()
    return counts


@torch.no_grad()
def distances_of(weights: Sequence[Tensor], quantizers: Sequence[Quantizer]) -> list[Tensor]:
    """The distance of weights from their thresholds in steps of their grids, float32 of each weight's shape."""
    doubled = ops.threshold_multipliers(
        [whole(weight.detach()).float() for weight in weights],
        whole_scales(quantizers),
        [quantizer.bit_width for quantizer in quantizers],
        [quantizer.extra_bits for quantizer in quantizers],
        shape="linear",
        alpha=0.0,
        rho=FARTHEST,
        narrow_range=[quantizer.narrow_range for quantizer in quantizers],
    )
    return [twice / 2 for twice in doubled]
