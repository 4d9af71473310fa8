"""Trains VGG-9 in float on CIFAR-10, for want of published weights: where `bench_retrain.py` starts from.

All 50,000 JPEG images, crops and flips, batch 128, SGD with momentum 0.9 and weight decay 5e-4, a cosine from 0.1 to 0,
bfloat16 autocast. Weights go to bench/weights (float16 is what is kept of them: half the file, no loss of accuracy),
the scores into a row. A run that is stopped goes on at its last checkpoint, in runs/vgg9.

Usage: MIXBIT_DATA=folder python bench/train_vgg9.py [--width W] [--epochs N] [--threads N] [--seed N]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
import torch
from rows import BENCH, measure

from mixbit import zoo
from mixbit.training import Images, cross_entropy, in_bf16, param_groups, train

RUNS = BENCH.parent / "runs" / "vgg9"
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 0.1, 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    config = {
        "network": f"VGG-9 {options.width:g}", "recipe": "float", "images": 50_000, "epochs": options.epochs,
        "lr": LEARNING_RATE,
    }  # fmt: skip
    row = measure("vgg9", config, lambda: trained(options), seed=options.seed)
    print(config, row["figures"], f"{row['seconds']} s")


def trained(options: Any) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    model = zoo.vgg9(width=options.width).to(memory_format=torch.channels_last)
    x, y = zoo.cifar10_jpeg("train")
    images = Images(x.to(memory_format=torch.channels_last), y, BATCH, seed=options.seed, augment="crop_flip")
    groups = param_groups(model, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9)
    steps = options.epochs * len(images)
    train(
        model,
        images,
        in_bf16(cross_entropy()),
        optimizer,
        epochs=options.epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        checkpoint=RUNS / f"float_{options.width:g}_{options.seed}.partial",
        after_step=lambda done, loss: print(done, loss, flush=True) if done % len(images) == 0 else None,
    )
    path = BENCH / "weights" / f"cifar10_vgg9_{options.width:g}_fp16.npz"
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    np.savez(path, **{name: value.numpy() for name, value in state.items() if "num_batches" not in name})
    model.load_state_dict(state)
    figures = {}
    for part, (tests, labels) in (("JPEG", zoo.cifar10_jpeg("test")), ("lossless", zoo.cifar10("test"))):
        with torch.no_grad():
            right = torch.cat([model(batch).argmax(1) for batch in tests.split(500)]) == labels
        figures[f"{part} %"] = round(100 * float(right.double().mean()), 2)
    return {**figures, "MB": round(path.stat().st_size / 1e6, 3)}


if __name__ == "__main__":
    main()
