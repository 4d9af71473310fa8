"""How a model is called with an item of `batches`, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError

_MODE_MATTERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
)

#: By how much a box may reach over the image.
_BORDER = 0.01


def input_of(item: Any) -> Any:
    """The input of an item: the item itself, the first element of a tuple or list, or the dict of keyword arguments.

    Raises:
        MixbitError: The item is none of these.
    """
    if isinstance(item, (Tensor, Mapping)):
        return item
    if isinstance(item, (tuple, list)) and item:
        return item[0]
    raise MixbitError(
        f"batches: an item is a {type(item).__name__}; expected a Tensor, a tuple or list whose first element is the "
        "input, or a dict of keyword arguments"
    )


def input_tensor(item: Any, argument: str = "batches: an item") -> Tensor:
    """The one tensor of an item's input: the input itself, or the only tensor of a dict of keyword arguments.

    Args:
        item: Of `batches`.
        argument: What an error calls it.

    Raises:
        MixbitError: The input is no tensor, or a dict of none or several.
    """
    value = input_of(item)
    if isinstance(value, Tensor):
        return value
    expected = "expected a Tensor [N, ...], a tuple whose first element is one, or a dict of keyword arguments with one"
    if not isinstance(value, Mapping):
        raise MixbitError(
            f"{argument} is a {type(value).__name__}; an integer network has one input tensor: {expected}"
        )
    tensors = [entry for entry in value.values() if isinstance(entry, Tensor)]
    if len(tensors) != 1:
        names = ", ".join(repr(key) for key, entry in value.items() if isinstance(entry, Tensor)) or "none"
        raise MixbitError(
            f"{argument} is a dict of {len(tensors)} tensors ({names}); an integer network has one input tensor: "
            f"{expected}, as {{'pixel_values': x}}, without labels"
        )
    return tensors[0]


def call_model(model: nn.Module, item: Any) -> Any:
    """Calls the model with an item of `batches`: `model(x)`, or `model(**item)` for a dict."""
    value = input_of(item)
    return model(**value) if isinstance(value, Mapping) else model(value)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def item_on(item: Any, device: torch.device) -> Any:
    """An item with all of its tensors on a device; for the CPU the item as it is."""
    if device.type == "cpu":
        return item
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, Mapping):
        return {k: item_on(v, device) for k, v in item.items()}
    return type(item)(item_on(v, device) for v in item) if type(item) in (list, tuple) else item


def input_tensors(item: Any) -> list[Tensor]:
    """The tensors inside an item's input, in order."""
    return [tensor for _, tensor in _tensors(input_of(item), "")]


def batch_size(item: Any) -> int:
    """Images in an item: the length of a list of images, else the first dimension of the first tensor."""
    value = input_of(item)
    while isinstance(value, Mapping) and value:
        value = next(iter(value.values()))
    if isinstance(value, Tensor):
        return int(value.shape[0]) if value.dim() else 1
    if isinstance(value, (tuple, list)):
        return len(value)
    raise MixbitError(f"batches: cannot tell the number of images of a {type(value).__name__}")


def check_batches(batches: Any, argument: str = "batches") -> Iterable[Any]:
    """Returns `batches` if it can be iterated again and is not empty.

    Raises:
        MixbitError: A single tensor, a one-shot iterator or an empty container.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise MixbitError(
            f"{argument} is a {type(batches).__name__}; expected a list or DataLoader of batches, e.g. [{argument}]"
        )
    if iter(batches) is batches:
        raise MixbitError(
            f"{argument} is a one-shot iterator ({type(batches).__name__}), which more than one pass would find empty; "
            f"expected a list or a DataLoader, e.g. list({argument})"
        )
    if isinstance(batches, Sequence) and len(batches) == 0:
        raise MixbitError(f"{argument} is empty; expected at least one batch of images")
    return batches


def check_eval_mode(model: nn.Module) -> None:
    """Refuses a model in training mode: batch statistics and dropout would change what is measured.

    Raises:
        MixbitError: Names the first module in training mode whose behaviour depends on it.
    """
    for name, module in model.named_modules():
        mode_matters = isinstance(module, _MODE_MATTERS)
        if module.training and (mode_matters or module is model):
            which = f"module {name!r} is" if name else "the model is"
            raise MixbitError(f"model: {which} in training mode; call model.eval() first")


def check_labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels of a batch of logits as int64, checked.

    Args:
        labels: Whole numbers [N].
        logits: [N, classes].

    Raises:
        MixbitError: They have another type or shape, or a class is out of range.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        got = f"a Tensor of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise MixbitError(f"labels are {got}; expected an int64 Tensor of shape ({logits.shape[0]},)")
    if labels.shape != logits.shape[:1]:
        raise MixbitError(f"labels have shape {tuple(labels.shape)}; expected ({logits.shape[0]},)")
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise MixbitError(f"labels run from {low} to {high}; expected classes from 0 to {logits.shape[1] - 1}")
    return labels.long()


def check_truths(truths: Any, images: int, classes: int | None = None) -> list[Tensor]:
    """The boxes of a batch, checked.

    Args:
        truths: For each image [n, 5]: class, x1, y1, x2, y2 as shares of width and height; an image without boxes has
            [0, 5].
        images: Images of the batch.
        classes: How many classes there are; None where that is not known.

    Raises:
        MixbitError: They have another form or number, a class is no whole number or out of range, or a corner lies
            outside the image or on the wrong side of the other.
    """
    if not isinstance(truths, (list, tuple)) or len(truths) != images:
        got = f"{len(truths)} entries" if isinstance(truths, (list, tuple)) else f"a {type(truths).__name__}"
        raise MixbitError(f"boxes of a batch of {images} images: got {got}; expected one Tensor [n, 5] for each image")
    for i, own in enumerate(truths):
        if not isinstance(own, Tensor) or own.dim() != 2 or own.shape[1] != 5:
            got = f"shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"a {type(own).__name__}"
            raise MixbitError(f"boxes of image {i}: got {got}; expected [n, 5] with class, x1, y1, x2, y2")
        for row in own.tolist():
            cls, x1, y1, x2, y2 = row
            if not (cls >= 0 and cls == cls // 1 and (classes is None or cls < classes)):
                limit = "at least 0" if classes is None else f"from 0 to {classes - 1}"
                raise MixbitError(f"boxes of image {i}: class {cls:g}; expected a whole number {limit}")
            # Shares that were rounded, or made from pixels, may miss the border by a little.
            if not (-_BORDER <= x1 <= x2 <= 1 + _BORDER and -_BORDER <= y1 <= y2 <= 1 + _BORDER):
                raise MixbitError(
                    f"boxes of image {i}: corners ({x1:g}, {y1:g}) and ({x2:g}, {y2:g}); expected x1 <= x2 and y1 <= "
                    "y2 as shares of width and height from 0 to 1, not pixels"
                )
    return list(truths)


def flatten_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """All floating-point tensors of a model's output with their paths, in a fixed order."""
    return [(path or "output", tensor) for path, tensor in _tensors(output, "") if tensor.is_floating_point()]


def _tensors(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (tuple, list)):
        pairs = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return []
    return [found for key, item in pairs for found in _tensors(item, f"{path}.{key}" if path else str(key))]
