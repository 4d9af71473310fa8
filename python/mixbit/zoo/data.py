"""The shipped images, prepared as the zoo's networks want them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixbit.errors import MixbitError, check_choice
from mixbit.zoo.weights import Arrays, read_arrays

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)
_CIFAR_PACKS = ("cifar10_lossless_4k1k.npz", "cifar10_512_1000.npz")
_CIFAR_JPEG_PACKS = ("cifar10_jpegq75_60k.npz",)
_COCO_PACKS = ("coco2017_177val_178train_480px.npz", "coco2017_48.npz")
_IMAGENET_PACKS = ("nips17_imagenet_compat_911_256px.npz", "imagenet_compat_64.npz")


def data_dir() -> Path:
    """The folder with `images/` and `weights/`: the environment variable MIXBIT_DATA, else the checkout's data/.

    Raises:
        MixbitError: Neither exists.
    """
    named = os.environ.get("MIXBIT_DATA")
    if named:
        if not Path(named).is_dir():
            raise MixbitError(f"MIXBIT_DATA={named!r} is no folder; expected one with images/ and weights/")
        return Path(named)
    checkout = Path(__file__).resolve().parents[3] / "data"
    if not (checkout / "weights").is_dir():
        raise MixbitError(
            "the data packs are part of the source checkout, not of the installed package; set MIXBIT_DATA to a folder "
            "with images/ and weights/"
        )
    return checkout


def _pack(names: tuple[str, ...], *keys: str) -> tuple[Path, Arrays]:
    """The first of these image packs that is there, with the arrays that it must have."""
    folder = data_dir() / "images"
    for path in (folder / name for name in names):
        if path.exists():
            arrays = read_arrays(path)
            for key in keys:
                if key not in arrays:
                    raise MixbitError(f"{str(path)!r} has no array {key!r}; expected {', '.join(keys)}")
            return path, arrays
    raise MixbitError(f"{str(folder)!r} holds none of the image packs {', '.join(names)}")


def _check_positive(**given: int | None) -> None:
    for argument, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise MixbitError(f"{argument}={value!r}: expected a whole number of at least 1, or None")


def _check_classes(path: Path, what: str, classes: Tensor, count: int) -> None:
    """Whole numbers from 0 to count - 1."""
    if len(classes) and not bool(((classes >= 0) & (classes < count) & (classes == classes.floor())).all()):
        raise MixbitError(
            f"{str(path)!r}: {what} run from {classes.min():g} to {classes.max():g}; expected whole numbers 0 to "
            f"{count - 1}"
        )


def _decoded(path: Path, what: str, data: bytes) -> Any:
    """An image, RGB.

    Raises:
        MixbitError: The bytes are no image, or a damaged one.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise MixbitError(f"{str(path)!r}: {what} is corrupt: {error}") from error


def cifar10_pixels(split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images as they are.

    Args:
        split: "train" (for calibration) or "test".
        count: The first so many; None is all there are.

    Returns:
        images: uint8 [N, 3, 32, 32], RGB; labels: int64 [N].

    Raises:
        MixbitError: An unknown split, a count below 1, or a pack that is missing, corrupt or has a label out of range.
    """
    check_choice("split", split, ("train", "test"))
    _check_positive(count=count)
    path, pack = _pack(_CIFAR_PACKS, f"y_{split}", f"{split}_mosaic_webp")
    labels = torch.from_numpy(pack[f"y_{split}"].astype(np.int64))
    _check_classes(path, "labels", labels, 10)
    mosaic = np.asarray(_decoded(path, f"the mosaic of {split!r}", pack[f"{split}_mosaic_webp"].tobytes()))
    images = mosaic.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(np.ascontiguousarray(images[: len(labels)][:count])), labels[:count]


def cifar10_jpeg_pixels(split: str = "train", count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All of CIFAR-10 as JPEG of quality 75: enough for training; networks trained on lossless images lose points here.

    Args:
        split: "train" (50,000) or "test" (10,000).
        count: The first so many of the order that the seed gives (the pack is sorted by class); None is all.
        seed: Of the order.

    Returns:
        images: uint8 [N, 3, 32, 32], RGB; labels: int64 [N].

    Raises:
        MixbitError: As `cifar10_pixels`; this pack is part of the full data only.
    """
    check_choice("split", split, ("train", "test"))
    _check_positive(count=count)
    path, pack = _pack(_CIFAR_JPEG_PACKS, "data", "off", "label", "split")
    chosen = np.flatnonzero(pack["split"] == (split == "test"))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).numpy()][:count]
    labels = torch.from_numpy(pack["label"][chosen].astype(np.int64))
    _check_classes(path, "labels", labels, 10)
    data, offsets = pack["data"].tobytes(), pack["off"]
    images = [np.asarray(_decoded(path, f"image {i}", data[offsets[i] : offsets[i + 1]])) for i in chosen]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def cifar10(split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images as the ResNets want them: x / 255, normalized.

    Args:
        split: "train" (for calibration) or "test".
        count: The first so many; None is all there are.

    Returns:
        images: float32 [N, 3, 32, 32]; labels: int64 [N].

    Raises:
        MixbitError: As `cifar10_pixels`.
    """
    images, labels = cifar10_pixels(split, count)
    return _normalized(images), labels


def cifar10_jpeg(split: str = "train", count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`cifar10_jpeg_pixels` as the ResNets want them: float32 [N, 3, 32, 32], x / 255, normalized."""
    images, labels = cifar10_jpeg_pixels(split, count, seed)
    return _normalized(images), labels


def _normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (images.float() / 255 - mean) / std


#: Size and preparation of the ImageNet networks' inputs.
_IMAGENET_NETWORKS = {"mobilenet_v1": 224, "mobilenet_v2": 224, "squeezenet1_1": 227}
#: Size, channel order and preparation of the COCO networks' inputs.
_COCO_NETWORKS = {"ssd_mobilenet_v2": 300, "ssdlite_mobilenet_v2": 300, "fastestdet": 352, "yolov2": 416, "vww": 96}


def imagenet_compat(
    count: int | None = None, network: str = "mobilenet_v2", size: int | None = None
) -> tuple[Tensor, Tensor]:
    """ImageNet-compatible images as a network of the zoo wants them.

    Args:
        count: The first so many; None is all there are.
        network: "mobilenet_v1" or "mobilenet_v2" (224, RGB, x / 127.5 - 1), or "squeezenet1_1" (227, BGR, means
            subtracted).
        size: Height and width, where the network was trained at another than its usual ones.

    Returns:
        images: float32 [N, 3, H, W]; labels: int64 [N].

    Raises:
        MixbitError: An unknown network, a count or size below 1, or a pack that is missing, has a label out of range or
            a corrupt image.
    """
    check_choice("network", network, _IMAGENET_NETWORKS)
    _check_positive(count=count, size=size)
    from PIL import Image

    path, pack = _pack(_IMAGENET_PACKS, "data", "off", "label")
    data, offsets = pack["data"].tobytes(), pack["off"]
    labels = torch.from_numpy(pack["label"].astype(np.int64))[:count]
    _check_classes(path, "labels", labels, 1000)
    size = size or _IMAGENET_NETWORKS[network]
    images = []
    for i in range(len(labels)):
        image = _decoded(path, f"image {i}", data[offsets[i] : offsets[i + 1]])
        # The short side becomes size / 0.875 (for SqueezeNet 256, the size of the files), then the centre is cut out.
        scaled = 256 if network == "squeezenet1_1" else round(size / 0.875)
        if scaled != image.width:
            image = image.resize((scaled, scaled), Image.Resampling.BILINEAR)
        left = (image.width - size) // 2
        images.append(np.asarray(image.crop((left, left, left + size, left + size))))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    if network == "squeezenet1_1":
        return (x.flip(1) - torch.tensor([104.0, 117.0, 123.0]).reshape(3, 1, 1)).contiguous(), labels
    return (x / 127.5 - 1).contiguous(), labels


def coco(
    split: str = "val", count: int | None = None, network: str = "ssd_mobilenet_v2", size: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """COCO images, stretched, as a detector of the zoo wants them, with their boxes.

    Args:
        split: "val" (measured on) or "train" (for calibration).
        count: The first so many; None is all there are.
        network: "ssd_mobilenet_v2" or "ssdlite_mobilenet_v2" (300, x / 127.5 - 1), "fastestdet" (352, BGR, x / 255),
            "yolov2" (416, x / 255), or "vww" (96, x / 255).
        size: Height and width, if not the network's usual ones.

    Returns:
        images: float32 [N, 3, size, size]; for each image its boxes, float32 [n, 5]: class 0 ... 79, then x1, y1, x2,
        y2 as shares of width and height. An image may have none.

    Raises:
        MixbitError: An unknown name, a count or size below 1, or a pack that is missing, has no image of the split, a
            class out of range or a corrupt image.
    """
    check_choice("split", split, ("train", "val"))
    check_choice("network", network, _COCO_NETWORKS)
    _check_positive(count=count, size=size)
    from PIL import Image

    path, pack = _pack(_COCO_PACKS, "data", "off", "split", "boxes")
    data, offsets = pack["data"].tobytes(), pack["off"]
    rows = torch.from_numpy(pack["boxes"].astype(np.float32))
    if rows.dim() != 2 or rows.shape[1] != 6:
        raise MixbitError(
            f"{str(path)!r}: boxes have shape {tuple(rows.shape)}; expected [n, 6] with image, class, x1, y1, x2, y2"
        )
    _check_classes(path, "classes", rows[:, 1], 80)
    chosen = np.flatnonzero(pack["split"] == (split == "val"))[:count]
    if not len(chosen):
        raise MixbitError(f"{str(path)!r} has no image of split={split!r}; expected at least one")
    size = size or _COCO_NETWORKS[network]
    images, boxes = [], []
    for i in chosen:
        image = _decoded(path, f"image {i}", data[offsets[i] : offsets[i + 1]])
        images.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
        own = rows[rows[:, 0] == float(i), 1:]
        boxes.append(torch.cat([own[:, :1], own[:, 1:].clamp(0.0, 1.0)], 1))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    if network == "fastestdet":
        x = x.flip(1)
    x = x / 127.5 - 1 if network in ("ssd_mobilenet_v2", "ssdlite_mobilenet_v2") else x / 255
    return x.contiguous(), boxes


def person_labels(boxes: list[Tensor], share: float = 0.005) -> Tensor:
    """Visual-wake-word labels: 1 where a person's box is larger than a share of the image.

    Args:
        boxes: As `coco` returns them.
        share: Of the image's area.

    Returns:
        int64 [N].
    """
    found = []
    for own in boxes:
        area = (own[:, 3] - own[:, 1]) * (own[:, 4] - own[:, 2])
        found.append(int(((own[:, 0] == 0) & (area > share)).any()))
    return torch.tensor(found)
