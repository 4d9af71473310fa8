"""The networks with real weights that several benchmarks run on, with calibration and test data that never overlap."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import torch

import mixbit
from mixbit import sources
from mixbit.quantizers import input_statistics

#: The fixed split of the ImageNet-compatible images: the first 600 calibrate, the last 311 are measured.
IMAGENET_SPLIT = 600


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a network and its data come from.

    Attributes:
        model: Name in the zoo.
        options: Of the model.
        weights: Pack with its weights; None for seeded random ones.
        data: Calibration data in the zoo.
        test: Test data; None takes the part of `data` behind the split.
        metric: Of the test.
        images: Calibration images.
        analyzed: How many of them the analysis of all pairs of widths reads.
        batch: Images of a batch.
        channels_last: The memory format in which it runs faster here.
    """

    model: str
    weights: str | None
    data: str
    test: str | None = None
    metric: str = "top1"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: int = 128
    analyzed: int = 32
    batch: int = 16
    channels_last: bool = True


NETWORKS: dict[str, Network] = {
    "ResNet-20": Network(
        "cifar_resnet", "cifar10_resnet20_fp32", "cifar10-train", "cifar10-test", images=256, analyzed=128, batch=64,
        options={"depth": 20}, channels_last=False,
    ),
    "ResNet-56": Network(
        "cifar_resnet", "cifar10_resnet56_fp32", "cifar10-train", "cifar10-test", images=256, analyzed=128, batch=64,
        options={"depth": 56}, channels_last=False,
    ),
    "ResNet-8": Network(
        "resnet8", "mlperf_tiny_resnet8_cifar10_fp32", "cifar10-train-raw", "cifar10-test-raw",
        images=256, analyzed=128, batch=64,
    ),
    "MobileNetV1 0.25": Network(
        "mobilenet_v1", "mobilenet_v1_0.25_128_qat_uint8", "imagenet_compat-mobilenet_v1-128", options={"width": 0.25}
    ),
    "VWW MobileNetV1 0.25": Network(
        "vww_mobilenet", "mlperf_tiny_vww_mobilenetv1_0.25_96_fp32", "coco-train-vww", "coco-val-vww"
    ),
    "SqueezeNet 1.1": Network("squeezenet1_1", "squeezenet1_1_fp16", "imagenet_compat-squeezenet1_1"),
    "MobileNetV1 0.75": Network(
        "mobilenet_v1", "mobilenet_v1_0.75_192_qat_uint8", "imagenet_compat-mobilenet_v1-192", options={"width": 0.75}
    ),
    "MobileNetV1 1.0": Network(
        "mobilenet_v1", "mobilenet_v1_1.0_224_qat_uint8", "imagenet_compat-mobilenet_v1", options={"width": 1.0}
    ),
    "MobileNetV2 (QAT weights)": Network("mobilenet_v2", "mobilenet_v2_1.0_224_qat_uint8", "imagenet_compat"),
    "MobileNetV2 (PTQ weights)": Network("mobilenet_v2", "mobilenet_v2_1.0_224_ptq_int8pc", "imagenet_compat"),
    "FastestDet": Network(
        "fastestdet", "fastestdet_coco_fp32", "coco-train-fastestdet", "coco-val-fastestdet", metric="ap50"
    ),
    "SSD-MobileNetV2": Network(
        "ssd_mobilenet_v2", "ssd_mobilenet_v2_300_oidv4_fp16", "coco-train-ssd_mobilenet_v2",
        "coco-val-ssd_mobilenet_v2", metric="ap50",
    ),
    "SSDlite-MobileNetV2 (seeded weights)": Network(
        "ssdlite_mobilenet_v2", None, "coco-train-ssdlite_mobilenet_v2", "coco-val-ssdlite_mobilenet_v2",
        metric="", images=16, analyzed=16,
    ),
    "YOLOv2 (seeded weights)": Network(
        "yolov2", None, "coco-train-yolov2", "coco-val-yolov2", metric="", images=8, analyzed=8, batch=4
    ),
}  # fmt: skip


class Setting:
    """A network, folded, with its data; candidates share one pass of calibration statistics."""

    def __init__(self, name: str, *, images: int | None = None) -> None:
        self.name, self.network = name, NETWORKS[name]
        torch.manual_seed(0)
        n = self.network
        weights = None if n.weights is None else f"{n.weights}.npz"
        self.model = sources.load_model(f"zoo:{n.model}", weights, n.options)
        labelled = sources.load_data(f"zoo:{n.data}", batch=n.batch)
        if n.test is not None:
            self.test = sources.load_data(f"zoo:{n.test}", batch=n.batch)
        else:
            # Without the full pack, two thirds of what there is.
            total = sum(len(x) for x, _ in labelled)
            split = min(IMAGENET_SPLIT, total * 2 // 3) // n.batch
            labelled, self.test = labelled[:split], labelled[split:]
        count = (images or n.images) // n.batch
        if n.channels_last:
            self.model.to(memory_format=torch.channels_last)
            for items in (labelled, self.test):
                items[:] = [(x.to(memory_format=torch.channels_last), y) for x, y in items]
        self.labelled = labelled[:count]
        self.batches = [x for x, _ in self.labelled]
        self.analyzed = self.batches[: max(1, n.analyzed // n.batch)]
        self.example = self.batches[0][:2]
        self.folded = mixbit.fold_batchnorm_(copy.deepcopy(self.model), self.example)
        self.found = mixbit.layers(self.folded, self.example)
        self.names = self.found.names
        self.statistics: Any = None

    @property
    def test_images(self) -> int:
        """Images that are measured."""
        return sum(len(x) for x, _ in self.test)

    def costs(self, name: str) -> mixbit.CostTable:
        """A cost table by name."""
        return getattr(mixbit.costs, name)(self.folded, self.example)

    def quantized(
        self,
        recipe: mixbit.Recipe,
        *,
        bias: bool = True,
        rounding: bool = False,
        equalize: bool = False,
        ranges: str = "mse",
    ) -> Any:
        """The network at a recipe, calibrated, corrections as asked for."""
        model = copy.deepcopy(self.folded)
        statistics = None
        if equalize:
            mixbit.equalize_(model, self.example)
        else:
            if self.statistics is None:
                self.statistics = input_statistics(self.folded, self.batches)
            statistics = self.statistics
        mixbit.prepare_(model, recipe, self.example)
        mixbit.calibrate_(model, self.batches, ranges, statistics=statistics)
        if rounding:
            mixbit.optimize_rounding_(model, self.batches)
        if bias:
            mixbit.correct_bias_(model, self.batches[: max(1, 32 // self.network.batch)])
        return model

    def score(self, model: Any) -> float:
        """The metric on the test data, percent."""
        return mixbit.evaluate(model, self.test, metric=self.network.metric)


def pack() -> str:
    """Which data a row was measured on."""
    return "full pack" if "MIXBIT_DATA" in os.environ else "shipped"
