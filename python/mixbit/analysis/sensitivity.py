"""`analyze`: SQNR of every layer at every (act, weight) width from a few float passes."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor, nn

from mixbit import ops
from mixbit.analysis.network import (
    Importance,
    OutputNoise,
    Outputs,
    checked_importance,
    detector_outputs,
    importance_tensors,
    output_tensors,
)
from mixbit.analysis.power import monotone, sqnr_db
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.files import PathLike, write_bytes
from mixbit.network import LayerList, call_model, check_batches, check_eval_mode, layers
from mixbit.progress import Progress, reporter
from mixbit.quantizers import (
    METHODS,
    QuantizedConv2d,
    QuantizedLinear,
    TensorStatistics,
    apply_layer,
    calibrate_,
    first_images,
    fold_batchnorm_,
    prepare_,
    quantized_layers,
    weight_scales,
)
from mixbit.recipe import GRANULARITIES, Recipe
from mixbit.tables import SensitivityTable

POINTS = ("layer_output", "tensor", "network_output", "cumulative")

log = logging.getLogger("mixbit.analysis")


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    precisions: Iterable[int] = (2, 3, 4, 5, 6, 7, 8),
    point: str = "layer_output",
    joint: bool = False,
    *,
    act_precisions: Iterable[int] | None = None,
    weight_precisions: Iterable[int] | None = None,
    ranges: str = "mse",
    granularity: str = "per_channel",
    narrow_range: bool = True,
    names: Iterable[str] | None = None,
    outputs: Outputs | None = None,
    importance: str | Importance | None = None,
    checkpoint: PathLike | None = None,
    progress: bool | Progress | None = None,
) -> SensitivityTable:
    """Measures how much noise each layer adds at each width: SQNR = 10 log10(sum x^2 / sum (x - x^)^2).

    Sums run over all images before the division. Works on a copy with folded batch normalization; the model is not
    changed. Rows are made non-decreasing along both widths (running maximum); `table.options` counts the moved entries.

    Points: "layer_output" (default) quantizes weight and input of one layer, takes the input from the float run and
    compares the layer's output: two float passes, every entry measured with both operands quantized. "tensor" adds the
    noise ratios of weight and input alone. "network_output" quantizes one layer and compares the network's output (one
    pass per entry). "cumulative" quantizes all layers up to this one.

    Args:
        model: Float, in eval mode.
        batches: Calibration images, re-iterable; labels are not used.
        precisions: Widths of both operands.
        point: Where the noise is measured.
        joint: Measure equal widths only; the table is [L, B].
        act_precisions: Widths of the inputs, if they differ.
        weight_precisions: Widths of the weights, if they differ.
        ranges: "mse", "maxabs" or "qformat".
        granularity: "per_channel" or "per_tensor" weight scales.
        narrow_range: Symmetric weight grids.
        names: Layer names or globs to analyze; None is all.
        outputs: Picks the tensors compared at the network's output; the least SQNR over them counts. None takes all; of
            a detector its `head_tensors`.
        importance: What each squared element of the compared tensors counts, from the float output: a callable that
            returns for each of them a tensor of its shape or one that broadcasts; or "confidence", a detector's decoded
            scores, so that the many anchors of the background do not drown the objects. For the points "network_output"
            and "cumulative".
        checkpoint: File for partial results; a run that was stopped goes on from it and ends with the same bytes. It is
            removed at the end.
        progress: True for a progress bar on a terminal, or a callable (done, total, text).

    Returns:
        A SensitivityTable [L, A, W], or [L, B] if joint; for the first two points it also holds the SQNR of each
        operand alone.

    Raises:
        MixbitError: The model is in training mode, data is empty, one-shot or not finite (layer named), a weight is not
            finite, or an argument is out of range.
    """
    check_choice("point", point, POINTS)
    check_choice("ranges", ranges, METHODS)
    check_choice("granularity", granularity, GRANULARITIES)
    acts = checked_widths("act_precisions" if act_precisions else "precisions", act_precisions or precisions)
    weights = checked_widths(
        "weight_precisions" if weight_precisions else "precisions", weight_precisions or precisions
    )
    if joint and acts != weights:
        raise MixbitError("joint=True needs the same act_precisions and weight_precisions")
    at_outputs = point in ("network_output", "cumulative")
    if importance is not None and not at_outputs:
        raise MixbitError(f'importance is for the points "network_output" and "cumulative"; got point={point!r}')
    outputs, weigh = detector_outputs(model, outputs), checked_importance(model, importance)
    check_eval_mode(model)
    check_batches(batches)
    first = next(iter(batches), None)
    if first is None:
        raise MixbitError("batches is empty; expected at least one batch of images")
    _check_weights(model)
    model = fold_batchnorm_(copy.deepcopy(model), first_images(first))
    found = _selected(layers(model, first_images(first)), names)
    options = {
        "point": point,
        "joint": joint,
        "ranges": ranges,
        "granularity": granularity,
        "narrow_range": narrow_range,
        "act_precisions": list(acts),
        "weight_precisions": list(weights),
    }
    if importance is not None:
        options["importance"] = importance if isinstance(importance, str) else "callable"
    kept = _Checkpoint(checkpoint, model, options, found)
    run = _Run(model, batches, found, acts, weights, options, kept, outputs, weigh)
    with reporter(progress, "analyze") as report:
        run.report = report
        table = run.network() if at_outputs else run.ranges_and_layers()
    run.checkpoint.remove()
    return table


def checked_widths(argument: str, precisions: Iterable[int]) -> tuple[int, ...]:
    """Ascending whole numbers from 2 to 16.

    Raises:
        MixbitError: They are something else; names the argument.
    """
    found = tuple(precisions)
    good = all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 16 for b in found)
    if not found or not good or list(found) != sorted(set(found)):
        raise MixbitError(f"{argument}={list(found)}: expected ascending whole numbers from 2 to 16 without duplicates")
    return found


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise MixbitError(f"parameter {name!r} holds NaN or infinity; expected finite numbers")


def _selected(found: LayerList, names: Iterable[str] | None) -> LayerList:
    if names is None:
        return found
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in found):
            raise MixbitError(f"names: no layer matches {pattern!r}{did_you_mean(pattern, found.names)}")
    kept = [layer for layer in found if any(fnmatch.fnmatchcase(layer.name, p) for p in patterns)]
    return LayerList(kept, found.float_modules, found.total_macs)


class _Checkpoint:
    """Partial sums in one file (safetensors), written atomically after each batch."""

    def __init__(self, path: PathLike | None, model: nn.Module, options: dict[str, Any], found: LayerList) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        digest = hashlib.sha256(json.dumps([options, found.names], sort_keys=True).encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.key = np.frombuffer(digest.digest(), np.uint8)

    def load(self, stage: str) -> tuple[int, dict[str, np.ndarray[Any, Any]]]:
        """(steps done of this stage, arrays of whatever stage was saved last); (0, {}) if nothing is there.

        Raises:
            MixbitError: The file is of another model, other options, or damaged.
        """
        if self.path is None or not self.path.exists():
            return 0, {}
        try:
            arrays = load_arrays(self.path.read_bytes())
            same = np.array_equal(arrays.pop("key"), self.key)
            done = int(arrays.pop("done")[0])
            held = bytes(arrays.pop("stage")).decode()
        except Exception as error:
            raise MixbitError(
                f"checkpoint {str(self.path)!r} is damaged or no checkpoint of analyze; remove it"
            ) from error
        if not same:
            raise MixbitError(
                f"checkpoint {str(self.path)!r} belongs to another model or other options; remove it or name another"
            )
        return (done if held == stage else 0), arrays

    def save(self, stage: str, done: int, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replaces the file."""
        if self.path is None:
            return
        content = {
            "key": self.key,
            "done": np.array([done]),
            "stage": np.frombuffer(stage.encode(), np.uint8),
            **{k: np.ascontiguousarray(v) for k, v in arrays.items()},
        }
        data = save_arrays(content)
        write_bytes(self.path, data)

    def remove(self) -> None:
        """Deletes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Run:
    """One analysis: model, data, widths, and the sums so far."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        found: LayerList,
        acts: tuple[int, ...],
        weights: tuple[int, ...],
        options: dict[str, Any],
        checkpoint: _Checkpoint,
        outputs: Outputs | None,
        importance: Importance | None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.found = found
        self.modules = {layer.name: _layer(model, layer.name) for layer in found}
        self.acts = acts
        self.weights = weights
        self.options = options
        self.joint = bool(options["joint"])
        self.narrow_range = bool(options["narrow_range"])
        self.checkpoint = checkpoint
        self.outputs = outputs
        self.importance = importance
        self.report: Progress = lambda done, total, text: None
        self.total = len(batches) if isinstance(batches, Sized) else 0

    # ---------------------------------------------------------------------------------------------- layers, two passes

    def ranges_and_layers(self) -> SensitivityTable:
        """The points "tensor" and "layer_output"."""
        scales, signed = self._act_scales()
        weight_grids = {layer.name: self._weight_scales(layer.name) for layer in self.found}
        shape = (len(self.found), len(self.acts), len(self.weights))
        sums = {
            "signal": np.zeros(shape[0]),
            "noise": np.zeros(shape),
            "act_signal": np.zeros(shape[0]),
            "act_noise": np.zeros(shape[:2]),
        }
        weight_signal, weight_noise = self._weight_noise(weight_grids)
        done, arrays = self.checkpoint.load("layers")
        if done > 0:
            sums = {name: arrays[name] for name in sums}
        measure = self.options["point"] == "layer_output"

        def at_layer(index: int, name: str, module: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
            act_bits = torch.tensor(self.acts, dtype=torch.float32)
            signal, noise = ops.quantization_noise(x, scales[index], act_bits, signed=signed[index], narrow_range=False)
            sums["act_signal"][index] += float(signal)
            sums["act_noise"][index] += noise.numpy()
            if measure:
                self._measure(index, module, x, output, scales[index], signed[index], weight_grids[name], sums)

        for batch, item in enumerate(self._from(done)):
            with torch.no_grad(), _watching(self.found, self.modules, at_layer):
                call_model(self.model, item)
            self.checkpoint.save("layers", done + batch + 1, {**sums, **self._kept(scales, signed)})
            self.report(done + batch + 1, self.total, "layers")
        if self.options["point"] == "tensor":
            act_ratio = sums["act_noise"] / np.where(sums["act_signal"] > 0, sums["act_signal"], np.nan)[:, None]
            weight_ratio = weight_noise / np.where(weight_signal > 0, weight_signal, np.nan)[:, None]
            noise = np.nan_to_num(act_ratio)[:, :, None] + np.nan_to_num(weight_ratio)[:, None, :]
            values = sqnr_db(np.ones_like(noise), noise)
        else:
            values = sqnr_db(sums["signal"][:, None, None], sums["noise"])
        if self.joint:
            values = np.stack([values[:, i, i] for i in range(len(self.acts))], axis=1)
        table = self._table(values)
        table.act_sqnr_db = sqnr_db(sums["act_signal"][:, None], sums["act_noise"])
        table.weight_sqnr_db = sqnr_db(weight_signal[:, None], weight_noise)
        return table

    def _kept(self, scales: list[Tensor], signed: list[bool]) -> dict[str, np.ndarray[Any, Any]]:
        return {"scales": torch.stack(scales).numpy(), "signed": np.array(signed, np.uint8)}

    def _act_scales(self) -> tuple[list[Tensor], list[bool]]:
        """Scales [A] of each layer's input and the sign of its grid: the first pass."""
        done, arrays = self.checkpoint.load("ranges")
        if "scales" in arrays:  # a later stage was reached
            return list(torch.from_numpy(arrays["scales"])), [bool(s) for s in arrays["signed"]]
        seen = [TensorStatistics() for _ in self.found]
        if done > 0:
            for i, statistics in enumerate(seen):
                statistics.load({k: torch.from_numpy(arrays[f"{k}{i}"]) for k in statistics.state()})

        def at_layer(index: int, name: str, module: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
            try:
                seen[index].update(x)
            except MixbitError as error:
                raise MixbitError(f"layer {name!r}: its input {error}") from error

        for batch, item in enumerate(self._from(done)):
            with torch.no_grad(), _watching(self.found, self.modules, at_layer):
                call_model(self.model, item)
            state = {f"{k}{i}": v.numpy() for i, s in enumerate(seen) for k, v in s.state().items()}
            self.checkpoint.save("ranges", done + batch + 1, state)
            self.report(done + batch + 1, self.total, "ranges")
        scales, signed = [], []
        for layer, statistics in zip(self.found, seen, strict=True):
            if statistics.count == 0:
                raise MixbitError(f"layer {layer.name!r} was never reached by the data")
            signed.append(statistics.signed)
            scales.append(
                statistics.scales(
                    list(self.acts), signed=signed[-1], narrow_range=False, method=str(self.options["ranges"])
                )
            )
        return scales, signed

    def _weight_scales(self, name: str) -> Tensor:
        per_channel = self.options["granularity"] == "per_channel"
        weight = self.modules[name].weight
        assert isinstance(weight, Tensor)
        return weight_scales(
            weight,
            list(self.weights),
            per_channel=per_channel,
            narrow_range=self.narrow_range,
            method=str(self.options["ranges"]),
        )

    def _weight_noise(self, grids: dict[str, Tensor]) -> tuple[Any, Any]:
        """Signal [L] and noise [L, W] of the weights alone."""
        bits = torch.tensor(self.weights, dtype=torch.float32)
        signal, noise = np.zeros(len(self.found)), np.zeros((len(self.found), len(self.weights)))
        for i, layer in enumerate(self.found):
            weight = self.modules[layer.name].weight
            assert isinstance(weight, Tensor)
            scales = grids[layer.name]
            per_channel = scales.shape[1] > 1
            s, n = ops.quantization_noise(
                weight.detach(),
                scales if per_channel else scales[:, 0],
                bits,
                signed=True,
                narrow_range=self.narrow_range,
                axis=0 if per_channel else None,
            )
            signal[i] = float(s.sum())
            noise[i] = (n.sum(1) if per_channel else n).numpy()
        return signal, noise

    def _measure(
        self,
        index: int,
        module: nn.Conv2d | nn.Linear,
        x: Tensor,
        output: Tensor,
        scales: Tensor,
        signed: bool,
        grids: Tensor,
        sums: dict[str, Any],
    ) -> None:
        """Runs one layer at every pair of widths and adds the noise of its output.

        The weights are quantized anew for each batch: that is cheap, and memory stays that of one layer.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        axis = 0 if grids.shape[1] > 1 else None
        variants = [
            ops.fake_quantize(weight.detach(), scale, 0, width, narrow_range=self.narrow_range, axis=axis)
            for scale, width in zip(grids, self.weights, strict=True)
        ]
        for j, (width, scale) in enumerate(zip(self.acts, scales, strict=True)):
            quantized = ops.fake_quantize(x, scale.reshape(1), 0, width, signed=signed)
            for k, variant in enumerate(variants):
                if self.joint and j != k:
                    continue
                signal, noise = ops.noise_power(apply_layer(module, quantized, variant), output)
                sums["noise"][index, j, k] += float(noise)
        sums["signal"][index] += float(signal)

    # ------------------------------------------------------------------------------------------------- network output

    def network(self) -> SensitivityTable:
        """The points "network_output" and "cumulative": every batch passes through once for each entry."""
        quantized = prepare_(
            copy.deepcopy(self.model),
            Recipe.uniform(
                self.found.names,
                weight=self.weights[-1],
                act=self.acts[-1],
                granularity=str(self.options["granularity"]),
                narrow_range=self.narrow_range,
            ),
        )
        calibrate_(quantized, self.batches, str(self.options["ranges"]))
        scales, signed = self._act_scales()
        modules = quantized_layers(quantized)
        order = [modules[name] for name in self.found.names]
        grids = [self._weight_scales(name) for name in self.found.names]
        pairs = [(j, k) for j in range(len(self.acts)) for k in range(len(self.weights)) if not self.joint or j == k]
        entries = [(i, j, k) for i in range(len(order)) for j, k in pairs]
        totals = [OutputNoise() for _ in entries]
        done, arrays = self.checkpoint.load("network")
        if done > 0:
            paths = bytes(arrays["paths"]).decode().split("\n")
            for total, state in zip(totals, arrays["totals"], strict=True):
                total.load(paths, state)
        for batch, item in enumerate(self._from(done)):
            with torch.no_grad():
                output = call_model(self.model, item)
                reference = output_tensors(output, self.outputs)
                weights = None if self.importance is None else importance_tensors(self.importance, output, reference)
                for count, ((i, j, k), total) in enumerate(zip(entries, totals, strict=True)):
                    for m, module in enumerate(order):
                        on = m == i or (self.options["point"] == "cumulative" and m < i)
                        _switch(module, on)
                        if on:
                            _set(module, self.acts[j], scales[m][j], signed[m], self.weights[k], grids[m][k])
                    total.add(reference, output_tensors(call_model(quantized, item), self.outputs), weights)
                    self.report((done + batch) * len(entries) + count + 1, self.total * len(entries), "network")
            self.checkpoint.save(
                "network",
                done + batch + 1,
                {
                    "totals": np.array([total.state() for total in totals]),
                    "paths": np.frombuffer("\n".join(totals[0].signal).encode(), np.uint8),
                    **self._kept(scales, signed),
                },
            )
        values = np.full((len(order), len(self.acts), len(self.weights)), np.nan)
        for (i, j, k), total in zip(entries, totals, strict=True):
            values[i, j, k] = total.db()
        if self.joint:
            values = np.stack([values[:, j, j] for j in range(len(self.acts))], axis=1)
        return self._table(values)

    # ---------------------------------------------------------------------------------------------------------- shared

    def _table(self, values: Any) -> SensitivityTable:
        # A deeper layer of a cumulative run adds noise to a longer prefix: along the layers nothing is monotone.
        axes = (1,) if self.joint else (1, 2)
        raised, moved = monotone(values, axes)
        if moved:
            log.info("%d of %d entries were not monotone in the widths and were raised", moved, values.size)
        groups = [layer.input_group for layer in self.found]
        table = SensitivityTable.from_arrays(self.found.names, raised, self.acts, self.weights, input_group=groups)
        table.point = str(self.options["point"])
        table.options = {**self.options, "raised_entries": moved}
        return table

    def _from(self, done: int) -> Iterator[Any]:
        """The batches that are still to do."""
        for index, item in enumerate(self.batches):
            if index >= done:
                yield item


def _layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    return module


def _switch(module: QuantizedConv2d | QuantizedLinear, on: bool) -> None:
    module.bypassed = not on


def _set(
    module: QuantizedConv2d | QuantizedLinear,
    act_bits: int,
    act_scale: Tensor,
    signed: bool,
    weight_bits: int,
    weight_scale: Tensor,
) -> None:
    act, weight = module.act_quantizer, module.weight_quantizer
    assert act is not None and weight is not None
    act.bit_width.fill_(float(act_bits))
    act.set_(act_scale.reshape(1), signed=signed)
    weight.bit_width.fill_(float(weight_bits))
    weight.set_(weight_scale)


class _watching:
    """Calls back with (index, name, module, input, output) for every call of a layer."""

    def __init__(
        self,
        found: LayerList,
        modules: Mapping[str, nn.Conv2d | nn.Linear],
        callback: Callable[[int, str, nn.Conv2d | nn.Linear, Tensor, Tensor], None],
    ) -> None:
        self.found, self.modules, self.callback = found, modules, callback
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for index, layer in enumerate(self.found):

            def hook(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, at: int = index
            ) -> None:
                x = args[0] if args else kwargs["input"]
                self.callback(at, self.found[at].name, module, x, output)

            self.handles.append(self.modules[layer.name].register_forward_hook(hook, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
