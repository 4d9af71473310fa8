"""Models and data by name: what the command line and the pipeline accept."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import zoo
from mixbit.errors import MixbitError, did_you_mean
from mixbit.training import Images
from mixbit.training.checkpoint import tree_digest

ZOO_MODELS: dict[str, Callable[..., Any]] = {
    build.__name__: build
    for build in (
        zoo.cifar_resnet,
        zoo.fastestdet,
        zoo.mobilenet_v1,
        zoo.mobilenet_v2,
        zoo.resnet8,
        zoo.squeezenet1_1,
        zoo.ssd_mobilenet_v2,
        zoo.ssdlite_mobilenet_v2,
        zoo.vgg9,
        zoo.vww_mobilenet,
        zoo.yolov2,
    )
}


def _raw_cifar(split: str, images: int | None) -> tuple[Tensor, Tensor]:
    x, y = zoo.cifar10_pixels(split, images)
    return x.float(), y


def _raw_cifar_jpeg(split: str, images: int | None) -> tuple[Tensor, Tensor]:
    x, y = zoo.cifar10_jpeg_pixels(split, images)
    return x.float(), y


def _persons(split: str, images: int | None) -> tuple[Tensor, Tensor]:
    x, boxes = zoo.coco(split, images, "vww")
    return x, zoo.person_labels(boxes)


#: Loaders `(images) -> (inputs, labels)`; labels of detectors are a list of boxes.
ZOO_DATA: dict[str, Callable[[int | None], tuple[Tensor, Any]]] = {
    "imagenet_compat": zoo.imagenet_compat,
    "imagenet_compat-mobilenet_v1": lambda n: zoo.imagenet_compat(n, "mobilenet_v1"),
    "imagenet_compat-mobilenet_v1-192": lambda n: zoo.imagenet_compat(n, "mobilenet_v1", 192),
    "imagenet_compat-mobilenet_v1-128": lambda n: zoo.imagenet_compat(n, "mobilenet_v1", 128),
    "imagenet_compat-squeezenet1_1": lambda n: zoo.imagenet_compat(n, "squeezenet1_1"),
}
for _split in ("train", "test"):
    ZOO_DATA[f"cifar10-{_split}"] = partial(lambda split, n: zoo.cifar10(split, n), _split)
    ZOO_DATA[f"cifar10-{_split}-raw"] = partial(_raw_cifar, _split)
    ZOO_DATA[f"cifar10-{_split}-jpeg"] = partial(lambda split, n: zoo.cifar10_jpeg(split, n), _split)
    ZOO_DATA[f"cifar10-{_split}-jpeg-raw"] = partial(_raw_cifar_jpeg, _split)
for _split in ("train", "val"):
    for _network in ("fastestdet", "ssd_mobilenet_v2", "ssdlite_mobilenet_v2", "yolov2"):
        ZOO_DATA[f"coco-{_split}-{_network}"] = partial(
            lambda split, network, n: zoo.coco(split, n, network), _split, _network
        )
    ZOO_DATA[f"coco-{_split}-vww"] = partial(_persons, _split)


def load_model(source: str, weights: str | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A model in eval mode.

    Args:
        source: `zoo:NAME`, `torchvision:NAME`, or `path/to/file.py:function`.
        weights: Path of the weights; a name without a folder is looked for in the shipped data too. torchvision models
            take a name of torchvision's own weights.
        options: Keyword arguments of the builder.

    Raises:
        MixbitError: The source, its options or the weights do not fit.
    """
    given = dict(options or {})
    kind, _, name = source.partition(":")
    if kind == "zoo":
        build = _named("model", name, ZOO_MODELS)
        if weights is not None:
            given["weights"] = _weights_path(weights)
    elif kind == "torchvision":
        from torchvision import models

        build = _named("model", name, {n: models.get_model_builder(n) for n in models.list_models()})
        given["weights"] = weights
    else:
        build = load_function("model", source)
        if weights is not None:
            given["weights"] = weights
    _check_options(f"options of {source}", build, given)
    model = build(**given)
    if not isinstance(model, nn.Module):
        raise MixbitError(f"model={source!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.eval()


def load_data(source: str, images: int | None = None, batch: int = 64) -> list[Any]:
    """Batches of data; labelled ones are (images, labels), those of detectors (images, boxes).

    Args:
        source: `zoo:NAME` or `path/to/file.py:function` (called without arguments, returns batches).
        images: At most so many images of a zoo pack.
        batch: Images per batch of a zoo pack.

    Raises:
        MixbitError: The source is unknown or the numbers are not positive.
    """
    for argument, value in (("images", images), ("batch", batch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise MixbitError(f"{argument}={value!r}: expected a whole number of at least 1")
    kind, _, name = source.partition(":")
    if kind != "zoo":
        found = load_function("data", source)()
        return list(found)
    x, y = _named("data", name, ZOO_DATA)(images)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)]


def load_images(
    source: str, images: int | None = None, batch: int = 128, *, augment: str | None = None, seed: int = 0
) -> Images:
    """Shuffled data to train on.

    Args:
        source: As of `load_data`; what a function returns is put together and cut anew.
        images: At most so many images of a zoo pack.
        batch: Images of a step.
        augment: "crop_flip", or None.
        seed: Of order and augmentation.

    Raises:
        MixbitError: As `load_data` and `Images`, or the items are no tensors (or pairs) of images of one size.
    """
    items = load_data(source, images)
    pairs = [item if isinstance(item, (tuple, list)) else (item,) for item in items]
    inputs = [pair[0] for pair in pairs if pair]
    whole = inputs and len({len(pair) for pair in pairs}) == 1 and all(isinstance(x, Tensor) for x in inputs)
    if not whole or len({x.shape[1:] for x in inputs}) != 1:
        raise MixbitError(
            f"training data {source!r}: expected items that are all tensors, or all pairs (images, labels), of images "
            "of one size"
        )
    labels: Any = None
    if len(pairs[0]) > 1:
        parts = [pair[1] for pair in pairs]
        labels = torch.cat(parts) if isinstance(parts[0], Tensor) else [label for part in parts for label in part]
    return Images(torch.cat(inputs), labels, batch, augment=augment, seed=seed)


def fingerprint(value: nn.Module | list[Any]) -> str:
    """A hash of a model's weights or of batches: names the content, whatever made it."""
    return tree_digest(dict(value.state_dict()) if isinstance(value, nn.Module) else value)


def _named(argument: str, name: str, options: Mapping[str, Any]) -> Any:
    if name not in options:
        shown = ", ".join(list(options)[:20])
        raise MixbitError(f"{argument}: no {name!r} among {shown}{did_you_mean(name, options)}")
    return options[name]


def _weights_path(weights: str) -> Path:
    path = Path(weights)
    if path.exists():
        return path
    if path.name == weights:
        folder = zoo.data_dir() / "weights"
        if (folder / weights).exists():
            return folder / weights
        raise MixbitError(
            f"weights={weights!r}: neither a file here nor in {str(folder)!r}"
            f"{did_you_mean(weights, [p.name for p in folder.glob('*.npz')])}"
        )
    raise MixbitError(f"weights={weights!r}: no such file")


def load_function(argument: str, source: str) -> Callable[..., Any]:
    """A function of a Python file, `path/to/file.py:function`.

    Raises:
        MixbitError: The file or the function does not exist, or the file fails; `argument` is named.
    """
    path, _, name = source.rpartition(":")
    if not path or not name:
        raise MixbitError(f"{argument}={source!r}: expected zoo:NAME, torchvision:NAME or path/to/file.py:function")
    if not Path(path).is_file():
        raise MixbitError(f"{argument}={source!r}: no file {path!r}; expected zoo:NAME or path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"mixbit_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise MixbitError(f"{argument}={source!r}: {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MixbitError(f"{argument}={source!r}: {path!r} fails with {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        functions = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise MixbitError(f"{argument}={source!r}: {path!r} has no function {name!r}{did_you_mean(name, functions)}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def _check_options(where: str, build: Callable[..., Any], given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            raise MixbitError(
                f"{where}: unknown option {name!r}; expected some of {sorted(parameters)}"
                f"{did_you_mean(name, parameters)}"
            )
