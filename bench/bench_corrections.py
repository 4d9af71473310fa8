"""Training-free corrections at low precision: the metric with and without each, on the same test images.

Corrections: none; equalize (before preparing; without effect on networks with ReLU6); bias (after calibrating);
rounding (weights of four bits and less, after calibrating); all, in the order equalize, rounding, bias.

Usage: python bench/bench_corrections.py [--again] [--network NAME]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit

# weight bits, act bits, granularity, ranges.
GRIDS = (
    (6, 8, "per_channel", "mse"),
    (4, 8, "per_channel", "mse"),
    (3, 8, "per_channel", "mse"),
    (8, 8, "per_tensor", "mse"),
    (6, 6, "per_channel", "mse"),
    (6, 6, "per_channel", "percentile"),
)
CORRECTIONS: dict[str, dict[str, bool]] = {
    "none": {},
    "equalize": {"equalize": True},
    "bias": {"bias": True},
    "rounding": {"rounding": True},
    "all": {"equalize": True, "rounding": True, "bias": True},
}


def figures(setting: Setting, config: dict[str, Any]) -> dict[str, Any]:
    names = [layer.name for layer in setting.found]
    precision = mixbit.LayerPrecision(weight=config["weight"], act=config["act"], granularity=config["granularity"])
    recipe = mixbit.Recipe(layers=dict.fromkeys(names, precision))
    scores: dict[str, Any] = {"test images": setting.test_images, "float": round(setting.score(setting.folded), 2)}
    for name, chosen in CORRECTIONS.items():
        if chosen == {"rounding": True} and config["weight"] > 4:
            scores[name] = scores["none"]  # wider weights are left alone
            continue
        asked = {"bias": False, **chosen}
        model = setting.quantized(recipe, **asked, ranges=config["ranges"])
        scores[name] = round(setting.score(model), 2)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    known = [name for name, network in NETWORKS.items() if network.weights is not None]
    parser.add_argument("--network", choices=known, action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.network or known:
        made: list[Setting] = []
        for weight, act, granularity, ranges in GRIDS:
            config = {
                "network": network, "weight": weight, "act": act, "granularity": granularity, "ranges": ranges,
                "images": pack(),
            }  # fmt: skip

            def run(config: dict[str, Any] = config, made: list[Setting] = made, network: str = network) -> Any:
                if not made:
                    made.append(Setting(network))
                return figures(made[0], config)

            row = measure("corrections", config, run, again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
