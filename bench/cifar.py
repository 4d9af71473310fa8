"""CIFAR-10 for training: the JPEG images of the full pack, decoded and normalized, with the lossless ones beside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixbit.zoo.data import CIFAR_MEAN, CIFAR_STD, cifar10, data_dir

PACK = "cifar10_jpegq75_60k.npz"


def _images(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> Tensor:
    data, offsets = arrays["data"], arrays["off"]
    pixels = [np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def jpeg(train: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels: "train", that many drawn by the seed; "test", all 10,000; "lossless", 1,000 of the test set.

    Raises:
        SystemExit: The pack is not there.
    """
    path: Path = data_dir() / "images" / PACK
    if not path.exists():
        raise SystemExit(f"{PACK} is not in {path.parent}; set MIXBIT_DATA to a folder with the full packs")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(arrays["split"] == 0))[:train]
    # In an order without classes, so that any first part is a fair sample.
    test = np.random.default_rng(0).permutation(np.flatnonzero(arrays["split"] == 1))
    parts = {
        name: (_images(arrays, indices), torch.from_numpy(arrays["label"][indices].astype(np.int64)))
        for name, indices in (("train", chosen), ("test", test))
    }
    return parts | {"lossless": cifar10("test")}
