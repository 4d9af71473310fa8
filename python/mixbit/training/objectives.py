"""What training makes small: functions of a model and an item of `batches`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixbit.errors import MixbitError
from mixbit.network import call_model, check_eval_mode, check_labels, device_of, flatten_outputs

#: (model, item of `batches`) -> scalar Tensor.
Objective = Callable[[nn.Module, Any], Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Cross entropy of logits with labels; of a detector its own `loss(outputs, boxes)`.

    Args:
        label_smoothing: Share of the target that is spread over all classes.

    Returns:
        An objective for items (input, labels), labels int64 [N], or (input, boxes).

    Raises:
        MixbitError: `label_smoothing` is not from 0 to 1; later, that items have no labels or outputs are no logits.
    """
    if not 0 <= label_smoothing <= 1:
        raise MixbitError(f"label_smoothing={label_smoothing}: expected a share from 0 to 1")

    def objective(model: nn.Module, item: Any) -> Tensor:
        return _task_loss(unwrapped(model), call_model(model, item), item, label_smoothing)

    return objective


def distill(
    teacher: nn.Module, temperature: float = 1.0, weight: float = 1.0, label_smoothing: float = 0.0
) -> Objective:
    """weight * distance to the teacher + (1 - weight) * what `cross_entropy` is.

    The distance of logits is T^2 KL(softmax(teacher / T) || softmax(model / T)), averaged over the batch (Hinton et
    al., arXiv 1503.02531, section 2). Of a detector, whose tensors are no logits of one choice, it is the sum over its
    `head_tensors` of |model - teacher|^2 / |teacher|^2, the noise-to-signal ratio that `analyze` measures there.

    Args:
        teacher: The float network, in eval mode; never changed.
        temperature: T > 0.
        weight: Share of the distance, 0 to 1; at 1 no labels are needed, and those there are stay unread.
        label_smoothing: Of the cross entropy.

    Returns:
        An objective for any items that the model takes.

    Raises:
        MixbitError: A number is out of range or the teacher is in training mode; later, that the outputs of both do not
            match.
    """
    if not temperature > 0:
        raise MixbitError(f"temperature={temperature}: expected a positive number")
    if not 0 <= weight <= 1:
        raise MixbitError(f"weight={weight}: expected a share from 0 to 1")
    labelled = cross_entropy(label_smoothing)  # checks the smoothing
    check_eval_mode(teacher)

    def objective(model: nn.Module, item: Any) -> Tensor:
        if weight == 0:
            return labelled(model, item)
        own = unwrapped(model)
        if own is teacher:
            raise MixbitError("teacher is the trained model itself; expected a copy of the float network")
        outputs = call_model(model, item)
        with torch.no_grad():
            wanted = call_model(teacher, item)
        distance = _distance(own, outputs, wanted, temperature)
        if weight == 1:
            return distance
        return weight * distance + (1 - weight) * _task_loss(own, outputs, item, label_smoothing)

    return objective


def _task_loss(model: nn.Module, outputs: Any, item: Any, label_smoothing: float) -> Tensor:
    if not (isinstance(item, (tuple, list)) and len(item) > 1):
        raise MixbitError(f"batches: an item is a {type(item).__name__} without labels; expected (input, labels)")
    own: Any = getattr(model, "loss", None)
    if callable(own):
        loss: Tensor = own(outputs, item[1])
        return loss
    logits = _logits(outputs)
    return F.cross_entropy(logits, check_labels(item[1], logits), label_smoothing=label_smoothing)


def _logits(outputs: Any) -> Tensor:
    found = flatten_outputs(outputs)
    if len(found) != 1 or found[0][1].dim() != 2:
        shapes = [tuple(tensor.shape) for _, tensor in found]
        raise MixbitError(f"the model returns tensors of shapes {shapes}; expected logits [N, classes]")
    return found[0][1]


def _distance(model: nn.Module, outputs: Any, wanted: Any, temperature: float) -> Tensor:
    pick: Any = getattr(model, "head_tensors", None)
    if callable(pick):
        pairs = zip(pick(outputs), pick(wanted), strict=True)
        return sum(
            ((own - other).square().sum() / other.square().sum().clamp(min=1e-12) for own, other in pairs),
            start=torch.zeros(()),
        )
    own, other = _logits(outputs), _logits(wanted)
    if own.shape != other.shape:
        raise MixbitError(f"the teacher returns {tuple(other.shape)} where the model returns {tuple(own.shape)}")
    soft, target = (F.log_softmax(logits.float() / temperature, 1) for logits in (own, other))
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


def in_bf16(objective: Objective) -> Objective:
    """The objective under bfloat16 autocast: operands are quantized in their own type and multiplied in bfloat16."""

    def run(model: nn.Module, item: Any) -> Tensor:
        with torch.autocast(device_of(model).type, torch.bfloat16):
            return objective(model, item)

    return run
