"""Accelerators: storage levels from the multipliers outwards, their energies, and what a mapping may do at each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike
from mixbit.hw.documents import LEAST_BANDWIDTH, MOST, MOST_IN_A_ROW, known, names, number, read_yaml, whole
from mixbit.hw.workload import TENSORS

LOOP_KINDS = ("spatial_x", "spatial_y", "temporal")


@dataclasses.dataclass(frozen=True)
class Mac:
    """The multipliers.

    Attributes:
        energy: pJ of one multiply-accumulate.
        mesh_x: Multipliers in a row.
        mesh_y: Rows.
        scaling: How the energy follows the operand widths, for `scale_mac=True`: {"multiplier": pJ, "adder": pJ,
            "reference_bits": 32} stands for multiplier * act * weight / reference_bits^2 + adder * max(act, weight) /
            reference_bits. None: it does not.
    """

    energy: float
    mesh_x: int
    mesh_y: int
    scaling: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, values: Any, where: str, mesh: tuple[int, int]) -> Mac:
        """Builds it from a dict; without a mesh it has that of the innermost level, or rows of its length."""
        given = known(where, values, ["energy"], ["instances", "meshX", "meshY", "scaling"])
        mesh_x, mesh_y = _mesh(where, given, mesh)
        scaling = given.get("scaling")
        if scaling is not None:
            scaling = known(f"{where}: scaling", scaling, ["multiplier", "adder"], ["reference_bits"])
            for key, value in scaling.items():
                number(f"{where}: scaling: {key}", value, 1.0 if key == "reference_bits" else 0.0)
        return cls(number(f"{where}: energy", given["energy"]), mesh_x, mesh_y, scaling)

    def to_dict(self) -> dict[str, Any]:
        """As in an architecture's dict."""
        scaling = {} if self.scaling is None else {"scaling": dict(self.scaling)}
        instances = self.mesh_x * self.mesh_y
        return {"energy": self.energy, "instances": instances, "meshX": self.mesh_x, "meshY": self.mesh_y, **scaling}


@dataclasses.dataclass(frozen=True)
class Level:
    """A storage level.

    Attributes:
        name: Unique in the architecture.
        size: Words of one instance, None for no limit.
        word_bits: Bits of a word; an operand never straddles two.
        block: Words of one access.
        cluster: Instances that share one access.
        mesh_x: Instances in a row.
        mesh_y: Rows.
        read_bw: Words an instance can deliver a cycle, None for no limit.
        write_bw: Words an instance can take a cycle.
        shared_bw: Words of both together.
        read_pj: Energy of reading one block, pJ.
        write_pj: Energy of writing one block, pJ.
        constraints: What a mapping may do here: "keep" and "bypass" (tensors), and for "spatial_x", "spatial_y" and
            "temporal" loops: "dims" (the only ones), "factors" (fixed; 0 or "all" is the whole dimension), "max"
            (largest factors) and "order" (inner to outer, "*" for any).
    """

    name: str
    size: int | None
    word_bits: int
    block: int = 1
    cluster: int = 1
    mesh_x: int = 1
    mesh_y: int = 1
    read_bw: float | None = None
    write_bw: float | None = None
    shared_bw: float | None = None
    read_pj: float = 0.0
    write_pj: float = 0.0
    constraints: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def instances(self) -> int:
        """How many there are."""
        return self.mesh_x * self.mesh_y

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Level:
        """Builds a level from a dict in the notation of `to_dict`; energies may be given by `energy: NAME`."""
        bandwidths = ("read_bw", "write_bw", "shared_bw")
        optional = [
            *("size", "block", "cluster", "instances", "meshX", "meshY", "Er", "Ew", "energy", "constraints"),
            *bandwidths,
        ]
        given = known(where, values, ["name", "word_bits"], optional)
        if not isinstance(given["name"], str) or not given["name"]:
            raise MixbitError(f"{where}: name is {given['name']!r}; expected a name")
        where = f"{where} {given['name']!r}"
        mesh_x, mesh_y = _mesh(where, given, (1, 1))
        limits = {n: number(f"{where}: {n}", given[n], LEAST_BANDWIDTH) for n in bandwidths if given.get(n) is not None}
        size = given.get("size")
        level = cls(
            given["name"],
            None if size is None else whole(f"{where}: size", size),
            whole(f"{where}: word_bits", given["word_bits"]),
            whole(f"{where}: block", given.get("block", 1)),
            whole(f"{where}: cluster", given.get("cluster", 1)),
            mesh_x,
            mesh_y,
            **limits,
            constraints=_constraints(f"{where}: constraints", given.get("constraints") or {}),
        )
        if level.instances % level.cluster:
            raise MixbitError(
                f"{where}: cluster is {level.cluster}; expected a divisor of its {level.instances} instances"
            )
        read, write = _energies(where, given, level.word_bits * level.block)
        return dataclasses.replace(level, read_pj=read, write_pj=write)

    def to_dict(self) -> dict[str, Any]:
        """As in an architecture's dict."""
        shared = {} if self.shared_bw is None else {"shared_bw": self.shared_bw}
        constraints = {"constraints": dict(self.constraints)} if self.constraints else {}
        return {
            "name": self.name,
            "size": self.size,
            "word_bits": self.word_bits,
            "block": self.block,
            "cluster": self.cluster,
            "instances": self.instances,
            "meshX": self.mesh_x,
            "meshY": self.mesh_y,
            "read_bw": self.read_bw,
            "write_bw": self.write_bw,
            **shared,
            "Er": self.read_pj,
            "Ew": self.write_pj,
            **constraints,
        }


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An accelerator.

    Attributes:
        name: For reports.
        mac: The multipliers.
        levels: Innermost first; the outermost holds everything.
        about: What it is and where its numbers come from.
    """

    name: str
    mac: Mac
    levels: tuple[Level, ...]
    about: str = ""

    @classmethod
    def load(cls, source: PathLike) -> Architecture:
        """Reads an architecture.

        Args:
            source: The name of a shipped one (`Architecture.shipped()`), or a YAML or JSON file.

        Raises:
            MixbitError: There is no such name or file, or its content does not fit: level and key are named.

        Example:
            >>> mixbit.hw.Architecture.load("eyeriss").levels[0].name
            'psum_spad'
        """
        text = str(source)
        if text in cls.shipped():
            path = _shipped_file(text)
        else:
            path = Path(source)
            if not path.exists():
                raise MixbitError(
                    f"arch={text!r} is no file and none of the shipped {list(cls.shipped())}"
                    f"{did_you_mean(text, cls.shipped())}"
                )
        try:
            return cls.from_dict(read_yaml("architecture", path), name=path.stem)
        except MixbitError as error:
            raise MixbitError(f"{text!r}: {error}") from error

    @staticmethod
    @cache
    def shipped() -> tuple[str, ...]:
        """Names that `load` knows."""
        folder = resources.files("mixbit.hw").joinpath("architectures")
        return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")))

    @classmethod
    def from_dict(cls, document: Any, name: str = "architecture") -> Architecture:
        """Builds an architecture from a dict {"mac": ..., "levels": [...]}, innermost level first.

        With "base", the name of a shipped one, "mac" holds what differs and "levels" is {level: {what differs}}.

        Raises:
            MixbitError: A key is unknown or missing, a number out of range, names repeat, or meshes do not divide each
                other.
        """
        if isinstance(document, Mapping) and "base" in document:
            document = _derived(document)
        given = known("architecture", document, ["mac", "levels"], ["name", "about"])
        if not isinstance(given["levels"], (list, tuple)) or not given["levels"]:
            raise MixbitError(
                f"architecture: levels is {given['levels']!r}; expected a list of at least one level, innermost first"
            )
        levels = tuple(Level.from_dict(v, f"level {i}") for i, v in enumerate(given["levels"]))
        for i, level in enumerate(levels):
            if level.name in [other.name for other in levels[:i]]:
                raise MixbitError(f"level {i} {level.name!r}: expected a name that no other level has")
        mac = Mac.from_dict(given["mac"], "mac", (levels[0].mesh_x, levels[0].mesh_y))
        inner: tuple[str, int, int] = ("mac", mac.mesh_x, mac.mesh_y)
        for level in levels:
            if inner[1] % level.mesh_x or inner[2] % level.mesh_y:
                raise MixbitError(
                    f"level {level.name!r} is a mesh of {level.mesh_x} x {level.mesh_y}; expected divisors of the "
                    f"{inner[1]} x {inner[2]} of {inner[0]!r} inside it"
                )
            inner = (level.name, level.mesh_x, level.mesh_y)
        return cls(str(given.get("name", name)), mac, levels, str(given.get("about", "")))

    def to_dict(self) -> dict[str, Any]:
        """The architecture in numbers, as `from_dict` takes it."""
        about = {"about": self.about} if self.about else {}
        levels = [level.to_dict() for level in self.levels]
        return {"name": self.name, **about, "mac": self.mac.to_dict(), "levels": levels}

    @property
    def model(self) -> dict[str, Any]:
        """What the cost model reads: `to_dict` without texts."""
        return {k: v for k, v in self.to_dict().items() if k in ("mac", "levels")}

    @property
    def digest(self) -> str:
        """Names everything that results depend on."""
        return hashlib.sha256(json.dumps(self.model, sort_keys=True).encode()).hexdigest()[:16]

    def check_bits(self, bits: Mapping[str, int]) -> None:
        """Refuses a width that does not fit a word of some level.

        Raises:
            MixbitError: Names the operand, its width and the level.
        """
        for operand, width in bits.items():
            for level in self.levels:
                if width > level.word_bits:
                    raise MixbitError(
                        f"bits: {operand}={width} is wider than the {level.word_bits}-bit words of level "
                        f"{level.name!r} of {self.name!r}"
                    )


def _shipped_file(name: str) -> Path:
    return Path(str(resources.files("mixbit.hw"))) / "architectures" / f"{name}.yaml"


def _derived(document: Mapping[str, Any]) -> dict[str, Any]:
    """A shipped architecture's document with what differs put in."""
    given = known("architecture", document, ["base"], ["name", "about", "mac", "levels"])
    shipped = Architecture.shipped()
    if given["base"] not in shipped:
        raise MixbitError(
            f"architecture: base is {given['base']!r}; expected one of {list(shipped)}"
            f"{did_you_mean(str(given['base']), shipped)}"
        )
    merged: dict[str, Any] = dict(read_yaml("architecture", _shipped_file(given["base"])))
    if "base" in merged:
        merged = _derived(merged)
    changes = known("architecture: levels", given.get("levels", {}), [], [v["name"] for v in merged["levels"]])
    levels = []
    for level in merged["levels"]:
        change = changes.get(level["name"], {})
        if not isinstance(change, Mapping):
            raise MixbitError(f"architecture: levels: {level['name']} is {change!r}; expected keys and values")
        kept = dict(level)
        if "energy" in change:
            kept = {k: v for k, v in kept.items() if k not in ("Er", "Ew")}
        elif "Er" in change or "Ew" in change:
            kept.pop("energy", None)
        levels.append(kept | dict(change))
    mac = given.get("mac", {})
    if not isinstance(mac, Mapping):
        raise MixbitError(f"architecture: mac is {mac!r}; expected keys and values")
    texts = {str(k): given[k] for k in ("name", "about") if k in given}
    return {**merged, **texts, "mac": {**merged["mac"], **mac}, "levels": levels}


def _mesh(where: str, given: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """(x, y) from meshX, meshY and instances, as far as they are given."""
    for key in ("instances", "meshX", "meshY"):
        if given.get(key) is not None:
            whole(f"{where}: {key}", given[key], most=MOST if key == "instances" else MOST_IN_A_ROW)
    instances = given.get("instances")
    y = given.get("meshY") or (1 if given.get("meshX") else default[1])
    x = given.get("meshX") or (default[0] if instances is None or instances == default[0] * y else instances // y)
    if instances is not None and x * y != instances:
        raise MixbitError(f"{where}: instances is {instances}; expected meshX * meshY, {x} * {y}")
    return whole(f"{where}: meshX", x, most=MOST_IN_A_ROW), whole(f"{where}: meshY", y)


def _constraints(where: str, values: Any) -> dict[str, Any]:
    given = known(where, values, [], ["keep", "bypass", *LOOP_KINDS])
    kept = [names(f"{where}: {key}", given[key], TENSORS) for key in ("keep", "bypass") if key in given]
    if len(kept) == 2 and set(kept[0]) & set(kept[1]):
        raise MixbitError(f"{where}: {sorted(set(kept[0]) & set(kept[1]))} are both kept and bypassed")
    for kind in LOOP_KINDS:
        if kind not in given:
            continue
        place = f"{where}: {kind}"
        loops = known(place, given[kind], [], ["dims", "factors", "max", "order"])
        for key in ("dims", "order"):
            if key in loops:
                names(f"{place}: {key}", loops[key])
        for key, least in (("factors", 0), ("max", 1)):
            if not isinstance(loops.get(key, {}), Mapping):
                raise MixbitError(f"{place}: {key} is {loops[key]!r}; expected dimensions and numbers")
            for dim, factor in loops.get(key, {}).items():
                if not (key == "factors" and factor == "all"):
                    whole(f"{place}: {key}: {dim}", factor, least)
    return given


@cache
def _energy_table() -> dict[str, dict[str, float]]:
    path = Path(str(resources.files("mixbit.hw"))) / "energies_45nm.yaml"
    table: dict[str, dict[str, float]] = read_yaml("energy table", path)
    return table


def _energies(where: str, given: Mapping[str, Any], access_bits: int) -> tuple[float, float]:
    """(read, write) pJ of one block: as given, or from the table of energies."""
    if given.get("energy") is None:
        for key in ("Er", "Ew"):
            if given.get(key) is None:
                raise MixbitError(f"{where} has no {key!r}; expected Er and Ew in pJ, or energy: NAME of the table")
        return number(f"{where}: Er", given["Er"]), number(f"{where}: Ew", given["Ew"])
    if given.get("Er") is not None or given.get("Ew") is not None:
        raise MixbitError(f"{where}: energy and Er or Ew are given; expected one or the other")
    table = _energy_table()
    if given["energy"] not in table:
        raise MixbitError(
            f"{where}: energy is {given['energy']!r}; expected one of {list(table)}"
            f"{did_you_mean(str(given['energy']), table)}"
        )
    entry = table[given["energy"]]
    share = access_bits if "bits" not in entry else access_bits / entry["bits"]
    return entry["read"] * share, entry["write"] * share
