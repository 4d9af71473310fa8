"""One mapping's cost, and the proven best mapping of every layer at every width."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit import _C
from mixbit.errors import MixbitError, check_choice
from mixbit.hw.arch import Architecture
from mixbit.hw.documents import known, whole
from mixbit.hw.mapping import Mapping as LoopNest
from mixbit.hw.workload import Layer, Use, Workload
from mixbit.tables import OUTPUT_BITS, CostTable, HasPrecisions

Array = npt.NDArray[np.float64]
Bits = Mapping[str, int]
Progress = Callable[[int, int, str], None]

#: Objective -> (key of a result, unit).
OBJECTIVES = {
    "energy": ("energy_pj", "pJ"),
    "delay": ("cycles", "cycles"),
    "edp": ("edp", "J*cycle"),
    "last_level_accesses": ("last_level_accesses", "words"),
}
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Record(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Cache:
    """The latest results by what they depend on, so that equal layers are searched once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def get(self, key: Any) -> Any:
        """What was kept under a key, or None."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Any, value: Any) -> None:
        """Keeps a result; the one that was not asked for the longest time goes."""
        self.entries[key] = value
        if len(self.entries) > self.size:
            self.entries.popitem(last=False)


Jobs = dict[Any, tuple[str, Callable[[int], Any]]]


def _searched(cache: _Cache, jobs: Jobs, threads: int, progress: Progress | None) -> dict[Any, Any]:
    """The results of searches by key: kept ones, and the others, several at once (they release the interpreter).

    Args:
        cache: Where results are kept.
        jobs: For each key the layer's name and the search, which takes a number of threads.
        threads: Searches at once; a lone one takes all of them itself.
        progress: Called with (done, jobs, name).
    """
    found = {key: kept for key in jobs if (kept := cache.get(key)) is not None}
    missing = [key for key in jobs if key not in found]
    inner = threads if len(missing) == 1 else 1

    def run(key: Any) -> Any:
        name, search = jobs[key]
        try:
            return search(inner)
        except MixbitError as error:
            raise MixbitError(f"layer {name!r}: {error}") from error

    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(threads, len(missing)))) as pool:
        for key, result in zip(missing, pool.map(run, missing), strict=True):
            found[key] = result
            cache.put(key, result)
            if progress is not None:
                progress(len(found), len(jobs), jobs[key][0])
    return found


_SEARCHES = _Cache(4096)
_SWEEPS = _Cache(512)


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A function of the C++ room, whose bad arguments are ours."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise MixbitError(str(error)) from error


def _problem(layer: Layer | Mapping[str, Any]) -> dict[str, Any]:
    """A layer as the cost model reads it, with its own widths."""
    found = layer if isinstance(layer, Layer) else Layer.from_dict(layer)
    return {k: v for k, v in found.to_dict().items() if k != "name"}


def _checked_bits(arch: Architecture, bits: Bits | None) -> dict[str, int] | None:
    if bits is None:
        return None
    given = known("bits", bits, [], ["act", "weight", "out", "partial"])
    for key, value in given.items():
        whole(f"bits: {key}", value)
    arch.check_bits(given)
    return given


def evaluate(
    arch: Architecture,
    layer: Layer | Mapping[str, Any],
    mapping: LoopNest | Sequence[Mapping[str, Any]],
    bits: Bits | None = None,
    semantics: str = "v3",
    *,
    reuse: str = "sampled",
    scale_mac: bool = False,
) -> Record:
    """Cost of one mapping, with every count (formulas and their sources: docs/mapper.md).

    Args:
        arch: The accelerator.
        layer: What is computed.
        mapping: The loop nest; levels are matched by name.
        bits: {"act", "weight", "out"} and "partial" for the width of partial sums, in bits. None: the layer's own
            `bitwidths`, else one element a word.
        semantics: "v3" or "v4", how a level counts what it asks of its parent.
        reuse: What a step to the next tile saves, see docs/mapper.md.
        scale_mac: Lets the energy of a multiply-accumulate follow the widths; needs `mac.scaling`.

    Returns:
        `energy_pj`, `cycles`, `edp` (J * cycle), `last_level_accesses` (words), `utilization`, `mac` and `levels`: of
        each its name, cycles and, by tensor, tile, partition, instances, reads, updates, fills (words of one instance)
        and energy_total_pJ. Keys are attributes too.

    Raises:
        MixbitError: The mapping is none of this architecture and layer, a tile exceeds its level (level, tensors and
            words are named), or a width exceeds a word.
    """
    nest = mapping if isinstance(mapping, LoopNest) else LoopNest.from_dict(mapping)
    options = {"semantics": semantics, "reuse": reuse, "scale_mac": scale_mac}
    return Record(
        _call(_C.hw.evaluate, arch.model, _problem(layer), nest.to_dict(), _checked_bits(arch, bits), **options)
    )


def count_mappings(arch: Architecture, layer: Layer | Mapping[str, Any], bits: Bits | None = None) -> Record:
    """How many mappings the constraints leave, and why others fall away.

    Args:
        arch: The accelerator.
        layer: What is computed.
        bits: As in `evaluate`.

    Returns:
        `total`, `fanout_invalid` (more loops in space than instances), `capacity_invalid` (tiles over the size of their
        level) and `valid`; `relaxed` lists fixed factors that do not divide their bound and are free therefore.
    """
    return Record(_call(_C.hw.count_mappings, arch.model, _problem(layer), _checked_bits(arch, bits)))


def random_search(
    arch: Architecture,
    layer: Layer | Mapping[str, Any],
    bits: Bits | None = None,
    objective: str = "edp",
    *,
    seed: int = 0,
    victory: int = 500,
    timeout: int = 15000,
    scale_mac: bool = False,
) -> Record:
    """The best of random mappings, with the stopping rule of the published set-up: a baseline, not an optimum.

    Args:
        arch: The accelerator.
        layer: What is computed.
        bits: As in `evaluate`.
        objective: As in `map_network`.
        seed: Of the draws.
        victory: Stops after so many valid mappings without an improvement.
        timeout: Stops after so many invalid mappings in a row.
        scale_mac: As in `evaluate`.

    Returns:
        What `evaluate` gives for the mapping found, `mapping`, and `counts` of what was drawn, as `count_mappings` has
        them.
    """
    check_choice("objective", objective, OBJECTIVES)
    options = {"seed": seed, "victory": victory, "timeout": timeout, "scale_mac": scale_mac}
    found = _call(_C.hw.random_search, arch.model, _problem(layer), _checked_bits(arch, bits), objective, **options)
    return Record(found | {"mapping": LoopNest.from_dict(found["mapping"])})


def pareto(
    arch: Architecture,
    layer: Layer | Mapping[str, Any],
    bits: Bits | None = None,
    objectives: Sequence[str] = ("energy", "delay", "last_level_accesses"),
    *,
    threads: int | None = None,
    scale_mac: bool = False,
) -> list[Record]:
    """Every mapping that no other beats in all objectives, ascending in the first one.

    Args:
        arch: The accelerator.
        layer: What is computed.
        bits: As in `evaluate`.
        objectives: As in `map_network`.
        threads: As in `map_network`.
        scale_mac: As in `evaluate`.

    Returns:
        For each point what `evaluate` gives, and `mapping`.
    """
    chosen = [check_choice("objectives", o, OBJECTIVES) for o in objectives]
    options = {"threads": _threads(threads), "scale_mac": scale_mac}
    found = _call(_C.hw.pareto, arch.model, _problem(layer), _checked_bits(arch, bits), chosen, **options)
    return [Record(p | {"mapping": LoopNest.from_dict(p["mapping"])}) for p in found["points"]]


@dataclasses.dataclass(frozen=True)
class LayerMapping:
    """The proven best mapping of a layer; energy, cycles, EDP and accesses are of one image, all calls.

    Attributes:
        name: Of the layer.
        bits: {"act", "weight", "out"}.
        calls: How often one image runs the layer.
        mapping: The loop nest.
        energy_pj: Energy, pJ.
        cycles: Cycles.
        edp: Energy times delay of a call, summed over calls, J * cycle.
        last_level_accesses: Words read from and written to the outermost level.
        utilization: Share of the multipliers' cycles that are used.
        counts: Levels with the counts of one call, as `evaluate` gives them under `levels`.
        mac: Energy, operations and instances of the multipliers, of one call.
        certificate: Why no mapping is better: how many there are, were visited, and were excluded by what.
    """

    name: str
    bits: Bits
    calls: int
    mapping: LoopNest
    energy_pj: float
    cycles: int
    edp: float
    last_level_accesses: int
    utilization: float
    counts: Sequence[Mapping[str, Any]]
    mac: Mapping[str, Any]
    certificate: Mapping[str, Any]

    def energies(self) -> dict[tuple[str, str], float]:
        """Energy in pJ by (level, tensor), ("MAC", "") for the multipliers; sums to `energy_pj`."""
        found = {("MAC", ""): self.calls * float(self.mac["energy_pJ"])}
        for level in self.counts:
            for tensor, data in level["data"].items():
                found[level["name"], tensor] = self.calls * float(data["energy_total_pJ"])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"bits": dict(self.bits), "mapping": self.mapping.to_dict()}


@dataclasses.dataclass(frozen=True)
class NetworkMapping:
    """The proven best mappings of a network; totals are sums over layers, EDP included.

    Attributes:
        architecture: Name of the accelerator.
        objective: What was minimized in each layer.
        layers: In forward order.
    """

    architecture: str
    objective: str
    layers: tuple[LayerMapping, ...]

    def __getitem__(self, name: str) -> LayerMapping:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def total(self, objective: str | None = None) -> float:
        """Sum over layers of an objective, of the one that was minimized by default; exact to the last bit."""
        key, _ = OBJECTIVES[check_choice("objective", objective or self.objective, OBJECTIVES)]
        return math.fsum(getattr(layer, key) for layer in self.layers)

    @property
    def energy_pj(self) -> float:
        """Energy of one image, pJ."""
        return self.total("energy")

    @property
    def cycles(self) -> int:
        """Cycles of one image, layer after layer."""
        return sum(layer.cycles for layer in self.layers)

    @property
    def edp(self) -> float:
        """Sum over layers of energy times delay, J * cycle."""
        return self.total("edp")

    @property
    def last_level_accesses(self) -> int:
        """Words to and from the outermost level."""
        return sum(layer.last_level_accesses for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        totals = {key: getattr(self, key) for key, _ in OBJECTIVES.values()}
        layers = [layer.to_dict() for layer in self.layers]
        return {"architecture": self.architecture, "objective": self.objective, "totals": totals, "layers": layers}


def network_bits(net: Workload, bits: Bits | HasPrecisions) -> list[dict[str, int]]:
    """{"act", "weight", "out"} of each layer.

    Args:
        net: The network.
        bits: The same for all layers, or a recipe. Without "out" the output has its consumer's act, the width of the
            add or concatenation it enters, or 8 bits at a network output.

    Raises:
        MixbitError: A key is unknown or missing, or a recipe leaves a layer float or gives it extra levels or
            bits by channel.
    """
    if isinstance(bits, Mapping):
        given = known("bits", bits, ["act", "weight"], ["out", "partial"])
        for key, value in given.items():
            whole(f"bits: {key}", value)
        acts = dict.fromkeys(net.names, given["act"])
        weights = dict.fromkeys(net.names, given["weight"])
    else:
        given = {}
        acts, weights = {}, {}
        for name in net.names:
            precision = bits[name]
            if name in getattr(bits, "channel_maps", {}):
                raise MixbitError(
                    f"bits: the channels of layer {name!r} have bits of their own, but a mapping has one width a "
                    "tensor; expected a recipe with one width for all channels"
                )
            if name in getattr(bits, "extra_maps", {}):
                raise MixbitError(
                    f"bits: the recipe gives layer {name!r} extra levels, but a mapping has one width a layer; price "
                    "it with mixbit.costs.mapper(...).total(recipe)"
                )
            if precision.act is None or precision.weight is None:
                raise MixbitError(
                    f"bits: the recipe leaves layer {name!r} float (act {precision.act}, weight {precision.weight}); "
                    "expected widths of both operands"
                )
            acts[name], weights[name] = precision.act, precision.weight
    found = []
    for use in net:
        name = use.layer.name
        out = given.get("out", _output_width(use, acts))
        rest = {"partial": given["partial"]} if "partial" in given else {}
        found.append({"act": acts[name], "weight": weights[name], "out": out, **rest})
    return found


def _output_width(use: Use, acts: Mapping[str, int]) -> int:
    if isinstance(use.consumer, str):
        return acts[use.consumer]
    return OUTPUT_BITS if use.consumer is None else use.consumer


def width_class(arch: Architecture, bits: Bits, scale_mac: bool = False) -> tuple[Any, ...]:
    """What results depend on of the widths: operands a word at every level, and themselves where the MACs follow."""
    words = sorted({level.word_bits for level in arch.levels})
    operands = tuple(tuple(word // bits[key] for word in words) for key in sorted(bits))
    return (*sorted(bits), *operands, *((bits["act"], bits["weight"]) if scale_mac else ()))


def map_network(
    arch: Architecture,
    net: Workload,
    bits: Bits | HasPrecisions,
    objective: str = "edp",
    *,
    threads: int | None = None,
    scale_mac: bool = False,
    progress: Progress | None = None,
) -> NetworkMapping:
    """The proven best mapping of every layer within the architecture's constraints.

    Equal layers are searched once, and once for all widths that pack alike.

    Args:
        arch: The accelerator.
        net: The network.
        bits: {"act": 8, "weight": 4} for all layers, or a recipe; see `network_bits`. "partial" stores partial sums at
            a width of their own.
        objective: "energy", "delay", "edp" or "last_level_accesses"; ties go to less energy, then to fewer cycles.
        threads: Layers searched at once; None takes all processors. The result does not depend on it.
        scale_mac: As in `evaluate`.
        progress: Called with (different layers done, different layers, name).

    Returns:
        Per layer the mapping, energy_pj, cycles, counts and certificate; totals over layers.

    Raises:
        MixbitError: No mapping exists (level, tensor and needed words are named), or a width exceeds a word.

    Example:
        >>> best = mixbit.hw.map_network(arch, net, {"act": 8, "weight": 4}, "energy")
        >>> best.energy_pj == mixbit.costs.mapper(arch, model, example).total(recipe)
    """
    check_choice("objective", objective, OBJECTIVES)
    threads = _threads(threads)
    every = network_bits(net, bits)
    keys: list[Any] = []
    jobs: Jobs = {}
    for use, widths in zip(net, every, strict=True):
        arch.check_bits(widths)
        key = (arch.digest, use.layer.key, width_class(arch, widths, scale_mac), objective, scale_mac)
        keys.append(key)
        search = partial(_call, _C.hw.search, arch.model, use.layer.problem, widths, objective, scale_mac=scale_mac)
        jobs.setdefault(key, (use.layer.name, search))
    best = _searched(_SEARCHES, jobs, threads, progress)
    found = (_layer_mapping(use, widths, best[key]) for use, widths, key in zip(net, every, keys, strict=True))
    return NetworkMapping(arch.name, objective, tuple(found))


def _layer_mapping(use: Use, bits: Bits, best: Mapping[str, Any]) -> LayerMapping:
    return LayerMapping(
        use.layer.name,
        dict(bits),
        use.calls,
        LoopNest.from_dict(best["mapping"]),
        best["energy_pj"] * use.calls,
        best["cycles"] * use.calls,
        best["edp"] * use.calls,
        best["last_level_accesses"] * use.calls,
        best["utilization"],
        best["levels"],
        best["mac"],
        best["certificate"],
    )


def _threads(threads: int | None) -> int:
    return os.cpu_count() or 1 if threads is None else whole("threads", threads)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The proven optimum of every layer at every triple of widths; values are of one image, all calls.

    Attributes:
        architecture: Name of the accelerator.
        objective: What was minimized.
        net: The network.
        widths: Bits along each of the last three axes.
        energy_pj: [layers, act, weight, out], pJ; NaN where no mapping fits.
        cycles: The same, cycles.
        edp: The same, J * cycle.
        last_level_accesses: The same, words.
        certificates: Of each layer: why no mapping is better at any width.
        classes: Of each layer, how many different problems its triples are.
    """

    architecture: str
    objective: str
    net: Workload
    widths: tuple[int, ...]
    energy_pj: Array
    cycles: Array
    edp: Array
    last_level_accesses: Array
    certificates: tuple[Mapping[str, Any], ...]
    classes: tuple[int, ...]
    _results: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False, compare=False)

    def mapping(self, layer: str, act: int, weight: int, out: int) -> LoopNest:
        """The best mapping of a layer at a triple of widths.

        Raises:
            KeyError: There is no such layer or width, or nothing fits at it.
        """
        if layer not in self.net.names:
            raise KeyError(f"no layer {layer!r}")
        for width in (act, weight, out):
            if width not in self.widths:
                raise KeyError(f"layer {layer!r}: no width {width}; the sweep has {list(self.widths)}")
        result = self._results[self.net.names.index(layer)]
        place = np.asarray(result["mapping"])[tuple(self.widths.index(b) for b in (act, weight, out))]
        if place < 0:
            raise KeyError(f"layer {layer!r}: no mapping fits act={act}, weight={weight}, out={out}")
        return LoopNest.from_dict(result["mappings"][int(place)])

    def table(self) -> CostTable:
        """The objective as a cost table with output widths: its totals are those of `map_network`.

        Raises:
            MixbitError: The widths lack 8, which network outputs have, or that of an add or concatenation, or no
                mapping fits some layer at some widths.
        """
        key, unit = OBJECTIVES[self.objective]
        needed = {OUTPUT_BITS, *(u.consumer for u in self.net if isinstance(u.consumer, int))}
        if not needed <= set(self.widths):
            raise MixbitError(
                f"widths={list(self.widths)}: expected {sorted(needed)} among them, the widths of the network's "
                "outputs, adds and concatenations"
            )
        values = getattr(self, key)
        if np.isnan(values).any():
            at = np.argwhere(np.isnan(values))[0]
            act, weight, out = (self.widths[i] for i in at[1:])
            raise MixbitError(
                f"layer {self.net.names[at[0]]!r}: no mapping on {self.architecture!r} fits act={act}, "
                f"weight={weight}, out={out}; leave the widest widths out"
            )
        return CostTable.from_arrays(
            self.net.names,
            values[..., self.widths.index(OUTPUT_BITS)],
            self.widths,
            self.widths,
            unit=unit,
            input_group=[use.input_group for use in self.net],
            values_out=values,
            consumer=[use.consumer for use in self.net],
        )


def sweep(
    arch: Architecture,
    net: Workload,
    widths: Iterable[int] = WIDTHS,
    objective: str = "edp",
    *,
    threads: int | None = None,
    scale_mac: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """The proven best mapping of every layer at every (input, weight, output) triple of widths, each layer in one go.

    Args:
        arch: The accelerator.
        net: The network.
        widths: Bits to choose from, for all three tensors.
        objective: As in `map_network`.
        threads: As in `map_network`.
        scale_mac: As in `evaluate`.
        progress: Called with (different layers done, different layers, name).

    Raises:
        MixbitError: As `map_network`.
    """
    check_choice("objective", objective, OBJECTIVES)
    threads = _threads(threads)
    bits = tuple(sorted({whole("widths", b) for b in widths}))
    if not bits:
        raise MixbitError("widths is empty; expected at least one bit-width")
    arch.check_bits({"widths": bits[-1]})
    keys: list[Any] = []
    jobs: Jobs = {}
    for use in net:
        key = (arch.digest, use.layer.key, bits, objective, scale_mac)
        keys.append(key)
        search = partial(_call, _C.hw.sweep, arch.model, use.layer.problem, list(bits), objective, scale_mac=scale_mac)
        jobs.setdefault(key, (use.layer.name, search))
    known_results = _searched(_SWEEPS, jobs, threads, progress)
    results = [known_results[key] for key in keys]

    def stacked(name: str) -> Array:
        return np.stack([np.asarray(r[name], np.float64) * u.calls for r, u in zip(results, net, strict=True)])

    return Sweep(
        arch.name,
        objective,
        net,
        bits,
        stacked("energy_pj"),
        stacked("cycles"),
        stacked("edp"),
        stacked("last_level_accesses"),
        tuple(r["certificate"] for r in results),
        tuple(int(r["classes"]) for r in results),
        tuple(results),
    )


def table_widths(arch: Architecture, net: Workload, widths: Iterable[int] | None = None) -> tuple[int, ...]:
    """Widths of a mapper table: those asked for (None: 2 ... 8, and 16 where words have them), 8, and those of adds."""
    if widths is None:
        word = min(level.word_bits for level in arch.levels)
        widths = [b for b in (*WIDTHS, 16) if b <= word]
    return tuple(sorted({*widths, OUTPUT_BITS, *(u.consumer for u in net if isinstance(u.consumer, int))}))


def mapper_table(
    arch: Architecture,
    net: Workload,
    objective: str = "energy",
    *,
    widths: Iterable[int] | None = None,
    threads: int | None = None,
    scale_mac: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """What the best mapping of every layer costs at every width: see `mixbit.costs.mapper`."""
    found = table_widths(arch, net, widths)
    return sweep(arch, net, found, objective, threads=threads, scale_mac=scale_mac, progress=progress).table()
