"""Task metrics of float, fake-quantized and integer networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError, check_choice
from mixbit.evaluation.detection import Found, average_precision, coco_map
from mixbit.export import simulation
from mixbit.network import (
    batch_size,
    call_model,
    check_batches,
    check_eval_mode,
    check_labels,
    check_truths,
    flatten_outputs,
)
from mixbit.quantizers import first_images

__all__ = ["DETECTION_METRICS", "METRICS", "evaluate"]

#: Metrics of all detections at once: those of a data set are not the mean of those of its batches.
DETECTION_METRICS: dict[str, Callable[..., float]] = {"coco_map": coco_map, "ap50": average_precision}
#: Metrics by name; labels are the second element of an item.
METRICS = ("top1", "top5", *DETECTION_METRICS)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | Callable[[Any, Any], Any] = "top1",
    integer: bool = False,
) -> float:
    """Runs a model over labelled data.

    Args:
        model: Float or prepared, in eval mode.
        loader: Re-iterable batches; for the named metrics items are (input, labels) with labels int64 [N], for
            detectors (input, boxes) with one Tensor [n, 5] (class, x1, y1, x2, y2 as shares) for each image; [0, 5] has
            none, and what is found there counts as false.
        metric: "top1" or "top5" (percent); "coco_map" (average precision over overlaps 0.50 ... 0.95, percent) or
            "ap50" (at 0.5, all-point interpolation) of a model with `decode(outputs)`; or a callable
            `(output, item)` that returns a score per image (a Tensor [N]) or the mean score of the batch (a number);
            scores are averaged over images.
        integer: Simulate the integer network (batch normalization folded, prepared, calibrated with `example=`): bit
            for bit what `export.reference` computes.

    Returns:
        Percent for the named metrics, else the mean score.

    Raises:
        MixbitError: The data is empty or one-shot, the model is in training mode, labels or boxes are missing, of wrong
            form or out of range, or an output holds NaN.
    """
    check_batches(loader, "loader")
    check_eval_mode(model)
    decode: Any = getattr(model, "decode", None)
    if isinstance(metric, str):
        check_choice("metric", metric, METRICS)
        if metric in DETECTION_METRICS and not callable(decode):
            raise MixbitError(f"metric={metric!r} needs a model with decode(outputs); {type(model).__name__} has none")
    network: Callable[[Any], Any] | None = None
    total, count = 0.0, 0
    found: list[Found] = []
    truths: list[Tensor] = []
    with torch.no_grad():
        for item in loader:
            if integer and network is None:
                network = simulation(model, first_images(item))
            if network is None:
                output = call_model(model, item)
            else:
                outputs = network(item)
                output = outputs[0] if len(outputs) == 1 else outputs
            images = batch_size(item)
            if isinstance(metric, str) and metric in DETECTION_METRICS:
                if not (isinstance(item, (tuple, list)) and len(item) > 1):
                    raise MixbitError(f"{metric} needs items (input, boxes); got {_described(item)} without boxes")
                truths += check_truths(item[1], images, getattr(model, "label_classes", None))
                found += decode(output)
                count += images
                continue
            total += _top(output, item, int(metric[3:])) if isinstance(metric, str) else _score(metric, output, item)
            count += images
    if count == 0:
        raise MixbitError("loader is empty; expected at least one batch of images")
    if isinstance(metric, str) and metric in DETECTION_METRICS:
        known = getattr(model, "coco_classes", None)
        return DETECTION_METRICS[metric](found, truths, None if known is None else [c for c in known if c >= 0])
    return (100.0 if isinstance(metric, str) else 1.0) * total / count


def _top(output: Any, item: Any, k: int) -> float:
    """How many images have their label among the k largest logits."""
    logits = flatten_outputs(output)[0][1] if flatten_outputs(output) else None
    if logits is None or logits.dim() != 2:
        raise MixbitError(
            f"metric='top{k}' needs logits [N, classes]; the model returns {_described(output)} (detectors have the "
            f"metrics {' and '.join(map(repr, DETECTION_METRICS))})"
        )
    if not (isinstance(item, (tuple, list)) and len(item) > 1 and isinstance(item[1], Tensor)):
        raise MixbitError(f"top{k} needs items (input, labels); got {_described(item)} without labels")
    labels = check_labels(item[1], logits)
    if torch.isnan(logits).any():
        raise MixbitError("the model's output holds NaN; nothing can be ranked")
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((best == labels.reshape(-1, 1).to(best.device)).any(1).sum())


def _score(metric: Callable[[Any, Any], Any], output: Any, item: Any) -> float:
    score = metric(output, item)
    images = batch_size(item)
    if isinstance(score, Tensor) and score.numel() > 1:
        if score.numel() != images:
            raise MixbitError(
                f"metric returned {score.numel()} scores for {images} images; expected one each, or a mean"
            )
        value = float(score.double().sum())
    else:
        value = float(score) * images
    if value != value:
        raise MixbitError("metric returned NaN")
    return value


def _described(value: Any) -> str:
    return f"a Tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
