"""Weights with extra levels as bytes, and what the index of the flagged weights costs.

A weight is stored as a code of `base_bits` bits; a weight with extra levels has one or two bits more. Which weights
have them is an index, kept in one of six ways ("index modes"):

* "none": not at all; whoever decodes has the flags.
* "bitmap": one bit a weight.
* "entropy": range coder, at the entropy H(f) of the flags (f: share of flagged weights).
* "rle4": 4 bits for the run of plain weights before each flagged one, 15 stands for fifteen of them and goes on.
* "group": one bit for `group_size` weights, which share their extra bits.
* "oddlevel": as "entropy", and flagged weights sit on odd levels only, whose last bit is not stored.

With weights of two extra bits there are two rounds: an index of the flagged weights, and an index among these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mixbit import _C, quantizers
from mixbit.errors import MixbitError, check_choice

__all__ = [
    "INDEX_MODES",
    "LayerCodes",
    "ModeSize",
    "Report",
    "Size",
    "bits_per_weight",
    "decode",
    "encode",
    "expected_bits",
    "flagged_fraction",
    "inspect",
    "layer_codes",
    "report",
    "size",
]

#: How flags are kept.
INDEX_MODES: tuple[str, ...] = tuple(_C.storage.INDEX_MODES)
#: Weights that share a flag, where nothing else is said.
GROUP_SIZE = 16
MAX_EXTRA_BITS = 2

Codes = npt.NDArray[Any] | torch.Tensor
Bytes = bytes | bytearray | memoryview


def _whole(argument: str, value: object, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise MixbitError(f"{argument}={value!r}: expected a whole number")
    if value < least or (most is not None and value > most):
        expected = f"from {least} to {most}" if most is not None else f"from {least}"
        raise MixbitError(f"{argument}={value!r}: expected a whole number {expected}")
    return int(value)


def _integers(argument: str, values: Codes, dtype: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """Integers as a contiguous array of another integer type, which must hold them."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu" and not (array.size == 0 or array.dtype == np.bool_):
        raise MixbitError(f"{argument} has dtype {array.dtype}: expected integers")
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise MixbitError(f"{argument} holds {array.min()} to {array.max()}: expected {limits.min} to {limits.max}")
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise MixbitError(str(error)) from error


def _check_bytes(data: object) -> None:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise MixbitError(f"data is a {type(data).__name__}: expected bytes that encode has written")


def encode(
    codes: Codes,
    extra_bits: Codes | None,
    base_bits: int,
    index: str = "entropy",
    *,
    group_size: int = GROUP_SIZE,
    group_axis: int | None = None,
) -> bytes:
    """The codes of one weight tensor as bytes; `decode` gives them back.

    The bytes hold a plane of base codes, packed as `mixbit.ops.pack_bits` packs a row of all weights; the extra bits;
    the index; behind a header with shape, counts and checksum. Grids are nested, `code = base * 2^extra + rest`: the
    plane of base codes is the network without extra levels.

    Args:
        codes: Signed codes, any shape of up to 8 dimensions, integers: `base_bits` bits where extra_bits is 0, else
            `base_bits + extra_bits` (the code on the finer grid).
        extra_bits: 0, 1 or 2, shape of codes; None: no extra levels.
        base_bits: 1 ... 8.
        index: One of `INDEX_MODES`.
        group_size: With "group": weights that share a flag. They follow each other along `group_axis`; where the
            dimension is no multiple the last group is shorter.
        group_axis: None: dimension 1, the input channels (0 of a vector).

    Raises:
        MixbitError: Codes or flags that do not fit; with "group" flags that differ within a group; with "oddlevel" a
            flagged weight on an even level.
    """
    check_choice("index", index, INDEX_MODES)
    given = _integers("codes", codes, np.int16)
    flags = np.zeros(given.shape, np.uint8) if extra_bits is None else _integers("extra_bits", extra_bits, np.uint8)
    if flags.shape != given.shape:
        raise MixbitError(f"extra_bits has shape {flags.shape}: expected {given.shape}, as codes")
    _whole("base_bits", base_bits, 1, 8)
    size, axis = 0, 0
    if index == "group":
        size = _whole("group_size", group_size, 1)
        axis = min(1, max(0, given.ndim - 1)) if group_axis is None else _whole("group_axis", group_axis, 0, 7)
    return bytes(_call(_C.storage.encode, given, flags, base_bits, index, size, axis))


def decode(data: Bytes, extra_bits: Codes | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """What `encode` was given.

    Args:
        data: Bytes of `encode`.
        extra_bits: With index "none": the flags that were given to `encode`. Otherwise not needed, and compared.

    Returns:
        Codes (int8 where they fit 8 bits, else int16) and extra bits (uint8), both in the original shape.

    Raises:
        MixbitError: Bytes that are missing, added or damaged, or other flags than the codes were stored with.
    """
    _check_bytes(data)
    flags = None
    if extra_bits is not None:
        flags = _integers("extra_bits", extra_bits, np.uint8)
        shape = inspect(data).shape
        if flags.shape != shape:
            raise MixbitError(f"extra_bits has shape {flags.shape}: expected {shape}, that of the stored codes")
    codes, found = _call(_C.storage.decode, data, flags)
    return codes, found


@dataclasses.dataclass(frozen=True)
class Size:
    """What stored codes take, in bytes.

    Attributes:
        index_mode: One of `INDEX_MODES`.
        base_bits: Of a weight without extra levels.
        shape: Of the codes.
        weights: Their number.
        flagged: Weights with extra bits.
        flagged_twice: Weights with two of them.
        base: Bytes of the base codes.
        extra: Bytes of the extra bits.
        index: Bytes of the index.
        header: Bytes of the header.
    """

    index_mode: str
    base_bits: int
    shape: tuple[int, ...]
    weights: int
    flagged: int
    flagged_twice: int
    base: int
    extra: int
    index: int
    header: int

    @property
    def payload(self) -> int:
        """Bytes without the header."""
        return self.base + self.extra + self.index

    @property
    def total(self) -> int:
        """Bytes written."""
        return self.payload + self.header

    @property
    def bits_per_weight(self) -> float:
        """Of the payload, padding to whole bytes included."""
        return 8 * self.payload / self.weights if self.weights else 0.0


def inspect(data: Bytes) -> Size:
    """What bytes of `encode` hold; reads the header and checks the bytes against their checksum.

    Raises:
        MixbitError: Bytes that are missing, added or damaged.
    """
    _check_bytes(data)
    found = _call(_C.storage.inspect, data)
    return Size(
        index_mode=found["index"],
        base_bits=found["base_bits"],
        shape=tuple(found["shape"]),
        weights=found["weights"],
        flagged=found["flagged"][0],
        flagged_twice=found["flagged"][1],
        base=found["base"],
        extra=found["extra"],
        index=found["index_bytes"],
        header=found["header"],
    )


def size(codes: Codes, extra_bits: Codes | None, base_bits: int, index: str = "entropy", **options: Any) -> Size:
    """What `encode` writes for these codes; the arguments and errors are its own."""
    return inspect(encode(codes, extra_bits, base_bits, index, **options))


def bits_per_weight(
    codes: Codes, extra_bits: Codes | None, base_bits: int, index: str = "entropy", **options: Any
) -> float:
    """Stored bits of a weight as `encode` writes them: base code, extra bits and index, without the header."""
    return size(codes, extra_bits, base_bits, index, **options).bits_per_weight


def expected_bits(
    base_bits: int, fraction: float, index: str = "entropy", group_size: int = GROUP_SIZE, *, extra: int = 1
) -> float:
    """Stored bits of a weight where a share of the weights, drawn independently, has extra levels.

    With n base bits, f the share, e extra bits each and H(f) = -f log2 f - (1 - f) log2(1 - f): none n + ef; bitmap
    n + ef + 1; entropy n + ef + H(f); rle4 n + ef + 4f / (1 - (1 - f)^15); group n + ef + 1 / group_size; oddlevel
    n + (e - 1)f + H(f). Header and padding are left out.

    Args:
        base_bits: 1 ... 8.
        fraction: 0 ... 1.
        index: One of `INDEX_MODES`.
        group_size: Weights that share a flag, with "group".
        extra: Extra bits of a flagged weight, 1 or 2.

    Raises:
        MixbitError: An argument out of range.

    Example:
        >>> round(expected_bits(2, 0.2), 3)
        2.922
    """
    check_choice("index", index, INDEX_MODES)
    _whole("base_bits", base_bits, 1, 8)
    _whole("group_size", group_size, 1)
    _whole("extra", extra, 1, MAX_EXTRA_BITS)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise MixbitError(f"fraction={fraction!r}: expected a share from 0 to 1")
    return float(_call(_C.storage.expected_bits, base_bits, fraction, index, group_size, extra))


def flagged_fraction(
    ratio: float,
    base_bits: int = 2,
    index: str = "entropy",
    *,
    group_size: int = GROUP_SIZE,
    extra: int = 1,
    uniform_bits: int = 4,
) -> float:
    """The share of weights that may have extra levels so that weights take 1 / ratio of what `uniform_bits` each would.

    The inverse of `expected_bits` up to the share where it stops rising (2/3 of "entropy": beyond, flags are cheaper to
    name by the weights that have none).

    Raises:
        MixbitError: The ratio is out of reach with this index.

    Example:
        >>> round(flagged_fraction(1.37), 5)
        0.19926
    """
    check_choice("index", index, INDEX_MODES)
    _whole("base_bits", base_bits, 1, 8)
    _whole("group_size", group_size, 1)
    _whole("extra", extra, 1, MAX_EXTRA_BITS)
    _whole("uniform_bits", uniform_bits, 1, 32)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not (math.isfinite(ratio) and ratio > 0):
        raise MixbitError(f"ratio={ratio!r}: expected a positive number")
    return float(_call(_C.storage.fraction_at, uniform_bits / ratio, base_bits, index, group_size, extra))


@dataclasses.dataclass(frozen=True)
class LayerCodes:
    """The weight of one layer as it is stored.

    Attributes:
        codes: Signed codes, as `encode` takes them.
        extra_bits: Shape of codes, or None.
        base_bits: Bits of a weight without extra levels.
        scales: Number of scales (4 bytes each).
        biases: Number of biases (4 bytes each).
    """

    codes: npt.NDArray[Any]
    extra_bits: npt.NDArray[Any] | None
    base_bits: int
    scales: int = 1
    biases: int = 0


def layer_codes(model: nn.Module) -> dict[str, LayerCodes]:
    """The codes of every quantized weight of a calibrated prepared model, by layer; float weights are left out.

    Raises:
        MixbitError: The model is not prepared, not calibrated or still under search, or the channels of a layer have
            bits of their own.
    """
    found = {}
    for name, layer in quantizers.quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            continue
        if quantizer.searching:
            raise MixbitError(f"layer {name!r} is under search: expected a model prepared with a recipe")
        quantizer.check_calibrated()
        if quantizer.by_channel:
            raise MixbitError(f"layer {name!r}: its channels have bits of their own; expected one width a layer")
        extra = quantizer.extra_bits
        found[name] = LayerCodes(
            quantizer.codes(layer.weight.detach()).cpu().numpy(),
            None if extra is None else extra.cpu().numpy(),
            int(quantizer.bit_width),
            quantizer.channels,
            0 if layer.bias is None else layer.bias.numel(),
        )
    if not found:
        raise MixbitError("model has no quantized weights: expected a model prepared with a recipe")
    return found


@dataclasses.dataclass(frozen=True)
class ModeSize:
    """A network's weights in one index mode, in bytes.

    Attributes:
        index_mode: One of `INDEX_MODES`.
        layers: Size of each layer; empty where the mode cannot keep these codes.
        reason: Why it cannot, or None.
        uniform_bits: Width of the uniform network that is compared with.
    """

    index_mode: str
    layers: Mapping[str, Size]
    reason: str | None = None
    uniform_bits: int = 4

    def _sum(self, part: str) -> int:
        return sum(getattr(size, part) for size in self.layers.values())

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self._sum("weights")

    @property
    def base(self) -> int:
        """Bytes of the base codes."""
        return self._sum("base")

    @property
    def extra(self) -> int:
        """Bytes of the extra bits."""
        return self._sum("extra")

    @property
    def index(self) -> int:
        """Bytes of the index."""
        return self._sum("index")

    @property
    def header(self) -> int:
        """Bytes of the headers."""
        return self._sum("header")

    @property
    def payload(self) -> int:
        """Bytes without the headers."""
        return self.base + self.extra + self.index

    @property
    def bits_per_weight(self) -> float:
        """Of the payload."""
        return 8 * self.payload / self.weights if self.weights else math.nan

    @property
    def ratio_uniform(self) -> float:
        """Bits of all weights at `uniform_bits` over the payload, index included."""
        return self.uniform_bits / self.bits_per_weight if self.payload else math.nan

    @property
    def ratio_float(self) -> float:
        """Bits of all weights in float32 over the payload, index included."""
        return 32 / self.bits_per_weight if self.payload else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Sizes and ratios, as JSON has them; only the reason where the mode cannot keep the codes."""
        if self.reason is not None:
            return {"reason": self.reason}
        parts = ("base", "extra", "index", "header", "payload", "bits_per_weight", "ratio_uniform", "ratio_float")
        layers = {name: size.bits_per_weight for name, size in self.layers.items()}
        return {part: getattr(self, part) for part in parts} | {"layers": layers}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a network's weights take in every index mode. `print` shows a table.

    Attributes:
        modes: By index mode.
        weights: Number of weights.
        flagged: Of them with extra levels.
        flagged_twice: Of them with two extra bits.
        uniform_bytes: All weights at `uniform_bits` each, layer by layer in whole bytes.
        float_bytes: All weights in float32.
        scale_bytes: Scales, not part of any ratio.
        bias_bytes: Biases, not part of any ratio.
        uniform_bits: Width of the uniform network that is compared with.
        group_size: Of the mode "group".
    """

    modes: Mapping[str, ModeSize]
    weights: int
    flagged: int
    flagged_twice: int
    uniform_bytes: int
    float_bytes: int
    scale_bytes: int
    bias_bytes: int
    uniform_bits: int
    group_size: int

    def __getitem__(self, index: str) -> ModeSize:
        return self.modes[check_choice("index", index, self.modes)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"modes": {name: mode.to_dict() for name, mode in self.modes.items()}}

    def __str__(self) -> str:
        share = self.flagged / self.weights if self.weights else 0.0
        lines = [
            f"{self.weights:,} weights, {100 * share:.2f} % with extra levels; {self.uniform_bytes:,} bytes at "
            f"{self.uniform_bits} bits, {self.float_bytes:,} in float32",
            f"{'index':<10}{'bits/weight':>12}{'bytes':>14}{'base':>14}{'extra':>12}{'index':>12}"
            f"{f'vs {self.uniform_bits} bit':>10}{'vs float':>10}",
        ]
        for name, mode in self.modes.items():
            if mode.reason is not None:
                lines.append(f"{name:<10}  {mode.reason}")
                continue
            lines.append(
                f"{name:<10}{mode.bits_per_weight:>12.4f}{mode.payload:>14,}{mode.base:>14,}{mode.extra:>12,}"
                f"{mode.index:>12,}{mode.ratio_uniform:>10.4f}{mode.ratio_float:>10.3f}"
            )
        lines.append(f"apart: {self.scale_bytes:,} bytes of scales, {self.bias_bytes:,} of biases")
        return "\n".join(lines)


def report(
    model_or_layers: nn.Module | Mapping[str, LayerCodes],
    *,
    modes: Iterable[str] = INDEX_MODES,
    group_size: int = GROUP_SIZE,
    uniform_bits: int = 4,
) -> Report:
    """What the weights of a network take in each index mode: every size is that of encoded bytes.

    Args:
        model_or_layers: A calibrated prepared model, or codes by layer.
        modes: Some of `INDEX_MODES`.
        group_size: Weights that share a flag, with "group".
        uniform_bits: Width of the uniform network to compare with.

    Raises:
        MixbitError: A model without quantized weights, or codes that do not fit, named by layer.
    """
    layers = layer_codes(model_or_layers) if isinstance(model_or_layers, nn.Module) else dict(model_or_layers)
    if not layers:
        raise MixbitError("layers is empty: expected the codes of at least one layer")
    _whole("uniform_bits", uniform_bits, 1, 32)
    found = {}
    for index in modes:
        check_choice("modes", index, INDEX_MODES)
        sizes: dict[str, Size] = {}
        reason = None
        for name, layer in layers.items():
            try:
                sizes[name] = size(layer.codes, layer.extra_bits, layer.base_bits, index, group_size=group_size)
            except MixbitError as error:
                # What no mode can keep is an error; what this one cannot is told.
                if index not in ("group", "oddlevel"):
                    raise MixbitError(f"layer {name!r}: {error}") from error
                reason, sizes = f"layer {name!r}: {error}", {}
                break
        found[index] = ModeSize(index, sizes, reason, uniform_bits)
    counts = [int(np.size(layer.codes)) for layer in layers.values()]
    extras = [np.zeros(0) if layer.extra_bits is None else np.asarray(layer.extra_bits) for layer in layers.values()]
    return Report(
        modes=found,
        weights=sum(counts),
        flagged=sum(int((extra > 0).sum()) for extra in extras),
        flagged_twice=sum(int((extra > 1).sum()) for extra in extras),
        uniform_bytes=sum((count * uniform_bits + 7) // 8 for count in counts),
        float_bytes=4 * sum(counts),
        scale_bytes=4 * sum(layer.scales for layer in layers.values()),
        bias_bytes=4 * sum(layer.biases for layer in layers.values()),
        uniform_bits=uniform_bits,
        group_size=group_size,
    )
