"""Networks with real weights: accuracy as documented, errors of wrong files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mixbit
from mixbit import zoo
from mixbit.errors import MixbitError

WEIGHTS = zoo.data_dir() / "weights"


def top1(model, images, labels) -> float:
    return mixbit.evaluate(model, list(zip(images.split(64), labels.split(64), strict=True)))


@pytest.mark.parametrize(("depth", "accuracy", "weights"), [(20, 91.5, 268_336), (56, 92.6, 848_944)])
def test_cifar_resnets(depth: int, accuracy: float, weights: int) -> None:
    model = zoo.cifar_resnet(depth, WEIGHTS / f"cifar10_resnet{depth}_fp32.npz")
    images, labels = zoo.cifar10("test")
    assert top1(model, images, labels) == pytest.approx(accuracy, abs=0.11)
    assert sum(layer.weights for layer in mixbit.layers(model, images[:2])) == weights


def test_imagenet_networks_on_the_shipped_images() -> None:
    """With 64 images a point is 0.64 of one: the documented figures of the 911 are 81.9 and 52.9 percent."""
    model = zoo.mobilenet_v2(WEIGHTS / "mobilenet_v2_1.0_224_qat_uint8.npz")
    images, labels = zoo.imagenet_compat(64)
    found = mixbit.layers(model, images[:1])
    assert (len(found), sum(layer.weights for layer in found)) == (53, 3_469_760)
    assert 70 < top1(model, images, labels) < 92
    squeeze = zoo.squeezenet1_1(WEIGHTS / "squeezenet1_1_fp16.npz")
    images, labels = zoo.imagenet_compat(64, "squeezenet1_1")
    assert 42 < top1(squeeze, images, labels) < 65


@pytest.mark.slow
def test_documented_accuracy_on_all_images(full_data: Path) -> None:
    images, labels = zoo.imagenet_compat()
    model = zoo.mobilenet_v2(full_data / "weights/mobilenet_v2_1.0_224_qat_uint8.npz")
    assert top1(model, images, labels) == pytest.approx(81.9, abs=0.15)
    images, labels = zoo.imagenet_compat(network="squeezenet1_1")
    squeeze = zoo.squeezenet1_1(full_data / "weights/squeezenet1_1_fp16.npz")
    assert top1(squeeze, images, labels) == pytest.approx(52.9, abs=0.15)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MixbitError, match="of another network: it has no 'layer1.3.conv1.weight'"):
        zoo.cifar_resnet(56, WEIGHTS / "cifar10_resnet20_fp32.npz")
    with pytest.raises(MixbitError, match="'layer1.3.conv1.weight' has no place in it"):
        zoo.cifar_resnet(20, WEIGHTS / "cifar10_resnet56_fp32.npz")
    with pytest.raises(MixbitError, match="cannot read"):
        zoo.cifar_resnet(20, tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes((WEIGHTS / "cifar10_resnet20_fp32.npz").read_bytes()[:5000])
    with pytest.raises(MixbitError, match="cannot read"):
        zoo.cifar_resnet(20, tmp_path / "cut.npz")
    with np.load(WEIGHTS / "cifar10_resnet20_fp32.npz") as file:
        arrays = {k: file[k] for k in file.files}
    np.savez(tmp_path / "shape.npz", **{**arrays, "conv1.weight": arrays["conv1.weight"][:8]})
    with pytest.raises(MixbitError, match=r"'conv1.weight' has shape \(8, 3, 3, 3\), expected \(16, 3, 3, 3\)"):
        zoo.cifar_resnet(20, tmp_path / "shape.npz")
    with pytest.raises(MixbitError, match="depth=21"):
        zoo.cifar_resnet(21)


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIXBIT_DATA", str(tmp_path / "none"))
    with pytest.raises(MixbitError, match="is no folder"):
        zoo.data_dir()
    monkeypatch.setenv("MIXBIT_DATA", str(tmp_path))
    with pytest.raises(MixbitError, match="holds none of"):
        zoo.cifar10("test")


def test_cifar_batches() -> None:
    images, labels = zoo.cifar10("train", 10)
    assert images.shape == (10, 3, 32, 32)
    assert labels.dtype == torch.int64
    with pytest.raises(MixbitError, match="did you mean 'test'"):
        zoo.cifar10("tests")
