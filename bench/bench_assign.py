"""Recipes at no more than 1 %p top-1 loss on CIFAR-10 ResNets, for each mode and method: cost and time.

The recipe is the cheapest that bisection on the predicted SQNR finds (about seven evaluations of the fake-quantized
network on the 1000 lossless test images). Reductions name their baseline: uniform 32, 16 and 8 bits of weights and
activations, first and last layers counted.

Usage: python bench/bench_assign.py [--depth 20] [--again]
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

from rows import measure

import mixbit

# method, mode, the cost that is saved.
RUNS = (
    ("threshold", "sqnr", "bops"),
    ("threshold", "ops", "bops"),
    ("threshold", "weight_memory", "weight_memory"),
    ("greedy", "sqnr", "bops"),
    ("greedy", "sqnr", "weight_memory"),
    ("ilp", "sqnr", "bops"),
    ("ilp", "sqnr", "weight_memory"),
    ("aimet", "sqnr", "bops"),
)


class Setting:
    """A network with its table and data, made when first asked for."""

    def __init__(self, depth: int) -> None:
        weights = mixbit.zoo.data_dir() / "weights" / f"cifar10_resnet{depth}_fp32.npz"
        self.model = mixbit.zoo.cifar_resnet(depth, weights=weights).eval()
        images, _ = mixbit.zoo.cifar10("train", 256)
        self.batches = list(images.split(64))
        self.example = images[:2]
        test_images, test_labels = mixbit.zoo.cifar10("test")
        self.test = list(zip(test_images.split(100), test_labels.split(100), strict=True))
        self.table = mixbit.analyze(self.model, self.batches)
        self.float_top1 = mixbit.evaluate(self.model, self.test)
        self.costs = {n: getattr(mixbit.costs, n)(self.model, self.example) for n in ("bops", "ops", "weight_memory")}

    def quantized(self, recipe: mixbit.Recipe) -> Any:
        model = mixbit.fold_batchnorm_(copy.deepcopy(self.model), self.example)
        mixbit.prepare_(model, recipe, self.example)
        return mixbit.calibrate_(model, self.batches, example=self.example)

    def top1(self, recipe: mixbit.Recipe) -> float:
        return mixbit.evaluate(self.quantized(recipe), self.test)

    def figures(self, method: str, mode: str, cost: str) -> dict[str, Any]:
        # The threshold rule takes its shares from the cost it is given: operations for the mode "ops".
        costs = self.costs["ops" if mode == "ops" else cost]
        start = time.perf_counter()
        recipe = mixbit.assign(
            self.table, costs, metric=self.top1, max_drop=1.0, reference=self.float_top1, method=method, mode=mode
        )
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {
            "float": round(self.float_top1, 2),
            "fake-quantized": round(recipe.report["metric"], 2),
            "integer": round(mixbit.evaluate(self.quantized(recipe), self.test, integer=True), 2),
            "feasible": recipe.report["feasible"],
            "predicted dB": round(self.table.predicted_sqnr_db(recipe), 2),
            "measured dB": round(mixbit.analysis.network_sqnr(self.model, recipe, self.batches), 2),
        }
        for name, table in self.costs.items():
            total = table.total(recipe)
            saved = [round(100 * (1 - total / table.uniform(b, b)), 2) for b in (32, 16, 8)]
            found[f"{name}: % less than 32/16/8 bit"] = saved
        return found | {"evaluations": recipe.report["evaluations"], "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    setting: list[Setting] = []
    for method, mode, cost in RUNS:

        def run(method: str = method, mode: str = mode, cost: str = cost) -> dict[str, Any]:
            if not setting:
                setting.append(Setting(options.depth))
            return setting[0].figures(method, mode, cost)

        config = {"network": f"ResNet-{options.depth}", "method": method, "mode": mode, "saves": cost}
        row = measure("assign", config, run, again=options.again)
        print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
