"""The loop closed on this machine: profile, choose bits, refine, export, run; predicted against measured.

For each network with real weights and each "hardware" (an instruction set and a number of threads of this processor):
`mixbit.profile` gives the latency of every layer at every pair of 2, 4 and 8 bits; `assign` (exact, on the SQNR of the
layers' outputs) finds recipes within shares of the 8/8 latency down to the least, `refine` ("no_slower") takes them to
the fastest widths that dominate them; each is calibrated, its biases corrected, exported as an integer package, and its
top-1 measured by the runtime on the test images. The fastest by the table that loses at most one point against the 8/8
package is run against it, taking turns, minimum of repeats (of one thread in time of the processor). With `--train`
recipes that lose more are trained to answer as the float network does (no label is used) and measured again.

"layers" are the steps of the layers in the running network, what the table predicts; "network" is a whole run with
quantization of the input, adds and pools. "recipe of other hardware" is what was chosen for that, run on this one.
Tables of networks whose weights exceed a second-level cache are measured cold.

Usage: python bench/bench_loop.py [--network NAME] [--hardware ISA:THREADS] [--train EPOCHS] [--again]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from networks import Setting, pack
from rows import measure
from torch import nn

import mixbit
from mixbit import retrain
from mixbit.quantizers import record_tensors_
from mixbit.runtime import Network
from mixbit.training import Images

NETWORKS = ("ResNet-20", "MobileNetV1 0.25", "MobileNetV1 1.0")
#: Images that teach, and of a step.
TAUGHT = {"ResNet-20": (4000, 64), "MobileNetV1 0.25": (600, 32), "MobileNetV1 1.0": (600, 16)}
LEARNING_RATE = 0.001
HARDWARE = ("amx:1", "amx:2", "vnni:1", "avx2:1")
SHARES = (0.97, 0.93, 0.88, 0.82, 0.75, 0.67, 0.58, 0.5)
PRECISIONS = (2, 4, 8)
CACHE_BYTES = 2 << 20
ROUNDS, BURST = 60, 5
PROFILE_REPEATS = 15
DROP = 1.0


class Shipped(NamedTuple):
    """A recipe as a package, and its top-1."""

    recipe: mixbit.Recipe
    path: Path
    top1: float
    taught: bool


class Loop:
    """A network with what is made only once for it."""

    def __init__(self, name: str, folder: Path, epochs: int = 0) -> None:
        self.setting = Setting(name)
        self.folder = folder
        self.epochs = epochs
        self.teaching: Images | None = None
        self.example = self.setting.example[:1]
        self.table = mixbit.analyze(self.setting.folded, self.setting.analyzed, PRECISIONS, point="layer_output")
        self.images = torch.cat([x for x, _ in self.setting.test]).contiguous().numpy()
        self.labels = torch.cat([y for _, y in self.setting.test]).numpy()
        self.cold = sum(layer.weights for layer in self.setting.found) > CACHE_BYTES
        self.known: dict[str, Shipped] = {}
        self.tables: dict[str, mixbit.CostTable] = {}
        self.chosen: dict[str, tuple[Shipped, mixbit.Recipe, float]] = {}

    def latency(self, hardware: str) -> mixbit.CostTable:
        """The measured table of a hardware."""
        if hardware not in self.tables:
            isa, threads = hardware.split(":")
            model = copy.deepcopy(self.setting.folded)
            lut = mixbit.profile(
                model, self.example, threads=int(threads), isa=isa, repeats=PROFILE_REPEATS, cold=self.cold
            )
            self.tables[hardware] = lut.costs(model, self.example)
        return self.tables[hardware]

    def taught(self, model: nn.Module) -> nn.Module:
        """A network at a recipe after training, in place."""
        count, batch = TAUGHT[self.setting.name]
        if self.teaching is None:
            x = torch.cat(Setting(self.setting.name, images=count).batches)
            augment = "crop_flip" if x.shape[-1] == 32 else None
            self.teaching = Images(x, None, batch, seed=0, augment=augment)
        torch.manual_seed(0)
        options = {"teacher": self.setting.folded, "temperature": 1.0, "clip_norm": 5.0, "bf16": True}
        retrain.fit(model, self.teaching, epochs=self.epochs, lr=LEARNING_RATE, **options)
        return model.eval()

    def ship(self, recipe: mixbit.Recipe, taught: bool = False) -> Shipped:
        """The package of a recipe, and its top-1 on the test images."""
        key = str([taught, *((name, recipe[name].weight, recipe[name].act) for name in self.setting.names)])
        if key not in self.known:
            model = self.setting.quantized(recipe)
            if taught:
                self.taught(model)
            record_tensors_(model, self.setting.batches[:2], self.setting.example, "mse")
            path = self.folder / f"{len(self.known)}.mixbit"
            mixbit.export.integer(model, self.setting.example, path)
            network = Network(path)
            found = np.concatenate([network(part)[0].argmax(1) for part in np.array_split(self.images, 20)])
            self.known[key] = Shipped(recipe, path, float(100 * np.mean(found == self.labels)), taught)
            print(f"  {taught=}: {self.known[key].top1:.2f} %", flush=True)
        return self.known[key]

    def choose(self, hardware: str) -> tuple[Shipped, mixbit.Recipe, float]:
        """The fastest refined recipe within a point of 8/8, what it was before refinement, and the share asked for."""
        if hardware not in self.chosen:
            costs = self.latency(hardware)
            eight = costs.uniform_recipe(8, 8)
            shipped = self.ship(eight)
            best, searched, asked = shipped, eight, 1.0
            total = costs.uniform(8, 8)
            least = mixbit.refine(eight, costs).report["latency_minimum"] / total * (1 + 1e-9)
            for share in [*(share for share in SHARES if share > least), least]:
                recipe = mixbit.assign(self.table, costs, budget=share * total, method="ilp")
                refined = mixbit.refine(recipe, costs, "no_slower")
                candidate = self.ship(refined)
                if candidate.top1 < shipped.top1 - DROP and self.epochs:
                    candidate = self.ship(refined, True)
                if candidate.top1 < shipped.top1 - DROP:
                    break
                if costs.total(candidate.recipe) < costs.total(best.recipe):
                    best, searched, asked = candidate, recipe, share
            self.chosen[hardware] = best, searched, asked
        return self.chosen[hardware]


def run_times(paths: dict[str, Path], hardware: str, x: np.ndarray) -> dict[str, tuple[float, float, dict[str, float]]]:
    """Of each package: microseconds of a run, of its layers, and of each layer; taking turns, the least."""
    isa, threads = hardware.split(":")
    # What interrupts a single thread does not count.
    clock = time.thread_time if threads == "1" else time.perf_counter
    networks = {name: Network(path, isa=isa, threads=int(threads)) for name, path in paths.items()}
    best = dict.fromkeys(networks, float("inf"))
    steps: dict[str, list[float]] = {name: [float("inf")] * len(n.steps) for name, n in networks.items()}
    for _ in range(ROUNDS):
        for name, network in networks.items():
            for _ in range(BURST):
                start = clock()
                network(x)
                best[name] = min(best[name], clock() - start)
            found = [step["seconds"] for step in network.profile(x)]
            steps[name] = [min(pair) for pair in zip(steps[name], found, strict=True)]
    result = {}
    for name, network in networks.items():
        layers: dict[str, float] = {}
        for step, seconds in zip(network.steps, steps[name], strict=True):
            if step["weight_bits"]:
                layers[step["module"]] = layers.get(step["module"], 0.0) + 1e6 * seconds
        result[name] = (1e6 * best[name], sum(layers.values()), layers)
    return result


def figures(loop: Loop, hardware: str, others: list[str]) -> dict[str, Any]:
    """Predicted and measured latencies of the recipe chosen for a hardware, and of those chosen for others."""
    costs = loop.latency(hardware)
    eight = loop.ship(costs.uniform_recipe(8, 8))
    shipped, searched, asked = loop.choose(hardware)
    four = loop.ship(costs.uniform_recipe(8, 4))
    paths = {"8/8": eight.path, "chosen": shipped.path, "W4A8": four.path}
    paths |= {other: loop.choose(other)[0].path for other in others}
    times = run_times(paths, hardware, loop.images[:1])
    before, after = times["8/8"], times["chosen"]

    def less(predicted_or_measured: float, of: float) -> float:
        return round(100 * (1 - predicted_or_measured / of), 2)

    predicted = costs.per_layer(costs.uniform_recipe(8, 8)), costs.per_layer(shipped.recipe)
    moved = []
    for i, name in enumerate(costs.layers):
        bits = shipped.recipe[name].weight
        if bits != 8:
            saved = predicted[0][i] - predicted[1][i], before[2][name] - after[2][name]
            moved.append((saved[0], f"{name} {bits}: {saved[0]:.1f} ({saved[1]:.1f})"))
    raised = sum(shipped.recipe[name].weight != searched[name].weight for name in costs.layers)
    widened = sum(shipped.recipe[name].act != searched[name].act for name in costs.layers)
    total = costs.uniform(8, 8)
    return {
        "test images": len(loop.labels),
        "8/8 top-1": round(eight.top1, 2),
        "top-1": round(shipped.top1, 2),
        "trained": shipped.taught,
        "share asked for": round(asked, 3),
        "layers below 8 bits": len(moved),
        "raised by refine (weights, acts)": [raised, widened],
        "8/8 predicted us": round(total, 1),
        "8/8 layers us": round(before[1], 1),
        "8/8 network us": round(before[0], 1),
        "predicted us": round(costs.total(shipped.recipe), 1),
        "layers us": round(after[1], 1),
        "network us": round(after[0], 1),
        "predicted, % less": less(costs.total(shipped.recipe), total),
        "layers, % less": less(after[1], before[1]),
        "network, % less": less(after[0], before[0]),
        "W4A8: top-1, network % less": [round(four.top1, 2), less(times["W4A8"][0], before[0])],
        "recipe of other hardware: network % less": {other: less(times[other][0], before[0]) for other in others},
        "most saved, predicted us (measured)": "; ".join(text for _, text in sorted(moved, reverse=True)[:6]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--hardware", choices=HARDWARE, action="append", help="default: all")
    parser.add_argument("--train", type=int, default=0, metavar="EPOCHS", help="of recipes that lose too much")
    parser.add_argument("--again", action="store_true", help="measure rows that exist again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network or NETWORKS:
        made: list[Loop] = []
        with tempfile.TemporaryDirectory() as folder:
            for hardware in options.hardware or HARDWARE:
                config = {"loop": name, "hardware": hardware, "data": pack()}
                if options.train:
                    config["epochs"] = options.train

                def run(name: str = name, hardware: str = hardware, made: list[Loop] = made, at: str = folder) -> Any:
                    if not made:
                        made.append(Loop(name, Path(at), options.train))
                    others = [other for other in options.hardware or HARDWARE if other != hardware]
                    return figures(made[0], hardware, others)

                row = measure("loop", config, run, again=options.again)
                print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
