"""Recipes at no more than 1 %p loss for every network with real weights, mode and method: cost, metric and time.

The recipe is the cheapest that bisection on the predicted SQNR finds (about seven evaluations of the fake-quantized
network on the test images, biases corrected). Reductions name their baseline: uniform 32, 16 and 8 bits of weights and
activations, first and last layers counted. "uniform" is the narrowest width of all layers that keeps the metric;
"fisher" takes the squared-gradient table in place of SQNR, "network" and "confidence" the SQNR at a detector's outputs,
plain and weighted by its decoded confidence (16 images, widths 3, 4, 6, 8). Analyses read 32 images (ResNets 128).

The published detectors, SSDlite and YOLOv2, whose weights are not at hand, run on seeded random weights: time, costs
and recipes at a predicted 20 dB, equal widths of both operands, and no claim about accuracy.

With MIXBIT_DATA the full packs are used, else the shipped ones (which lack some of the networks).

Usage: python bench/bench_assign.py [--network NAME] [--method METHOD] [--again]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit
from mixbit.analysis import fisher, network_sqnr

# table, method, mode, the cost that is saved.
RUNS = (
    ("sqnr", "uniform", "", "bops"),
    ("sqnr", "threshold", "sqnr", "bops"),
    ("sqnr", "threshold", "ops", "bops"),
    ("sqnr", "threshold", "weight_memory", "weight_memory"),
    ("sqnr", "greedy", "sqnr", "bops"),
    ("sqnr", "ilp", "sqnr", "bops"),
    ("sqnr", "ilp", "sqnr", "weight_memory"),
    ("sqnr", "aimet", "sqnr", "bops"),
    ("fisher", "ilp", "sqnr", "bops"),
)
DETECTOR_RUNS = (("network", "ilp", "sqnr", "bops"), ("confidence", "ilp", "sqnr", "bops"))
SEEDED_RUNS = tuple(run for run in RUNS if run[:2] not in (("sqnr", "uniform"), ("fisher", "ilp")))
SEEDED_TARGET = 20.0
COSTS = ("bops", "ops", "weight_memory")
MAX_DROP = 1.0


class Run:
    """A network with its tables and scores, made when first asked for."""

    def __init__(self, name: str) -> None:
        self.setting = Setting(name)
        self.cost_tables = {c: self.setting.costs(c) for c in COSTS}
        self.tables: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.seeded = self.setting.network.weights is None
        self.reference = 0.0 if self.seeded else self.setting.score(self.setting.folded)

    def table(self, kind: str) -> Any:
        if kind not in self.tables:
            start = time.perf_counter()
            setting = self.setting
            if kind == "sqnr":
                self.tables[kind] = mixbit.analyze(setting.folded, setting.analyzed, joint=self.seeded)
            elif kind == "fisher":
                self.tables[kind] = fisher(setting.folded, setting.labelled[: max(1, 64 // setting.network.batch)])
            else:
                self.tables[kind] = mixbit.analyze(
                    setting.folded,
                    setting.batches[: max(1, 16 // setting.network.batch)],
                    (3, 4, 6, 8),
                    "network_output",
                    joint=True,
                    importance="confidence" if kind == "confidence" else None,
                )
            self.seconds[kind] = time.perf_counter() - start
        return self.tables[kind]

    def score(self, recipe: mixbit.Recipe) -> float:
        key = repr(recipe.layers)
        if key not in self.scores:
            self.scores[key] = self.setting.score(self.setting.quantized(recipe))
        return self.scores[key]

    def uniform(self) -> mixbit.Recipe:
        """The narrowest uniform widths that keep the metric."""
        best = self.cost_tables["bops"].uniform_recipe(8, 8)
        for bits in (7, 6, 5, 4, 3, 2):
            recipe = self.cost_tables["bops"].uniform_recipe(bits, bits)
            if self.score(recipe) < self.reference - MAX_DROP:
                break
            best = recipe
        return best

    def figures(self, kind: str, method: str, mode: str, cost: str) -> dict[str, Any]:
        table = self.table(kind)
        start = time.perf_counter()
        if method == "uniform":
            recipe = self.uniform()
        else:
            if self.seeded:
                asked: dict[str, Any] = {"target_sqnr_db": SEEDED_TARGET}
            else:
                asked = {"metric": self.score, "max_drop": MAX_DROP, "reference": self.reference}
            # The threshold rule takes its shares from the cost it is given: operations for the mode "ops".
            costs = self.cost_tables["ops" if mode == "ops" else cost]
            recipe = mixbit.assign(table, costs, method=method, mode=mode, **asked)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {}
        if not self.seeded:
            score = self.score(recipe)
            found = {
                "test images": self.setting.test_images,
                "float": round(self.reference, 2),
                "fake-quantized": round(score, 2),
                "feasible": score >= self.reference - MAX_DROP,
            }
        found["measured dB"] = round(network_sqnr(self.setting.folded, recipe, self.setting.batches[:1]), 2)
        for name, costs in self.cost_tables.items():
            total = costs.total(recipe)
            saved = [round(100 * (1 - total / costs.uniform(b, b)), 2) for b in (32, 16, 8)]
            found[f"{name}: % less than 32/16/8 bit"] = saved
        return found | {"table s": round(self.seconds[kind], 1), "search s": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(NETWORKS)
    parser.add_argument("--network", choices=known, action="append", help="only these")
    parser.add_argument("--table", choices=("sqnr", "fisher", "network", "confidence"), help="only runs on this table")
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network or known:
        run: list[Run] = []
        detector = NETWORKS[name].metric == "ap50"
        runs = SEEDED_RUNS if NETWORKS[name].weights is None else RUNS + (DETECTOR_RUNS if detector else ())
        for kind, method, mode, cost in runs:
            if options.table not in (None, kind):
                continue

            def figures(arguments: Any = (kind, method, mode, cost), name: str = name, run: list[Run] = run) -> Any:
                if not run:
                    run.append(Run(name))
                return run[0].figures(*arguments)

            config = {"network": name, "images": pack(), "table": kind, "method": method, "mode": mode, "saves": cost}
            row = measure("assign", config, figures, again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
