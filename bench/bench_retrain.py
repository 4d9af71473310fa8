"""Retraining at two bits with extra levels, each mechanism off in turn: VGG-9 (quarter width) and ResNet-20, CIFAR-10.

All networks start from the same float weights and train alike: six epochs on 10,000 JPEG images (a fixed list for
each seed; crops and flips, batch 128, bfloat16), SGD with momentum, cosine from 0.03. Inputs of layers have 4 bits
(PACT; the image itself 8), weights one learned scale a layer. "w/a" are bits of hidden weights and of inputs; the first
and the last layer keep 4-bit weights throughout. Networks with extra levels train 0.4 of the steps, then at most a
share f (0.2) of each layer's weights gets one more bit, ranked by how often they switched between contiguous levels;
weights that never switched get none, "flagged" says how many did. "smaller steps" is the threshold-aware step
throughout.

The test set is the 10,000 JPEG images, the 1,000 lossless ones stand beside; differences to uniform 4/4 and 2/4 of the
same seed are paired bootstrap intervals over the test images (95 %, 2,000 samples). "not re-estimated" is the lossless
score before the statistics of the batch normalizations were averaged anew. Bits of a weight are what `retrain.storage`
writes, "without index" and in the cheapest mode that knows where the extra levels are; scales and biases are left out
(they are equal). "switches" is the mean share of weights that change level in a step, in the last quarter of the steps.

A run that is stopped goes on at its last checkpoint, in runs/bench_retrain; rows that exist are not measured again.

Usage: MIXBIT_DATA=folder python bench/bench_retrain.py [--network NAME] [--arm NAME] [--seeds N] [--threads N]
    [--again]
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
import torch
from bench_search import interval
from rows import BENCH, config_hash, measure
from torch import Tensor, nn

import mixbit
from mixbit import sources, zoo
from mixbit.retrain import Dampening, IterativeFreezing, Schedule, SwitchTracker, ThresholdAware, storage
from mixbit.training import Images, cross_entropy, reestimate_batchnorm_, train

BATCH, LEARNING_RATE, EPOCHS, IMAGES = 128, 0.03, 6, 10_000
#: Share of the steps before the extra levels.
ASSIGN_AT = 0.4
RUNS = BENCH.parent / "runs"
#: What `train_vgg9.py` made.
VGG = BENCH / "weights" / "cifar10_vgg9_0.25_fp16.npz"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VGG-9 0.25": lambda: zoo.vgg9(width=0.25, weights=VGG),
    "ResNet-20": lambda: sources.load_model("zoo:cifar_resnet", "cifar10_resnet20_fp32.npz", {"depth": 20}),
}
#: What differs from two bits without any of the mechanisms.
ARMS: dict[str, dict[str, Any]] = {
    "float": {"weight": None},
    "4/4": {"weight": 4},
    "2/4": {},
    "extra levels": {"fraction": 0.2},
    "3/4": {"weight": 3},
    "extra levels at random": {"fraction": 0.2, "by": "random"},
    "extra levels + smaller steps": {"fraction": 0.2, "aware": True},
    "2/4 + smaller steps": {"aware": True},
    "extra levels f=0.1": {"fraction": 0.1},
    "extra levels f=0.5": {"fraction": 0.5},
    "2/4 + freezing": {"freezing": True},
    "2/4 + dampening": {"dampening": True},
    "extra levels, then freezing": {"fraction": 0.2, "freezing": True},
    "extra levels by one snapshot": {"fraction": 0.2, "by": "snapshot"},
    "extra levels by oscillation": {"fraction": 0.2, "score": "osc"},
    "extra levels, groups of 16": {"fraction": 0.2, "group": 16},
    "extra levels f=0.3": {"fraction": 0.3},
}


class Study:
    """A network and a seed: data and the float weights."""

    def __init__(self, network: str, seed: int) -> None:
        x, y = zoo.cifar10_jpeg("train", IMAGES, seed)
        x = x.to(memory_format=torch.channels_last)
        self.images = Images(x, y, BATCH, seed=seed, augment="crop_flip")
        self.calibration = list(x[:256].split(64))
        self.example = x[:2]
        self.tests = {"JPEG": zoo.cifar10_jpeg("test"), "lossless": zoo.cifar10("test")}
        self.tests = {part: (x.to(memory_format=torch.channels_last), y) for part, (x, y) in self.tests.items()}
        self.float = NETWORKS[network]().to(memory_format=torch.channels_last)
        self.costs = mixbit.costs.bops(self.float, self.example)

    def right(self, model: nn.Module, part: str) -> Tensor:
        """Which test images get their label."""
        x, y = self.tests[part]
        model.eval()
        with torch.no_grad():
            return torch.cat([model(images).argmax(1) for images in x.split(100)]) == y

    def recipe(self, weight: int) -> mixbit.Recipe:
        names = self.costs.layers
        return mixbit.Recipe(
            layers={
                name: mixbit.LayerPrecision(
                    weight=max(weight, 4) if name in (names[0], names[-1]) else weight,
                    act=8 if name == names[0] else 4,
                    granularity="per_tensor",
                    narrow_range=False,
                    rounding="half_up",
                )
                for name in names
            }
        )


class Mechanisms:
    """What watches a training run, and steps in halfway."""

    def __init__(self, model: nn.Module, arm: dict[str, Any], steps: int, seed: int) -> None:
        self.arm, self.steps, self.seed = arm, steps, seed
        self.tracker = SwitchTracker(model, arm.get("score", "adj"))
        self.freezing = None
        self.flagged: int | None = None
        if arm.get("freezing"):
            self.freezing = IterativeFreezing(
                model, Schedule(0.1, 0.02, steps, begin=ASSIGN_AT if "fraction" in arm else 0.25)
            )
        self.dampening = Dampening(model, Schedule(0.0, 0.1, steps)) if arm.get("dampening") else None
        self.parts: dict[str, Any] = {"tracker": self.tracker}
        for name, part in (("freezing", self.freezing), ("dampening", self.dampening)):
            if part is not None:
                self.parts[name] = part

    def after_step(self, done: int, _: float) -> None:
        self.tracker.update_()
        if self.freezing is not None:
            self.freezing.update_()
        if done == int(ASSIGN_AT * self.steps) and "fraction" in self.arm:
            options = {k: self.arm[k] for k in ("by", "group") if k in self.arm}
            given = self.tracker.assign_(fraction=self.arm["fraction"], seed=self.seed, **options)
            self.flagged = sum(given.values())

    def objective(self, model: nn.Module, item: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy()(model, item)
        return loss if self.dampening is None else loss + self.dampening()


def trained(study: Study, arm: dict[str, Any], seed: int, checkpoint: Path) -> tuple[nn.Module, Mechanisms | None]:
    """A network after training, its batch normalizations as training left them."""
    model = copy.deepcopy(study.float)
    steps = EPOCHS * len(study.images)
    weight = arm.get("weight", 2)
    made = None
    if weight is not None:
        mixbit.prepare_(
            model, study.recipe(weight), study.example, act_quantizer="pact", weight_quantizer=arm.get("kind")
        )
        mixbit.calibrate_(model, study.calibration)
        made = Mechanisms(model, arm, steps, seed)
    groups = mixbit.training.param_groups(model, LEARNING_RATE, weight_decay=1e-4)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if arm.get("aware"):
        optimizer = ThresholdAware(optimizer, model)
    train(
        model,
        study.images,
        made.objective if made else bf16_cross_entropy,
        optimizer,
        epochs=EPOCHS,
        scheduler=cosine,
        modules=made.parts if made else None,
        after_step=made.after_step if made else None,
        checkpoint=checkpoint,
        checkpoint_every=20,
    )
    return model, made


def bf16_cross_entropy(model: nn.Module, item: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy()(model, item)


def figures(study: Study, network: str, name: str, seed: int, checkpoint: Path, outputs: Path) -> dict[str, Any]:
    """Scores and sizes of one row."""
    model, made = trained(study, ARMS[name], seed, checkpoint)
    found: dict[str, Any] = {"not re-estimated %": percent(study.right(model, "lossless"))}
    reestimate_batchnorm_(model, study.images)
    right = {part: study.right(model, part) for part in study.tests}
    found |= {f"{part} %": percent(value) for part, value in right.items()}
    kept = outputs / f"{network} {name} {seed}.npy".replace(" ", "_").replace("/", "-")
    np.save(kept, np.packbits(right["JPEG"].numpy()))
    for base in ("4/4", "2/4"):
        reference = outputs / f"{network} {base} {seed}.npy".replace(" ", "_").replace("/", "-")
        if reference.exists() and name != base:
            other = np.unpackbits(np.load(reference))[: len(right["JPEG"])]
            found[f"against {base}"] = interval(right["JPEG"].numpy(), other)
    if made is not None:
        found |= sizes(model)
        history = made.tracker.history()
        weights = sum(dict(model.named_modules())[n].weight.numel() for n in made.tracker.layers)
        last = history[-len(history) // 4 :].sum(1).double().mean() / weights
        found["switches %"] = round(100 * float(last), 3)
        if made.flagged is not None:
            found["flagged %"] = round(100 * made.flagged / weights, 2)
        if made.freezing is not None:
            frozen = sum(int(made.freezing.frozen(n).sum()) for n in made.freezing.layers)
            found["frozen %"] = round(100 * frozen / weights, 2)
    checkpoint.unlink(missing_ok=True)
    return found


def sizes(model: nn.Module) -> dict[str, Any]:
    """Stored bits of a weight, all layers counted."""
    modes = {name: mode for name, mode in storage.report(model).modes.items() if mode.reason is None}
    free, cheapest = modes.pop("none"), min(modes.values(), key=lambda mode: mode.payload)
    return {
        "bits without index": round(free.bits_per_weight, 3),
        "bits": round(min(cheapest.bits_per_weight, free.bits_per_weight if not free.extra else 99.0), 3),
        "index": cheapest.index_mode if free.extra else "",
        "smaller than 4 bits": round(cheapest.ratio_uniform if free.extra else free.ratio_uniform, 3),
    }


def percent(right: Tensor) -> float:
    return round(100 * float(right.double().mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only these")
    parser.add_argument("--arm", choices=ARMS, action="append", help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoints, outputs = RUNS / "bench_retrain", BENCH / "results" / "retrain_outputs"
    for folder in (checkpoints, outputs):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for network in options.network or NETWORKS:
            study = functools.cache(lambda network=network, seed=seed: Study(network, seed))
            for name in options.arm or ARMS:
                config = {
                    "network": network, "arm": name, "images": IMAGES, "epochs": EPOCHS, "lr": LEARNING_RATE,
                    "seed": seed,
                }  # fmt: skip
                path = checkpoints / f"{config_hash('retrain', config, seed)}.partial"
                row = measure(
                    "retrain",
                    config,
                    lambda study=study, network=network, name=name, seed=seed, path=path: figures(
                        study(), network, name, seed, path, outputs
                    ),
                    seed=seed,
                    again=options.again,
                )
                print(config, row["figures"], f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
