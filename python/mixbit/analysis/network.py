"""Noise at the network's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixbit import ops
from mixbit.analysis.power import sqnr_db
from mixbit.errors import MixbitError
from mixbit.network import call_model, check_batches, check_eval_mode, flatten_outputs
from mixbit.quantizers import calibrate_, first_images, fold_batchnorm_, prepare_
from mixbit.recipe import Recipe

Outputs = Callable[[Any], Any]


def output_tensors(output: Any, pick: Outputs | None) -> list[tuple[str, Tensor]]:
    """The tensors that are compared at the network's output.

    Raises:
        MixbitError: There is none.
    """
    found = flatten_outputs(output if pick is None else pick(output))
    if not found:
        raise MixbitError("the network's output holds no floating-point tensor to compare; pass outputs= to pick some")
    return found


class OutputNoise:
    """Signal and noise power of each output tensor, summed over batches, for several quantized variants."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}

    def add(self, reference: list[tuple[str, Tensor]], output: list[tuple[str, Tensor]]) -> None:
        """Adds one batch.

        Raises:
            MixbitError: Shapes differ (a detector's final boxes, say), so that there is nothing to subtract.
        """
        for (path, expected), (other, got) in zip(reference, output, strict=False):
            if path != other or expected.shape != got.shape:
                raise MixbitError(
                    f"the network's output {path!r} changes its shape when a layer is quantized "
                    f"({tuple(expected.shape)} to {tuple(got.shape)}); pass outputs= to pick tensors from before the "
                    "detections are filtered"
                )
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
) -> float:
    """Measured SQNR of the whole recipe at the network's output, in dB (the least over output tensors).

    Args:
        model: Float, in eval mode; not changed (a batch-norm-folded copy is quantized).
        recipe: Bits of every layer.
        batches: Data to measure on.
        method: How scales are calibrated.
        outputs: Picks the tensors to compare from the model's output; None takes all.
        calibration: Data to calibrate on; None takes `batches`.
    """
    check_eval_mode(model)
    check_batches(batches)
    first = next(iter(batches))
    folded = fold_batchnorm_(copy.deepcopy(model), first_images(first))
    quantized = prepare_(copy.deepcopy(folded), recipe)
    calibrate_(quantized, batches if calibration is None else calibration, method)
    total = OutputNoise()
    with torch.no_grad():
        for item in batches:
            reference = output_tensors(call_model(folded, item), outputs)
            total.add(reference, output_tensors(call_model(quantized, item), outputs))
    return total.db()
