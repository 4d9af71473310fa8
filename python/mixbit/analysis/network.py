"""Noise at the network's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.analysis.power import sqnr_db
from mixbit.errors import MixbitError, check_choice
from mixbit.network import call_model, check_batches, check_eval_mode, flatten_outputs
from mixbit.quantizers import calibrate_, first_images, fold_batchnorm_, prepare_
from mixbit.recipe import Recipe

Outputs = Callable[[Any], Any]
Importance = Callable[[Any], Any]


def detector_outputs(model: nn.Module, outputs: Outputs | None) -> Outputs | None:
    """`outputs`, or where that is None the model's own `head_tensors` if it is a detector that has them."""
    own = getattr(model, "head_tensors", None)
    return own if outputs is None and callable(own) else outputs


def checked_importance(model: nn.Module, importance: str | Importance | None) -> Importance | None:
    """The callable that was asked for.

    Raises:
        MixbitError: "confidence" of a model without a method `confidence`, or another word.
    """
    if not isinstance(importance, str):
        return importance
    check_choice("importance", importance, ("confidence",))
    confidence: Importance | None = getattr(model, "confidence", None)
    if not callable(confidence):
        raise MixbitError(
            f'importance="confidence" needs a model with confidence(outputs); {type(model).__name__} has none'
        )
    return confidence


def output_tensors(output: Any, pick: Outputs | None) -> list[tuple[str, Tensor]]:
    """The tensors that are compared at the network's output.

    Raises:
        MixbitError: There is none.
    """
    found = flatten_outputs(output if pick is None else pick(output))
    if not found:
        raise MixbitError("the network's output holds no floating-point tensor to compare; pass outputs= to pick some")
    return found


def importance_tensors(importance: Importance, output: Any, reference: list[tuple[str, Tensor]]) -> list[Tensor]:
    """The importance of each compared tensor's elements.

    Raises:
        MixbitError: Not one tensor for each, or a tensor is negative, not finite, or does not broadcast.
    """
    found = [tensor for _, tensor in flatten_outputs(importance(output))]
    if len(found) != len(reference):
        raise MixbitError(
            f"importance gave {len(found)} tensors for {len(reference)} that are compared; expected one for each"
        )
    for weight, (path, tensor) in zip(found, reference, strict=True):
        try:
            fits = torch.broadcast_shapes(weight.shape, tensor.shape) == tensor.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise MixbitError(
                f"importance of {path!r} has shape {tuple(weight.shape)}; expected one that broadcasts to "
                f"{tuple(tensor.shape)}"
            )
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise MixbitError(f"importance of {path!r} holds negative or not finite values; expected finite ones >= 0")
    return found


class OutputNoise:
    """Signal and noise power of each output tensor, summed over batches, for several quantized variants."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}

    def state(self) -> list[list[float]]:
        """Signal and noise of the tensors in order."""
        return [list(self.signal.values()), list(self.noise.values())]

    def load(self, paths: list[str], state: Any) -> None:
        """Takes over what `state` returned of tensors with these paths."""
        self.signal, self.noise = ({p: float(v) for p, v in zip(paths, row, strict=True)} for row in state)

    def add(
        self,
        reference: list[tuple[str, Tensor]],
        output: list[tuple[str, Tensor]],
        importance: list[Tensor] | None = None,
    ) -> None:
        """Adds one batch; with importance, every squared element counts so much.

        Raises:
            MixbitError: Shapes differ (a detector's final boxes, say), so that there is nothing to subtract.
        """
        for index, ((path, expected), (other, got)) in enumerate(zip(reference, output, strict=False)):
            if path != other or expected.shape != got.shape:
                raise MixbitError(
                    f"the network's output {path!r} changes its shape when a layer is quantized "
                    f"({tuple(expected.shape)} to {tuple(got.shape)}); pass outputs= to pick tensors from before the "
                    "detections are filtered"
                )
            if importance is not None:
                root = importance[index].sqrt().to(expected.dtype)
                expected, got = expected * root, got * root
            signal, noise = ops.noise_power(got, expected)
            self.signal[path] = self.signal.get(path, 0.0) + float(signal)
            self.noise[path] = self.noise.get(path, 0.0) + float(noise)

    def db(self) -> float:
        """The least SQNR over the output tensors."""
        return float(min(sqnr_db(self.signal[path], self.noise[path]) for path in self.signal))


def network_sqnr(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    *,
    method: str = "mse",
    outputs: Outputs | None = None,
    calibration: Iterable[Any] | None = None,
    importance: str | Importance | None = None,
    quantized: nn.Module | None = None,
) -> float:
    """Measured SQNR of the whole recipe at the network's output, in dB (the least over output tensors).

    Args:
        model: Float, in eval mode; not changed (a batch-norm-folded copy is quantized).
        recipe: Bits of every layer.
        batches: Data to measure on.
        method: How scales are calibrated.
        outputs: Picks the tensors to compare from the model's output; None takes all, of a detector `head_tensors`.
        calibration: Data to calibrate on; None takes `batches`.
        importance: As in `analyze`.
        quantized: The network at this recipe, if there is one already, calibrated and corrected; None makes one.
    """
    check_eval_mode(model)
    check_batches(batches)
    first = next(iter(batches))
    folded = fold_batchnorm_(copy.deepcopy(model), first_images(first))
    if quantized is None:
        quantized = prepare_(copy.deepcopy(folded), recipe)
        calibrate_(quantized, batches if calibration is None else calibration, method)
    outputs, weigh = detector_outputs(model, outputs), checked_importance(model, importance)
    total = OutputNoise()
    with torch.no_grad():
        for item in batches:
            output = call_model(folded, item)
            reference = output_tensors(output, outputs)
            weights = None if weigh is None else importance_tensors(weigh, output, reference)
            total.add(reference, output_tensors(call_model(quantized, item), outputs), weights)
    return total.db()
