"""The shipped images, prepared as the zoo's networks want them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixbit.errors import MixbitError, check_choice
from mixbit.zoo.weights import read_arrays

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)
_CIFAR_PACKS = ("cifar10_lossless_4k1k.npz", "cifar10_512_1000.npz")
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


def _pack(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    folder = data_dir() / "images"
    for name in names:
        if (folder / name).exists():
            return read_arrays(folder / name)
    raise MixbitError(f"{str(folder)!r} holds none of {', '.join(names)}")


def cifar10_pixels(split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images as they are.

    Args:
        split: "train" (for calibration) or "test".
        count: The first so many; None is all there are.

    Returns:
        images: uint8 [N, 3, 32, 32], RGB; labels: int64 [N].
    """
    check_choice("split", split, ("train", "test"))
    from PIL import Image

    pack = _pack(_CIFAR_PACKS)
    labels = torch.from_numpy(pack[f"y_{split}"].astype(np.int64))
    mosaic = np.asarray(Image.open(io.BytesIO(pack[f"{split}_mosaic_webp"].tobytes())).convert("RGB"))
    images = mosaic.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(np.ascontiguousarray(images[: len(labels)][:count])), labels[:count]


def cifar10(split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images as the ResNets want them: x / 255, normalized.

    Args:
        split: "train" (for calibration) or "test".
        count: The first so many; None is all there are.

    Returns:
        images: float32 [N, 3, 32, 32]; labels: int64 [N].
    """
    images, labels = cifar10_pixels(split, count)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (images.float() / 255 - mean) / std, labels


def imagenet_compat(count: int | None = None, network: str = "mobilenet_v2") -> tuple[Tensor, Tensor]:
    """ImageNet-compatible images as a network of the zoo wants them.

    Args:
        count: The first so many; None is all there are.
        network: "mobilenet_v2" (224, RGB, x / 127.5 - 1) or "squeezenet1_1" (227, BGR, means subtracted).

    Returns:
        images: float32 [N, 3, H, W]; labels: int64 [N].
    """
    check_choice("network", network, ("mobilenet_v2", "squeezenet1_1"))
    from PIL import Image

    pack = _pack(_IMAGENET_PACKS)
    data, offsets = pack["data"].tobytes(), pack["off"]
    labels = torch.from_numpy(pack["label"].astype(np.int64))[:count]
    size = 224 if network == "mobilenet_v2" else 227
    images = []
    for i in range(len(labels)):
        image = Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])).convert("RGB")
        # The short side becomes size / 0.875 (for SqueezeNet 256, the size of the files), then the centre is cut out.
        scaled = round(size / 0.875) if network == "mobilenet_v2" else 256
        if scaled != image.width:
            image = image.resize((scaled, scaled), Image.Resampling.BILINEAR)
        left = (image.width - size) // 2
        images.append(np.asarray(image.crop((left, left, left + size, left + size))))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    if network == "mobilenet_v2":
        return (x / 127.5 - 1).contiguous(), labels
    return (x.flip(1) - torch.tensor([104.0, 117.0, 123.0]).reshape(3, 1, 1)).contiguous(), labels
