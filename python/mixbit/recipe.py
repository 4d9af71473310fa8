"""The recipe: how many bits each layer gets. A versioned JSON file that a person can read, edit and diff."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike, read_document, write_bytes, write_document

FORMAT = "mixbit-recipe"
VERSION = 1

GRANULARITIES = ("per_channel", "per_tensor")
ROUNDINGS = ("half_even", "half_up")
_GLOB = re.compile(r"[*?\[]")

#: Most extra bits of a weight.
MAX_EXTRA_BITS = 2
#: Maps of a recipe, and the entry of a layer that names the file with its map.
MAPS = {"extra_maps": "extra_levels", "channel_maps": "channel_bits"}
ExtraMap = npt.NDArray[np.uint8]
ChannelMap = npt.NDArray[np.uint8]


def check_bits(argument: str, value: object) -> int | None:
    """Returns a whole bit-width 1 ... 16 or None (float); raises a MixbitError naming `argument` for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16:
        raise MixbitError(f"{argument}={value!r}: expected a whole number of bits from 1 to 16, or null for float")
    return value


@dataclasses.dataclass(frozen=True)
class LayerPrecision:
    """Precision of one layer.

    Attributes:
        weight: Bits of the weights, None for float.
        act: Bits of the tensor entering the layer, None for float.
        signed_act: Whether that tensor's grid is signed; None lets calibration decide.
        granularity: "per_channel" (one scale per output channel) or "per_tensor", of the weights.
        narrow_range: Leaves out the lowest weight code, so that the grid is symmetric.
        rounding: "half_even" or "half_up".
        extra_levels: Path of a safetensors file with the map of extra bits per weight (uint8 of the weight's shape,
            each 0, 1 or 2, under the layer's name), relative to the recipe file.
        channel_bits: Path of a safetensors file with the bits of each output channel's weights (uint8 [channels], under
            the layer's name), relative to the recipe file; `weight` is then the widest of them.
    """

    weight: int | None = 8
    act: int | None = 8
    signed_act: bool | None = None
    granularity: str = "per_channel"
    narrow_range: bool = True
    rounding: str = "half_even"
    extra_levels: str | None = None
    channel_bits: str | None = None

    def __post_init__(self) -> None:
        check_bits("weight", self.weight)
        check_bits("act", self.act)
        if self.weight == 1 and self.narrow_range:
            raise MixbitError("weight=1 with narrow_range leaves only the level 0; expected at least 2 bits")
        for name, options in (("granularity", GRANULARITIES), ("rounding", ROUNDINGS)):
            value = getattr(self, name)
            if value not in options:
                expected = " or ".join(repr(o) for o in options)
                raise MixbitError(f"{name}={value!r}: expected {expected}{did_you_mean(str(value), options)}")
        if self.signed_act is not None and not isinstance(self.signed_act, bool):
            raise MixbitError(f"signed_act={self.signed_act!r}: expected true, false or null")
        if not isinstance(self.narrow_range, bool):
            raise MixbitError(f"narrow_range={self.narrow_range!r}: expected true or false")
        for name in MAPS.values():
            named = getattr(self, name)
            if named is not None and not isinstance(named, str):
                raise MixbitError(f"{name}={named!r}: expected a path or null")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "precision") -> LayerPrecision:
        """Builds a precision from a dict; missing keys take their defaults, unknown ones are an error."""
        return cls(**_known(values, [f.name for f in dataclasses.fields(cls)], where))

    def to_dict(self) -> dict[str, Any]:
        """Weight and act, and what differs from the defaults."""
        values = dataclasses.asdict(self)
        defaults = dataclasses.asdict(LayerPrecision())
        return {k: v for k, v in values.items() if k in ("weight", "act") or v != defaults[k]}


#: A layer that stays float.
FLOAT = LayerPrecision(weight=None, act=None)


def _known(values: Any, names: Iterable[str], where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise MixbitError(f"{where} is {values!r}; expected an object of keys and values")
    names = list(names)
    for key in values:
        if key not in names:
            raise MixbitError(f"{where}: unknown key {key!r}; expected some of {names}{did_you_mean(str(key), names)}")
    return dict(values)


def match_name(name: str, patterns: Iterable[str]) -> str | None:
    """The exact pattern if there is one, else the first glob that matches (`*` crosses dots), else None."""
    patterns = list(patterns)
    if name in patterns:
        return name
    return next((p for p in patterns if _GLOB.search(p) and fnmatch.fnmatchcase(name, p)), None)


@dataclasses.dataclass
class Recipe:
    """Precisions of a model's layers.

    Lookup (`recipe[name]`): the exact name, else the first matching glob in file order (`*` crosses dots), else
    `default`, else float.

    Attributes:
        layers: Name or glob to precision, in file order.
        default: For layers that nothing matches; None is float.
        tensors: Bits of the tensors of the integer network that no layer reads (adds, concatenations, pools, outputs):
            name, glob or "default" to {"act": bits}.
        made_by: How the recipe came about (verb, options, versions).
        cost: Audited cost by unit.
        sqnr_db: Predicted network SQNR in dB, an estimate.
        report: Details of the run that made it; not saved.
        extra_maps: Extra bits per weight by layer name: uint8 of the weight's shape, each 0, 1 or 2. `load` reads them
            from the files that `extra_levels` names; `save` writes all of them to one file beside the recipe.
        channel_maps: Bits of each output channel's weights by layer name: uint8 [channels], 1 to 16 each, of layers
            whose channels differ. The layer's `weight` is the widest. Files as for `extra_maps`, by `channel_bits`.
    """

    layers: dict[str, LayerPrecision] = dataclasses.field(default_factory=dict)
    default: LayerPrecision | None = None
    tensors: dict[str, dict[str, int]] = dataclasses.field(default_factory=lambda: {"default": {"act": 8}})
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    sqnr_db: float | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    extra_maps: dict[str, ExtraMap] = dataclasses.field(default_factory=dict, compare=False)
    channel_maps: dict[str, ChannelMap] = dataclasses.field(default_factory=dict, compare=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        # The maps themselves count, not the files that they came from.
        if without_files(self.to_dict()) != without_files(other.to_dict()):
            return False
        return all(
            mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in ((getattr(self, maps), getattr(other, maps)) for maps in MAPS)
        )

    @classmethod
    def uniform(cls, names: Iterable[str], *, weight: int | None = 8, act: int | None = 8, **options: Any) -> Recipe:
        """The same precision for every named layer."""
        return cls(layers={name: LayerPrecision(weight=weight, act=act, **options) for name in names})

    def __getitem__(self, name: str) -> LayerPrecision:
        found = match_name(name, self.layers)
        if found is not None:
            return self.layers[found]
        return self.default if self.default is not None else FLOAT

    def tensor_bits(self, name: str) -> int:
        """Bits of a tensor of the integer network: exact name, first matching glob, "default", else 8."""
        found = match_name(name, self.tensors)
        return int(self.tensors[found if found is not None else "default"]["act"]) if self.tensors else 8

    def check_channel_map(self, name: str) -> None:
        """Refuses the map of a layer's channel bits that does not fit its entry.

        Raises:
            MixbitError: No uint8 [channels] of bits 1 to 16, another widest one than the layer's `weight`, a layer with
                one scale or with extra levels, or one bit on a grid with narrow_range.
        """
        found, precision, where = self.channel_maps[name], self[name], f"channel bits of layer {name!r}"
        if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 1 or not found.size:
            what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
            raise MixbitError(f"{where}: found {what}; expected an array of uint8 [channels]")
        least, most = int(found.min()), int(found.max())
        if least < 1 or most > 16:
            raise MixbitError(f"{where}: found {least} to {most}; expected whole numbers of bits from 1 to 16")
        if precision.weight != most:
            raise MixbitError(
                f"{where}: the widest is {most}, but the layer has weight={precision.weight}; expected it"
            )
        if precision.granularity != "per_channel":
            raise MixbitError(
                f'{where}: its granularity is {precision.granularity!r}, one scale for all; expected "per_channel"'
            )
        if least == 1 and precision.narrow_range:
            raise MixbitError(f"{where}: 1 bit with narrow_range leaves only the level 0; expected at least 2 bits")
        if name in self.extra_maps:
            raise MixbitError(f"{where}: the layer has extra levels, too; expected one of the two")

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses an exact layer name that is not among `names`.

        Raises:
            MixbitError: Names the layer and the nearest one that exists.
        """
        names = list(names)
        for key in self.layers:
            if not _GLOB.search(key) and key not in names:
                raise MixbitError(f"recipe: the model has no layer {key!r}{did_you_mean(key, names)}")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from the JSON document's content; `format` and `version` may be left out.

        Raises:
            MixbitError: An unknown key or a bad value, named with the nearest valid one.
        """
        allowed = ["format", "version", "default", "layers", "tensors", "made_by", "cost", "sqnr_db"]
        values = _known(document, allowed, "recipe")
        layers = _known_object(values.get("layers", {}), "layers")
        tensors = {}
        for name, entry in _known_object(values.get("tensors", {"default": {"act": 8}}), "tensors").items():
            bits = check_bits(f"tensors[{name!r}].act", _known(entry, ["act"], f"tensors[{name!r}]").get("act", 8))
            if bits is None:
                raise MixbitError(f"tensors[{name!r}].act is null: expected a whole number of bits from 1 to 16")
            tensors[str(name)] = {"act": bits}
        tensors.setdefault("default", {"act": 8})
        default = values.get("default")
        sqnr = values.get("sqnr_db")
        if sqnr is not None and (isinstance(sqnr, bool) or not isinstance(sqnr, (int, float))):
            raise MixbitError(f"sqnr_db={sqnr!r}: expected a number of dB or null")
        return cls(
            layers={n: LayerPrecision.from_dict(v, f"layers[{n!r}]") for n, v in layers.items()},
            default=None if default is None else LayerPrecision.from_dict(default, "default"),
            tensors=tensors,
            made_by=_known_object(values.get("made_by", {}), "made_by"),
            cost=_known_object(values.get("cost", {}), "cost"),
            sqnr_db=sqnr,
        )

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes, `format` and `version` included."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "default": None if self.default is None else self.default.to_dict(),
            "layers": {name: precision.to_dict() for name, precision in self.layers.items()},
            "tensors": {name: dict(entry) for name, entry in self.tensors.items()},
            "made_by": dict(self.made_by),
            "cost": dict(self.cost),
            "sqnr_db": self.sqnr_db,
        }

    def save(self, path: PathLike) -> None:
        """Writes the recipe as JSON, atomically; maps to "NAME.ENTRY.safetensors" beside it, a file for each kind.

        ENTRY is "extra_levels" or "channel_bits".

        Raises:
            MixbitError: A map is not what it should be, or a file cannot be written.
        """
        for name, extra in self.extra_maps.items():
            _check_map(name, extra)
        for name in self.channel_maps:
            self.check_channel_map(name)
        saved = self
        for kind, entry in MAPS.items():
            given: dict[str, npt.NDArray[np.uint8]] = getattr(self, kind)
            if not given:
                continue
            target = Path(path)
            beside = target.with_name(f"{target.stem}.{entry}.safetensors")
            maps = {name: np.ascontiguousarray(given[name]) for name in sorted(given)}
            write_bytes(beside, safetensors.numpy.save(maps))
            # Layers that a glob or the default speaks for get an entry of their own: it names the file.
            own = {name: _naming(saved[name], entry, beside.name) for name in given}
            # The file that a glob or the default names may not be where this one goes.
            others = {n: _naming(p, entry, None) if _GLOB.search(n) else p for n, p in saved.layers.items()}
            default = None if saved.default is None else _naming(saved.default, entry, None)
            saved = dataclasses.replace(saved, layers=others | own, default=default)
        body = {k: v for k, v in saved.to_dict().items() if k not in ("format", "version")}
        write_document(path, FORMAT, VERSION, body)

    @classmethod
    def load(cls, path: PathLike) -> Recipe:
        """Reads what `save` wrote, or what a person made of it.

        Raises:
            MixbitError: A missing, truncated, foreign or newer file, an unknown key or a bad value; likewise a file of
                maps, or one without a layer that names it.
        """
        document = read_document(path, FORMAT, VERSION)
        try:
            recipe = cls.from_dict(document)
            recipe.extra_maps = _read_maps(recipe, Path(path).parent, "extra_levels")
            for name, extra in recipe.extra_maps.items():
                _check_map(name, extra)
            recipe.channel_maps = _read_maps(recipe, Path(path).parent, "channel_bits")
            for name in recipe.channel_maps:
                recipe.check_channel_map(name)
        except MixbitError as error:
            raise MixbitError(f"{str(path)!r}: {error}") from error
        return recipe


def without_files(document: Mapping[str, Any], entries: Iterable[str] = tuple(MAPS.values())) -> dict[str, Any]:
    """A recipe's document without the entries that name files."""
    entries = tuple(entries)

    def bare(entry: Any) -> Any:
        return None if entry is None else {key: value for key, value in entry.items() if key not in entries}

    layers = {name: bare(entry) for name, entry in document["layers"].items()}
    return {**document, "default": bare(document["default"]), "layers": layers}


def _naming(precision: LayerPrecision, entry: str, named: str | None) -> LayerPrecision:
    """The same precision with another file in its entry."""
    values: dict[str, Any] = {entry: named}
    return dataclasses.replace(precision, **values)


def _check_map(name: str, extra: Any) -> None:
    """Raises a MixbitError unless `extra` is an array of extra bits."""
    if not isinstance(extra, np.ndarray) or extra.dtype != np.uint8:
        found = extra.dtype if isinstance(extra, np.ndarray) else type(extra).__name__
        raise MixbitError(f"extra levels of layer {name!r}: found {found}; expected an array of uint8")
    if extra.size and int(extra.max()) > MAX_EXTRA_BITS:
        raise MixbitError(
            f"extra levels of layer {name!r}: found {int(extra.max())} extra bits; expected 0 to {MAX_EXTRA_BITS}"
        )


def _read_maps(recipe: Recipe, folder: Path, entry: str) -> dict[str, npt.NDArray[np.uint8]]:
    """The maps that the entries of a recipe name; each file is read once.

    A glob or the default takes whatever layers its file holds; an exact name must be there.
    """
    entries = dict(recipe.layers) | ({} if recipe.default is None else {"default": recipe.default})
    files: dict[str, dict[str, npt.NDArray[np.uint8]]] = {}
    for precision in entries.values():
        named = getattr(precision, entry)
        if named is None or named in files:
            continue
        try:
            files[named] = safetensors.numpy.load((folder / named).read_bytes())
        except OSError as error:
            raise MixbitError(f"{entry}={named!r}: cannot read it: {error.strerror or error}") from error
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise MixbitError(f"{entry}={named!r} is not a whole safetensors file: {error}") from error
    for name, precision in recipe.layers.items():
        named = getattr(precision, entry)
        if named is not None and not _GLOB.search(name) and name not in files[named]:
            raise MixbitError(f"{entry}={named!r} holds no layer {name!r}{did_you_mean(name, files[named])}")
    maps = {}
    for named, found in files.items():
        for name, extra in found.items():
            if getattr(recipe[name], entry) == named:
                maps[name] = extra
    return maps


def _known_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise MixbitError(f"{where} is {value!r}; expected an object of names and values")
    return dict(value)
