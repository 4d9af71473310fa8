"""Exported ONNX files under ONNX Runtime against the integer reference: outputs and codes that differ, and bytes.

The networks with real weights at 8/8, 4/8, 4/4 (weight/act) and a mixed recipe (weights 8 4 2 6 3 in turn, inputs
8 6 4 5). "exact" is the default form of `export.onnx`, "plain" its `exact=False`.

Usage: python bench/bench_export.py [--again] [--network NAME] [--images N]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit
from mixbit.export import VerifyReport

RECIPES = ("8/8", "4/8", "4/4", "mixed")


def recipe_of(setting: Setting, kind: str) -> mixbit.Recipe:
    if kind != "mixed":
        weight, act = (int(part) for part in kind.split("/"))
        return mixbit.Recipe.uniform(setting.names, weight=weight, act=act)
    acts: dict[int, int] = {}
    layers = {}
    for i, layer in enumerate(setting.found):
        act = acts.setdefault(layer.input_group, (8, 6, 4, 5)[i % 4])
        layers[layer.name] = mixbit.LayerPrecision(weight=(8, 4, 2, 6, 3)[i % 5], act=act)
    return mixbit.Recipe(layers=layers)


def images_of(setting: Setting, count: int) -> list[torch.Tensor]:
    """The first test images, in batches of four."""
    return list(torch.cat([x for x, _ in setting.test])[:count].split(4))


def compared(report: VerifyReport) -> tuple[str, str]:
    """Outputs, and codes between each computed from the file's own inputs: how many differ of how many."""
    layers = report.layers or ()
    wrong, codes = sum(d.mismatches for d in layers), sum(d.values for d in layers)
    return f"{report.mismatches} of {report.values}", f"{wrong} of {codes}"


def figures(setting: Setting, config: dict[str, Any]) -> dict[str, Any]:
    model = mixbit.prepare_(copy.deepcopy(setting.folded), recipe_of(setting, config["recipe"]), setting.example)
    mixbit.calibrate_(model, setting.batches[:2], "mse", example=setting.example)
    batches = images_of(setting, config["images"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        start = time.perf_counter()
        written = mixbit.export.onnx(model, setting.example, path, say=lambda text: None)
        seconds = time.perf_counter() - start
        exact = mixbit.export.verify(path, model, batches)
        mixbit.export.onnx(model, setting.example, path, exact=False, force=True, say=lambda text: None)
        plain = mixbit.export.verify(path, model, batches)
    found["exact: outputs differ"], found["codes differ"] = compared(exact)
    found["plain: outputs differ"], found["plain: codes differ"] = compared(plain)
    found["plain: most codes off in a layer"] = max(d.largest for d in plain.layers or ())
    size = written.bytes
    found["opset"] = written.opset
    found["weights, bytes"] = size.weights
    found["scales and biases, bytes"] = size.scales + size.biases
    found["the rest, % of these"] = round(100 * size.overhead / (size.total - size.overhead), 2)
    found["export, s"] = round(seconds, 1)
    found["ONNX Runtime"] = exact.kind.rpartition(" ")[2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    known = [name for name, network in NETWORKS.items() if network.weights is not None]
    parser.add_argument("--network", choices=known, action="append", help="only these")
    parser.add_argument("--images", type=int, default=8, help="of the test data (default: 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.network or known:
        made: list[Setting] = []
        for recipe in RECIPES:
            config = {"network": network, "recipe": recipe, "images": options.images, "data": pack()}

            def run(config: dict[str, Any] = config, made: list[Setting] = made, network: str = network) -> Any:
                if not made:
                    made.append(Setting(network))
                return figures(made[0], config)

            row = measure("export", config, run, again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
