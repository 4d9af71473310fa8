"""Latency of a network's layers on this machine, at every pair of widths, through the integer runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixbit import _C
from mixbit._build_info import VERSION
from mixbit.costs.latency import SHAPE, Key, latency_table, shape_key, write_latencies
from mixbit.errors import MixbitError
from mixbit.files import PathLike, write_document, write_text
from mixbit.network import layers
from mixbit.progress import Progress, reporter
from mixbit.runtime import Network
from mixbit.tables import OUTPUT_BITS, CostTable

__all__ = ["Measurement", "Profile", "profile"]

#: Widths that the runtime has kernels for; others run in the next of these.
KERNEL_BITS = (2, 4, 8)
#: Widths of a package: what the table has rows for.
PACKAGE_BITS = tuple(range(1, 9))
UNIT = "us"
#: Times that all layers are visited: a slow spell of the machine then hits no layer in all of its repeats.
_PASSES = 3
#: What is read between two runs of a cold profile: more than a second-level cache holds.
_COLD_BYTES = 8 << 20
#: Where Linux tells the energy that processor packages have taken (RAPL).
_POWERCAP = Path("/sys/class/powercap")
#: An energy is that of at least so long a burst: the counters move once a millisecond.
_ENERGY_SECONDS = 0.05
_DOCUMENT = ("mixbit-profile", 1)


def _kernel_bits(width: int) -> int:
    """The kernel that a width runs in."""
    return next(bits for bits in KERNEL_BITS if bits >= width)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One layer at one pair of widths.

    Attributes:
        key: Kind and sizes, as `mixbit.costs.latency.SHAPE` names them.
        dilation: (vertical, horizontal), (1, 1) for linear. It has no column in the CSV.
        layers: Names of the layers of this shape.
        act: Bits of the input.
        weight: Bits of the weights.
        samples: Microseconds of each repeat, one image.
        energy: Microjoules of a run, input and output included, of all processor packages (so with whatever else they
            did); None where they cannot be read.
    """

    key: Key
    dilation: tuple[int, int]
    layers: tuple[str, ...]
    act: int
    weight: int
    samples: tuple[float, ...]
    energy: float | None = None

    @property
    def least(self) -> float:
        """Microseconds of the fastest repeat."""
        return min(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """What the JSON beside the CSV says."""
        shape = dict(zip(SHAPE, self.key, strict=True))
        return {
            **shape,
            "dilation": list(self.dilation),
            "layers": list(self.layers),
            "act_bits": self.act,
            "weight_bits": self.weight,
            "min": self.least,
            "median": statistics.median(self.samples),
            "max": max(self.samples),
            "repeats": len(self.samples),
            "energy_uj": "not readable" if self.energy is None else self.energy,
        }


@dataclasses.dataclass(frozen=True)
class Profile:
    """Latencies of layers on this machine: what `profile` returns.

    Attributes:
        measurements: Each shape of a layer at each pair of 2, 4 and 8 bits.
        machine: Processor, instruction set, threads, and what else the figures hold for.
        unit: Of the latencies.
    """

    measurements: tuple[Measurement, ...]
    machine: Mapping[str, Any]
    unit: str = UNIT

    @property
    def latencies(self) -> dict[tuple[Key, int, int], float]:
        """{(shape, act bits, weight bits): microseconds}, for every width from 1 to 8.

        A pair has the entry of its kernel. The runtime's kernels read activations as bytes of any width: pairs that
        differ in the act width alone run the same instructions, so that what was measured between them is noise, and
        they share the least of their minima. Of layers that differ in dilation alone the slowest counts.
        """
        # {(shape, weight bits): {dilation: microseconds}}
        least: dict[tuple[Key, int], dict[tuple[int, int], float]] = {}
        for m in self.measurements:
            known = least.setdefault((m.key, m.weight), {})
            known[m.dilation] = min(m.least, known.get(m.dilation, m.least))
        return {
            (key, act, weight): max(least[key, _kernel_bits(weight)].values())
            for key in dict.fromkeys(m.key for m in self.measurements)
            for act in PACKAGE_BITS
            for weight in PACKAGE_BITS
        }

    def costs(self, model: nn.Module, example: Any) -> CostTable:
        """The cost table of a model whose shapes were measured, as `mixbit.costs.latency` reads it from the CSV.

        Args:
            model: In eval mode.
            example: An item of `batches`.

        Raises:
            MixbitError: A layer has a shape that was not measured.
        """
        return latency_table(layers(model, example), self.latencies, self.unit, "the profile")

    def save(self, path: PathLike, *, force: bool = False) -> Path:
        """Writes the latency CSV, and a JSON of the same name with minimum, median and maximum of each measurement.

        Args:
            path: A file that ends in ".csv".
            force: Replaces files that exist.

        Returns:
            The path of the CSV.
        """
        target = _check_output(path, force)
        body = {
            "unit": self.unit,
            "machine": dict(self.machine),
            "measurements": [m.to_dict() for m in self.measurements],
        }
        write_document(target.with_suffix(".json"), *_DOCUMENT, body)
        return write_latencies(target, self.latencies, self.unit)


def profile(
    model: nn.Module,
    example: Any,
    path: PathLike | None = None,
    *,
    threads: int = 1,
    repeats: int = 30,
    isa: str | None = None,
    cold: bool = False,
    force: bool = False,
    progress: bool | Progress | None = None,
) -> Profile:
    """Measures each layer shape of a model at every pair of 2, 4 and 8 bits on this machine, in the integer runtime.

    Each layer runs alone, one image, in a package of its own with random codes; the time is that of the layer's kernel,
    without quantizing the input and converting the output. Outputs are 8 bits: the kernels write bytes whatever the
    width. The repeats of the pairs take turns, and all layers are visited three times. The fastest repeat counts.

    Args:
        model: In eval mode; its weights do not matter.
        example: An item of `batches`.
        path: Of the latency CSV (`Profile.save`). With it a run that was stopped goes on where it was, if model,
            options, version and machine are the same. None writes nothing.
        threads: Of the runtime, 1 to the number of processors that this process may use. They are kept on as many
            processors where the system can do that (`os.sched_setaffinity`).
        repeats: Timed runs of each layer at each pair, 1 or more.
        isa: Caps the instruction set, as in `mixbit.runtime.Network`.
        cold: Weights have left the second-level cache before each run, as those of a network that does not fit it; a
            layer's input, made just before, has not.
        force: Replaces files that exist.
        progress: As in `analyze`.

    Returns:
        The measurements; `.costs(model, example)` is the table for `assign`, `refine` and `search.Penalty`.

    Raises:
        MixbitError: The model has no quantizable layer, an argument is wrong, or the file exists.
    """
    _check_count("repeats", repeats, None)
    processors = _processors()
    _check_count("threads", threads, len(processors))
    target = None if path is None else _check_output(path, force)
    state_path = None if target is None else _state_path(target)
    names: dict[tuple[Key, tuple[int, int]], dict[str, None]] = {}
    for layer in layers(model, example):
        dilation = (layer.dilation[0], layer.dilation[1]) if layer.dilation else (1, 1)
        for shapes in layer.call_shapes:
            names.setdefault((shape_key(layer, shapes), dilation), {})[layer.name] = None
    with _pinned(processors[-threads:]) as pinned:
        runner = _Runner(threads, isa, cold, pinned)
        machine = {
            "processor": _processor_name(),
            "system": platform.platform(),
            "isa": runner.isa,
            "threads": threads,
            "processors": pinned,
            "repeats": repeats,
            "cold": cold,
            "mixbit": VERSION,
        }
        state = _State(state_path, machine, list(names))
        turns = [repeats // _PASSES + (i < repeats % _PASSES) for i in range(min(_PASSES, repeats))]
        with reporter(progress, "profile") as report:
            for done, (turn, (key, dilation)) in enumerate((t, at) for t in range(len(turns)) for at in names):
                if not state.has(turn, key, dilation, turns[turn]):
                    state.add(turn, key, dilation, runner.measure(key, dilation, turns[turn]))
                report(done + 1, len(turns) * len(names), "layers")
        energies = {at: runner.energies(*at) for at in names}
    found = Profile(
        tuple(
            Measurement(
                key,
                dilation,
                tuple(names[key, dilation]),
                act,
                weight,
                samples,
                energies[key, dilation].get((act, weight)),
            )
            for key, dilation in names
            for (act, weight), samples in state.samples(len(turns), key, dilation).items()
        ),
        machine,
    )
    if target is not None:
        found.save(target, force=True)  # checked above, before the work
        state.remove()
    return found


class _Runner:
    """Runs layers by themselves."""

    def __init__(self, threads: int, isa: str | None, cold: bool, processors: list[int] | None = None) -> None:
        self.other_data = np.ones(_COLD_BYTES // 8, np.int64) if cold else None
        self.processors = processors
        self.options: dict[str, Any] = {"threads": threads, "isa": isa}
        self.isa = self._network(("linear", 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1), (1, 1), 8, 8).isa

    def measure(self, key: Key, dilation: tuple[int, int], repeats: int) -> list[list[float]]:
        """Microseconds of each repeat, for each pair of widths: one after the other, as often as there are repeats."""
        pairs = [(act, weight) for act in KERNEL_BITS for weight in KERNEL_BITS]
        networks = [self._network(key, dilation, act, weight) for act, weight in pairs]
        inputs = np.random.default_rng(0).random((1, *networks[0].input_shape), dtype=np.float32)
        samples: list[list[float]] = [[] for _ in pairs]
        for network in networks:
            network.profile(inputs)
        for _ in range(repeats):
            for network, mine in zip(networks, samples, strict=True):
                self.empty_caches()
                seconds = sum(step["seconds"] for step in network.profile(inputs) if step["weight_bits"])
                mine.append(seconds * 1e6)
        return samples

    def empty_caches(self) -> None:
        """Of a cold profile: reads other data on each of its processors, whose second-level caches are their own."""
        if self.other_data is None:
            return
        if self.processors is None or len(self.processors) == 1:
            self.other_data.sum()
            return
        try:
            for processor in self.processors:
                os.sched_setaffinity(0, [processor])
                self.other_data.sum()
        finally:
            os.sched_setaffinity(0, self.processors)

    def energies(self, key: Key, dilation: tuple[int, int]) -> dict[tuple[int, int], float]:
        """Microjoules of a run at each pair of widths; nothing where energies cannot be read."""
        counters = _energy_counters()
        found: dict[tuple[int, int], float] = {}
        if not counters:
            return found
        for act in KERNEL_BITS:
            for weight in KERNEL_BITS:
                network = self._network(key, dilation, act, weight)
                inputs = np.random.default_rng(0).random((1, *network.input_shape), dtype=np.float32)
                network(inputs)
                before, start, runs = _energies(counters), time.perf_counter(), 0
                while time.perf_counter() - start < _ENERGY_SECONDS:
                    network(inputs)
                    runs += 1
                after = _energies(counters)
                # A counter that fell has begun anew.
                taken = sum(b - a if b >= a else b - a + counters[path] for path, a, b in zip(counters, before, after))
                found[act, weight] = taken / runs
        return found

    def _network(self, key: Key, dilation: tuple[int, int], act: int, weight: int) -> Network:
        return Network.from_bytes(_package(key, dilation, act, weight), **self.options)


def _energy_counters() -> dict[Path, int]:
    """Readable energy counters of processor packages, in microjoules, and where each begins anew."""
    counters: dict[Path, int] = {}
    for domain in sorted(_POWERCAP.glob("intel-rapl:*")):
        # (intel-rapl:0 is a package, intel-rapl:0:1 a part of it)
        if domain.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                int((domain / "energy_uj").read_text())
                counters[domain / "energy_uj"] = int((domain / "max_energy_range_uj").read_text())
    return counters


def _energies(counters: Mapping[Path, int]) -> list[int]:
    return [int(path.read_text()) for path in counters]


def _package(key: Key, dilation: tuple[int, int], act: int, weight: int) -> bytes:
    """An integer package (docs/package_format.md) of one layer with random weights; inputs from 0 to 1."""
    cin, cout, groups, kh, kw, sh, sw, ph, pw, hin, win = (int(size) for size in key[1:])
    high = 2**act - 1
    grid = {"scale": 1.0 / high, "zero_point": 0, "low": 0, "high": high}
    output = {"scale": 1.0, "zero_point": 0, "low": 0, "high": 2**OUTPUT_BITS - 1}
    if key[0] == "linear":
        shape = [hin, cin] if hin > 1 else [cin]
        options: dict[str, Any] = {}
        weight_shape: tuple[int, ...] = (cout, cin)
    else:
        shape = [cin, hin, win]
        options = {"stride": [sh, sw], "padding": [ph, pw], "dilation": list(dilation), "groups": groups}
        weight_shape = (cout, cin // groups, kh, kw)
    layer = {"name": "y", "op": key[0], "module": "layer", "inputs": ["x"], "grid": output, "act": grid, **options}
    layer |= {"weight": "weight", "bias": "bias", "multiplier": "multiplier"}
    manifest = {
        "made_by": {"mixbit": VERSION},
        "nodes": [{"name": "x", "op": "input", "shape": shape, "grid": grid}, layer],
        "outputs": ["y"],
    }
    most = 2 ** (weight - 1) - 1
    codes = np.random.default_rng(0).integers(-most, most + 1, weight_shape, dtype=np.int8)
    arrays: list[tuple[str, int, np.ndarray[Any, Any]]] = [
        ("weight", weight, codes),
        ("bias", 0, np.zeros(cout, np.int32)),
        ("multiplier", 0, np.full(cout, 1.0 / high, np.float32)),
    ]
    try:
        package: bytes = _C.runtime.make_package(json.dumps(manifest), arrays)
    except ValueError as error:
        raise MixbitError(f"a layer of shape {','.join(map(str, key))} does not fit the runtime: {error}") from error
    return package


class _State:
    """What was measured so far, in a file after every layer."""

    def __init__(self, path: Path | None, machine: Mapping[str, Any], shapes: list[Any]) -> None:
        self.path = path
        # Which of equal processors it runs on makes no other measurement.
        options = {k: v for k, v in machine.items() if k != "processors"}
        self.key = hashlib.sha256(json.dumps([options, shapes]).encode()).hexdigest()[:16]
        self.done: dict[str, list[list[float]]] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                document = json.loads(path.read_text())
                if document["key"] == self.key:
                    self.done = dict(document["done"])

    @staticmethod
    def _name(turn: int, key: Key, dilation: tuple[int, int]) -> str:
        return ",".join(map(str, (turn, *key, *dilation)))

    def has(self, turn: int, key: Key, dilation: tuple[int, int], repeats: int) -> bool:
        """Whether a layer was measured in a pass, at each pair so many times."""
        found = self.done.get(self._name(turn, key, dilation))
        return (
            isinstance(found, list)
            and [len(mine) for mine in found if isinstance(mine, list)] == [repeats] * len(KERNEL_BITS) ** 2
            and all(isinstance(value, float) and math.isfinite(value) for mine in found for value in mine)
        )

    def add(self, turn: int, key: Key, dilation: tuple[int, int], samples: list[list[float]]) -> None:
        """Notes what a pass has measured of a layer."""
        self.done[self._name(turn, key, dilation)] = samples
        if self.path is not None:
            write_text(self.path, json.dumps({"key": self.key, "done": self.done}))

    def samples(self, turns: int, key: Key, dilation: tuple[int, int]) -> dict[tuple[int, int], tuple[float, ...]]:
        """All samples of a layer by (act, weight)."""
        passes = [self.done[self._name(turn, key, dilation)] for turn in range(turns)]
        pairs = [(act, weight) for act in KERNEL_BITS for weight in KERNEL_BITS]
        return {pair: tuple(v for found in passes for v in found[i]) for i, pair in enumerate(pairs)}

    def remove(self) -> None:
        """Forgets the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _state_path(target: Path) -> Path:
    """What a run that was stopped leaves beside its CSV."""
    return target.with_name(f".{target.name}.state")


def _check_output(path: PathLike, force: bool) -> Path:
    target = Path(path)
    if target.suffix != ".csv":
        raise MixbitError(f"path={str(path)!r}: expected a file that ends in '.csv'")
    if not target.parent.is_dir():
        raise MixbitError(f"path={str(path)!r}: the folder {str(target.parent)!r} does not exist")
    beside = target.with_suffix(".json")
    # A run that was stopped between its two files has left its state, too.
    for file in (target,) if _state_path(target).exists() else (target, beside):
        if file.exists() and not force:
            raise MixbitError(f"{str(file)!r} exists; use force=True (--force) to replace it, or another path")
    return target


def _check_count(name: str, value: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        upper = "" if most is None else f" to {most} (processors of this process)"
        raise MixbitError(f"{name}={value!r}: expected a whole number from 1{upper}")


def _processors() -> list[int]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _pinned(processors: list[int]) -> Iterator[list[int] | None]:
    """Keeps the calling thread, and threads that it starts, on processors; gives them, or None where that cannot be."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, processors)
    except OSError:
        yield None
        return
    try:
        yield processors
    finally:
        os.sched_setaffinity(0, before)


def _processor_name() -> str:
    """The processor as the system calls it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
