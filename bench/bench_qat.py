"""Training at given bits: ResNet-20 on CIFAR-10 from the published float weights, with and without a float teacher.

Three epochs of `retrain.fit` on 10,000 JPEG images (a fixed list for each seed; crops and flips, batch 128, bfloat16
autocast). Recipes are uniform: WwAa has w-bit weights and a-bit inputs in every layer, but for the image itself, which
keeps 8 bits; "first/last 8" gives both operands of the first and last layer 8 bits. Their cost (bops, all layers
counted) is audited in shares of uniform 8/8.

The test set is the 10,000 JPEG images; the 1,000 lossless ones stand beside. "before" is the calibrated network that
training starts from, "after" the trained one, "integer" what it computes with batch normalization folded, in integers,
on the lossless images. "after - float" is a paired bootstrap interval over the test images (95 %, 2,000 samples). The
float weights were trained on lossless images: training on JPEG images adapts to them, so that the float network
trained in the same way ("W32A32") is the reference that counts.

A run that is stopped goes on at its last checkpoint, in runs/bench_qat; rows that exist are not measured again.

Usage: MIXBIT_DATA=folder python bench/bench_qat.py [--seeds N] [--recipe NAME] [--distill SHARE] [--epochs N]
    [--images N] [--threads N] [--again]
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from bench_search import interval
from rows import BENCH, config_hash, measure
from torch import Tensor, nn

import mixbit
from mixbit import retrain, sources, zoo
from mixbit.quantizers import record_tensors_
from mixbit.training import Images, cross_entropy, distill, in_bf16, train

#: weight bits, act bits, bits of the first and the last layer.
RECIPES: dict[str, tuple[int | None, int | None, int | None]] = {
    "W32A32": (None, None, None),
    "W4A4": (4, 4, None),
    "W2A4 first/last 8": (2, 4, 8),
    "W2A2": (2, 2, None),
}
BATCH, LEARNING_RATE, TEMPERATURE = 128, 0.02, 4.0
CHECKPOINTS = BENCH.parent / "runs" / "bench_qat"


class Study:
    """One seed: data and the float network."""

    def __init__(self, seed: int, images: int) -> None:
        x, y = zoo.cifar10_jpeg("train", images, seed)
        x = x.to(memory_format=torch.channels_last)
        self.images = Images(x, y, BATCH, seed=seed, augment="crop_flip")
        self.calibration = list(x[:256].split(64))
        self.example = x[:2]
        self.tests = {"JPEG": zoo.cifar10_jpeg("test"), "lossless": zoo.cifar10("test")}
        self.float = sources.load_model("zoo:cifar_resnet", "cifar10_resnet20_fp32.npz", {"depth": 20})
        self.float.to(memory_format=torch.channels_last)
        self.costs = mixbit.costs.bops(self.float, self.example)

    def right(self, model: nn.Module, part: str) -> Tensor:
        """Which test images get their label."""
        x, y = self.tests[part]
        with torch.no_grad():
            return (
                torch.cat([model(part).argmax(1) for part in x.to(memory_format=torch.channels_last).split(100)]) == y
            )

    def trained(self, name: str, share: float, epochs: int, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
        """The network before and after training."""
        model = copy.deepcopy(self.float)
        teacher = self.float if share else None
        options: dict[str, Any] = {"epochs": epochs, "checkpoint": checkpoint, "checkpoint_every": 20}
        weight, act, ends = RECIPES[name]
        if weight is None:
            float_options = {"momentum": 0.9, "weight_decay": 1e-4}
            optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, **float_options)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(self.images))
            objective = cross_entropy() if teacher is None else distill(teacher, TEMPERATURE, share)
            train(model, self.images, in_bf16(objective), optimizer, scheduler=cosine, **options)
            mixbit.training.reestimate_batchnorm_(model, self.images)
            return self.float, model
        mixbit.prepare_(model, self.costs.uniform_recipe(act, weight, ends), self.example)
        mixbit.calibrate_(model, self.calibration)
        before = copy.deepcopy(model)
        retrain.fit(
            model,
            self.images,
            lr=LEARNING_RATE,
            teacher=teacher,
            temperature=TEMPERATURE,
            teacher_weight=share or 1.0,
            bf16=True,
            **options,
        )
        return before, model

    def figures(self, name: str, share: float, epochs: int, checkpoint: Path) -> dict[str, Any]:
        """Scores of one row."""
        weight, act, ends = RECIPES[name]
        found: dict[str, Any] = {"bops of 8/8": self.costs.total(self.costs.uniform_recipe(act, weight, ends))}
        found["bops of 8/8"] = round(found["bops of 8/8"] / self.costs.uniform(8, 8), 4)
        before, after = self.trained(name, share, epochs, checkpoint)
        networks = {"float": self.float, "before": before, "after": after}
        right = {key: {part: self.right(model, part) for part in self.tests} for key, model in networks.items()}
        for part in self.tests:
            for key in networks:
                found[f"{key}, {part} %"] = percent(right[key][part])
        found["after - float, JPEG"] = interval(right["after"]["JPEG"].numpy(), right["float"]["JPEG"].numpy())
        if weight is not None:
            mixbit.fold_batchnorm_(after, self.example)
            record_tensors_(after, self.calibration, self.example, quantized=True)
            x, y = self.tests["lossless"]
            loader = list(zip(x.split(100), y.split(100), strict=True))
            found["integer, lossless %"] = round(mixbit.evaluate(after, loader, integer=True), 2)
        checkpoint.unlink(missing_ok=True)
        return found


def percent(right: Tensor) -> float:
    return round(100 * float(right.double().mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only these")
    parser.add_argument("--distill", type=float, action="append", help="shares of the teacher (default: 0 and 1)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        study: list[Study] = []
        for name in options.recipe or RECIPES:
            for share in options.distill or [0.0, 1.0]:
                config = {
                    "network": "ResNet-20", "recipe": name, "seed": seed, "images": options.images,
                    "epochs": options.epochs, "lr": LEARNING_RATE, "distill": share,
                }  # fmt: skip
                checkpoint = CHECKPOINTS / f"{config_hash('qat', config, seed)}.partial"

                def figures(
                    name: str = name, share: float = share, seed: int = seed, path: Path = checkpoint, made: Any = study
                ) -> Any:
                    if not made:
                        made.append(Study(seed, options.images))
                    return made[0].figures(name, share, options.epochs, path)

                row = measure("qat", config, figures, seed=seed, again=options.again)
                print(config, row["figures"], f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
