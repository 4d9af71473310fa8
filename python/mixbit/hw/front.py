"""Points of accuracy against cost, and the exact front where accuracy is additive."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.errors import MixbitError, did_you_mean
from mixbit.files import PathLike, read_document, write_document
from mixbit.pareto import pareto_indices, pareto_sums
from mixbit.recipe import LayerPrecision, Recipe
from mixbit.tables import CostTable, SensitivityTable

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

#: (act, weight) of the first layer, of the second, ...
Genome = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """One choice of bits.

    Attributes:
        genome: Bits (act, weight) of the first layer, of the second, and so on.
        accuracy: In the front's `measure`, more is better.
        cost: In the front's `unit`, less is better.
    """

    genome: Genome
    accuracy: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Front:
    """Points that no other known point beats in both accuracy and cost.

    Attributes:
        layers: Names in forward order.
        unit: Of the costs.
        measure: What accuracy is: "accuracy", or "predicted_sqnr_db" (an estimate).
        points: Cheapest first.
        uniform: One width everywhere, narrowest first, where they were evaluated.
        failures: (genome, reason) of choices whose accuracy could not be had.
        evaluations: How many choices were evaluated.
        made_by: How the front came about.
    """

    FORMAT = "mixbit-front"
    VERSION = 1

    layers: tuple[str, ...]
    unit: str
    measure: str
    points: tuple[Point, ...]
    uniform: tuple[Point, ...] = ()
    failures: tuple[tuple[Genome, str], ...] = ()
    evaluations: int = 0
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self, point: Point) -> Recipe:
        """The recipe of a point, with its cost and, if that is what was searched on, its predicted SQNR."""
        recipe = Recipe(layers=precisions(self.layers, point.genome))
        recipe.cost = {self.unit or "cost": point.cost}
        recipe.sqnr_db = point.accuracy if self.measure == "predicted_sqnr_db" else None
        recipe.made_by = {"verb": "cosearch", **self.made_by}
        return recipe

    def cheapest(self, accuracy: float) -> Point | None:
        """The cheapest point of at least this accuracy, None where there is none."""
        return next((p for p in self.points if p.accuracy >= accuracy), None)

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes."""
        document = dataclasses.asdict(self)
        document["failures"] = [{"genome": list(g), "reason": r} for g, r in self.failures]
        for name in ("points", "uniform"):
            document[name] = [dataclasses.asdict(p) | {"genome": list(p.genome)} for p in getattr(self, name)]
        return document | {"layers": list(self.layers), "made_by": dict(self.made_by)}

    def save(self, path: PathLike) -> None:
        """Writes the front as versioned JSON, atomically."""
        write_document(path, self.FORMAT, self.VERSION, self.to_dict())

    @classmethod
    def load(cls, path: PathLike) -> Front:
        """Reads what `save` wrote.

        Raises:
            MixbitError: A missing, truncated, foreign or newer file, or one that lacks a part.
        """
        document = read_document(path, cls.FORMAT, cls.VERSION)

        def read(entry: Mapping[str, Any]) -> Point:
            return Point(tuple(entry["genome"]), float(entry["accuracy"]), float(entry["cost"]))

        try:
            return cls(
                tuple(document["layers"]),
                document["unit"],
                document["measure"],
                tuple(read(p) for p in document["points"]),
                tuple(read(p) for p in document["uniform"]),
                tuple((tuple(f["genome"]), f["reason"]) for f in document["failures"]),
                int(document["evaluations"]),
                dict(document["made_by"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MixbitError(f"{str(path)!r} is not a whole {cls.FORMAT} document: {error!r}") from error


def precisions(layers: Sequence[str], genome: Genome) -> dict[str, LayerPrecision]:
    """Precision of each layer of a genome."""
    return {
        name: LayerPrecision(act=genome[2 * i], weight=genome[2 * i + 1], narrow_range=genome[2 * i + 1] > 1)
        for i, name in enumerate(layers)
    }


class TableIndex:
    """Tables by index, for whole populations at once: cost and predicted noise of genomes.

    Args:
        costs: The cost table.
        widths: Bits to choose from; the axes of what is looked up.
        sensitivity: For `noise`; the same layers.
    """

    def __init__(self, costs: CostTable, widths: Iterable[int], sensitivity: SensitivityTable | None = None) -> None:
        self.costs = costs
        self.widths = tuple(sorted({int(b) for b in widths}))
        if not self.widths:
            raise MixbitError("widths is empty; expected at least one bit-width")
        for b in self.widths:
            if b not in costs.act_bits or b not in costs.weight_bits:
                raise MixbitError(
                    f"widths: the costs have no width {b}; expected some of act {list(costs.act_bits)} and weight "
                    f"{list(costs.weight_bits)}"
                )
        self.layers = costs.layers
        rows = np.arange(len(self.layers))
        #: First layer that reads the same tensor: its act counts for all of them.
        self.leader = np.array([costs.input_group.index(g) for g in costs.input_group], dtype=np.int64)
        a = np.array([costs.act_bits.index(b) for b in self.widths])
        w = np.array([costs.weight_bits.index(b) for b in self.widths])
        #: Layer that reads the output, or -1 where the output's width is fixed.
        self.consumer = np.full(len(rows), -1, dtype=np.int64)
        if costs.values_out is None:
            self.cost = costs.values[np.ix_(rows, a, w)][..., None]
        else:
            self.cost = costs.values_out[np.ix_(rows, a, w, a)].copy()
            for i, reader in enumerate(costs.consumer or ()):
                if isinstance(reader, str):
                    self.consumer[i] = self.layers.index(reader)
                else:
                    for j, k in itertools.product(range(len(a)), range(len(w))):
                        self.cost[i, j, k, :] = costs.entry(
                            self.layers[i], self.widths[j], self.widths[k], costs.output_width(self.layers[i], {})
                        )
        self.noise_ratio = None if sensitivity is None else self._noise_ratios(sensitivity)

    def _noise_ratios(self, table: SensitivityTable) -> Array:
        """[L, widths, widths] noise-to-signal ratios."""
        if table.joint:
            raise MixbitError("accuracy is a joint table (act and weight at one width); expected one with both axes")
        for name in (*self.layers, *table.layers):
            if name not in table.layers or name not in self.layers:
                other = table.layers if name in self.layers else self.layers
                where = "accuracy" if name in self.layers else "costs"
                raise MixbitError(
                    f"accuracy and costs are of different models: {where} has no layer {name!r}"
                    f"{did_you_mean(name, other)}"
                )
        found = [[[table.entry(n, a, w) for w in self.widths] for a in self.widths] for n in self.layers]
        with np.errstate(over="ignore"):
            return np.asarray(10.0 ** (-np.asarray(found) / 10.0))

    def tied(self, genomes: Indices) -> Indices:
        """Genomes [N, 2 L] of width indices in which layers that read one tensor have the first one's act."""
        tied = genomes.copy()
        tied[:, 0::2] = genomes[:, 0::2][:, self.leader]
        return tied

    def genome(self, indices: Iterable[int]) -> Genome:
        """Bits of width indices."""
        return tuple(self.widths[int(i)] for i in indices)

    def indices(self, genome: Sequence[int]) -> list[int]:
        """Width indices of bits.

        Raises:
            MixbitError: The genome has the wrong length or a width that is not among `widths`.
        """
        if len(genome) != 2 * len(self.layers):
            raise MixbitError(
                f"genome has {len(genome)} numbers; expected {2 * len(self.layers)}: act and weight bits of each of "
                f"{len(self.layers)} layers"
            )
        for b in genome:
            if b not in self.widths:
                raise MixbitError(f"genome holds {b}; expected some of the widths {list(self.widths)}")
        return [self.widths.index(b) for b in genome]

    def per_layer(self, genomes: Indices) -> Array:
        """Costs [N, L] of tied genomes."""
        act, weight = genomes[:, 0::2], genomes[:, 1::2]
        rows = np.arange(len(self.layers))
        out = np.where(self.consumer >= 0, act[:, self.consumer], 0)
        if self.cost.shape[3] == 1:
            out = np.zeros_like(out)
        return np.asarray(self.cost[rows, act, weight, out])

    def totals(self, genomes: Indices) -> Array:
        """Costs [N] of tied genomes, by the table's own rule."""
        return np.array([self.costs.combine(row) for row in self.per_layer(genomes)], dtype=np.float64)

    def predicted_sqnr_db(self, genomes: Indices) -> Array:
        """Predicted network SQNR [N] of tied genomes, an estimate."""
        assert self.noise_ratio is not None
        ratios = self.noise_ratio[np.arange(len(self.layers)), genomes[:, 0::2], genomes[:, 1::2]]
        with np.errstate(divide="ignore"):
            return np.asarray(-10.0 * np.log10(ratios.sum(axis=1)))


@dataclasses.dataclass
class _Sums:
    """A Pareto set of (noise, cost) sums: `choice[i]` holds the option of every layer seen so far, -1 elsewhere."""

    noise: Array
    cost: Array
    choice: npt.NDArray[np.int16]

    def __getitem__(self, which: Indices) -> _Sums:
        return _Sums(self.noise[which], self.cost[which], self.choice[which])

    def thinned(self, step: float) -> _Sums:
        """With `step`, one point a bucket of costs within a factor 1 + step."""
        if step == 0 or len(self.cost) == 1 or self.cost[0] == 0:
            return self
        bucket = np.floor(np.log(self.cost / self.cost[0]) / np.log1p(step))
        # The last of a bucket is the least noisy.
        return self[np.flatnonzero(np.r_[bucket[1:] != bucket[:-1], True])]


def exact_front(
    costs: CostTable,
    sensitivity: SensitivityTable,
    *,
    widths: Iterable[int] = (2, 3, 4, 5, 6, 7, 8),
    tolerance: float = 0.0,
    limit: int = 2_000_000,
) -> Front:
    """The whole front of predicted SQNR against cost, exactly: what a genetic search is judged against.

    Noise ratios and costs are sums over layers, so Pareto sets of parts can be merged (dynamic programming, Bellman):
    input groups are eliminated one after the other, fewest neighbours first; a layer's cost joins its own group and,
    where the cost depends on the output's width, its consumer's.

    Args:
        costs: Summed over layers (`reduce` "sum"), with or without values_out.
        sensitivity: Of the same layers, with both axes.
        widths: Bits to choose from.
        tolerance: 0 is exact. Else every point of the true front has one at most as noisy that costs at most
            1 + tolerance times as much.
        limit: Largest size of a Pareto set on the way.

    Raises:
        MixbitError: The tables do not fit, costs are totalled by maximum, or a set outgrows `limit`.
    """
    if costs.reduce != "sum":
        raise MixbitError("costs are totalled by maximum; the exact front needs costs that are summed")
    if not 0 <= tolerance < 1:
        raise MixbitError(f"tolerance={tolerance}: expected a number from 0 to below 1")
    index = TableIndex(costs, widths, sensitivity)
    assert index.noise_ratio is not None
    layers, count = len(index.layers), len(index.widths)
    step = np.expm1(np.log1p(tolerance) / max(layers, 1))
    # A factor: the groups it depends on and, for each of their widths, a Pareto set.
    factors: list[tuple[tuple[int, ...], dict[tuple[int, ...], _Sums]]] = []
    for i in range(layers):
        own, reader = int(index.leader[i]), int(index.consumer[i])
        scope = (own,) if reader < 0 else tuple(dict.fromkeys((own, int(index.leader[reader]))))
        sets = {}
        for assigned in itertools.product(range(count), repeat=len(scope)):
            noise = index.noise_ratio[i, assigned[0]]
            cost = index.cost[i, assigned[0], :, assigned[-1] if reader >= 0 else 0]
            keep = pareto_indices(cost, noise)
            choice = np.full((len(keep), layers), -1, dtype=np.int16)
            choice[:, i] = assigned[0] * count + keep
            sets[assigned] = _Sums(noise[keep], cost[keep], choice)
        factors.append((scope, sets))

    def merged(a: _Sums, b: _Sums) -> _Sums:
        i, j = pareto_sums((a.cost, a.noise), (b.cost, b.noise))
        choice = np.maximum(a.choice[i], b.choice[j])
        found = _Sums(a.noise[i] + b.noise[j], a.cost[i] + b.cost[j], choice).thinned(step)
        if len(found.cost) > limit:
            raise MixbitError(
                f"the exact front has more than limit={limit} points on the way; a tolerance such as 1e-4 bounds it"
            )
        return found

    def union(sets: list[_Sums]) -> _Sums:
        noise, cost, choice = (np.concatenate([getattr(s, n) for s in sets]) for n in ("noise", "cost", "choice"))
        return _Sums(noise, cost, choice)[pareto_indices(cost, noise)]

    left = sorted(set(index.leader.tolist()))
    while left:
        around = {v: {u for scope, _ in factors if v in scope for u in scope} - {v} for v in left}
        v = min(left, key=lambda u: (len(around[u]), u))
        left.remove(v)
        scope = tuple(sorted(around[v]))
        mine = [f for f in factors if v in f[0]]
        sets = {}
        for assigned in itertools.product(range(count), repeat=len(scope)):
            given = dict(zip(scope, assigned, strict=True))
            options = []
            for width in range(count):
                given[v] = width
                total: _Sums | None = None
                for names, table in mine:
                    part = table[tuple(given[u] for u in names)]
                    total = part if total is None else merged(total, part)
                assert total is not None
                options.append(total)
            sets[assigned] = union(options)
        factors = [f for f in factors if v not in f[0]] + [(scope, sets)]
    total = factors[0][1][()]
    for _, sets in factors[1:]:
        total = merged(total, sets[()])
    genomes = np.empty((len(total.noise), 2 * layers), dtype=np.int64)
    genomes[:, 0::2], genomes[:, 1::2] = np.divmod(total.choice.astype(np.int64), count)
    accuracy, cost = index.predicted_sqnr_db(genomes), index.totals(genomes)
    bits = np.asarray(index.widths)[genomes]
    points = tuple(
        Point(tuple(bits[i].tolist()), float(accuracy[i]), float(cost[i])) for i in pareto_indices(cost, -accuracy)
    )
    return Front(
        index.layers,
        costs.unit,
        "predicted_sqnr_db",
        points,
        uniform_points(index),
        evaluations=0,
        made_by={"method": "exact", "widths": list(index.widths), "tolerance": tolerance},
    )


def uniform_points(index: TableIndex) -> tuple[Point, ...]:
    """One width everywhere, on predicted SQNR."""
    genomes = np.arange(len(index.widths))[:, None].repeat(2 * len(index.layers), axis=1)
    accuracy, cost = index.predicted_sqnr_db(genomes), index.totals(genomes)
    return tuple(Point(index.genome(g), float(a), float(c)) for g, a, c in zip(genomes, accuracy, cost, strict=True))
