"""The mapper on MobileNetV1 as published (224 x 224, 28 layers, 100 classes, depthwise layers as full convolutions).

speed: seconds for the proven EDP optimum of all layers, at one width triple (8/8/8) and at all width classes of 16-bit
words in one sweep (216), least of three; mappings in the space and evaluated.
saving: EDP saved from 16 to 8 bits, proven, and as a random search with the reference's stopping rule (500 valid ones
without gain, 15000 invalid ones in a row) would have claimed; its mappings a second, one thread.
claim: energy of real networks at uniform 16 and 8 bits, each at its own proven optimum, and of the cheapest recipe that
loses at most 1 %p (exact assignment on the mapper's energies, biases corrected). Depthwise layers are grouped here.

Usage: python bench/bench_mapper.py [speed] [saving] [claim] [--network NAME] [--again]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from networks import Setting, pack
from rows import measure

import mixbit
from mixbit import hw
from mixbit.hw import mapper

CLASSES = (2, 3, 4, 5, 8, 16)  # one width of each class of a 16-bit word
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def published() -> hw.Workload:
    """MobileNetV1 with the 100 classes of the published set-up."""
    model = mixbit.zoo.mobilenet_v1().eval()
    net = hw.Workload.from_model(model, torch.zeros(1, 3, 224, 224), depthwise_as_full=True)
    layers = [use.layer.to_dict() for use in net]
    layers[-1] |= {"M": 100}
    return hw.Workload.from_shapes(layers)


def least(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Least seconds of several runs from empty caches, and the last result."""
    seconds = []
    for _ in range(repeats):
        mapper._SEARCHES.entries.clear()
        mapper._SWEEPS.entries.clear()
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def speed(name: str, classes: str, threads: int) -> dict[str, Any]:
    arch, net = hw.Architecture.load(name), published()
    if classes == "one":
        bits = {"act": 8, "weight": 8, "out": 8}
        seconds, best = least(3, lambda: hw.map_network(arch, net, bits, "edp", threads=threads))
        certificates = {layer.name: layer.certificate for layer in best.layers}
        found = {"energy uJ": round(best.energy_pj / 1e6, 1), "EDP J*cycle": round(best.edp, 1)}
    else:
        seconds, result = least(3, lambda: hw.sweep(arch, net, CLASSES, "edp", threads=threads))
        certificates = dict(enumerate(result.certificates))
        found = {"energy uJ": "", "EDP J*cycle": ""}
    total, evaluated = (sum(c[key] for c in certificates.values()) for key in ("total", "evaluated"))
    return {"seconds": round(seconds, 3), **found, "mappings in the space": f"{total:.3g}", "evaluated": int(evaluated)}


def saving(name: str) -> dict[str, Any]:
    arch, net = hw.Architecture.load(name), published()
    proven, lucky, mappings, seconds = [], [], 0, 0.0
    for width in (16, 8):
        bits = {"act": width, "weight": width, "out": width}
        proven.append(hw.map_network(arch, net, bits, "edp").edp)
        start = time.perf_counter()
        found = {use.layer.key: hw.random_search(arch, use.layer, bits, "edp") for use in net}
        seconds += time.perf_counter() - start
        mappings += sum(result.counts["total"] for result in found.values())
        lucky.append(sum(found[use.layer.key].edp for use in net))
    return {
        "proven saving %": round(100 * (1 - proven[1] / proven[0]), 2),
        "claimed saving %": round(100 * (1 - lucky[1] / lucky[0]), 2),
        "random above the optimum % at 16, 8": [
            round(100 * (a / b - 1), 2) for a, b in zip(lucky, proven, strict=True)
        ],
        "random mappings/s": round(mappings / seconds),
    }


def claim(network: str, name: str) -> dict[str, Any]:
    setting, arch = Setting(network), hw.Architecture.load(name)
    costs = mixbit.costs.mapper(arch, setting.folded, setting.example[:1], "energy", widths=WIDTHS)
    net = hw.Workload.from_model(setting.folded, setting.example[:1])
    table = mixbit.analyze(setting.folded, setting.analyzed)
    reference = setting.score(setting.folded)
    known: dict[str, float] = {}

    def score(recipe: mixbit.Recipe) -> float:
        key = repr(recipe.layers)
        if key not in known:
            known[key] = setting.score(setting.quantized(recipe))
        return known[key]

    recipe = mixbit.assign(table, costs, method="ilp", metric=score, max_drop=1.0, reference=reference)
    mixed = hw.map_network(arch, net, recipe, "energy").energy_pj
    assert abs(mixed - costs.total(recipe)) <= 1e-9 * mixed
    uniform = {b: hw.map_network(arch, net, {"act": b, "weight": b}, "energy").energy_pj for b in (16, 8)}
    eight = score(costs.uniform_recipe(8, 8))
    return {
        "test images": setting.test_images,
        "float": round(reference, 2),
        "uniform 8": round(eight, 2),
        "mixed": round(score(recipe), 2),
        "feasible": score(recipe) >= reference - 1.0,
        "uniform 16 uJ": round(uniform[16] / 1e6, 2),
        "uniform 8 uJ": round(uniform[8] / 1e6, 2),
        "mixed uJ": round(mixed / 1e6, 2),
        "less than 16 %": round(100 * (1 - mixed / uniform[16]), 2),
        "less than 8 %": round(100 * (1 - mixed / uniform[8]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=("speed", "saving", "claim"), default=["speed", "saving", "claim"])
    parser.add_argument("--network", action="append", help="of the claim (default: ResNet-20)")
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for name in ("eyeriss", "simba"):
        if "speed" in options.parts:
            for classes in ("one", "all 216"):
                for threads in (1, 2):
                    config = {"part": "speed", "architecture": name, "classes": classes, "threads": threads}
                    jobs.append(("mapper", config, lambda n=name, c=classes, t=threads: speed(n, c, t)))
        if "saving" in options.parts:
            jobs.append(("mapper", {"part": "saving", "architecture": name}, lambda n=name: saving(n)))
        if "claim" in options.parts:
            for network in options.network or ["ResNet-20"]:
                config = {"part": "claim", "architecture": name, "network": network, "images": pack()}
                jobs.append(("mapper", config, lambda n=name, w=network: claim(w, n)))
    for file, config, run in jobs:
        print(config, measure(file, config, run, again=options.again)["figures"], flush=True)


if __name__ == "__main__":
    main()
