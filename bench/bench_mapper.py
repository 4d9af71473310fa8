"""The mapper on MobileNetV1 as published (224 x 224, 28 layers, 100 classes, depthwise layers as full convolutions).

speed: seconds for the proven EDP optimum of all layers, at one width triple (8/8/8) and at all width classes of 16-bit
words in one sweep (216), least of three; mappings in the space and evaluated.
saving: EDP saved from 16 to 8 bits, proven, and as a random search with the reference's stopping rule (500 valid ones
without gain, 15000 invalid ones in a row) would have claimed; its mappings a second, one thread.
claim: energy of real networks at uniform 16 and 8 bits, each at its own proven optimum, and of the cheapest recipe that
loses at most 1 %p (exact assignment on the mapper's energies, biases corrected). Depthwise layers are grouped here.
check: the bounded search's optima of all four objectives and all 216 width classes against every mapping of the space,
scored one by one by build/tests/cpp/bench_mapper, which uses nothing of the search. "grouped": depthwise layers, one
channel a group.
nests: the loop nests that Timeloop's random search published for the pointwise layer 64 -> 128 at 56 x 56, scored by
our evaluate, beside the optimum of the same space; and the nest that FactorFlow published for a matrix product.
peers: the energy optimum of that layer on Eyeriss, by us (with the published constraints; with any loops at any level)
and by ZigZag (LOMA, `pip install zigzag-dse`; skipped where it is missing), which is given the unrolling of our optimum
and whose nest is scored by our evaluate too: the two models count differently, so only that number compares.

Usage: python bench/bench_mapper.py [speed] [saving] [claim] [check] [nests] [peers] [--network NAME] [--again]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from networks import Setting, pack
from rows import measure

import mixbit
from mixbit import hw
from mixbit.hw import mapper

CLASSES = (2, 3, 4, 5, 8, 16)  # one width of each class of a 16-bit word
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
PARTS = ("speed", "saving", "claim", "check", "nests", "peers")
POINTWISE = {"C": 64, "M": 128, "P": 56, "Q": 56}
ROOT = Path(__file__).resolve().parents[1]
POINTS = ROOT / "tests" / "data" / "timeloop_points.json"


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


def optimum(arch: hw.Architecture, problem: dict[str, Any], width: int, objective: str) -> hw.LayerMapping:
    bits = {"act": width, "weight": width, "out": width}
    return hw.map_network(arch, hw.Workload.from_shapes([problem]), bits, objective, threads=1).layers[0]


def check(name: str, layers: str, program: Path) -> dict[str, Any]:
    method = {"as full convolutions": "check", "grouped": "check_grouped"}[layers]
    done = subprocess.run([str(program), name, "edp", method, "all"], stdout=subprocess.PIPE, text=True, check=False)
    figures = json.loads(done.stdout)
    assert isinstance(figures, dict)
    return figures


def nests(point: str) -> dict[str, Any]:
    reference = json.loads(POINTS.read_text(encoding="utf-8"))
    found = next(p for p in reference["points"] if p["id"] == point)
    arch = hw.Architecture.load(found["arch"].split("_")[0])
    problem = hw.Layer.from_dict(found["problem"])
    scored = hw.evaluate(arch, problem, hw.Mapping.from_dict(found["mapping"]))
    width = found["problem"].get("bitwidths", {"Inputs": 16})["Inputs"]
    best = optimum(arch, found["problem"], width, "edp")
    return {
        "published uJ": round(found["expected"]["energy_total_pJ"] / 1e6, 2),
        "published cycles": found["expected"]["cycles"],
        "scored uJ": round(scored.energy_pj / 1e6, 2),
        "scored cycles": scored.cycles,
        "scored EDP": round(scored.edp, 2),
        "optimal EDP": round(best.edp, 2),
        "above the optimum %": round(100 * (scored.edp / best.edp - 1), 1),
    }


def unconstrained() -> hw.Architecture:
    """Eyeriss with its hardware alone: what each memory keeps and where it fans out, any loops in any order."""
    document = copy.deepcopy(hw.Architecture.load("eyeriss").to_dict())
    for level in document["levels"]:
        rules = level["constraints"]
        closed = [k for k in ("spatial_x", "spatial_y") if not rules.get(k, {}).get("dims", True)]
        level["constraints"] = {k: rules[k] for k in ("keep", "bypass", *closed) if k in rules}
    document["levels"][3]["constraints"]["temporal"] = {"dims": []}  # the column stores nothing
    return hw.Architecture.from_dict(document | {"name": "eyeriss, any loops"})


def factorflow() -> dict[str, Any]:
    """FactorFlow's published nest for M 3072, K 1024, N 4096 on Eyeriss, and the optimum of the space it is from.

    Its buffer has 128 KiB, and its values have 8 bits (https://github.com/EMJzero/FactorFlow, solutions_db.py,
    `arch_eyeriss_factorflow_1`); it fixes which dimensions unroll and the order at each memory, and chooses factors.
    K is our C, its N (columns of the product) our N.
    """
    document = unconstrained().to_dict()
    levels = document["levels"]
    levels[4]["size"] = 65536
    for at in (1, 2, 4):
        levels[at]["constraints"]["temporal"] = {"order": ["N", "C", "M"]}
    levels[5]["constraints"]["temporal"] = {"order": ["C", "M", "N"]}
    levels[4]["constraints"]["spatial_x"] = {"dims": ["M"]}
    levels[3]["constraints"]["spatial_y"] = {"dims": ["M", "C"]}
    arch = hw.Architecture.from_dict(document | {"name": "eyeriss, as FactorFlow has it"})
    problem, bits = {"C": 1024, "M": 3072, "N": 4096}, {"act": 8, "weight": 8, "out": 8}
    loops: dict[str, dict[str, Any]] = {
        "psum_spad": {"temporal_inner_to_outer": [["M", 4]]},
        "weights_spad": {"temporal_inner_to_outer": [["C", 16]]},
        "ifmap_spad": {},
        "DummyBuffer": {"spatial_y": [["M", 12]]},
        "shared_glb": {"spatial_x": [["M", 8]], "temporal_inner_to_outer": [["N", 256], ["C", 8]]},
        "DRAM": {"temporal_inner_to_outer": [["C", 8], ["M", 8], ["N", 16]]},
    }
    nest = [
        {"level": level.name, "keep": level.constraints.get("keep", []), "spatial_x": [], "spatial_y": []}
        | {"temporal_inner_to_outer": []}
        | loops[level.name]
        for level in arch.levels
    ]
    scored = hw.evaluate(arch, problem, hw.Mapping.from_dict(nest), bits)
    best = optimum(arch, problem, 8, "edp")
    assert best.edp <= scored.edp
    return {
        "published uJ": "",
        "published cycles": "",
        "scored uJ": round(scored.energy_pj / 1e6, 2),
        "scored cycles": scored.cycles,
        "scored EDP": round(scored.edp, 2),
        "optimal EDP": round(best.edp, 2),
        "above the optimum %": round(100 * (scored.edp / best.edp - 1), 1),
    }


def ours(arch: hw.Architecture) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    best = optimum(arch, POINTWISE, 16, "energy")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "CPU s": round(time.process_time() - cpu, 2),
        "mappings": f"{best.certificate['total']:.3g} in the space, {best.certificate['evaluated']} priced",
        "own uJ": "",
        "own cycles": "",
        "our uJ": round(best.energy_pj / 1e6, 2),
        "our cycles": best.cycles,
    }


def zigzag_memory(level: hw.Level, operands: str, shared: bool) -> dict[str, Any]:
    ways = {"I1": ("fh", "tl"), "I2": ("fh", "tl"), "O": ("fh", "tl", "fl", "th")}
    access = level.word_bits * level.block
    port = {
        "name": "rw_port_1",
        "type": "read_write",
        "bandwidth_min": access,
        "bandwidth_max": access,
        "allocation": [f"{operand}, {way}" for operand in operands.split() for way in ways[operand]],
    }
    return {
        "size": 10**12 if level.size is None else level.size * level.word_bits,
        "r_cost": level.read_pj,
        "w_cost": level.write_pj,
        "area": 0,
        "latency": 1,
        "operands": operands.split(),
        "ports": [port],
        "served_dimensions": ["D1", "D2"] if shared else [],
    }


def zigzag() -> dict[str, Any]:
    """ZigZag's best energy, and its nest, at the levels where its outputs have their loops, in our model."""
    from zigzag.api import get_hardware_performance_zigzag

    arch = hw.Architecture.load("eyeriss")
    psum, weights, ifmap, _, glb, dram = arch.levels
    memories = {
        "ifmap_spad": zigzag_memory(ifmap, "I1", False),
        "weights_spad": zigzag_memory(weights, "I2", False),
        "psum_spad": zigzag_memory(psum, "O", False),
        "shared_glb": zigzag_memory(glb, "I1 O", True),
        "DRAM": zigzag_memory(dram, "I1 I2 O", True),
    }
    array = {
        "unit_energy": arch.mac.energy,
        "unit_area": 0,
        "dimensions": ["D1", "D2"],
        "sizes": [arch.mac.mesh_x, arch.mac.mesh_y],
    }
    layer = {
        "id": 0,
        "name": "pointwise",
        "operator_type": "Conv",
        "equation": "O[k][oy][ox]+=W[k][c]*I[c][oy][ox]",
        "dimension_relations": [],
        "loop_dims": ["K", "C", "OX", "OY"],
        "loop_sizes": [POINTWISE[dim] for dim in "MCPQ"],
        "operand_precision": dict.fromkeys(("W", "I", "O", "O_final"), 16),
        "operand_source": {"I": 0, "W": 0},
    }
    unrolled = {
        "name": "default",
        "spatial_mapping": {"D1": ["K, 8"], "D2": ["C, 8"]},
        "memory_operand_links": {"O": "O", "W": "I2", "I": "I1"},
    }
    documents = {
        "accelerator": {"name": "eyeriss", "memories": memories, "operational_array": array},
        "workload": [layer],
        "mapping": [unrolled],
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / f"{name}.yaml") for name in documents}
        for name, document in documents.items():
            # The memories' order is the hierarchy.
            Path(paths[name]).write_text(yaml.safe_dump(document, sort_keys=False))
        start, cpu = time.perf_counter(), time.process_time()
        energy, latency, found = get_hardware_performance_zigzag(
            **paths, opt="energy", dump_folder=f"{folder}/out", loma_show_progress_bar=False
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    result = found[0][1][0][0]
    names = {"K": "M", "C": "C", "OX": "P", "OY": "Q"}
    loops = next(
        levels for operand, levels in result.temporal_mapping.mapping_dic_origin.items() if str(operand) == "O"
    )
    document = [{"level": level.name, "temporal_inner_to_outer": []} for level in arch.levels]
    for at, inside in zip((0, 4, 5), loops, strict=True):
        document[at]["temporal_inner_to_outer"] = [[names[str(dim)], int(factor)] for dim, factor in inside]
    for at, level in enumerate(arch.levels):
        document[at] |= {"keep": level.constraints.get("keep", []), "spatial_x": [], "spatial_y": []}
    document[3]["spatial_y"], document[4]["spatial_x"] = [["C", 8]], [["M", 8]]
    scored = hw.evaluate(arch, POINTWISE, hw.Mapping.from_dict(document), {"act": 16, "weight": 16, "out": 16})
    return {
        "seconds": round(seconds, 2),
        "CPU s": round(cpu, 2),
        "mappings": "all orders of 6 merged factors, one unrolling",
        "own uJ": round(energy / 1e6, 2),
        "own cycles": int(latency),
        "our uJ": round(scored.energy_pj / 1e6, 2),
        "our cycles": scored.cycles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--network", action="append", help="of the claim (default: ResNet-20)")
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "tests" / "cpp" / "bench_mapper")
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
        if "check" in options.parts:
            for layers in ("as full convolutions", "grouped"):
                config = {"part": "check", "architecture": name, "depthwise": layers}
                jobs.append(("mapper", config, lambda n=name, d=layers: check(n, d, options.program)))
    if "nests" in options.parts:
        for point in ("eyeriss-8_8_8-L5", "simba-native-L5", "simba-4_4_4-L5"):
            jobs.append(("mapper", {"part": "nests", "point": point}, lambda p=point: nests(p)))
        jobs.append(("mapper", {"part": "nests", "point": "FactorFlow, KQV of BERT large"}, factorflow))
    if "peers" in options.parts:
        published_loops, any_loops = hw.Architecture.load("eyeriss"), unconstrained()
        peers = {
            "mixbit, published constraints": lambda: ours(published_loops),
            "mixbit, any loops": lambda: ours(any_loops),
        }
        if importlib.util.find_spec("zigzag") is None:
            print("peers: ZigZag is not installed (pip install zigzag-dse); its row is skipped")
        else:
            peers["ZigZag, LOMA"] = zigzag
        print("peers: AccelForge needs Python 3.12 or later and is not run; its row is skipped")
        jobs += [("mapper", {"part": "peers", "mapper": name}, run) for name, run in peers.items()]
    for file, config, run in jobs:
        print(config, measure(file, config, run, again=options.again)["figures"], flush=True)


if __name__ == "__main__":
    main()
