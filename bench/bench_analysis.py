"""The SQNR analysis against the accuracy-based flow, on one machine in one run: time, and how alike they rank layers.

The accuracy-based flow: one prepared model; for every width and every layer that layer alone is quantized, bits
switched in place, and the whole test set is evaluated (layers x widths evaluations). It is run for one width and its
time multiplied by the number of widths. The analysis reads its calibration images at all widths. The ratio on equal
images divides both by what they read.

The rank correlation (Spearman) is between each layer's SQNR at that width and the loss of the metric when the layer
alone has it; the SQNR of the layer's output and of the network's, for detectors also weighted by the decoded
confidence.

`--sampled N` is for networks on which the accuracy-based flow takes hours: it evaluates N layers, evenly spread over
the network, and multiplies their time; there is no rank correlation then.

Usage: python bench/bench_analysis.py [--network NAME] [--bits B] [--sampled N] [--threads N] [--again]
       python bench/bench_analysis.py --scaling: time and memory over images and layers, on seeded networks
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from networks import NETWORKS, Setting, pack
from rows import measure
from scipy.stats import spearmanr

import mixbit
from mixbit.quantizers import quantized_layers

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def single_layers(setting: Setting, bits: int, names: list[str]) -> tuple[list[float], float]:
    """The metric with each of some layers alone at a width, and the seconds of these evaluations."""
    recipe = mixbit.Recipe.uniform(setting.names, act=bits, weight=bits)
    model = setting.quantized(recipe, bias=False)
    modules = quantized_layers(model)
    scores = []
    start = time.perf_counter()
    for name in names:
        for other, module in modules.items():
            module.bypassed = other != name
        scores.append(setting.score(model))
    return scores, time.perf_counter() - start


def figures(name: str, bits: int, threads: int, sampled: int = 0) -> dict[str, Any]:
    torch.set_num_threads(threads)
    setting = Setting(name)
    images = sum(len(x) for x in setting.batches)
    mixbit.analyze(setting.folded, setting.batches[:1], precisions=(8,), joint=True)  # warm
    start = time.perf_counter()
    table = mixbit.analyze(setting.folded, setting.batches, precisions=WIDTHS, joint=True)
    seconds = time.perf_counter() - start
    reference = setting.score(setting.folded)
    names = setting.names
    if sampled:
        names = [names[i * len(names) // sampled] for i in range(sampled)]
    scores, flow = single_layers(setting, bits, names)
    flow *= len(WIDTHS) * len(setting.names) / len(names)
    drops = [reference - score for score in scores]
    per_image = (setting.test_images / images) * seconds / flow
    column = WIDTHS.index(bits)
    found = {
        "test images": setting.test_images,
        "calibration images": images,
        "layers x widths": len(setting.names) * len(WIDTHS),
        "accuracy flow s": round(flow, 1),
        "analyze s": round(seconds, 1),
        "less time %": round(100 * (1 - seconds / flow), 2),
        "less time % on equal images": round(100 * (1 - per_image), 2),
        "largest drop": round(max(drops), 2),
    }
    if sampled:
        return found
    found["rank correlation"] = round(float(spearmanr(-table.sqnr_db[:, column], drops).statistic), 3)
    weightings = {"at the output": None}
    if setting.network.metric == "ap50":
        weightings["at the output, by confidence"] = "confidence"
    for label, importance in weightings.items():
        few = setting.batches[: max(1, 64 // setting.network.batch)]
        other = mixbit.analyze(setting.folded, few, (bits,), "network_output", True, importance=importance)
        found[f"rank correlation {label}"] = round(float(spearmanr(-other.sqnr_db[:, 0], drops).statistic), 3)
    return found


class Chain(torch.nn.Module):
    """Convolutions one after the other, 16 channels on 32 x 32."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(16 if i else 3, 16, 3, padding=1) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, 32, 32] -> [N, 16, 32, 32]."""
        for layer in self.layers:
            x = layer(x).relu()
        return x


def peak_mib() -> float:
    """Peak resident set of this process since it was last reset, in MiB."""
    line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def scaling(images: int, layers: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = Chain(layers).eval()
    generator = torch.Generator().manual_seed(1)
    # Made anew at each pass, as a loader does: the data itself does not count.

    class Images:
        def __iter__(self) -> Any:
            state = copy.deepcopy(generator.get_state())
            own = torch.Generator()
            own.set_state(state)
            return (torch.randn(8, 3, 32, 32, generator=own) for _ in range(images // 8))

        def __len__(self) -> int:
            return images // 8

    mixbit.analyze(model, Images(), (8,), joint=True) if images == 8 else None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_mib()
    start = time.perf_counter()
    mixbit.analyze(model, Images(), WIDTHS, joint=True)
    return {"seconds": round(time.perf_counter() - start, 2), "peak MiB above the start": round(peak_mib() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name, network in NETWORKS.items() if network.weights is not None]
    parser.add_argument("--network", choices=known, action="append", help="only these")
    parser.add_argument("--bits", type=int, default=3, choices=WIDTHS)
    parser.add_argument("--sampled", type=int, default=0, metavar="N", help="evaluate only N layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    options = parser.parse_args()
    if options.scaling:
        for images, layers in ((8, 20), (32, 20), (128, 20), (512, 20), (64, 20), (64, 50), (64, 100), (64, 200)):
            config = {"layers": layers, "images": images, "widths": "2..8"}
            row = measure("scaling", config, lambda i=images, n=layers: scaling(i, n), again=options.again)
            print(config, row["figures"], flush=True)
        return
    for name in options.network or known:
        config = {"network": name, "images": pack(), "widths": "2..8", "bits": options.bits, "threads": options.threads}
        if options.sampled:
            config["sampled layers"] = options.sampled
        row = measure(
            "analysis",
            config,
            lambda n=name: figures(n, options.bits, options.threads, options.sampled),
            again=options.again,
        )
        print(config, row["figures"], flush=True)


if __name__ == "__main__":
    main()
