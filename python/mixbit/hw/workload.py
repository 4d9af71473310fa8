"""What a network asks of an accelerator: shapes of its layers, who reads what, and how often."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixbit.errors import MixbitError, did_you_mean
from mixbit.hw.documents import known, pairs, whole

if TYPE_CHECKING:
    from mixbit import network

TENSORS = ("Weights", "Inputs", "Outputs")
_MOST_RANKS = 8

_CONV = ("C", "M", "R", "S", "N", "P", "Q", "G", "Wstride", "Hstride", "Wdilation", "Hdilation")
_GEMM = ("M", "N", "K")
_PROJECTED = ("dims", "projections")

#: Of each tensor its ranks; each rank is a sum of (dimension, step).
Projections = Mapping[str, Sequence[Sequence[tuple[str, int]]]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The loop nest of one layer.

    Of a convolution: C channels and M filters in each of G groups, kernel R x S, N images, output P x Q, where R and P
    belong to the width (Wstride, Wdilation) and S and Q to the height. The input is read without its padding: its
    width is (P - 1) * Wstride + (R - 1) * Wdilation + 1. Of a matrix product: Outputs[N, M] of K sums each. Anything
    else is bounds and projections, which say how a point of the loop nest finds its element of each tensor.

    Attributes:
        shape: Bounds by name; strides and dilations of a convolution beside them.
        bitwidths: The layer's own widths by tensor ("Weights", "Inputs", "Outputs"), or None.
        name: For reports and recipes.
        projections: Ranks of each tensor, each one a sum of (dimension, step); None for convolutions and products.
    """

    shape: Mapping[str, int]
    bitwidths: Mapping[str, int] | None = None
    name: str = ""
    projections: Projections | None = None

    @classmethod
    def from_dict(cls, problem: Any, name: str = "") -> Layer:
        """Builds a layer from {"C": ..., "M": ..., ...}, {"M": ..., "N": ..., "K": ...} or {"dims", "projections"}.

        Args:
            problem: What is left out is 1; C and M (or M, N and K) are needed. May hold "bitwidths" and "name".
                {"dims": {"X": 8, "K": 3}, "projections": {"Weights": [[("K", 1)]], "Inputs": [[("X", 1), ("K", 1)]],
                "Outputs": [[("X", 1)]]}} is a convolution in one dimension.
            name: Where the dict has none.

        Raises:
            MixbitError: A key or a dimension is unknown (the nearest is named) or missing, or a number is below 1.
        """
        gemm = isinstance(problem, Mapping) and "K" in problem
        where = f"layer {name!r}" if name else "layer"
        extra = ["bitwidths", "name"]
        if isinstance(problem, Mapping) and not set(_PROJECTED).isdisjoint(problem):
            given = known(where, problem, _PROJECTED, extra)
            bounds, projections = _projected(where, given["dims"], given["projections"])
            return cls(bounds, _bitwidths(where, given), str(given.get("name", name)), projections)
        given = known(where, problem, _GEMM if gemm else _CONV[:2], extra if gemm else [*_CONV[2:], *extra])
        shape = {k: whole(f"{where}: {k}", given.get(k, 1)) for k in (_GEMM if gemm else _CONV)}
        return cls(shape, _bitwidths(where, given), str(given.get("name", name)))

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` takes it."""
        named = {"name": self.name} if self.name else {}
        return {**self.problem, **({} if self.bitwidths is None else {"bitwidths": dict(self.bitwidths)}), **named}

    @property
    def problem(self) -> dict[str, Any]:
        """The shape alone, with the projections where it has some."""
        if self.projections is None:
            return dict(self.shape)
        ranks = {tensor: [list(rank) for rank in of] for tensor, of in self.projections.items()}
        return {"dims": dict(self.shape), "projections": ranks}

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        strides = () if self.projections is not None or "K" in self.shape else _CONV[8:]
        return math.prod(bound for key, bound in self.shape.items() if key not in strides)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layers that map alike."""
        bounds = tuple(sorted(self.shape.items()))
        return bounds if self.projections is None else (*bounds, repr(sorted(self.problem["projections"].items())))


def _bitwidths(where: str, given: Mapping[str, Any]) -> dict[str, int] | None:
    """A layer's own widths."""
    if given.get("bitwidths") is None:
        return None
    found = known(f"{where}: bitwidths", given["bitwidths"], [], TENSORS)
    for tensor, width in found.items():
        whole(f"{where}: bitwidths: {tensor}", width)
    return found


def _projected(where: str, dims: Any, projections: Any) -> tuple[dict[str, int], Projections]:
    """Bounds and ranks of a layer that is spelled out."""
    if not isinstance(dims, Mapping) or not dims or not all(isinstance(dim, str) for dim in dims):
        raise MixbitError(f"{where}: dims is {dims!r}; expected names and bounds, at least one")
    bounds = {dim: whole(f"{where}: dims: {dim}", bound) for dim, bound in dims.items()}
    found = {}
    for tensor, ranks in known(f"{where}: projections", projections, TENSORS).items():
        place = f"{where}: projections: {tensor}"
        if not isinstance(ranks, (list, tuple)) or len(ranks) > _MOST_RANKS:
            raise MixbitError(f"{place} is {ranks!r}; expected a list of at most {_MOST_RANKS} ranks")
        found[tensor] = tuple(pairs(place, rank, "(dimension, step)") for rank in ranks)
        for dim in (dim for rank in found[tensor] for dim, _ in rank):
            if dim not in bounds:
                raise MixbitError(
                    f"{place}: unknown dimension {dim!r}; expected some of {list(bounds)}{did_you_mean(dim, bounds)}"
                )
    used = {dim for ranks in found.values() for rank in ranks for dim, _ in rank}
    for dim in bounds:
        if dim not in used:
            raise MixbitError(f"{where}: no tensor depends on dimension {dim!r}; expected one that does")
    return bounds, found


@dataclasses.dataclass(frozen=True)
class Use:
    """A layer's place in the network.

    Attributes:
        layer: Its loop nest.
        calls: How often one image runs it.
        input_group: Layers with the same number read the same tensor; 0 is the network input.
        consumer: Name of the layer that reads the output, or the width of the tensor it goes to, or None (8 bits).
        input_elements: Size of the input of one call; None: what the loop nest reads, a convolution's padding included.
    """

    layer: Layer
    calls: int
    input_group: int
    consumer: str | int | None
    input_elements: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """An entry of `Workload.to_dict`."""
        place = {"calls": self.calls, "input_group": self.input_group, "consumer": self.consumer}
        known_size = {} if self.input_elements is None else {"input_elements": self.input_elements}
        return {**self.layer.to_dict(), **place, **known_size}


@dataclasses.dataclass(frozen=True)
class Workload:
    """The layers of a network in forward order.

    Attributes:
        uses: Every layer and its place.
    """

    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        found = self.names
        if not found:
            raise MixbitError("workload has no layers; expected at least one")
        for name in found:
            if found.count(name) > 1:
                raise MixbitError(f"workload: two layers are named {name!r}; expected distinct names")
        for use in self.uses:
            if isinstance(use.consumer, str) and use.consumer not in found:
                raise MixbitError(
                    f"layer {use.layer.name!r}: consumer {use.consumer!r} is no layer"
                    f"{did_you_mean(use.consumer, found)}"
                )

    def __iter__(self) -> Iterator[Use]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)

    @property
    def names(self) -> list[str]:
        """Names in forward order."""
        return [use.layer.name for use in self.uses]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(use.layer.macs * use.calls for use in self.uses)

    @classmethod
    def from_model(cls, model: Any, example: Any, *, depthwise_as_full: bool = False, tensor_bits: int = 8) -> Workload:
        """The layers of a model, for one image.

        Args:
            model: In eval mode.
            example: An item of `batches`; the shapes are those of its images.
            depthwise_as_full: Counts a depthwise layer as a full convolution, as the published numbers do.
            tensor_bits: Width of adds and concatenations (a recipe's `tensors` default).
        """
        # Loads torch, which the processes of a co-search do without.
        from mixbit import network

        whole("tensor_bits", tensor_bits)
        uses = []
        for layer in network.layers(model, example):
            consumer = layer.consumer if layer.consumer is not None else tensor_bits if layer.joined else None
            nest = Layer(_shape(layer, depthwise_as_full), None, layer.name)
            uses.append(Use(nest, layer.calls, layer.input_group, consumer, math.prod(layer.shapes.input)))
        return cls(tuple(uses))

    @classmethod
    def from_shapes(cls, shapes: Iterable[Layer | Mapping[str, Any]]) -> Workload:
        """A chain of layers: each one's output is read by the next, the last one's is the network's.

        Args:
            shapes: Layers, or dicts as `Layer.from_dict` takes them; without a name they are called layer1, layer2, ...
        """
        layers: list[Layer] = []
        for i, shape in enumerate(shapes, 1):
            layer = shape if isinstance(shape, Layer) else Layer.from_dict(shape, f"layer{i}")
            layers.append(layer if layer.name else dataclasses.replace(layer, name=f"layer{i}"))
        consumers: list[str | None] = [layer.name for layer in layers[1:]] + [None]
        return cls(tuple(Use(nest, 1, i, consumers[i]) for i, nest in enumerate(layers)))

    @classmethod
    def from_dict(cls, document: Any) -> Workload:
        """Builds a workload from what `to_dict` gives: {"layers": [{..., "calls", "input_group", "consumer"}, ...]}.

        "input_elements" may be left out.
        """
        given = known("workload", document, ["layers"])["layers"]
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise MixbitError(f"workload: layers is {given!r}; expected a list")
        uses = []
        for i, entry in enumerate(given):
            where = f"workload: layers[{i}]"
            place = ["calls", "input_group", "consumer"]
            rest = {
                k: v
                for k, v in known(
                    where, entry, place, [*_CONV, "K", *_PROJECTED, "bitwidths", "name", "input_elements"]
                ).items()
            }
            calls, group, consumer = (rest.pop(k) for k in place)
            elements = rest.pop("input_elements", None)
            if elements is not None:
                whole(f"{where}: input_elements", elements)
            if consumer is not None and not isinstance(consumer, str):
                whole(f"{where}: consumer", consumer)
            layer = Layer.from_dict(rest, f"layer{i + 1}")
            group = whole(f"{where}: input_group", group, 0)
            uses.append(Use(layer, whole(f"{where}: calls", calls), group, consumer, elements))
        return cls(tuple(uses))

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` takes it."""
        return {"layers": [use.to_dict() for use in self.uses]}


def _shape(layer: network.Layer, depthwise_as_full: bool) -> dict[str, int]:
    """Bounds of a model's layer for one image."""
    shape = dict.fromkeys(_CONV, 1)
    outputs, channels = layer.shapes.weight[:2]
    if layer.kind == "linear":
        positions = 1
        for size in layer.shapes.output[:-1]:
            positions *= size
        return shape | {"C": channels, "M": outputs, "P": positions}
    # A convolution's output without the batch: channels, height, width.
    _, height, width = layer.shapes.output
    kernel_height, kernel_width = layer.shapes.weight[2:]
    groups = layer.groups
    if depthwise_as_full and layer.depthwise:
        channels, groups = channels * groups, 1
    return shape | {
        "C": channels,
        "M": outputs // groups,
        "R": kernel_width,
        "S": kernel_height,
        "P": width,
        "Q": height,
        "G": groups,
        "Wstride": layer.stride[1],
        "Hstride": layer.stride[0],
        "Wdilation": layer.dilation[1],
        "Hdilation": layer.dilation[0],
    }
