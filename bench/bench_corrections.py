"""Training-free corrections at low precision: top-1 with and without each, on the same test images.

Corrections: none; equalize (before preparing; without effect on networks with ReLU6); bias (after calibrating); both.
Calibration takes the first images of the pack, the test its last third, or the test split where there is one. With
MIXBIT_DATA the full packs are used, else the shipped ones.

Usage: python bench/bench_corrections.py [--again] [--network NAME]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from rows import measure

import mixbit
from mixbit import sources

IMAGENET = "imagenet_compat"
#: Weights, options, data, and test data where it is another pack.
NETWORKS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "mobilenet_v1 0.25": (
        "mobilenet_v1_0.25_128_qat_uint8.npz",
        {"width": 0.25},
        "imagenet_compat-mobilenet_v1-128",
        "",
    ),
    "mobilenet_v1 0.75": (
        "mobilenet_v1_0.75_192_qat_uint8.npz",
        {"width": 0.75},
        "imagenet_compat-mobilenet_v1-192",
        "",
    ),
    "mobilenet_v1 1.0": ("mobilenet_v1_1.0_224_qat_uint8.npz", {"width": 1.0}, "imagenet_compat-mobilenet_v1", ""),
    "mobilenet_v2 1.0": ("mobilenet_v2_1.0_224_qat_uint8.npz", {}, IMAGENET, ""),
    "vww_mobilenet": ("mlperf_tiny_vww_mobilenetv1_0.25_96_fp32.npz", {}, "coco-train-vww", "coco-val-vww"),
    "resnet8": ("mlperf_tiny_resnet8_cifar10_fp32.npz", {}, "cifar10-train-raw", "cifar10-test-raw"),
}
CALIBRATION = 128


def top1(network: str, weight: int, act: int, granularity: str, method: str, equalize: bool, bias: bool) -> float:
    weights, options, data, test = NETWORKS[network]
    model = sources.load_model(f"zoo:{network.split()[0]}", weights, options)
    batches = sources.load_data(f"zoo:{data}", batch=32)
    if test:
        labelled = sources.load_data(f"zoo:{test}", batch=32)
    else:
        labelled = batches[-max(1, len(batches) // 3) :]
        batches = batches[: len(batches) - len(labelled)]
    calibration = [x for x, _ in batches[: CALIBRATION // 32]]
    example = calibration[0][:1]
    mixbit.fold_batchnorm_(model, example)
    if equalize:
        mixbit.equalize_(model, example)
    if weight < 32:
        precision = mixbit.LayerPrecision(weight=weight, act=act, granularity=granularity)
        names = [layer.name for layer in mixbit.layers(model, example)]
        mixbit.prepare_(model, mixbit.Recipe(layers=dict.fromkeys(names, precision)), example)
        mixbit.calibrate_(model, calibration, method=method)
        if bias:
            mixbit.correct_bias_(model, calibration)
    return round(mixbit.evaluate(model, labelled), 2)


def figures(config: dict[str, Any]) -> dict[str, Any]:
    arguments = (config["network"], config["weight"], config["act"], config["granularity"], config["ranges"])
    return {
        "float": top1(config["network"], 32, 32, "per_channel", "mse", False, False),
        "none": top1(*arguments, False, False),
        "equalize": top1(*arguments, True, False),
        "bias": top1(*arguments, False, True),
        "both": top1(*arguments, True, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="only these")
    options = parser.parse_args()
    torch.manual_seed(0)
    for network in options.network or NETWORKS:
        for weight, act, granularity, ranges in (
            (6, 8, "per_channel", "mse"),
            (4, 8, "per_channel", "mse"),
            (8, 8, "per_tensor", "mse"),
            (6, 6, "per_channel", "mse"),
            (6, 6, "per_channel", "percentile"),
        ):
            config = {
                "network": network,
                "weight": weight,
                "act": act,
                "granularity": granularity,
                "ranges": ranges,
                "images": "full pack" if "MIXBIT_DATA" in os.environ else "shipped",
            }
            row = measure("corrections", config, lambda c=config: figures(c), again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
