"""The verbs `map` and `cosearch`: accelerators, without the pipeline's stages."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixbit import hw, report
from mixbit.errors import MixbitError, check_choice
from mixbit.files import file_digest, read_document, write_document, write_text
from mixbit.pipeline import versions
from mixbit.recipe import Recipe
from mixbit.sources import fingerprint, load_function, load_model
from mixbit.tables import SensitivityTable

#: A workload in a file.
WORKLOAD = ("mixbit-workload", 1)


def run_map(arguments: argparse.Namespace) -> None:
    """Maps a network, prints what it found and what a random search would have claimed, writes files."""
    run = _Run(arguments, "mapping.json")
    arch, net = run.arch, run.net
    bits: Any = {"act": arguments.act, "weight": arguments.weight}
    if arguments.recipe:
        bits = Recipe.load(arguments.recipe)
        bits.check_names(net.names)
        run.inputs["recipe"] = file_digest(arguments.recipe)
    wide = arguments.against or min(level.word_bits for level in arch.levels)
    run.say(f"{len(net)} layers, {net.macs:,} MACs on {arch.name}, objective {arguments.objective}")
    best = hw.map_network(arch, net, bits, arguments.objective, threads=arguments.threads)
    reference_bits = {"act": wide, "weight": wide, "out": wide}
    reference = hw.map_network(arch, net, reference_bits, arguments.objective, threads=arguments.threads)
    baseline = {
        name: _random(arch, net, given, arguments.objective, arguments.seed)
        for name, given in (("bits", bits), ("against", reference_bits))
    }
    _show_mapping(best)
    saving = _saving(best, reference, baseline, wide)
    run.write(
        "mapping.json", lambda path: write_document(path, "mixbit-mapping", 1, best.to_dict() | {"saving": saving})
    )
    nests = [f"# {layer.name} {json.dumps(dict(layer.bits))}\n{hw.loop_nest(layer.mapping)}\n" for layer in best.layers]
    run.write("loop_nests.txt", lambda path: write_text(path, "\n".join(nests)))
    run.write("energy.svg", lambda path: write_text(path, report.standalone(energy_chart(best))))
    run.finish()


def _random(arch: hw.Architecture, net: hw.Workload, bits: Any, objective: str, seed: int) -> dict[str, float]:
    """Totals of the best that random search finds in each layer."""
    totals = dict.fromkeys((key for key, _ in hw.OBJECTIVES.values()), 0.0)
    known: dict[Any, Any] = {}
    for use, widths in zip(net, hw.network_bits(net, bits), strict=True):
        key = (use.layer.key, tuple(widths.items()))
        if key not in known:
            known[key] = hw.random_search(arch, use.layer, widths, objective, seed=seed)
        for name in totals:
            totals[name] += known[key][name] * use.calls
    return totals


def _saving(
    best: hw.NetworkMapping, reference: hw.NetworkMapping, baseline: Mapping[str, Mapping[str, float]], wide: int
) -> dict[str, Any]:
    """Prints and returns the saving against wide words: proven, and as a random search would have claimed it."""
    table = Table("", f"at {wide} bits", "at these bits", "saving", title="what the bits save, and what luck adds")
    found: dict[str, Any] = {"against": wide}
    for objective, (key, unit) in hw.OBJECTIVES.items():
        rows = {
            "proven": (reference.total(objective), best.total(objective)),
            "random_search": (baseline["against"][key], baseline["bits"][key]),
        }
        found[key] = {}
        for how, (before, after) in rows.items():
            share = 1 - after / before if before else 0.0
            found[key][how] = {"against": before, "bits": after, "saving": share}
            table.add_row(f"{key} ({unit}), {how.replace('_', ' ')}", f"{before:,.6g}", f"{after:,.6g}", f"{share:.1%}")
    Console().print(table)
    return found


def _show_mapping(best: hw.NetworkMapping) -> None:
    title = f"{best.architecture}: least {best.objective}, proven"
    table = Table("layer", "act/weight/out", "energy (uJ)", "cycles", "used", "mappings", "evaluated", title=title)
    for layer in best.layers:
        bits = "/".join(str(layer.bits[k]) for k in ("act", "weight", "out"))
        table.add_row(
            layer.name,
            bits,
            f"{layer.energy_pj / 1e6:,.3f}",
            f"{layer.cycles:,}",
            f"{layer.utilization:.0%}",
            *(f"{layer.certificate[key]:,}" for key in ("total", "evaluated")),
        )
    table.add_row("total", "", f"{best.energy_pj / 1e6:,.3f}", f"{best.cycles:,}", "", "", "")
    Console().print(table)


def energy_chart(best: hw.NetworkMapping) -> str:
    """Energy per level and tensor of each layer, as SVG."""
    rows = [(layer.name, layer.energies()) for layer in best.layers]
    parts = list(dict.fromkeys(part for _, energies in rows for part in energies))
    names = [f"{level} {tensor}".strip() for level, tensor in parts]
    bars = [(name, [energies.get(part, 0.0) / 1e6 for part in parts]) for name, energies in rows]
    return report.stacked_bars(bars, names, "uJ", f"Energy per level and tensor on {best.architecture}")


def run_cosearch(arguments: argparse.Namespace) -> None:
    """Searches, prints the front beside the uniform points, writes files."""
    if (arguments.sensitivity is None) == (arguments.accuracy is None):
        raise MixbitError("--sensitivity or --accuracy: expected one of them")
    if arguments.exact and arguments.sensitivity is None:
        raise MixbitError("--exact needs --sensitivity: accuracy must be a sum over layers")
    run = _Run(arguments, "front.json")
    accuracy: Any
    if arguments.sensitivity is not None:
        accuracy = SensitivityTable.load(arguments.sensitivity)
        run.inputs["sensitivity"] = file_digest(arguments.sensitivity)
    else:
        accuracy = load_function("accuracy", arguments.accuracy)
        run.inputs["accuracy"] = file_digest(arguments.accuracy.rpartition(":")[0])
    run.say(f"mapping {len(run.net)} layers on {run.arch.name} at every width")
    costs = hw.mapper_table(run.arch, run.net, arguments.objective, widths=arguments.widths, threads=arguments.threads)
    run.write("costs.json", costs.save)
    front = hw.cosearch(
        run.arch,
        run.net,
        accuracy,
        arguments.generations,
        objective=arguments.objective,
        costs=costs,
        widths=arguments.widths,
        engine=arguments.engine,
        parents=arguments.parents,
        offspring=arguments.offspring,
        seed=arguments.seed,
        state=run.folder / "evaluations.json",
    )
    run.write("evaluations.json", lambda _: None)
    run.write("front.json", front.save)
    fronts = {"found": front}
    if arguments.exact:
        exact = hw.exact_front(costs, accuracy, widths=arguments.widths, tolerance=arguments.tolerance)
        run.write("exact_front.json", exact.save)
        fronts["exact"] = exact
        print(f"exact front: {len(exact.points)} points; the search found {_found(front, exact):.0%} of them")
    title = f"{run.arch.name}: {front.measure} against {arguments.objective}"
    chart = report.scatter(_dots(fronts), f"{arguments.objective} ({costs.unit})", front.measure)
    run.write("front.svg", lambda path: write_text(path, report.standalone(chart)))
    table = Table(f"{arguments.objective} ({costs.unit})", front.measure, "bits", title=title)
    for point in front.points[:: max(1, len(front.points) // 20)]:
        table.add_row(f"{point.cost:,.6g}", f"{point.accuracy:.2f}", " ".join(map(str, point.genome)))
    for point in front.uniform:
        table.add_row(f"{point.cost:,.6g}", f"{point.accuracy:.2f}", f"uniform {point.genome[0]}")
    Console().print(table)
    print(f"{front.evaluations} evaluated, {len(front.points)} on the front, {len(front.failures)} failed")
    run.finish()


def _dots(fronts: Mapping[str, hw.Front], most: int = 500) -> list[report.Dot]:
    """Uniform points and the fronts, thinned where they have many points, for a picture; the last one is joined."""
    uniform = next(iter(fronts.values())).uniform
    dots = [report.Dot(p.cost, p.accuracy, "uniform", "uniform", f"{p.genome[0]} bits", hollow=True) for p in uniform]
    for name, front in fronts.items():
        for point in front.points[:: math.ceil(len(front.points) / most)]:
            bits = " ".join(map(str, point.genome))
            dots.append(report.Dot(point.cost, point.accuracy, name, bits, on_front=name == [*fronts][-1]))
    return dots


def _found(front: hw.Front, exact: hw.Front) -> float:
    """Share of the exact front's points that another front reaches."""
    reached = 0
    for point in exact.points:
        best = max((p.accuracy for p in front.points if p.cost <= point.cost * (1 + 1e-12)), default=-float("inf"))
        reached += best >= point.accuracy - 1e-9
    return reached / len(exact.points)


class _Run:
    """The inputs both verbs share, the files they write, and the manifest."""

    def __init__(self, arguments: argparse.Namespace, result: str) -> None:
        check_choice("objective", arguments.objective, hw.OBJECTIVES)
        self.arguments = arguments
        self.folder = Path(arguments.output)
        if (self.folder / result).exists() and not arguments.force:
            raise MixbitError(f"{str(self.folder / result)!r} exists; use --force to replace it, or another --output")
        self.start = time.perf_counter()
        self.inputs: dict[str, str] = {}
        self.outputs: list[str] = []
        self.arch = hw.Architecture.load(arguments.arch)
        self.inputs["arch"] = self.arch.digest
        self.net = self._workload()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MixbitError(f"output={str(self.folder)!r} cannot be made: {error.strerror or error}") from error
        self.write("workload.json", lambda path: write_document(path, *WORKLOAD, self.net.to_dict()))

    def _workload(self) -> hw.Workload:
        arguments = self.arguments
        if (arguments.model is None) == (arguments.workload is None):
            raise MixbitError("model or --workload: expected one of them")
        if arguments.workload is not None:
            self.inputs["workload"] = file_digest(arguments.workload) if Path(arguments.workload).exists() else ""
            document = read_document(arguments.workload, *WORKLOAD)
            return hw.Workload.from_dict({k: v for k, v in document.items() if k not in ("format", "version")})
        if min(arguments.input) < 1:
            raise MixbitError(f"--input {arguments.input}: expected sizes of at least 1, e.g. 3,224,224")
        torch.manual_seed(arguments.seed)
        model = load_model(arguments.model, arguments.weights, dict(arguments.model_option))
        self.inputs["model"] = fingerprint(model)
        try:
            return hw.Workload.from_model(
                model, torch.zeros(1, *arguments.input), depthwise_as_full=arguments.depthwise_as_full
            )
        except RuntimeError as error:
            sizes = ",".join(map(str, arguments.input))
            raise MixbitError(f"--input {sizes} does not fit the model: {error}") from error

    def say(self, text: str) -> None:
        """One line of what happens."""
        print(f"mixbit {self.arguments.verb}: {text}", flush=True)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file of the folder and notes it for the manifest."""
        write(self.folder / name)
        self.outputs.append(name)

    def finish(self) -> None:
        """Writes the manifest; wall-clock figures have a file of their own."""
        skip = {"debug", "force", "output", "verb", "version"}
        options = {k: v for k, v in vars(self.arguments).items() if k not in skip}
        document = {
            "verb": self.arguments.verb,
            "options": options,
            "seed": self.arguments.seed,
            "versions": versions(),
            "inputs": self.inputs,
            "outputs": {name: file_digest(self.folder / name) for name in self.outputs},
        }
        manifest = self.folder / f"{self.arguments.verb}.manifest.json"
        write_text(manifest, json.dumps(document, indent=2) + "\n")
        seconds = {self.arguments.verb: round(time.perf_counter() - self.start, 3)}
        write_text(self.folder / "timings.json", json.dumps(seconds, indent=2) + "\n")
        print("\n".join(f"wrote {self.folder / name}" for name in [*self.outputs, manifest.name]))
