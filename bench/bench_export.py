"""Exported artifacts against the integer reference: outputs and codes that differ, bytes, time and memory.

The networks with real weights at 8/8, 4/8, 4/4 (weight/act) and a mixed recipe (weights 8 4 2 6 3 in turn, inputs
8 6 4 5). "exact" is the default form of `export.onnx`, "plain" its `exact=False`; "program" the dialect "mixbit" of
`export.program`, which `export.package` compiles; "pt2e" the other one. `--compile` adds the compiled package.
`--bytes` measures the sizes of the files instead, `--cost` what each export of a network takes at 4/8, each in a fresh
process that loads the prepared network: the peak of the process above what it held before, after memory that was freed
has gone back to the system. "seconds" are those of the clock, on a machine that may be shared; "processor seconds" are
not.

Usage: python bench/bench_export.py [--again] [--network NAME] [--images N] [--compile] [--bytes] [--cost [--form FORM]]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from networks import NETWORKS, Setting, pack
from rows import measure

import mixbit
from mixbit.export import IntegerReference, VerifyReport
from mixbit.export.lowering import lower
from mixbit.export.verification import verify

RECIPES = ("8/8", "4/8", "4/4", "mixed")
#: What `--cost` measures, in order.
FORMS = ("reference", "onnx", "qonnx", "integer", "program", "pt2e", "package")


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


def prepared(setting: Setting, kind: str, quick: bool = False) -> Any:
    """The integer network at a recipe; `quick` where its ranges do not matter."""
    model = mixbit.prepare_(copy.deepcopy(setting.folded), recipe_of(setting, kind), setting.example)
    if quick:
        return mixbit.calibrate_(model, [setting.example], "maxabs", example=setting.example)
    return mixbit.calibrate_(model, setting.batches[:2], "mse", example=setting.example)


def images_of(setting: Setting, count: int) -> list[torch.Tensor]:
    """The first test images, in batches of four."""
    return list(torch.cat([x for x, _ in setting.test])[:count].split(4))


class Remembering(IntegerReference):
    """Computes each batch once, for all artifacts."""

    def __init__(self, model: Any, example: Any) -> None:
        super().__init__(model, example)
        self._known: dict[int, Any] = {}

    def tensors(self, x: Any) -> Any:
        if id(x) not in self._known:
            self._known[id(x)] = (x, super().tensors(x))
        return self._known[id(x)][1]


@contextlib.contextmanager
def lowered_once(model: Any, example: Any) -> Iterator[None]:
    """All exports inside read one lowered network."""
    network = lower(model, example)
    with contextlib.ExitStack() as stack:
        for module in ("to_onnx", "to_package", "program", "package"):
            stack.enter_context(mock.patch(f"mixbit.export.{module}.lower", lambda *_: network))
        yield


def compared(report: VerifyReport) -> str:
    """Outputs, and where they show the codes between, each computed from the file's own inputs: differing of all."""
    layers = report.layers or ()
    wrong, codes = sum(d.mismatches for d in layers), sum(d.values for d in layers)
    outputs = f"{report.mismatches} of {report.values} outputs"
    return f"{outputs}, {wrong} of {codes} codes" if layers else outputs


def most(report: VerifyReport) -> float:
    """The largest difference in codes between what a value is and what the reference makes of the file's own inputs."""
    return max(d.largest for d in report.layers or ())


def figures(setting: Setting, config: dict[str, Any]) -> dict[str, Any]:
    model, example = prepared(setting, config["recipe"]), setting.example
    batches = images_of(setting, config["images"])
    reference = Remembering(model, example)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, lowered_once(model, example):
        onnx, package = Path(folder) / "m.onnx", Path(folder) / "m.mixbit"

        def held(artifact: Any) -> VerifyReport:
            return verify(artifact, model, batches, reference=reference)

        opset = mixbit.export.onnx(model, example, onnx, say=lambda text: None).opset
        exact = held(onnx)
        found["ONNX exact"] = compared(exact)
        mixbit.export.onnx(model, example, onnx, exact=False, force=True, say=lambda text: None)
        plain = held(onnx)
        found["ONNX plain"], found["most codes off"] = compared(plain), most(plain)
        mixbit.export.integer(model, example, package)
        found["integer package"] = compared(held(package))
        found["program"] = compared(held(mixbit.export.program(model, example)))
        pt2e = held(mixbit.export.program(model, example, dialect="pt2e"))
        found["pt2e"], found["codes of pt2e off"] = compared(pt2e), most(pt2e)
        if config.get("compiled"):
            found["AOTInductor"] = compared(held(mixbit.export.package(model, example, Path(folder) / "m.pt2")))
    found["ONNX opset"] = opset
    found["ONNX Runtime"] = exact.kind.rpartition(" ")[2]
    return found


def sizes(setting: Setting, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes by what they are for; the rest of the files as a share of all that is not the rest."""
    model, example = prepared(setting, config["recipe"], quick=True), setting.example
    with tempfile.TemporaryDirectory() as folder, lowered_once(model, example):
        path = Path(folder) / "m.onnx"
        onnx = mixbit.export.onnx(model, example, path, say=lambda text: None).bytes
        compact = mixbit.export.onnx(model, example, path, compact=True, force=True, say=lambda text: None).bytes
        package = mixbit.export.integer(model, example, Path(folder) / "m.mixbit")
        tensors, total = mixbit.runtime.Network(package).manifest["tensors"], package.stat().st_size
    packed = sum(t["bytes"] for t in tensors if t["dtype"] == "packed")
    data = sum(t["bytes"] for t in tensors)
    return {
        "weights in ONNX, bytes": onnx.weights,
        "scales and biases": onnx.scales + onnx.biases,
        "its rest, %": round(100 * onnx.overhead / (onnx.total - onnx.overhead), 2),
        "with compact=True": round(100 * compact.overhead / (compact.total - compact.overhead), 2),
        "weights in the package": packed,
        "multipliers, biases, tables": data - packed,
        "the package's rest, %": round(100 * (total - data) / data, 2),
    }


def cost(config: dict[str, Any], model: Path) -> dict[str, Any]:
    """Seconds and peak memory of one form, in a fresh process that has done nothing but load the prepared model."""
    done = subprocess.run(
        [sys.executable, __file__, "--form", config["form"], "--model", str(model)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{config}: its process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def costs(network: str, forms: Sequence[str], model: Path, again: bool) -> None:
    """Measures the forms one after the other; the model is prepared where the first row is missing."""
    for form in forms:
        config = {"network": network, "recipe": "4/8", "form": form}

        def run(config: dict[str, Any] = config) -> dict[str, Any]:
            if not model.exists():
                save_prepared(network, model)
            return cost(config, model)

        print(config, measure("export_cost", config, run, again=again)["figures"], flush=True)


def save_prepared(name: str, path: Path) -> None:
    """A network at 4/8 and its example, for the processes that measure."""
    setting = Setting(name, images=2 * NETWORKS[name].batch)
    torch.save((prepared(setting, "4/8", quick=True), setting.example), path)


def export_as(form: str, model: torch.nn.Module, example: Any, folder: Path) -> None:
    """Exports a network in one of FORMS."""
    if form == "reference":
        mixbit.export.reference(model, example)
    elif form in ("onnx", "qonnx"):
        dialect = "qdq" if form == "onnx" else form
        mixbit.export.onnx(model, example, folder / "m.onnx", dialect=dialect, say=lambda text: None)
    elif form == "integer":
        mixbit.export.integer(model, example, folder / "m.mixbit")
    elif form == "package":
        mixbit.export.package(model, example, folder / "m.pt2")
    else:
        dialect = "mixbit" if form == "program" else form
        torch.export.save(mixbit.export.program(model, example, dialect=dialect), folder / "m.pt2")


def cost_of(path: Path, form: str) -> dict[str, Any]:
    """Measures the form in this process: a warm import, a fresh export."""
    # What the libraries load lazily is theirs, once a process: a small network goes the same way first.
    x = torch.randn(2, 3, 8, 8)
    small = mixbit.prepare_(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval(), mixbit.Recipe.uniform(["0"]))
    mixbit.calibrate_(small, [x], example=x)
    with tempfile.TemporaryDirectory() as folder:
        export_as("program" if form == "package" else form, small, x, Path(folder))
    model, example = torch.load(path, weights_only=False)  # written by `save_prepared` a moment ago
    parameters = sum(p.numel() for name, p in model.named_parameters() if "_quantizer." not in name)
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        export_as(form, model, example, Path(folder))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += children.ru_utime + children.ru_stime
    return {
        "seconds": round(wall, 1),
        "processor seconds": round(cpu, 1),
        "memory above before, MB": round(peak.bytes / 1e6, 1),
        "training state with SGD, MB": round(12 * parameters / 1e6, 1),
        "with Adam, MB": round(16 * parameters / 1e6, 1),
    }


class Peak:
    """The most memory (resident, of this process) above that at the start, as Linux counts it."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no room that the block could use unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        self.bytes, self._start = 0, self._kilobytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = 1024 * (self._kilobytes("VmHWM") - self._start)

    @staticmethod
    def _kilobytes(key: str) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    known = [name for name, network in NETWORKS.items() if network.weights is not None]
    parser.add_argument("--network", choices=known, action="append", help="only these")
    parser.add_argument("--images", type=int, default=4, help="of the test data (default: 4)")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only these")
    parser.add_argument("--compile", action="store_true", help="the compiled package, too")
    parser.add_argument("--bytes", action="store_true", help="sizes of the files alone")
    parser.add_argument("--cost", action="store_true", help="time and memory of each form of --network")
    parser.add_argument("--form", choices=FORMS, action="append", help="of --cost, only these")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # of the processes that measure
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model:
        print(json.dumps(cost_of(options.model, options.form[0])))
        return
    for network in options.network or known:
        if options.cost:
            with tempfile.TemporaryDirectory() as folder:
                costs(network, options.form or FORMS, Path(folder) / "prepared.pt", options.again)
            continue
        made: list[Setting] = []
        for recipe in options.recipe or RECIPES:
            config = {"network": network, "recipe": recipe, "images": options.images, "data": pack()}
            if options.compile:
                config["compiled"] = True
            if options.bytes:
                config = {"network": network, "recipe": recipe}

            def run(config: dict[str, Any] = config, made: list[Setting] = made, network: str = network) -> Any:
                if not made:
                    made.append(Setting(network, images=2 * NETWORKS[network].batch))
                return (sizes if options.bytes else figures)(made[0], config)

            row = measure("export_bytes" if options.bytes else "export_verified", config, run, again=options.again)
            print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
