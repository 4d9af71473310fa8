"""Reading weight packs: .npz files, never pickles."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike

Arrays = dict[str, np.ndarray[Any, Any]]


def read_arrays(path: PathLike) -> Arrays:
    """All arrays of an .npz file.

    Raises:
        MixbitError: The file is missing, damaged or not an .npz file.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise MixbitError(f"cannot read {str(path)!r} as an .npz file: {error}") from error
    except AttributeError as error:  # np.load gives a bare array for an .npy file
        raise MixbitError(f"{str(path)!r} is an .npy file; expected an .npz file") from error


def load_state(model: nn.Module, state: dict[str, Tensor], path: PathLike) -> nn.Module:
    """Loads a state dict strictly and puts the model in eval mode.

    Raises:
        MixbitError: The file is of another network; names the first tensor that differs.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            state[name] = value  # a count of training steps: some packs have it, in some shape, others not
        if name not in state:
            raise MixbitError(f"{str(path)!r} is of another network: it has no {name!r}{did_you_mean(name, state)}")
        if state[name].shape != value.shape:
            raise MixbitError(
                f"{str(path)!r} is of another network: {name!r} has shape {tuple(state[name].shape)}, expected "
                f"{tuple(value.shape)}"
            )
    for name in state:
        if name not in own:
            raise MixbitError(
                f"{str(path)!r} is of another network: {name!r} has no place in it{did_you_mean(name, own)}"
            )
    model.load_state_dict(state)
    return model.eval()


def float_state(arrays: Arrays) -> dict[str, Tensor]:
    """A pack with PyTorch names as a state dict, in float32; arrays of text are no weights and left out."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(value, np.float32))
        for name, value in arrays.items()
        if value.dtype.kind in "biuf"
    }


def integer_state(arrays: Arrays) -> dict[str, Tensor]:
    """A pack of codes (`NAME.q`, `.scale`, `.zp`, `.bias`) as the float weights they stand for: (q - zp) * scale.

    Raises:
        MixbitError: One of the four is missing.
    """
    state = {}
    for key in arrays:
        if not key.endswith(".q"):
            continue
        name = key[: -len(".q")]
        for part in ("scale", "zp", "bias"):
            if f"{name}.{part}" not in arrays:
                raise MixbitError(
                    f"a pack of codes has {key!r} but no '{name}.{part}'; expected .q, .scale, .zp, .bias"
                )
        codes = arrays[key].astype(np.float32)
        shape = (-1,) + (1,) * (codes.ndim - 1)
        scale = arrays[f"{name}.scale"].reshape(shape)
        zero_point = arrays[f"{name}.zp"].astype(np.float32).reshape(shape)
        state[f"{name}.weight"] = torch.from_numpy((codes - zero_point) * scale)
        state[f"{name}.bias"] = torch.from_numpy(arrays[f"{name}.bias"].astype(np.float32))
    return state


#: Keras' names of a layer's arrays, PyTorch's, and the order of axes that PyTorch wants.
_KERAS: dict[str, tuple[str, dict[int, tuple[int, ...]]]] = {
    "kernel": ("weight", {4: (3, 2, 0, 1), 2: (1, 0)}),
    "depthwise_kernel": ("weight", {4: (2, 3, 0, 1)}),
    "bias": ("bias", {}),
    "gamma": ("weight", {}),
    "beta": ("bias", {}),
    "moving_mean": ("running_mean", {}),
    "moving_variance": ("running_var", {}),
}


def keras_state(arrays: Arrays, names: dict[str, str], path: PathLike) -> dict[str, Tensor]:
    """A pack with Keras names and layouts (HWIO, HWC1, IO) as a state dict.

    Args:
        arrays: `LAYER/kernel`, `LAYER/depthwise_kernel`, `LAYER/bias`, `LAYER/gamma`, ...
        names: Keras' layer for each module.
        path: For messages.

    Raises:
        MixbitError: An array belongs to no module, or is of an unknown kind.
    """
    modules = {layer: module for module, layer in names.items()}
    state = {}
    for key, value in arrays.items():
        layer, _, kind = key.rpartition("/")
        if layer not in modules or kind not in _KERAS:
            raise MixbitError(
                f"{str(path)!r} is of another network: {key!r} has no place in it{did_you_mean(layer, modules)}"
            )
        own, orders = _KERAS[kind]
        order = orders.get(value.ndim)
        array = np.ascontiguousarray(value if order is None else value.transpose(order), np.float32)
        state[f"{modules[layer]}.{own}"] = torch.from_numpy(array)
    return state
