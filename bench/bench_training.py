"""One training step at 4-bit weights and activations with learned scales, or of a search, against the float step.

ResNet-18: batch 4, 224 x 224. Searches over 2, 4 and 8 bits, the penalty included: ResNet-20, batch 128, and
MobileNetV1 1.0, batch 4, 224 x 224. Random images (time and memory do not depend on them), batch norm unfolded, plain
SGD. Saved: bytes that autograd keeps between forward and backward, parameters and buffers aside, each storage counted
once. Peak RSS: what steps add to the resident set of a process of their own.

With --optimizers the step of all parameters of ResNet-20 and VGG-9 at 2 bits, momentum and decay, random gradients:
torch's against ThresholdAware, alone and with the counting of level switches.

With --retrain a whole step of ResNet-20, batch 128, with momentum and decay: float, at 2-bit weights and 4-bit inputs,
and with everything that retraining has (clipped activations, extra levels for a fifth of the weights, counting, smaller
steps near thresholds, freezing, dampening).

Usage: python bench/bench_training.py [--again] [--threads N] [--compiled | --search KIND | --optimizers | --retrain]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from rows import measure
from torch import Tensor, nn
from torchvision.models import resnet18

import mixbit
from mixbit import search, zoo
from mixbit.bench import side_by_side

BATCH, SIZE = 4, 224


class Step:
    """A model with its data and optimizer; calling it trains one step."""

    def __init__(self, model: nn.Module, x: Tensor | None = None, classes: int = 1000, penalty: Any = None) -> None:
        torch.manual_seed(1)
        self.model = model.train()
        self.x = torch.randn(BATCH, 3, SIZE, SIZE) if x is None else x
        self.labels = torch.randint(0, classes, (len(self.x),))
        self.penalty = penalty
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(self.x), self.labels)
        return loss if self.penalty is None else loss + self.penalty()

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def saved_mib(self) -> float:
        """MiB kept for the backward."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(kept.values()) / 2**20


def quantized(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = resnet18().eval()
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    names = mixbit.layers(model, x).names
    mixbit.prepare_(model, mixbit.Recipe.uniform(names, act=bits, weight=bits), x)
    return mixbit.calibrate_(model, [x], method="maxabs")


def figures(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    float_step, low_step = Step(resnet18()), Step(quantized(4))
    times = side_by_side({"float": float_step, "mixbit": low_step}, repeats=8, warmup=2)
    seconds = {name: timing.least for name, timing in times.items()}
    saved = {"float": float_step.saved_mib(), "mixbit": low_step.saved_mib()}
    # The allocator's luck differs from process to process: the least of three.
    peaks = {kind: min(peak_rss_mib(kind) for _ in range(3)) for kind in ("float", "mixbit")}
    return {
        "float ms": round(seconds["float"] * 1e3, 1),
        "mixbit": round(seconds["mixbit"] / seconds["float"], 3),
        "float saved MiB": round(saved["float"], 1),
        "mixbit saved": round(saved["mixbit"] / saved["float"], 3),
        "float peak RSS MiB": round(peaks["float"], 1),
        "mixbit peak RSS": round(peaks["mixbit"] / peaks["float"], 3),
    }


def compiled_figures(threads: int) -> dict[str, Any]:
    """Both whole models through torch.compile, forward and backward; the optimizer stays eager."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    steps = {"float": Step(resnet18()), "mixbit": Step(quantized(4))}
    start = time.perf_counter()
    for step in steps.values():
        step.model = torch.compile(step.model, fullgraph=True)
        step()
    seconds = time.perf_counter() - start
    times = side_by_side(steps, repeats=8, warmup=2)
    return {
        "compiled float ms": round(times["float"].least * 1e3, 1),
        "mixbit": round(times["mixbit"].least / times["float"].least, 3),
        "s to compile both": round(seconds, 1),
    }


#: Networks of the searches: constructor, batch, size of the images.
SEARCHED: dict[str, tuple[Any, int, int]] = {
    "ResNet-20": (lambda: zoo.cifar_resnet(20), 128, 32),
    "MobileNetV1 1.0": (lambda: zoo.mobilenet_v1(1.0), 4, 224),
}
SPACES = {"gates": search.Gates, "mixture": search.Mixture, "fractional": search.Fractional}


def search_figures(network: str, kind: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    make, batch, size = SEARCHED[network]
    x = torch.randn(batch, 3, size, size)
    steps = {}
    for name in ("float", "search"):
        torch.manual_seed(0)
        model, penalty = make().eval(), None
        classes = model(x[:1]).shape[1]
        if name == "search":
            costs = mixbit.costs.bops(model, x[:1])
            mixbit.prepare_(model, SPACES[kind](precisions=(2, 4, 8)), x[:1])
            mixbit.calibrate_(model, [x], method="maxabs")
            penalty = search.Penalty(model, costs, budget=0.5 * costs.uniform(8, 8), total_steps=1000)
        steps[name] = Step(model, x, classes, penalty)
    times = side_by_side(steps, repeats=8, warmup=2)
    saved = {name: step.saved_mib() for name, step in steps.items()}
    return {
        "float ms": round(times["float"].least * 1e3, 1),
        "search": round(times["search"].least / times["float"].least, 3),
        "float saved MiB": round(saved["float"], 1),
        "search saved": round(saved["search"] / saved["float"], 3),
    }


STEPPED: dict[str, Any] = {"ResNet-20": lambda: zoo.cifar_resnet(20), "VGG-9": zoo.vgg9}


def optimizer_figures(network: str, threads: int) -> dict[str, Any]:
    """One model a contender; none of them moves its weights far, at the rate of a fine-tuning."""
    torch.set_num_threads(threads)

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = STEPPED[network]().eval()
        x = torch.randn(4, 3, 32, 32)
        recipe = mixbit.Recipe.uniform(
            mixbit.layers(made, x).names, act=4, weight=2, rounding="half_up", narrow_range=False
        )
        mixbit.calibrate_(mixbit.prepare_(made, recipe, x), [x], method="maxabs")
        for p in made.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        return made

    def sgd(made: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(made.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, **options)

    models = {name: model() for name in ("foreach", "plain", "fused", "aware", "both")}
    aware = {name: mixbit.retrain.ThresholdAware(sgd(models[name]), models[name]) for name in ("aware", "both")}
    tracker = mixbit.retrain.SwitchTracker(models["both"])

    def both() -> None:
        aware["both"].step()
        tracker.update_()

    contenders: dict[str, Any] = {
        "foreach": sgd(models["foreach"], foreach=True).step,
        "plain": sgd(models["plain"], foreach=False).step,
        "fused": sgd(models["fused"], fused=True).step,
        "aware": aware["aware"].step,
        "both": both,
    }
    times = side_by_side(contenders, repeats=30, warmup=5)
    base = times["foreach"].least
    return {
        "weights": sum(p.numel() for p in models["aware"].parameters()),
        "SGD(foreach=True) ms": round(base * 1e3, 3),
        "SGD(foreach=False)": round(times["plain"].least / base, 3),
        "SGD(fused=True)": round(times["fused"].least / base, 3),
        "ThresholdAware": round(times["aware"].least / base, 3),
        "ThresholdAware + switches": round(times["both"].least / base, 3),
    }


class Retrained(Step):
    """A step of retraining: SGD with momentum and decay, and what a run does beside it."""

    def __init__(self, kind: str, x: Tensor) -> None:
        torch.manual_seed(0)
        model = zoo.cifar_resnet(20).eval()
        self.after: list[Any] = []
        dampening = None
        if kind != "float":
            names = mixbit.layers(model, x).names
            grid = {"rounding": "half_up", "narrow_range": False}
            recipe = mixbit.Recipe.uniform(names, act=4, weight=2, **grid)
            for name in (names[0], names[-1]):
                recipe.layers[name] = mixbit.LayerPrecision(weight=4, act=4, **grid)
            mixbit.prepare_(model, recipe, x[:2], act_quantizer="lsq" if kind == "low" else "pact")
            mixbit.calibrate_(model, [x], method="maxabs")
        if kind == "everything, dampening too":
            dampening = mixbit.retrain.Dampening(model, 1e-3)
        super().__init__(model, x, 10, dampening)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        if kind.startswith("everything"):
            self.optimizer = mixbit.retrain.ThresholdAware(self.optimizer, model)
            tracker = mixbit.retrain.SwitchTracker(model)
            tracker.assign_(fraction=0.2, by="random")
            freezing = mixbit.retrain.IterativeFreezing(model, 0.1)
            self.after = [freezing.update_, tracker.update_]

    def __call__(self) -> None:
        super().__call__()
        for update in self.after:
            update()


def retrain_figures(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(2)
    x = torch.randn(128, 3, 32, 32)
    kinds = ("float", "low", "everything", "everything, dampening too")
    steps = {kind: Retrained(kind, x) for kind in kinds}
    times = side_by_side(steps, repeats=12, warmup=2)
    base = times["float"].least
    return {
        "float ms": round(base * 1e3, 1),
        "2-bit weights, 4-bit inputs": round(times["low"].least / base, 3),
        "everything on": round(times["everything"].least / base, 3),
        "dampening too": round(times["everything, dampening too"].least / base, 3),
    }


def peak_rss_mib(kind: str) -> float:
    """MiB that three steps, the first ones, add to a process that has its model: gradients, activations, workspaces."""
    code = f"import bench_training; print(bench_training.added_peak({kind!r}))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return float(out.stdout.split()[-1])


def added_peak(kind: str) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = Step(resnet18() if kind == "float" else quantized(4))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what calibration has left
    before = resident_mib()
    reset_peak()
    for _ in range(3):
        step()
    return peak_mib() - before


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def resident_mib() -> float:
    return _status("VmRSS:")


def peak_mib() -> float:
    return _status("VmHWM:")


def reset_peak() -> None:
    """The peak starts anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure a row that exists anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="compare the models through torch.compile")
    parser.add_argument("--search", choices=SPACES, help="steps of a search, on both networks")
    parser.add_argument("--optimizers", action="store_true", help="compare the steps of optimizers alone")
    parser.add_argument("--retrain", action="store_true", help="compare steps of retraining with everything on")
    options = parser.parse_args()
    if options.retrain:
        config = {"network": "ResNet-20", "retraining": "batch 128, SGD momentum 0.9 decay 1e-4"}
        config["threads"] = options.threads
        row = measure("training", config, lambda: retrain_figures(options.threads), again=options.again)
        print(config, row["figures"])
        return
    for network in STEPPED if options.optimizers else ():
        config = {"network": network, "optimizer": "SGD momentum 0.9 decay 1e-4", "threads": options.threads}
        row = measure(
            "training",
            config,
            lambda network=network: optimizer_figures(network, options.threads),
            again=options.again,
        )
        print(config, row["figures"])
    if options.optimizers:
        return
    for network in SEARCHED if options.search else ():
        config = {"network": network, "search": options.search, "widths": "2 4 8", "threads": options.threads}
        row = measure(
            "training",
            config,
            lambda network=network: search_figures(network, options.search, options.threads),
            again=options.again,
        )
        print(config, row["figures"])
    if options.search:
        return
    config = {
        "network": "ResNet-18 W4A4 learned scales",
        "mode": "compiled" if options.compiled else "eager",
        "batch": BATCH,
        "size": SIZE,
        "threads": options.threads,
    }
    run = compiled_figures if options.compiled else figures
    row = measure("training", config, lambda: run(options.threads), again=options.again)
    print(config, row["figures"])


if __name__ == "__main__":
    main()
