"""Reading weight packs: .npz files, never pickles."""

from __future__ import annotations

import zipfile
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
        MixbitError: The file is missing, truncated or not an .npz file.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
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
            state.setdefault(name, value)
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
    """A pack with PyTorch names as a state dict, in float32."""
    return {name: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for name, value in arrays.items()}


def integer_state(arrays: Arrays) -> dict[str, Tensor]:
    """A pack of codes (`NAME.q`, `.scale`, `.zp`, `.bias`) as the float weights they stand for: (q - zp) * scale."""
    state = {}
    for key in arrays:
        if not key.endswith(".q"):
            continue
        name = key[: -len(".q")]
        codes = arrays[key].astype(np.float32)
        shape = (-1,) + (1,) * (codes.ndim - 1)
        scale = arrays[f"{name}.scale"].reshape(shape)
        zero_point = arrays[f"{name}.zp"].astype(np.float32).reshape(shape)
        state[f"{name}.weight"] = torch.from_numpy((codes - zero_point) * scale)
        state[f"{name}.bias"] = torch.from_numpy(arrays[f"{name}.bias"].astype(np.float32))
    return state
