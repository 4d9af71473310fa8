"""Time of the SQNR analysis against the accuracy-based flow, one after the other on the same machine.

The accuracy-based flow: one prepared model; for every width and every layer that layer alone is quantized, bits
switched in place, and the whole test set is evaluated (layers x widths evaluations). The analysis reads its 256
calibration images. The ratio on equal images divides both by what they read.

Usage: python bench/bench_analysis.py [--depth 20] [--threads N] [--again]
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from rows import measure

import mixbit
from mixbit.quantizers import quantized_layers

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def flow_of_accuracies(model: Any, batches: Any, test: Any, example: Any) -> float:
    """Seconds of layers x widths evaluations; what they find is not needed here."""
    names = mixbit.layers(model, example).names
    work = mixbit.fold_batchnorm_(copy.deepcopy(model), example)
    start = time.perf_counter()
    for bits in reversed(WIDTHS):
        mixbit.prepare_(work, mixbit.Recipe.uniform(names, act=bits, weight=bits), example)
        if bits == WIDTHS[-1]:
            mixbit.calibrate_(work, batches)
        modules = quantized_layers(work)
        for name in names:
            for other, module in modules.items():
                module.bypassed = other != name
            mixbit.evaluate(work, test, metric="top1")
        for module in modules.values():
            module.bypassed = False
    return time.perf_counter() - start


def figures(depth: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    weights = mixbit.zoo.data_dir() / "weights" / f"cifar10_resnet{depth}_fp32.npz"
    model = mixbit.zoo.cifar_resnet(depth, weights=weights).eval()
    images, _ = mixbit.zoo.cifar10("train", 256)
    batches = list(images.split(64))
    test_images, test_labels = mixbit.zoo.cifar10("test")
    test = list(zip(test_images.split(100), test_labels.split(100), strict=True))
    example = images[:2]
    seconds = {}
    for joint in (True, False):
        mixbit.analyze(model, batches[:1], precisions=(8,), joint=True)  # warm
        start = time.perf_counter()
        mixbit.analyze(model, batches, precisions=WIDTHS, joint=joint)
        seconds["joint" if joint else "separate"] = time.perf_counter() - start
    flow = flow_of_accuracies(model, batches, test, example)
    per_image = (len(test_images) / len(images)) * seconds["joint"] / flow
    return {
        "layers x widths": len(mixbit.layers(model, example)) * len(WIDTHS),
        "accuracy flow s": round(flow, 2),
        "analyze joint s": round(seconds["joint"], 2),
        "analyze all pairs s": round(seconds["separate"], 2),
        "less time % (joint)": round(100 * (1 - seconds["joint"] / flow), 2),
        "less time % (all pairs)": round(100 * (1 - seconds["separate"] / flow), 2),
        "less time % on equal images (joint)": round(100 * (1 - per_image), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure a row that exists anew")
    options = parser.parse_args()
    config = {
        "network": f"ResNet-{options.depth}",
        "widths": "2..8",
        "calibration images": 256,
        "test images": 1000,
        "threads": options.threads,
    }
    row = measure("analysis", config, lambda: figures(options.depth, options.threads), again=options.again)
    print(config, row["figures"])


if __name__ == "__main__":
    main()
