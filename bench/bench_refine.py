"""Free bits on the analytic stand-in for PULP clusters (`mixbit.costs.pulp`): nothing here was measured on a target.

MobileNetV1 (three widths) and MobileNetV2 at 224 x 224 with symmetric padding and random weights: shapes alone matter.
Starts are uniform 4/4, uniform 2/2, and "cyc", which cycles through pairs of widths (act (2, 4, 8)[7 i mod 3], weight
(2, 4, 8)[(5 i + 1) mod 3] in layer i); the network input has 8 bits in all of them.

Usage: python bench/bench_refine.py [--network NAME] [--again]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torchvision
from rows import measure
from torch import nn

import mixbit
from mixbit.costs.pulp import KERNELS, TARGETS
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.zoo.imagenet import MobileNetV1

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV1 0.25": lambda: MobileNetV1(0.25, same=False).eval(),
    "MobileNetV1 0.75": lambda: MobileNetV1(0.75, same=False).eval(),
    "MobileNetV1 1.0": lambda: MobileNetV1(1.0, same=False).eval(),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(weights=None).eval(),
}
STARTS: dict[str, Callable[[int], tuple[int, int]]] = {
    "4/4": lambda i: (4, 4),
    "2/2": lambda i: (2, 2),
    "cyc": lambda i: (KERNELS[7 * i % 3], KERNELS[(5 * i + 1) % 3]),
}


@cache
def tables(network: str, target: str) -> tuple[mixbit.CostTable, mixbit.CostTable]:
    """Latency and bit operations."""
    model, example = NETWORKS[network](), torch.zeros(1, 3, 224, 224)
    return mixbit.costs.pulp(target, model, example), mixbit.costs.bops(model, example)


def figures(network: str, target: str, start: str) -> dict[str, Any]:
    latency, bops = tables(network, target)
    widths = [STARTS[start](i) for i in range(len(latency.layers))]
    recipe = Recipe(
        layers={
            name: LayerPrecision(act=8 if group == 0 else act, weight=weight)
            for name, group, (act, weight) in zip(latency.layers, latency.input_group, widths, strict=True)
        }
    )
    refined = {mode: mixbit.refine(recipe, latency, mode) for mode in ("strict", "no_slower")}
    report = refined["strict"].report
    eight = latency.uniform(8, 8)
    return {
        "8/8 cycles (stand-in)": int(eight),
        "start": int(report["latency_before"]),
        "refined": int(report["latency_after"]),
        "fastest widths": int(report["latency_minimum"]),
        "start / 8/8": round(report["latency_before"] / eight, 4),
        "refined / 8/8": round(report["latency_after"] / eight, 4),
        "layers raised (strict, no slower)": [len(r.report["raised"]) for r in refined.values()],
        "BOPs / 8/8 (start, strict, no slower)": [
            round(bops.total(r) / bops.uniform(8, 8), 4) for r in (recipe, *refined.values())
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", choices=NETWORKS, help="default: all")
    parser.add_argument("--again", action="store_true", help="make rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.network or NETWORKS:
        for target in TARGETS:
            for start in STARTS:
                config = {"network": network, "target": target, "start": start}
                row = measure(
                    "refine", config, lambda n=network, t=target, s=start: figures(n, t, s), again=options.again
                )
                print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
