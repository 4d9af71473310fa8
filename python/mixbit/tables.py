"""Sensitivity and cost of every layer at every (act bits, weight bits): the data that assignments and searches read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike, read_document, write_document, write_text
from mixbit.recipe import LayerPrecision, Recipe

FLOAT_BITS = 32
#: Output width at the network's outputs, where no layer consumes a tensor.
OUTPUT_BITS = 8

Array = npt.NDArray[np.float64]


class Precision(Protocol):
    """What a table reads of a layer's precision."""

    @property
    def weight(self) -> int | None:
        """Weight bits, None for float."""

    @property
    def act(self) -> int | None:
        """Bits of the tensor entering the layer, None for float."""


class HasPrecisions(Protocol):
    """A recipe, as far as tables are concerned; it may have `extra_maps` and `channel_maps` (see `Recipe`)."""

    def __getitem__(self, name: str) -> Precision: ...


def extra_shares(recipe: HasPrecisions, layer: str) -> dict[int, float]:
    """The share of a layer's weights that have 0, 1 and 2 extra bits; {0: 1.0} without a map."""
    extra = getattr(recipe, "extra_maps", {}).get(layer)
    if extra is None or extra.size == 0:
        return {0: 1.0}
    counts = np.bincount(extra.reshape(-1))
    return {e: float(count / extra.size) for e, count in enumerate(counts.tolist()) if count}


def channel_counts(recipe: HasPrecisions, layer: str) -> dict[int, int]:
    """How many of a layer's output channels have each width; empty where they share one."""
    found = getattr(recipe, "channel_maps", {}).get(layer)
    if found is None or found.size == 0:
        return {}
    return {bits: count for bits, count in enumerate(np.bincount(found.reshape(-1)).tolist()) if count}


def mean_weight_bits(recipe: HasPrecisions, layer: str) -> float:
    """Bits of a layer's weights without extra levels, the mean where its channels differ; 32 for float."""
    counts = channel_counts(recipe, layer)
    if counts:
        return sum(bits * count for bits, count in counts.items()) / sum(counts.values())
    weight = recipe[layer].weight
    return float(FLOAT_BITS if weight is None else weight)


def _widths(argument: str, bits: Iterable[int]) -> tuple[int, ...]:
    found = tuple(int(b) for b in bits)
    if not found or any(b < 1 for b in found) or list(found) != sorted(set(found)):
        raise MixbitError(f"{argument}={list(found)}: expected ascending bit-widths without duplicates")
    return found


def _layer_names(layers: Iterable[str]) -> tuple[str, ...]:
    names = tuple(layers)
    twice = [n for n in names if names.count(n) > 1]
    if not names or twice:
        raise MixbitError(
            f"layers: {'no names' if not names else f'{twice[0]!r} appears twice'}; expected distinct names"
        )
    return names


def _groups(input_group: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One group a layer; without information every layer has its own, and none is known to read the network input."""
    if input_group is None:
        return tuple(range(1, count + 1))
    groups = tuple(int(g) for g in input_group)
    if len(groups) != count or any(g < 0 for g in groups):
        raise MixbitError(f"input_group={list(groups)}: expected {count} numbers >= 0, one a layer")
    return groups


def _encode(values: npt.NDArray[Any]) -> Any:
    """Nested lists of numbers; infinities as strings, since JSON has none."""
    if values.ndim == 0:
        value = float(values)
        return value if np.isfinite(value) else ("inf" if value > 0 else "-inf" if value < 0 else "nan")
    return [_encode(v) for v in values]


def _decode(where: str, values: Any) -> Array:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("inf", "-inf", "nan")):
            raise MixbitError(f"{where} holds {value!r}; expected numbers")
        return float(value)

    numbers = convert(values)
    try:
        return np.asarray(numbers, dtype=np.float64)
    except ValueError as error:
        raise MixbitError(f"{where} is not a regular array of numbers") from error


def _index(bits: tuple[int, ...], width: int | None, layer: str, what: str) -> int:
    value = FLOAT_BITS if width is None else width
    if value not in bits:
        raise KeyError(f"layer {layer!r}: no {what} width {value}; the table has {list(bits)}")
    return bits.index(value)


class SensitivityTable:
    """SQNR of every layer at every (act, weight) width, in dB; +inf where exact.

    Attributes:
        layers: Layer names in forward order.
        act_bits: Widths of the second axis, ascending.
        weight_bits: Widths of the third axis, ascending.
        sqnr_db: float64 [L, A, W]; of a joint table (act and weight at one width) [L, B].
        input_group: Layers with the same number read the same tensor; 0 is the network input.
        point: Where it was measured.
        options: How it was measured.
        weight_sqnr_db: float64 [L, W] of the weights alone, or None.
        act_sqnr_db: float64 [L, A] of the inputs alone, or None.
    """

    FORMAT = "mixbit-sensitivity"
    VERSION = 1

    layers: tuple[str, ...]
    act_bits: tuple[int, ...]
    weight_bits: tuple[int, ...]
    sqnr_db: Array
    input_group: tuple[int, ...]
    point: str | None
    options: dict[str, Any]
    weight_sqnr_db: Array | None
    act_sqnr_db: Array | None

    @classmethod
    def from_arrays(
        cls,
        layers: Iterable[str],
        sqnr_db: npt.ArrayLike,
        act_bits: Iterable[int],
        weight_bits: Iterable[int],
        *,
        input_group: Sequence[int] | None = None,
    ) -> SensitivityTable:
        """Builds a table.

        Args:
            layers: L distinct names.
            sqnr_db: dB, [L, A, W], or [L, B] of a joint table (act_bits and weight_bits are then the same).
            act_bits: A ascending widths.
            weight_bits: W ascending widths.
            input_group: L numbers; None gives every layer its own.

        Raises:
            MixbitError: Shapes, names or widths do not fit, or a value is NaN.
        """
        table = cls()
        table.layers = _layer_names(layers)
        table.act_bits = _widths("act_bits", act_bits)
        table.weight_bits = _widths("weight_bits", weight_bits)
        table.sqnr_db = np.array(sqnr_db, dtype=np.float64)
        count = len(table.layers)
        joint = (count, len(table.act_bits))
        separate = (*joint, len(table.weight_bits))
        if table.sqnr_db.shape != separate and (table.sqnr_db.shape != joint or table.act_bits != table.weight_bits):
            raise MixbitError(
                f"sqnr_db has shape {table.sqnr_db.shape}; expected {separate} (layer, act, weight), or {joint} for a "
                "joint table with equal act_bits and weight_bits"
            )
        if np.isnan(table.sqnr_db).any():
            raise MixbitError("sqnr_db holds NaN; expected dB, +inf where exact")
        table.input_group = _groups(input_group, count)
        table.point = None
        table.options = {}
        table.weight_sqnr_db = None
        table.act_sqnr_db = None
        return table

    @property
    def joint(self) -> bool:
        """Whether act and weight share one width."""
        return self.sqnr_db.ndim == 2

    @property
    def nsr(self) -> Array:
        """Noise-to-signal ratios, 10^(-dB / 10)."""
        with np.errstate(over="ignore"):
            return np.asarray(10.0 ** (-self.sqnr_db / 10.0))

    def diagonal(self) -> SensitivityTable:
        """The joint table of the widths that both axes have."""
        if self.joint:
            return self
        bits = [b for b in self.act_bits if b in self.weight_bits]
        if not bits:
            raise MixbitError("the table has no width on both axes, so it has no diagonal")
        values = [[self.entry(n, b, b) for b in bits] for n in self.layers]
        table = SensitivityTable.from_arrays(self.layers, values, bits, bits, input_group=self.input_group)
        table.point, table.options = self.point, dict(self.options)
        return table

    def entry(self, layer: str, act: int | None, weight: int | None) -> float:
        """dB of one layer; a float operand (None) is not in the table unless it has the width 32.

        Raises:
            KeyError: Names the layer and the width that is missing.
        """
        if layer not in self.layers:
            raise KeyError(f"no layer {layer!r}{did_you_mean(layer, self.layers)}")
        row = self.layers.index(layer)
        a = _index(self.act_bits, act, layer, "act")
        w = _index(self.weight_bits, weight, layer, "weight")
        if self.joint:
            if a != w:
                raise KeyError(f"layer {layer!r}: a joint table has no act={act} with weight={weight}")
            return float(self.sqnr_db[row, a])
        return float(self.sqnr_db[row, a, w])

    def predicted_sqnr_db(self, recipe: HasPrecisions) -> float:
        """-10 log10 of the sum of the layers' noise ratios: an estimate of the network's SQNR, often pessimistic.

        Layers that the recipe leaves wholly float add nothing. Extra levels of single weights are not counted. Where
        channels have their own bits, the mean over them of what the layer has at these bits.
        """
        total = 0.0
        for name in self.layers:
            precision = recipe[name]
            if precision.weight is None and precision.act is None:
                continue
            total += self.noise_ratio(name, recipe)
        return float("inf") if total == 0.0 else float(-10.0 * np.log10(total))

    def noise_ratio(self, layer: str, recipe: HasPrecisions) -> float:
        """Noise over signal of a layer at a recipe's bits; the mean over its channels where these have their own.

        Raises:
            KeyError: The layer or a width is not in the table.
        """
        precision = recipe[layer]
        counts: dict[Any, int] = channel_counts(recipe, layer) or {precision.weight: 1}
        noise = [n * 10.0 ** (-self.entry(layer, precision.act, bits) / 10.0) for bits, n in counts.items()]
        return math.fsum(noise) / sum(counts.values())

    def to_csv(self, path: PathLike) -> None:
        """Writes one row per entry: layer, act_bits, weight_bits, sqnr_db."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "act_bits", "weight_bits", "sqnr_db"])
        for name in self.layers:
            for a in self.act_bits:
                for w in self.weight_bits:
                    if not self.joint or a == w:
                        writer.writerow([name, a, w, repr(self.entry(name, a, w))])
        write_text(path, text.getvalue())

    def save(self, path: PathLike) -> None:
        """Writes the table as versioned JSON, atomically."""
        optional = {
            name: _encode(value)
            for name, value in (("weight_sqnr_db", self.weight_sqnr_db), ("act_sqnr_db", self.act_sqnr_db))
            if value is not None
        }
        body = {
            "point": self.point,
            "options": self.options,
            "layers": list(self.layers),
            "input_group": list(self.input_group),
            "act_bits": list(self.act_bits),
            "weight_bits": list(self.weight_bits),
            "sqnr_db": _encode(self.sqnr_db),
            **optional,
        }
        write_document(path, self.FORMAT, self.VERSION, body)

    @classmethod
    def load(cls, path: PathLike) -> SensitivityTable:
        """Reads what `save` wrote.

        Raises:
            MixbitError: A missing, truncated, foreign or newer file, or one whose content does not fit.
        """
        document = read_document(path, cls.FORMAT, cls.VERSION)
        with _reading(path):
            table = cls.from_arrays(
                document["layers"],
                _decode("sqnr_db", document["sqnr_db"]),
                document["act_bits"],
                document["weight_bits"],
                input_group=document["input_group"],
            )
            table.point = document.get("point")
            table.options = dict(document.get("options", {}))
            for name in ("weight_sqnr_db", "act_sqnr_db"):
                if name in document:
                    setattr(table, name, _decode(name, document[name]))
        return table

    def plot(self) -> Any:
        """A heat map of the joint table (layers x widths); needs matplotlib, returns its Figure."""
        from matplotlib.figure import Figure

        table = self.diagonal()
        finite = table.sqnr_db[np.isfinite(table.sqnr_db)]
        top = float(finite.max()) if finite.size else 1.0
        figure = Figure(figsize=(4 + 0.3 * len(table.act_bits), 1 + 0.22 * len(table.layers)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.clip(table.sqnr_db, -10, top), aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(table.act_bits)), [str(b) for b in table.act_bits])
        axes.set_yticks(range(len(table.layers)), list(table.layers), fontsize=7)
        axes.set_xlabel("bits of act and weight")
        figure.colorbar(image, label="SQNR [dB]")
        return figure


class CostTable:
    """Cost of every layer at every (act, weight) width, for one image.

    Attributes:
        layers: Layer names in forward order.
        act_bits: Widths of the second axis, ascending; 32 stands for float.
        weight_bits: Widths of the third axis.
        values: float64 [L, A, W], in `unit`.
        unit: What the numbers are.
        input_group: Layers with the same number read the same tensor; 0 is the network input.
        reduce: "sum" or "max": how layers make a total.
        values_out: float64 [L, A, W, O] with O = act_bits for costs that depend on the output's width too, or None.
        consumer: For each layer the name of the layer that reads its output, or None (a network output, 8 bits; for an
            add or concatenation the width of that tensor as a number).
        additive: Whether a layer costs the sum of what its output channels cost by themselves.
    """

    FORMAT = "mixbit-cost"
    VERSION = 1

    layers: tuple[str, ...]
    act_bits: tuple[int, ...]
    weight_bits: tuple[int, ...]
    values: Array
    unit: str
    input_group: tuple[int, ...]
    reduce: str
    values_out: Array | None
    consumer: tuple[str | int | None, ...] | None
    additive: bool

    @classmethod
    def from_arrays(
        cls,
        layers: Iterable[str],
        values: npt.ArrayLike,
        act_bits: Iterable[int],
        weight_bits: Iterable[int],
        *,
        unit: str = "",
        input_group: Sequence[int] | None = None,
        values_out: npt.ArrayLike | None = None,
        consumer: Sequence[str | int | None] | None = None,
        reduce: str = "sum",
        additive: bool = False,
    ) -> CostTable:
        """Builds a table.

        Args:
            layers: L distinct names.
            values: [L, A, W], finite and not negative.
            act_bits: A ascending widths.
            weight_bits: W ascending widths.
            unit: What the numbers are, e.g. "bops".
            input_group: L numbers; None gives every layer its own.
            values_out: [L, A, W, O], O the widths of act_bits, for costs that depend on the output's width.
            consumer: L names, widths or None; see the class.
            reduce: "sum" or "max".
            additive: Whether a layer costs the sum of what its output channels cost, as operations and memory do and
                latencies do not: the table then prices channels with bits of their own (see `check_channels`).

        Raises:
            MixbitError: Shapes, names or widths do not fit, or a cost is negative or not finite.
        """
        table = cls()
        table.layers = _layer_names(layers)
        table.act_bits = _widths("act_bits", act_bits)
        table.weight_bits = _widths("weight_bits", weight_bits)
        table.unit = str(unit)
        count = len(table.layers)
        table.input_group = _groups(input_group, count)
        table.values = cls._checked("values", values, (count, len(table.act_bits), len(table.weight_bits)))
        table.values_out = None
        if values_out is not None:
            table.values_out = cls._checked("values_out", values_out, (*table.values.shape, len(table.act_bits)))
        table.consumer = None
        if consumer is not None:
            table.consumer = tuple(consumer)
            if len(table.consumer) != count:
                raise MixbitError(f"consumer has {len(table.consumer)} entries; expected {count}, one a layer")
            for name in table.consumer:
                if isinstance(name, str) and name not in table.layers:
                    raise MixbitError(f"consumer: no layer {name!r}{did_you_mean(name, table.layers)}")
        elif values_out is not None:
            table.consumer = (None,) * count
        if reduce not in ("sum", "max"):
            raise MixbitError(f"reduce={reduce!r}: expected 'sum' or 'max'")
        table.reduce = reduce
        table.additive = bool(additive)
        return table

    @staticmethod
    def _checked(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
        array = np.array(values, dtype=np.float64)
        if array.shape != shape:
            raise MixbitError(f"{name} has shape {array.shape}; expected {shape} (layer, act, weight, ...)")
        if not np.isfinite(array).all() or (array < 0).any():
            raise MixbitError(f"{name} holds a negative or non-finite cost; expected finite numbers >= 0")
        return array

    def _row(self, layer: str) -> int:
        if layer not in self.layers:
            raise KeyError(f"no layer {layer!r}{did_you_mean(layer, self.layers)}")
        return self.layers.index(layer)

    def output_width(self, layer: str, recipe: HasPrecisions) -> int | None:
        """Width of a layer's output: the consumer's act, a tensor's own width, or 8 at a network output."""
        consumer = None if self.consumer is None else self.consumer[self._row(layer)]
        if isinstance(consumer, str):
            return recipe[consumer].act
        return OUTPUT_BITS if consumer is None else int(consumer)

    def entry(self, layer: str, act: int | None, weight: int | None, out: int | None = OUTPUT_BITS) -> float:
        """Cost of one layer; None is float, counted as 32 bits.

        Raises:
            KeyError: Names the layer and the width that is missing.
        """
        row = self._row(layer)
        a = _index(self.act_bits, act, layer, "act")
        w = _index(self.weight_bits, weight, layer, "weight")
        if self.values_out is None:
            return float(self.values[row, a, w])
        return float(self.values_out[row, a, w, _index(self.act_bits, out, layer, "output")])

    def per_layer(self, recipe: HasPrecisions) -> Array:
        """Cost of each layer under a recipe, float64 [L].

        Where weights have extra levels (`Recipe.extra_maps`), the mean over the weights of what the table says at their
        widths. That is exact for costs linear in the weights' bits, such as bops and weight memory; what it takes to
        store which weights they are is not counted. Where output channels have bits of their own
        (`Recipe.channel_maps`), the mean over the channels, exactly; see `check_channels`.

        Raises:
            MixbitError: Channels have bits of their own, and the table does not tell what these cost.
            KeyError: The recipe uses a width that the table does not have.
        """
        found = []
        for name in self.layers:
            precision, out = recipe[name], self.output_width(name, recipe)
            if counts := channel_counts(recipe, name):
                self.check_channels(name)
                # One division, so that costs which are whole numbers stay so.
                every = math.fsum(n * self.entry(name, precision.act, bits, out) for bits, n in counts.items())
                found.append(every / sum(counts.values()))
                continue
            found.append(
                math.fsum(
                    share * self.entry(name, precision.act, precision.weight if e == 0 else _wider(precision, e), out)
                    for e, share in extra_shares(recipe, name).items()
                )
            )
        return np.asarray(found, dtype=np.float64)

    def check_channels(self, layer: str) -> None:
        """Refuses a cost that does not tell what single output channels of a layer cost.

        A layer whose channels have several widths costs the mean over its channels of what it costs at each of these
        widths, if its cost is additive, or linear in the weights' bits. Latencies and the costs of a mapping are
        neither: they hold for one width a tensor.

        Raises:
            MixbitError: The table is not additive, and at some act width the layer's cost is not linear in the weights'
                bits (with less than three widths nobody can tell); the cost depends on the output's width; or layers
                make a total by their maximum while weights count.
        """
        rows = self.values[self._row(layer)]
        bits = np.asarray(self.weight_bits, dtype=np.float64)
        slopes = (rows[:, -1:] - rows[:, :1]) / max(bits[-1] - bits[0], 1.0)
        linear = np.allclose(rows[:, :1] + slopes * (bits - bits[0]), rows, rtol=1e-9, atol=0.0)
        why = None
        if self.values_out is not None:
            why = "are those of mappings with one width a tensor"
        elif self.reduce == "max" and not (linear and not slopes.any()):
            why = "are totalled by maximum and depend on the weights' bits"
        elif not self.additive and len(bits) < 3:
            why = f"are known at the weight widths {list(self.weight_bits)} alone, too few to be seen as linear in them"
        elif not self.additive and not linear:
            why = "are not linear in the weights' bits"
        if why is not None:
            raise MixbitError(
                f"costs in {self.unit or 'a unit of their own'!r} {why}, so they do not tell what single channels of "
                f"layer {layer!r} cost; expected a table such as mixbit.costs.bops, .ops or .weight_memory"
            )

    def total(self, recipe: HasPrecisions) -> float:
        """Cost of the network under a recipe: the audit used before, during and after every search.

        Extra levels of single weights and bits of single channels count, see `per_layer`.

        Raises:
            MixbitError: See `per_layer`.
            KeyError: The recipe uses a width that the table does not have.
        """
        return self.combine(self.per_layer(recipe))

    def combine(self, per_layer: Array) -> float:
        """Total of per-layer costs, by the table's own rule."""
        if self.reduce == "max":
            return float(per_layer.max())
        # fsum: the total of the same entries is the same number in every order.
        return math.fsum(per_layer.tolist())

    def uniform(self, act: int | None, weight: int | None, first_last: int | None = None) -> float:
        """Total at one precision everywhere; see `uniform_recipe`."""
        return self.total(self.uniform_recipe(act, weight, first_last))

    def uniform_recipe(self, act: int | None, weight: int | None, first_last: int | None = None) -> Recipe:
        """One precision everywhere, except that layers reading the network input use at least 8 act bits.

        Args:
            act: Bits of every input; None is float.
            weight: Bits of every weight.
            first_last: Bits of both operands of the first and the last layer, if they are to differ.
        """
        chosen = {}
        for i, name in enumerate(self.layers):
            a, w = act, weight
            if first_last is not None and i in (0, len(self.layers) - 1):
                a, w = first_last, first_last
            if self.input_group[i] == 0 and a is not None:
                a = max(a, 8)
            # Not a LayerPrecision at 32 bits: the table's float width is not a width of a recipe.
            chosen[name] = LayerPrecision(
                weight=None if w == FLOAT_BITS else w, act=None if a == FLOAT_BITS else a, narrow_range=w != 1
            )
        return Recipe(layers=chosen)

    def to_csv(self, path: PathLike) -> None:
        """Writes one row per entry: layer, act_bits, weight_bits, cost, unit."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "act_bits", "weight_bits", "cost", "unit"])
        for i, name in enumerate(self.layers):
            for j, a in enumerate(self.act_bits):
                for k, w in enumerate(self.weight_bits):
                    writer.writerow([name, a, w, repr(float(self.values[i, j, k])), self.unit])
        write_text(path, text.getvalue())

    def save(self, path: PathLike) -> None:
        """Writes the table as versioned JSON, atomically."""
        body: dict[str, Any] = {
            "unit": self.unit,
            "reduce": self.reduce,
            "layers": list(self.layers),
            "input_group": list(self.input_group),
            "act_bits": list(self.act_bits),
            "weight_bits": list(self.weight_bits),
            "values": _encode(self.values),
        }
        if self.values_out is not None:
            body["values_out"] = _encode(self.values_out)
        if self.consumer is not None:
            body["consumer"] = list(self.consumer)
        if self.additive:
            body["additive"] = True
        write_document(path, self.FORMAT, self.VERSION, body)

    @classmethod
    def load(cls, path: PathLike) -> CostTable:
        """Reads what `save` wrote.

        Raises:
            MixbitError: A missing, truncated, foreign or newer file, or one whose content does not fit.
        """
        document = read_document(path, cls.FORMAT, cls.VERSION)
        with _reading(path):
            return cls.from_arrays(
                document["layers"],
                _decode("values", document["values"]),
                document["act_bits"],
                document["weight_bits"],
                unit=document["unit"],
                input_group=document["input_group"],
                values_out=_decode("values_out", document["values_out"]) if "values_out" in document else None,
                consumer=document.get("consumer"),
                reduce=document.get("reduce", "sum"),
                additive=document.get("additive", False),
            )


def _wider(precision: Precision, extra: int) -> int | None:
    return None if precision.weight is None else precision.weight + extra


def unit_names(tables: Iterable[CostTable]) -> dict[CostTable, str]:
    """What names the cost of each table where several stand together: its unit, numbered where two have the same."""
    names: dict[CostTable, str] = {}
    for table in tables:
        unit = table.unit or "cost"
        same = sum(1 for other in names if (other.unit or "cost") == unit)
        names[table] = f"{unit} ({same + 1})" if same else unit
    return names


class _reading:
    """Turns what a damaged document raises into one sentence that names the file."""

    def __init__(self, path: PathLike) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, KeyError):
            raise MixbitError(f"{str(self.path)!r} lacks {error.args[0]!r}") from error
        if isinstance(error, (MixbitError, TypeError)):
            raise MixbitError(f"{str(self.path)!r}: {error}") from error
