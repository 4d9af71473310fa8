"""Searched against given bit-widths: ResNet-20 on CIFAR-10 at equal audited cost, every method trained alike.

Every run starts from the published float weights and trains six epochs on the same 10,000 JPEG images, by SGD under
bfloat16 autocast: the search three epochs with the penalty, then three at the recipe it found; all others three in
float (once for each seed), then three at their recipe. The budgets are the costs (operations x bits, all layers
counted) of uniform widths, so that "uniform" spends each of them exactly. Methods beside it:

  search    gates over the candidates, the expected cost led to the budget; trained on from the searched weights
  searched  the recipe of "search" on the weights that all others start from: what the recipe alone is worth
  ilp       training-free: SQNR of the float network (256 images), exact assignment
  fisher    the same with squared gradients in place of the SQNR
  random    of 16 random recipes that fill the budget, the one with the least loss on 512 training images

The test set is the 10,000 JPEG images; the 1,000 lossless ones stand beside. "difference" is to "uniform" of the same
seed with a paired bootstrap interval (95 %, 2,000 samples of the test images).

Usage: MIXBIT_DATA=folder python bench/bench_search.py [--seeds N] [--point NAME] [--method NAME] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
import torch
import torch.nn.functional as F
from rows import measure
from torch import Tensor, nn

import mixbit
from mixbit import retrain, search, sources, zoo
from mixbit.analysis import fisher
from mixbit.training import Images, cross_entropy, in_bf16, reestimate_batchnorm_, train, weight_groups

CANDIDATES = (2, 3, 4, 5, 6, 8)
#: (act, weight) of the uniform recipe that sets the budget; layers that read the image take 8 bits of it.
POINTS = {"6/6": (6, 6), "5/5": (5, 5), "4/4": (4, 4), "3/3": (3, 3), "3/2": (3, 2)}
METHODS = ("uniform", "search", "searched", "ilp", "fisher", "random")
IMAGES, BATCH, EPOCHS = 10_000, 128, 3
LEARNING_RATE, WEIGHT_DECAY = 0.02, 1e-4
RANDOM_RECIPES = 16


class Study:
    """One seed: data, float weights, what all methods start from, and what is made only once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.data = {
            "train": zoo.cifar10_jpeg("train", IMAGES, seed),
            "test": zoo.cifar10_jpeg("test"),
            "lossless": zoo.cifar10("test"),
        }
        x, y = self.data["train"]
        self.images = Images(x, y, BATCH, seed=seed, augment="crop_flip")
        self.sample = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
        self.inputs = [x for x, _ in self.sample]
        self.float = sources.load_model("zoo:cifar_resnet", "cifar10_resnet20_fp32.npz", {"depth": 20}).eval()
        self.float.to(memory_format=torch.channels_last)
        self.folded = mixbit.fold_batchnorm_(copy.deepcopy(self.float), self.inputs[0])
        self.costs = mixbit.costs.bops(self.folded, self.inputs[0][:2])
        self.names = list(self.costs.layers)
        self.made: dict[Any, Any] = {}

    def once(self, key: Any, make: Any) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def budget(self, point: str) -> float:
        return self.costs.uniform(*POINTS[point])

    def prepared(self, model: nn.Module, recipe: Any) -> nn.Module:
        torch.manual_seed(self.seed)
        mixbit.prepare_(model, recipe, self.inputs[0][:2])
        return mixbit.calibrate_(model, self.inputs)

    def qat(self, model: nn.Module) -> nn.Module:
        """Three epochs of weights and scales, in place."""
        torch.manual_seed(self.seed)
        retrain.fit(model, self.images, epochs=EPOCHS, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, bf16=True)
        return model

    def warm(self) -> nn.Module:
        """The float network after three epochs of its own."""

        def make() -> nn.Module:
            model = copy.deepcopy(self.float)
            optimizer = torch.optim.SGD(weight_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(self.images))
            torch.manual_seed(self.seed)
            train(model, self.images, in_bf16(cross_entropy()), optimizer, epochs=EPOCHS, scheduler=schedule)
            return reestimate_batchnorm_(model, self.images, EPOCHS)

        return copy.deepcopy(self.once("warm", make))

    def searched(self, point: str) -> tuple[nn.Module, mixbit.Recipe]:
        """The model after three epochs of search, and the recipe."""

        def make() -> Any:
            model = self.prepared(copy.deepcopy(self.float), search.Gates(CANDIDATES))
            found = search.fit(
                model,
                self.images,
                self.costs,
                epochs=EPOCHS,
                budget=self.budget(point),
                lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                bf16=True,
            )
            return model, found.recipe

        model, recipe = self.once(("search", point), make)
        return copy.deepcopy(model), recipe

    def assigned(self, kind: str, point: str) -> mixbit.Recipe:
        def make() -> Any:
            if kind == "ilp":
                return mixbit.analyze(self.folded, self.inputs, CANDIDATES)
            return fisher(self.folded, self.sample, CANDIDATES)

        return mixbit.assign(self.once(kind, make), self.costs, method="ilp", budget=self.budget(point))

    def random(self, point: str) -> mixbit.Recipe:
        """Random widths, each raised in a random order while the budget allows it; the best of several."""
        generator = np.random.default_rng([self.seed, *POINTS[point]])
        x, y = self.data["train"]
        best, least = None, float("inf")
        groups = dict(zip(self.names, self.costs.input_group or (), strict=False))
        for _ in range(RANDOM_RECIPES):
            recipe = _random_recipe(self.costs, groups, self.budget(point), generator)
            model = self.prepared(copy.deepcopy(self.folded), recipe)
            with torch.no_grad():
                loss = float(F.cross_entropy(model(x[:512]), y[:512]))
            if loss < least:
                best, least = recipe, loss
        assert best is not None
        return best

    def trained(self, method: str, point: str) -> tuple[nn.Module, mixbit.Recipe]:
        if method in ("search", "searched"):
            model, recipe = self.searched(point)
            if method == "search":
                mixbit.prepare_(model, recipe)
                return self.qat(model), recipe
        elif method == "uniform":
            recipe = self.costs.uniform_recipe(*POINTS[point])
        elif method == "random":
            recipe = self.random(point)
        else:
            recipe = self.assigned(method, point)
        return self.qat(self.prepared(self.warm(), recipe)), recipe

    def correct(self, model: nn.Module, part: str) -> Tensor:
        x, y = self.data[part]
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(part).argmax(1) for part in x.to(memory_format=torch.channels_last).split(100)])
        return found == y

    def figures(self, method: str, point: str, folder: Path) -> dict[str, Any]:
        model, recipe = self.trained(method, point)
        right = self.correct(model, "test")
        np.save(folder / f"{self.seed} {method} {point.replace('/', '-')}.npy", np.packbits(right.numpy()))
        widths = [recipe[name] for name in self.names]
        return {
            "JPEG %": round(100 * float(right.float().mean()), 2),
            "lossless %": round(100 * float(self.correct(model, "lossless").float().mean()), 2),
            "bops of 8/8": round(self.costs.total(recipe) / self.costs.uniform(8, 8), 4),
            "act bits": " ".join(str(w.act) for w in widths),
            "weight bits": " ".join(str(w.weight) for w in widths),
        }


def _random_recipe(costs: Any, groups: dict[str, int], budget: float, generator: np.random.Generator) -> mixbit.Recipe:
    """All at the narrowest, then single operands widened in random order until none can be."""
    bits = {(name, "weight"): 0 for name in costs.layers} | {(group, "act"): 0 for group in set(groups.values())}

    def made() -> mixbit.Recipe:
        layers = {}
        for name in costs.layers:
            act = 8 if groups[name] == 0 else CANDIDATES[bits[groups[name], "act"]]
            layers[name] = mixbit.LayerPrecision(weight=CANDIDATES[bits[name, "weight"]], act=act)
        return mixbit.Recipe(layers=layers)

    # Steps in a random order, but each operand narrow to wide.
    order = [key for key in bits if key != (0, "act") for _ in CANDIDATES[1:]]
    generator.shuffle(order)
    for key in order:
        bits[key] += 1
        if costs.total(made()) > budget:
            bits[key] -= 1
    return made()


def interval(right: np.ndarray, other: np.ndarray) -> list[float]:
    """Paired bootstrap of the difference in percent: 2.5 %, mean, 97.5 %."""
    generator = np.random.default_rng(0)
    difference = right.astype(np.int64) - other.astype(np.int64)
    samples = [difference[generator.integers(0, len(difference), len(difference))].mean() for _ in range(2000)]
    return [
        round(100 * float(v), 2) for v in (np.quantile(samples, 0.025), difference.mean(), np.quantile(samples, 0.975))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--point", choices=POINTS, action="append", help="only these budgets")
    parser.add_argument("--method", choices=METHODS, action="append", help="only these methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(__file__).resolve().parent / "results" / "search_outputs"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        study: list[Study] = []
        for point in options.point or POINTS:
            for method in options.method or METHODS:

                def figures(method: str = method, point: str = point, seed: int = seed, study: Any = study) -> Any:
                    if not study:
                        study.append(Study(seed))
                    found = study[0].figures(method, point, folder)
                    if method != "uniform":
                        rights = []
                        for name in (method, "uniform"):
                            path = folder / f"{seed} {name} {point.replace('/', '-')}.npy"
                            if not path.exists():
                                return found
                            rights.append(np.unpackbits(np.load(path))[:10_000])
                        found["difference"] = interval(*rights)
                    else:
                        found["difference"] = [0.0, 0.0, 0.0]
                    return found

                config = {"network": "ResNet-20", "seed": seed, "budget of": point, "method": method}
                row = measure("search", config, figures, seed=seed, again=options.again)
                print(config, row["figures"], f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
