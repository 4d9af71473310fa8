"""Free Bits from end to end: searched, refined for four targets, trained, and measured on the very same network.

The search chooses 4 or 8 bits, the same for a layer's weight and input (what vector units like), under a budget of
operations x bits, and learns from the float network's outputs (no label is used); the recipe it found is refined for
each target ("no_slower") and trained on from the searched weights. Latencies are cycles of the analytic stand-in
(docs/latency.md), not measurements. "8/8" is the network trained in the same way at 8 bits. MobileNetV1 0.25: the first
600 ImageNet-compatible images teach, the last 311 are measured; VWW: the train and the val part of the COCO images. One
image is 0.3 and 0.6 %p.

Usage: MIXBIT_DATA=folder python bench/bench_free_bits.py [--network NAME] [--share S] [--epochs N] [--again]
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit
from mixbit import retrain, search
from mixbit.costs import pulp
from mixbit.training import Images

SHARES = (0.7, 0.5)
TARGETS = ("8bit", "xpulpv2", "xpulpnn", "xpulpnn-mixed")
#: Network: images that teach, and passes over them in the search and after it.
TAUGHT = {"MobileNetV1 0.25": (600, 12, 12), "VWW MobileNetV1 0.25": (176, 40, 40)}
BATCH, LEARNING_RATE, TEMPERATURE = 32, 0.001, 1.0


class Run:
    """A network with what is made only once for it."""

    def __init__(self, name: str, seed: int, epochs: int | None = None) -> None:
        self.seed = seed
        count, self.search_epochs, self.epochs = TAUGHT[name]
        if epochs is not None:
            self.search_epochs = self.epochs = epochs
        self.setting = Setting(name, images=count)
        self.teacher = self.setting.folded
        self.images = Images(torch.cat(self.setting.batches), None, BATCH, seed=seed)
        self.costs = self.setting.costs("bops")
        self.reference = self.setting.score(self.teacher)
        self.made: dict[Any, Any] = {}

    def once(self, key: Any, make: Any) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def prepared(self, recipe: Any) -> Any:
        torch.manual_seed(self.seed)
        model = mixbit.prepare_(copy.deepcopy(self.teacher), recipe, self.setting.example)
        return mixbit.calibrate_(model, self.setting.batches[:8])

    def trained(self, model: Any) -> float:
        """The metric after training at the bits of a prepared model."""
        torch.manual_seed(self.seed)
        retrain.fit(
            model,
            self.images,
            epochs=self.epochs,
            lr=LEARNING_RATE,
            teacher=self.teacher,
            temperature=TEMPERATURE,
            clip_norm=5.0,
        )
        return self.setting.score(model.eval())

    def eight(self) -> float:
        return self.once("8/8", lambda: self.trained(self.prepared(self.costs.uniform_recipe(8, 8))))

    def searched(self, share: float) -> tuple[Any, mixbit.Recipe]:
        def make() -> Any:
            model = self.prepared(search.Gates(precisions=(4, 8), tie=True))
            found = search.fit(
                model,
                self.images,
                self.costs,
                epochs=self.search_epochs,
                budget=share * self.costs.uniform(8, 8),
                lr=LEARNING_RATE,
                teacher=self.teacher,
                temperature=TEMPERATURE,
                clip_norm=5.0,
            )
            return mixbit.prepare_(model, found.recipe), found.recipe

        return self.once(share, make)

    def figures(self, share: float, target: str) -> dict[str, Any]:
        model, recipe = self.searched(share)
        table = pulp(target, self.teacher, self.setting.example)
        refined = mixbit.refine(recipe, table, "no_slower")
        report = refined.report
        score = self.once((share, "searched"), lambda: self.trained(copy.deepcopy(model)))
        after = self.trained(mixbit.prepare_(copy.deepcopy(model), refined))
        return {
            "test images": self.setting.test_images,
            "float": round(self.reference, 2),
            "8/8": round(self.eight(), 2),
            "searched": round(score, 2),
            "refined": round(after, 2),
            "bops of 8/8": round(self.costs.total(recipe) / self.costs.uniform(8, 8), 4),
            "8/8 cycles": report["latency_8bit"],
            "searched cycles": report["latency_before"],
            "refined cycles": report["latency_after"],
            "% less than 8/8": round(100 * (1 - report["latency_after"] / report["latency_8bit"]), 2),
            "layers raised": len(report["raised"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=TAUGHT, action="append", help="only these")
    parser.add_argument("--share", type=float, action="append", help="budgets as shares of uniform 8/8")
    parser.add_argument("--epochs", type=int, help="of the search, and after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network or TAUGHT:
        assert name in NETWORKS
        run: list[Run] = []
        for share in options.share or SHARES:
            for target in TARGETS:

                def figures(name: str = name, share: float = share, target: str = target, run: Any = run) -> Any:
                    if not run:
                        run.append(Run(name, options.seed, options.epochs))
                    return run[0].figures(share, target)

                config = {"network": name, "images": pack(), "budget of 8/8": share, "target": target}
                if options.epochs is not None:
                    config["epochs"] = options.epochs
                row = measure("free_bits", config, figures, seed=options.seed, again=options.again)
                print(config, row["figures"], f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
