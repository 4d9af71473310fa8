"""Integer packages in the C++ runtime against the integer reference: how many outputs and codes differ.

Every network with real weights (MIXBIT_DATA: the full packs) at W8A8, W4A8 (weights of 4 bits, inputs of 8), W4A4, W2A2
and a mixed recipe (weights 8 4 2 6 3 5 in turn, inputs 8 6 4 5 3), on every instruction set of this machine: outputs
with one thread and with two, and the codes of all values between.

Usage: python bench/bench_exact.py [--again] [--network NAME] [--images N]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit
from mixbit.runtime import Network

RECIPES = ("W8A8", "W4A8", "W4A4", "W2A2", "mixed")
ISAS = ("scalar", "avx2", "vnni", "amx")


def recipe_of(setting: Setting, kind: str) -> mixbit.Recipe:
    """A recipe by its name."""
    if kind != "mixed":
        return mixbit.Recipe.uniform(setting.names, weight=int(kind[1]), act=int(kind[3]))
    acts: dict[int, int] = {}
    layers = {}
    for i, layer in enumerate(setting.found):
        act = acts.setdefault(layer.input_group, (8, 6, 4, 5, 3)[i % 5])
        layers[layer.name] = mixbit.LayerPrecision(weight=(8, 4, 2, 6, 3, 5)[i % 6], act=act)
    return mixbit.Recipe(layers=layers)


def figures(setting: Setting, config: dict[str, Any]) -> dict[str, Any]:
    """Differences of each instruction set."""
    model = mixbit.prepare_(copy.deepcopy(setting.folded), recipe_of(setting, config["recipe"]), setting.example)
    mixbit.calibrate_(model, [setting.batches[0][:8]], "maxabs", example=setting.example)
    x = torch.cat([x for x, _ in setting.test])[: config["images"]].contiguous()
    reference = mixbit.export.reference(model, setting.example)
    tensors = reference.tensors(x)
    expected = [reference.dequantize(name, tensors[name]) for name in reference.outputs]
    found: dict[str, Any] = {
        "outputs": sum(values.size for values in expected),
        "codes": sum(codes.size for codes in tensors.values()),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = mixbit.export.integer(model, setting.example, Path(folder) / "m.mixbit")
        for isa in ISAS:
            kept = Network(path, isa=isa, keep_values=True)
            if kept.isa != isa:
                found[f"{isa}: differ"] = f"not on this machine ({kept.isa} ran)"
                continue
            values = kept.values(x.numpy())
            codes = sum(int(np.sum(values[name] != wanted)) for name, wanted in tensors.items())
            outputs = 0
            for threads in (1, 2):
                got = Network(path, isa=isa, threads=threads)(x.numpy())
                outputs += sum(int(np.sum(a != b)) for a, b in zip(got, expected, strict=True))
            found[f"{isa}: differ"] = outputs + codes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    known = [name for name, network in NETWORKS.items() if network.weights is not None]
    parser.add_argument("--network", choices=known, action="append", help="only these")
    parser.add_argument("--images", type=int, default=2, help="of the test data (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.network or known:
        made: list[Setting] = []
        for recipe in RECIPES:
            config = {"exact": network, "recipe": recipe, "images": options.images, "data": pack()}

            def run(config: dict[str, Any] = config, made: list[Setting] = made, network: str = network) -> Any:
                if not made:
                    made.append(Setting(network))
                return figures(made[0], config)

            row = measure("runtime", config, run, again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
