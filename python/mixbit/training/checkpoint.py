"""The state of a training run as one file: tensors as safetensors, all else as JSON in its header. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mixbit.errors import MixbitError
from mixbit.files import PathLike, write_bytes

_FORMAT, _VERSION = "mixbit-training", 1


def write_checkpoint(path: PathLike, state: Mapping[str, Any]) -> Path:
    """Writes a tree of dicts, lists, tuples, tensors, numbers, strings and None, atomically.

    Raises:
        MixbitError: A value is none of these, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(state, tensors, "state")
    header = {"format": _FORMAT, "version": _VERSION, "state": tree}
    # One entry: the header's order, and with it the file's bytes, is then the same every time.
    return write_bytes(path, save(tensors, {"mixbit": json.dumps(header)}))


def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote: the same tree, tensors on the CPU.

    Raises:
        MixbitError: The file is missing, damaged, or of another kind or version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mixbit", "{}"))
            if header.get("format") != _FORMAT or header.get("version") != _VERSION:
                raise MixbitError(
                    f"checkpoint={str(path)!r} has the format {header.get('format')!r}, version "
                    f"{header.get('version')!r}; expected {_FORMAT!r}, version {_VERSION}"
                )
            names = file.keys()
            state: dict[str, Any] = _decoded(header["state"], {name: file.get_tensor(name) for name in names})
            return state
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, AttributeError) as error:
        raise MixbitError(f"checkpoint={str(path)!r} cannot be read: {error}; delete it to start anew") from error


def copied(value: Any) -> Any:
    """A tree whose tensors no training step changes."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def tree_digest(value: Any) -> str:
    """Names the content of a tree: tensors by type, shape and bytes, all else by its repr."""
    digest = hashlib.sha256()

    def add(entry: Any) -> None:
        if isinstance(entry, Tensor):
            digest.update(f"{entry.dtype}{tuple(entry.shape)}".encode())
            digest.update(entry.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(entry, Mapping):
            for key in entry:
                digest.update(str(key).encode())
                add(entry[key])
        elif isinstance(entry, (tuple, list)):
            for part in entry:
                add(part)
        else:
            digest.update(repr(entry).encode())

    add(value)
    return digest.hexdigest()[:16]


def describe_teacher(teacher: nn.Module | None, temperature: float, weight: float) -> str | None:
    """What of a distillation a resumed run must agree in."""
    if teacher is None:
        return None
    return f"{tree_digest(teacher.state_dict())}, temperature {temperature:g}, weight {weight:g}"


def _encoded(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON that keeps what JSON has not: tensors, tuples, and keys that are no strings."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy: names of one model may share memory, which safetensors refuses.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(k, tensors, path), _encoded(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(v, tensors, f"{path}[{i}]") for i, v in enumerate(value)]}
    raise MixbitError(
        f"checkpoint: {path} is a {type(value).__name__}; expected tensors, numbers, strings, None, and dicts, lists "
        "and tuples of them"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decoded(k, tensors): _decoded(v, tensors) for k, v in content}
    items = [_decoded(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
