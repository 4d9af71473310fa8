"""Precision-scalable processing elements: cycles and energy of a network at given bits and extra levels.

A model after an accelerator of which only the abstract is published (docs/pe.md): reconstructed, labelled as such.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixbit import _C
from mixbit.errors import MixbitError, check_choice, did_you_mean
from mixbit.hw.documents import known, number, whole
from mixbit.hw.mapper import Bits, network_bits
from mixbit.hw.workload import Use, Workload
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.tables import HasPrecisions

#: Kinds of processing elements and where they come from.
PE_KINDS = {
    "base_lsb": "one 2 x 4-bit multiplier and an AND lane for one more weight bit; reconstruction, the default",
    "slices": "four 2 x 2-bit multipliers; reconstruction",
    "bit_serial": "one weight bit a cycle; reconstruction",
    "unpu_like": "one weight bit a cycle, 16-bit activations, multiplications cheaper by UNPU's published savings",
    "bit_fusion_like": "2 x 2-bit multipliers, widths rounded up to 2, 4, 8, 16, after Bit Fusion (arXiv 1712.01507)",
    "stripes_like": "one activation bit a cycle, 16-bit weights, after Stripes",
}
#: Where the energy goes, in the order of tables.
PARTS = ("mac", "weights", "acts", "index", "control")

#: Share of a layer's weights with extra levels, or shares with more than 0 and more than 1 extra bits.
Shares = float | Sequence[float]


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise MixbitError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class ProcessingElement:
    """A processing element and what its surroundings cost, in energies of one 16-bit multiply-accumulate.

    The costs of memory are those of Eyeriss' 65-nm table (register 1, buffer 6, DRAM 200 a 16-bit word).

    Attributes:
        kind: One of `PE_KINDS`.
        count: How many there are.
        mac: A product of 16 x 16 bits; others in proportion to the product of the widths.
        add: Accumulating 16 bits.
        accumulator_bits: Width of an accumulator.
        dram: 16 bits of DRAM.
        buffer: 16 bits of the on-chip buffer.
        weight_dram_reads: How often an image reads each weight from DRAM.
        weight_buffer_reads: How often from the buffer.
        act_buffer_accesses: Buffer accesses for each element of a layer's input and output.
        act_buffer_bits: A layer whose input and output take more goes through DRAM; 0: none does.
        control: Share that is added to everything else.
    """

    kind: str = "base_lsb"
    count: int = 1
    mac: float = 1.0
    add: float = 0.0
    accumulator_bits: float = 32.0
    dram: float = 200.0
    buffer: float = 6.0
    weight_dram_reads: float = 1.0
    weight_buffer_reads: float = 1.0
    act_buffer_accesses: float = 1.0
    act_buffer_bits: float = 0.0
    control: float = 0.1

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, PE_KINDS)
        whole("count", self.count)
        for field in dataclasses.fields(self)[2:]:
            number(field.name, getattr(self, field.name))

    @classmethod
    def from_dict(cls, options: Any) -> ProcessingElement:
        """Builds one from some of its attributes; unknown keys are an error."""
        return cls(**known("pe", options, [], [f.name for f in dataclasses.fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` takes it."""
        return dataclasses.asdict(self)

    def throughput(self, weight_bits: int, act_bits: int) -> float:
        """Products a cycle of one processing element.

        Example:
            >>> ProcessingElement("slices").throughput(2, 4)
            2.0
        """
        widths = (whole("weight_bits", weight_bits, 1, 16), whole("act_bits", act_bits, 1, 16))
        return float(_call(_C.pe.throughput, self.kind, *widths))

    def product(self, weight: int, act: int, weight_bits: int, act_bits: int) -> int:
        """weight * act as the passes of the hardware make it; weight signed, act unsigned."""
        widths = (whole("weight_bits", weight_bits, 1, 16), whole("act_bits", act_bits, 1, 16))
        operands = (whole("weight", weight, -(1 << 15), 1 << 15), whole("act", act, 0, 1 << 16))
        return int(_call(_C.pe.product, self.kind, operands[0], widths[0], operands[1], widths[1])[0])

    def dot(self, codes: Any, extra_bits: Any, acts: Any, base_bits: int, act_bits: int) -> int:
        """A dot product of weights with 0 to 2 extra bits, in units of the finest step among them.

        Args:
            codes: Signed codes of base_bits + extra bits.
            extra_bits: 0 to 2 each.
            acts: Unsigned codes.
            base_bits: Of a weight without extra bits.
            act_bits: Of an activation.
        """
        given = {"codes": codes, "extra_bits": extra_bits, "acts": acts}
        arrays = []
        for name, values in given.items():
            array = np.asarray(values)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
                raise MixbitError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [n]")
            if name == "extra_bits" and array.size and not 0 <= array.min() <= array.max() <= 2:
                raise MixbitError(f"extra_bits holds {array.min()} to {array.max()}; expected 0 to 2")
            arrays.append(np.ascontiguousarray(array, np.uint8 if name == "extra_bits" else np.int64))
        widths = (whole("base_bits", base_bits, 1, 16), whole("act_bits", act_bits, 1, 16))
        return int(_call(_C.pe.dot, self.kind, *arrays, *widths))


@dataclasses.dataclass(frozen=True)
class LayerEnergy:
    """One layer on a processing element; energies are in units of a 16-bit multiply-accumulate.

    Attributes:
        name: Of the layer.
        act: Bits of the input.
        weight: Bits of a weight without extra levels.
        flagged: Shares of the weights with more than 0 and more than 1 extra bits.
        macs: Multiply-accumulates.
        weights: Number of weights.
        cycles: Of one image.
        energy: By part (`PARTS`).
        stored_bits: Weights and index, of all weights.
    """

    name: str
    act: int
    weight: int
    flagged: tuple[float, float]
    macs: int
    weights: int
    cycles: int
    energy: Mapping[str, float]
    stored_bits: float

    @property
    def total(self) -> float:
        """Energy of all parts."""
        return math.fsum(self.energy.values())


@dataclasses.dataclass(frozen=True)
class NetworkEnergy:
    """A network on a processing element, one image. `print` shows a table.

    Attributes:
        pe: The processing element.
        index: How the flags are kept.
        layers: In forward order.
    """

    pe: ProcessingElement
    index: str
    layers: tuple[LayerEnergy, ...]

    def __getitem__(self, name: str) -> LayerEnergy:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def energy(self) -> dict[str, float]:
        """By part, in units of a 16-bit multiply-accumulate."""
        return {part: math.fsum(layer.energy[part] for layer in self.layers) for part in PARTS}

    @property
    def total(self) -> float:
        """Energy of all parts."""
        return math.fsum(layer.total for layer in self.layers)

    @property
    def cycles(self) -> int:
        """Layer after layer."""
        return sum(layer.cycles for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight, index included."""
        return math.fsum(layer.stored_bits for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        totals = {"total": self.total, "energy": self.energy, "cycles": self.cycles}
        return {"pe": self.pe.to_dict(), "index": self.index, **totals, "layers": layers}

    def __str__(self) -> str:
        head = f"{'layer':<16}{'act':>4}{'weight':>7}{'flagged':>9}{'cycles':>14}"
        lines = [
            f"{self.pe.kind} x {self.pe.count} ({PE_KINDS[self.pe.kind]}); energies in 16-bit multiply-accumulates",
            head + "".join(f"{part:>15}" for part in (*PARTS, "total")),
        ]
        for layer in self.layers:
            values = "".join(f"{layer.energy[part]:>15,.0f}" for part in PARTS)
            lines.append(
                f"{layer.name:<16}{layer.act:>4}{layer.weight:>7}{layer.flagged[0]:>9.3f}{layer.cycles:>14,}"
                f"{values}{layer.total:>15,.0f}"
            )
        values = "".join(f"{value:>15,.0f}" for value in self.energy.values())
        lines.append(f"{'total':<36}{self.cycles:>14,}{values}{self.total:>15,.0f}")
        return "\n".join(lines)


def _by_layer(where: str, net: Workload, given: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in given:
        if name not in net.names:
            raise MixbitError(f"{where}: the network has no layer {name!r}{did_you_mean(str(name), net.names)}")
    return given


def _widths(net: Workload, bits: Bits | HasPrecisions | Mapping[str, Bits]) -> list[dict[str, int]]:
    """{"act", "weight"} of each layer."""
    if isinstance(bits, Mapping) and any(isinstance(value, Mapping) for value in bits.values()):
        layers = {}
        for name, entry in _by_layer("bits", net, bits).items():
            widths = known(f"bits: {name}", entry, ["act", "weight"])
            layers[name] = LayerPrecision(widths["weight"], widths["act"], narrow_range=False)
        for name in net.names:
            if name not in layers:
                raise MixbitError(f"bits has no layer {name!r}: expected all of {net.names}")
        bits = Recipe(layers=layers)
    elif getattr(bits, "extra_maps", None):
        bits = dataclasses.replace(bits, extra_maps={})  # type: ignore[type-var]
    return network_bits(net, bits)  # type: ignore[arg-type]


def _shares(where: str, value: Any) -> tuple[float, float]:
    given = (value, 0.0) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise MixbitError(f"{where} is {value!r}; expected a share, or shares with one and with two extra bits")
    some, two = (number(where, share, 0.0, 1.0) for share in given)
    if two > some:
        raise MixbitError(f"{where} is {value!r}; expected the second share within the first")
    return float(some), float(two)


def _flagged(net: Workload, extra: Shares | Mapping[str, Shares] | None) -> dict[str, tuple[float, float]]:
    """Shares of each layer's weights with more than 0 and more than 1 extra bits."""
    if isinstance(extra, Mapping):
        found = dict.fromkeys(net.names, (0.0, 0.0))
        return found | {name: _shares(f"extra: {name}", v) for name, v in _by_layer("extra", net, extra).items()}
    return dict.fromkeys(net.names, (0.0, 0.0) if extra is None else _shares("extra", extra))


def _shares_of_maps(net: Workload, maps: Mapping[str, Any]) -> dict[str, Shares]:
    """Shares of flagged weights in a recipe's maps of extra bits."""
    return {
        name: (float((given > 0).mean()), float((given > 1).mean()))
        for name, given in _by_layer("extra levels of the recipe", net, maps).items()
    }


def _index(index: str, group_size: int, flagged: tuple[float, float]) -> tuple[float, float]:
    """Bits a weight of the index, and extra bits a weight that it makes superfluous (docs/storage.md)."""
    some, two = flagged
    if some == 0.0:
        return 0.0, 0.0
    bits = _call(_C.storage.index_bits, some, index, group_size)
    if 0.0 < two < some:
        bits += some * _call(_C.storage.index_bits, two / some, index, group_size)
    return bits, some if index == "oddlevel" else 0.0


def pe_energy(
    net: Workload,
    bits: Bits | HasPrecisions | Mapping[str, Bits],
    pe: str | Mapping[str, Any] | ProcessingElement = "base_lsb",
    *,
    extra: Shares | Mapping[str, Shares] | None = None,
    index: str = "entropy",
    group_size: int = 16,
    index_bits: Mapping[str, float] | None = None,
) -> NetworkEnergy:
    """Cycles and energy of a network on precision-scalable processing elements; one image.

    Energies are in units of one 16-bit multiply-accumulate, by part: `mac` (in proportion to the product of the
    widths), `weights` and `acts` (bits read and written, from DRAM and buffer), `index` (of the flagged weights, from
    DRAM) and `control` (a share of these). docs/pe.md has the formulas and what of them is known.

    Args:
        net: The network.
        bits: {"act": 4, "weight": 2} for all layers, {layer: {"act", "weight"}}, or a recipe; weight bits are those of
            a weight without extra levels.
        pe: A kind (`PE_KINDS`), options (as `ProcessingElement.from_dict` takes them), or a `ProcessingElement`.
        extra: Share of the weights with one extra bit, or (share with at least one, share with two); for all layers or
            by layer. Layers that are not named have none. A recipe with maps of extra levels brings its own shares.
        index: How flags are kept (`mixbit.retrain.storage.INDEX_MODES`); layers without flags keep none.
        group_size: Of the index "group".
        index_bits: Bits of the index by layer, where they were measured; otherwise the closed form of the mode.

    Raises:
        MixbitError: An unknown layer, kind or index, a width beyond 16 bits, a share out of range.

    Example:
        >>> net = Workload.from_shapes([{"C": 64, "M": 64, "R": 3, "S": 3, "P": 8, "Q": 8}])
        >>> plain = pe_energy(net, {"act": 4, "weight": 4})
        >>> mixed = pe_energy(net, {"act": 4, "weight": 2}, extra=0.2)
        >>> plain.cycles, mixed.cycles
        (4718592, 2359296)
    """
    element = pe if isinstance(pe, ProcessingElement) else None
    if element is None:
        element = ProcessingElement(pe) if isinstance(pe, str) else ProcessingElement.from_dict(pe)
    check_choice("index", index, _C.storage.INDEX_MODES)
    whole("group_size", group_size)
    measured = {} if index_bits is None else _by_layer("index_bits", net, index_bits)
    maps = getattr(bits, "extra_maps", None)
    if maps:
        if extra is not None:
            raise MixbitError("extra is given beside a recipe with extra levels of its own; expected one of them")
        extra = _shares_of_maps(net, maps)
    flagged = _flagged(net, extra)
    options = element.to_dict()
    kind = options.pop("kind")
    layers = []
    for use, widths in zip(net, _widths(net, bits), strict=True):
        name = use.layer.name
        counts = _counts(use)
        a_weight, spared = _index(index, group_size, flagged[name])
        of_index = number(f"index_bits: {name}", measured[name]) if name in measured else a_weight * counts["weights"]
        unstored = spared * counts["weights"]
        try:
            cost = _C.pe.cost(
                pe=kind, **options, **counts, act_bits=widths["act"], base_bits=widths["weight"],
                flagged=flagged[name], index_bits=of_index, unstored_bits=unstored,
            )  # fmt: skip
        except ValueError as error:
            raise MixbitError(f"layer {name!r}: {error}") from error
        stored = counts["weights"] * (widths["weight"] + sum(flagged[name])) - unstored + of_index
        energy = {part: cost[part] for part in PARTS}
        place = (name, widths["act"], widths["weight"], flagged[name], counts["macs"], counts["weights"])
        layers.append(LayerEnergy(*place, int(cost["cycles"]), energy, stored))
    return NetworkEnergy(element, index, tuple(layers))


def _counts(use: Use) -> dict[str, int]:
    """Multiply-accumulates and elements of a layer; what it is called several times for counts as often."""
    found = _call(_C.hw.elements, use.layer.problem)
    inputs = found["Inputs"] if use.input_elements is None else use.input_elements
    return {
        "macs": found["macs"] * use.calls,
        "weights": found["Weights"],
        "inputs": inputs * use.calls,
        "outputs": found["Outputs"] * use.calls,
    }


def proportional_share(saving: float, compression: float) -> float:
    """The share x of the energy that is proportional to weight bits if compressing them saves a factor `saving` of all.

    `1 / (1 - x + x / compression) = saving`: with the published 1.29 and 1.37, x = 0.832: plausible, no more.

    Example:
        >>> round(proportional_share(1.29, 1.37), 3)
        0.832
    """
    return float(_call(_C.pe.proportional_share, saving, compression))
