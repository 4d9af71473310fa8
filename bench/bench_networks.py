"""Whole networks with real weights in the integer runtime, against ONNX Runtime's int8 and float torch, one thread.

One image, everything interleaved, minimum of repeats, in time of the processor (a run that another program interrupts
would take longer by the clock; all contenders use one thread). Recipes are uniform ("W4A8": weights of 4 bits, inputs
of 8). "ONNX Runtime int8" is ONNX Runtime's own quantization of the float network (`quantize_static`: one scale a
channel, minimum and maximum of the same images, QDQ); "our file" is `mixbit.export.onnx` of the W8A8 network
(`exact=False`, the faster form). Float torch runs the folded network in the memory format that is faster here.
Cold start: `mixbit-run` from the start of the process to the written answer, by the clock and in time of the
processor, and inside it from opening the package to the first answer by the clock; the file is in the page cache. Peak
memory: of that process up to the first answer, less that of one that runs a layer of one weight, beside the bytes of
values (arena) and weights.

Usage: python bench/bench_networks.py [--network NAME] [--isa amx|vnni|avx2] [--program mixbit-run] [--again]
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from networks import Setting, pack
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rows import measure, versions

import mixbit
from mixbit.runtime import Network

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("W8A8", "W4A8", "W2A8", "W4A4", "W2A2")
NETWORKS = ("ResNet-20", "MobileNetV1 0.25", "MobileNetV1 1.0", "MobileNetV2 (PTQ weights)", "SSD-MobileNetV2")
#: Images that ranges are taken from: no time depends on them.
FEW = 4
ROUNDS = 30
STARTS = 12
#: Calls of one contender in a row; the first of them finds a cache that another contender has filled.
BURST = 5


class Images(CalibrationDataReader):
    """Calibration images, one at a time, as ONNX Runtime wants them."""

    def __init__(self, name: str, batches: list[torch.Tensor]) -> None:
        self._images = iter([{name: image[None].contiguous().numpy()} for batch in batches for image in batch])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None after the last."""
        return next(self._images, None)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def peer(setting: Setting, folder: Path) -> ort.InferenceSession:
    """The float network as ONNX Runtime quantizes it."""
    path, quantized = folder / "float.onnx", folder / "int8.onnx"
    model = copy.deepcopy(setting.folded).to(memory_format=torch.contiguous_format)
    example = setting.example[:1].contiguous()
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False, external_data=False)
    name = session(path).get_inputs()[0].name
    quantize_static(
        path,
        quantized,
        Images(name, [setting.batches[0][:FEW]]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return session(quantized)


def bound(found: ort.InferenceSession, x: np.ndarray) -> Callable[[], Any]:
    """A call without conversions of arrays."""
    binding = found.io_binding()
    binding.bind_ortvalue_input(found.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(x))
    for output in found.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: found.run_with_iobinding(binding)


def least(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest call of each; they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(BURST):
                start = time.thread_time()
                call()
                best[name] = min(best[name], time.thread_time() - start)
    return {name: seconds * 1e3 for name, seconds in best.items()}


def said(command: list[str], environment: dict[str, str]) -> str:
    """What a program prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def number(text: str, before: str, after: str) -> float:
    """The number between two texts."""
    return float(text.partition(before)[2].partition(after)[0])


def nothing(folder: Path) -> Path:
    """A package with one weight."""
    model, x = torch.nn.Sequential(torch.nn.Linear(1, 1)).eval(), torch.ones(1, 1)
    mixbit.prepare_(model, mixbit.Recipe.uniform(["0"], weight=8, act=8), x)
    mixbit.calibrate_(model, [x], "maxabs", example=x)
    return mixbit.export.integer(model, x, folder / "nothing.mixbit")


def start_figures(program: Path, package: Path, x: np.ndarray, folder: Path, isa: str) -> dict[str, Any]:
    """Cold start and memory of `mixbit-run` at W8A8."""
    environment = {**os.environ, "MIXBIT_CPU_ISA": isa}
    np.save(folder / "x.npy", x)
    command = [str(program), str(package), "--input", str(folder / "x.npy"), "--output", str(folder / "y.npy")]
    seconds, busy, told = [], [], []
    for _ in range(STARTS):
        start = time.perf_counter()
        process = os.posix_spawn(command[0], command, environment)
        _, status, usage = os.wait4(process, 0)
        seconds.append(time.perf_counter() - start)
        busy.append(usage.ru_utime + usage.ru_stime)
        assert status == 0, command
        told.append(said([*command, "--bench", "1"], environment))
    empty = said([str(program), str(nothing(folder)), "--bench", "1"], environment)
    memory = ("process by then: ", " kB")
    network = Network(package, isa=isa)
    return {
        "W8A8 start of the process to the answer, ms": round(min(seconds) * 1e3, 2),
        "of the processor, ms": round(min(busy) * 1e3, 2),
        "open to first answer, ms": round(min(number(text, "first answer after ", " ms") for text in told), 2),
        "peak memory, kB": int(min(number(text, *memory) for text in told) - number(empty, *memory)),
        "values + weights, kB": (network.arena_bytes + network.weight_bytes) // 1024,
        "file, kB": package.stat().st_size // 1024,
    }


def figures(name: str, isa: str, program: Path) -> dict[str, Any]:
    """Milliseconds of all contenders, how many times faster each recipe is, cold start and memory."""
    setting = Setting(name)
    x = setting.test[0][0][:1].contiguous()
    array = x.numpy()
    few = [setting.batches[0][:FEW]]
    layout = torch.channels_last if setting.network.channels_last else torch.contiguous_format
    floats = x.to(memory_format=layout)
    with tempfile.TemporaryDirectory() as at, torch.inference_mode():
        folder = Path(at)
        calls: dict[str, Callable[[], Any]] = {"float torch": lambda: setting.folded(floats)}
        for recipe in RECIPES:
            weight, act = int(recipe[1]), int(recipe[3])
            model = copy.deepcopy(setting.folded)
            uniform = mixbit.Recipe.uniform(setting.names, weight=weight, act=act)
            mixbit.prepare_(model, uniform, setting.example)
            mixbit.calibrate_(model, few, "maxabs", example=setting.example)
            package = mixbit.export.integer(model, setting.example, folder / f"{recipe}.mixbit")
            network = Network(package, isa=isa)
            calls[recipe] = lambda network=network: network(array)
            if recipe == "W8A8":
                ours = folder / "ours.onnx"
                mixbit.export.onnx(model, setting.example, ours, exact=False, say=lambda text: None)
                calls["our file"] = bound(session(ours), array)
        calls["ONNX Runtime int8"] = bound(peer(setting, folder), array)
        best = least(calls, ROUNDS)
        found: dict[str, Any] = {
            "float torch ms": round(best["float torch"], 3),
            "ONNX Runtime int8 ms": round(best["ONNX Runtime int8"], 3),
            "our file ms": round(best["our file"], 3),
            "W8A8 ms": round(best["W8A8"], 3),
        }
        theirs = min(best["ONNX Runtime int8"], best["our file"])
        found |= {f"{recipe} (of the faster file)": round(theirs / best[recipe], 2) for recipe in RECIPES}
        found["W8A8 (of float torch)"] = round(best["float torch"] / best["W8A8"], 2)
        return found | start_figures(program, folder / "W8A8.mixbit", array, folder, isa)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--isa", default="amx", choices=("scalar", "avx2", "vnni", "amx"))
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "csrc" / "runtime" / "mixbit-run")
    parser.add_argument("--again", action="store_true", help="measure rows that exist again")
    options = parser.parse_args()
    if not options.program.exists():
        parser.error(f"--program {options.program} is missing; build it: cmake --build build -t mixbit_run")
    versions()
    torch.set_num_threads(1)
    for network in options.network or NETWORKS:
        config = {"whole network": network, "isa": options.isa, "peer": f"ONNX Runtime {ort.__version__}"}
        config["data"] = pack()

        def run(network: str = network) -> dict[str, Any]:
            return figures(network, options.isa, options.program)

        row = measure("runtime", config, run, again=options.again)
        print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
