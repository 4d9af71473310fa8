"""Prepared networks that the tests of exporters share."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe, zoo


def ready(
    model: nn.Module, batches: list[torch.Tensor], recipe: Recipe | None = None, method: str = "mse", **options
) -> nn.Module:
    """Folded, prepared and calibrated; uniform 8/8 without a recipe."""
    model = mixbit.fold_batchnorm_(copy.deepcopy(model), batches[0])
    recipe = recipe or Recipe.uniform(mixbit.layers(model, batches[0]).names)
    mixbit.prepare_(model, recipe, batches[0], **options)
    return mixbit.calibrate_(model, batches, method, example=batches[0])


def recipe_of(model: nn.Module, x: torch.Tensor, kind: str) -> Recipe:
    """ "8/8", "4/8" (weight/act), ... or "mixed": all widths of weights from 1 to 8, of inputs from 3 to 8."""
    model = mixbit.fold_batchnorm_(copy.deepcopy(model), x)
    found = mixbit.layers(model, x)
    if kind != "mixed":
        weight, act = (int(part) for part in kind.split("/"))
        return Recipe.uniform(found.names, weight=weight, act=act)
    acts: dict[int, int] = {}
    layers = {}
    for i, layer in enumerate(found):
        act = acts.setdefault(layer.input_group, (8, 6, 7, 4, 5, 3)[i % 6])
        layers[layer.name] = LayerPrecision(weight=(8, 4, 2, 6, 3, 5, 7)[i % 7], act=act)
    return Recipe(layers=layers)


def resnet8(kind: str = "8/8") -> tuple[nn.Module, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The shipped ResNet-8 at a recipe; calibration batches, test images and labels."""
    model = zoo.resnet8(zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz")
    batches = list(zoo.cifar10_pixels("train", 16)[0].float().split(8))
    images, labels = zoo.cifar10_pixels("test", 8)
    return ready(model, batches, recipe_of(model, batches[0], kind), "maxabs"), batches, images.float(), labels


class Everything(nn.Module):
    """All operations of the integer network, read in several ways, with two outputs."""

    def __init__(self, channels: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 1, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False)
        self.grouped = nn.Conv2d(2 * channels, channels, (1, 3), (1, 2), (0, 2), (1, 2), groups=groups)
        self.side = nn.Conv2d(channels, channels, 1)
        self.rows = nn.Linear(5, 5)
        self.linear = nn.Linear(channels, 7)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu6(self.conv(x))  # [8, 9, 9]
        z = F.max_pool2d(F.relu(self.depthwise(y)), 2, 1, 1, ceil_mode=True)  # [8, 6, 6]
        w = F.avg_pool2d(F.pad(y, (0, 3, 0, 3)), 3, 2, 1)[:, :, :6, :6]
        v = self.grouped(torch.cat([z, w], 1))  # [8, 6, 4]
        side = self.side(F.avg_pool2d(v, 3, 1, 1, count_include_pad=False))
        s = F.relu(side + v)
        up = F.interpolate(s[:, :, 1:6:2, :2], scale_factor=(2.0, 3.0), mode="nearest")  # [8, 6, 6]
        wide = torch.cat([up, z], 1)[:, 4:12] + F.relu6(w)
        flat = self.rows(wide[:, :, :5, :5].reshape(x.shape[0], 40, 5)).flatten(1)
        return self.linear(wide.mean((2, 3)) + side.mean((2, 3))), flat


class Functions(nn.Module):
    """Every function that is looked up, products, softmax, and what moves values about."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.functions = nn.ModuleList(
            [nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ELU(0.5), nn.Hardsigmoid(), nn.Hardswish(),
             nn.LeakyReLU(0.1), nn.Hardtanh(-0.5, 1.5)]
        )  # fmt: skip
        self.head = nn.Conv2d(32, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        outputs = [function(x) for function in self.functions]
        y = F.hardswish(self.inner(outputs[2])) * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        z = self.head(F.pixel_unshuffle((y - 0.25) / 3, 2))
        boxes = z.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3)
        return [*outputs, z.softmax(1), boxes.softmax(-1), boxes.transpose(1, 2)]
