"""Co-search of bits and mappings: many Pareto points of accuracy against what the mapper charges."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixbit.errors import MixbitError, check_choice
from mixbit.files import PathLike, read_document, write_document
from mixbit.hw.front import Array, Front, Genome, Indices, Point, TableIndex, precisions
from mixbit.pareto import pareto_indices
from mixbit.recipe import Recipe
from mixbit.tables import CostTable, SensitivityTable

if TYPE_CHECKING:
    from mixbit.hw.arch import Architecture
    from mixbit.hw.workload import Workload

Accuracy = Callable[[Recipe], float] | Mapping[Genome, float] | SensitivityTable

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a population moves.

    Attributes:
        parents: Survivors of a generation.
        offspring: New genomes of a generation.
        published: The operators of the published engine instead of ours.
    """

    parents: int
    offspring: int
    published: bool


#: "published" is the engine of Klhufek et al. (arXiv 2404.05368) as its authors run it: uniform genomes to start with,
#: two parents drawn at random, pairs copied from one of them with probability 0.95 and else widest, one layer redrawn
#: with probability 0.1, crowding recomputed after each removal and scaled by what the widest network has. "standard"
#: adds random genomes to the start, picks parents by tournament, and mutates each gene with probability 1 / genes,
#: half of the time by one width.
ENGINES = {"standard": Settings(40, 40, False), "published": Settings(10, 10, True)}

_STATE = ("mixbit-cosearch-state", 1)
#: Seconds between two writings of the state file while evaluations come in; each generation writes it anyway.
_STATE_INTERVAL = 1.0


def cosearch(
    arch: Architecture | None,
    net: Workload | None,
    accuracy: Accuracy,
    generations: int = 25,
    executor: concurrent.futures.Executor | None = None,
    *,
    objective: str = "edp",
    costs: CostTable | None = None,
    widths: Iterable[int] = WIDTHS,
    engine: str = "standard",
    parents: int | None = None,
    offspring: int | None = None,
    initial: Sequence[Sequence[int]] = (),
    seed: int = 42,
    state: PathLike | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Front:
    """Searches (act, weight) bits of every layer for accuracy against mapped cost, with NSGA-II.

    A genome is mapped by a look-up: the table of proven optima of every layer and width is made once. All genomes ever
    evaluated compete for the front that is returned. Layers that read the same tensor share their act bits.

    Args:
        arch: The accelerator; with `net` it makes the cost table. None where `costs` is given.
        net: The network.
        accuracy: Of a recipe, more is better: a callable; a table {(act, weight, act, weight, ...): accuracy}; or a
            SensitivityTable, whose predicted network SQNR in dB (an estimate) is then searched on. A callable that
            raises or returns NaN, infinity or no number, and a genome that a table lacks, is recorded in `.failures`,
            and the search goes on without it.
        generations: After generation 0.
        executor: Where a callable runs, any `concurrent.futures.Executor` (threads, processes, Dask, MPI); its
            submissions are pickled where the executor needs that. None uses processes where the callable can be
            pickled and is no part of the main script, else this thread. Tables need none.
        objective: What the mapper minimizes and the table sums: "energy", "delay", "edp" or "last_level_accesses".
        costs: A ready cost table, e.g. of `mixbit.costs`, instead of `arch` and `net`.
        widths: Bits to choose from.
        engine: "standard" or "published"; see `ENGINES`.
        parents: Survivors of a generation instead of the engine's.
        offspring: New genomes of a generation instead of the engine's.
        initial: Genomes (bits) for generation 0 beside the uniform ones.
        seed: Of every random draw.
        state: File that keeps the accuracies found: a search that was stopped goes on from it and ends with the same
            bytes as one that was not; a search with other settings, or for another accelerator, starts with them.
        progress: Called with (evaluations so far, most that there can be, what happens).

    Returns:
        The front, with the uniform points beside it.

    Raises:
        MixbitError: An argument or a table does not fit, a genome has the wrong length, the state file belongs to
            another network or accuracy, or no accuracy could be had at all.

    Example:
        >>> front = mixbit.hw.cosearch(arch, net, accuracy=table)  # table = mixbit.analyze(model, batches)
        >>> front.recipe(front.cheapest(30.0))
    """
    settings = _settings(engine, parents, offspring, generations)
    if costs is None:
        if arch is None or net is None:
            raise MixbitError("arch and net are needed to make the cost table; expected both, or costs=")
        from mixbit.hw.mapper import mapper_table

        widths = tuple(widths)
        costs = mapper_table(arch, net, objective=objective, widths=widths)
    sensitivity = accuracy if isinstance(accuracy, SensitivityTable) else None
    index = TableIndex(costs, widths, sensitivity)
    start = [[i] * (2 * len(index.layers)) for i in range(len(index.widths))]
    start += [index.indices(genome) for genome in initial]
    made_by = {
        "method": "nsga2",
        "engine": engine,
        **dataclasses.asdict(settings),
        "generations": generations,
        "seed": seed,
        "widths": list(index.widths),
        "objective": objective,
        "architecture": None if arch is None else arch.name,
    }
    key = _digest(list(index.layers), index.leader, index.noise_ratio, accuracy)
    most = max(len(start), settings.parents) + generations * settings.offspring
    archive = _Archive(None if state is None else Path(state), key, most, progress)
    # pymoo takes a while to import, and reading fronts does not need it.
    from mixbit.hw.genetic import evolve

    with _Evaluator(index, accuracy, executor, archive, settings.offspring) as evaluate:
        evolve(index, np.asarray(start), evaluate, settings, generations, seed, lambda _: archive.save())
    return _front(index, archive, sensitivity is not None, made_by)


def _settings(engine: str, parents: int | None, offspring: int | None, generations: int) -> Settings:
    settings = ENGINES[check_choice("engine", engine, ENGINES)]
    for name, value, least in (("parents", parents, 2), ("offspring", offspring, 1), ("generations", generations, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise MixbitError(f"{name}={value!r}: expected a whole number of at least {least}")
    return dataclasses.replace(settings, parents=parents or settings.parents, offspring=offspring or settings.offspring)


def _digest(*parts: Any) -> str:
    """Names what accuracies depend on; of a callable only that it is one."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping) and part and isinstance(next(iter(part)), tuple):
            digest.update(repr(sorted(part.items())).encode())
        elif isinstance(part, (Mapping, list)):
            digest.update(json.dumps(part, sort_keys=True).encode())
        else:
            digest.update(type(part).__name__.encode() if callable(part) else b"-")
    return digest.hexdigest()[:16]


class _Archive:
    """Accuracy or failure of every genome that was asked for, in the order in which they were."""

    def __init__(
        self, path: Path | None, key: str, most: int, progress: Callable[[int, int, str], None] | None
    ) -> None:
        self.path, self.key, self.most, self.progress = path, key, most, progress
        self.asked: dict[Genome, float | str | None] = {}
        self.known: dict[Genome, float | str] = {}
        self.saved = 0.0
        if path is not None and path.exists():
            document = read_document(path, *_STATE)
            if document.get("key") != key:
                raise MixbitError(
                    f"state={str(path)!r} belongs to another network or another kind of accuracy; use another file, "
                    "or delete it"
                )
            for entry in document["evaluations"]:
                found = entry["failure"] if entry["accuracy"] is None else float(entry["accuracy"])
                self.known[tuple(entry["genome"])] = found

    def record(self, genome: Genome, result: float | str) -> None:
        """Notes a result; the file follows at the latest with the generation."""
        self.asked[genome] = self.known[genome] = result
        if self.progress is not None:
            self.progress(sum(v is not None for v in self.asked.values()), self.most, "cosearch")
        if time.monotonic() - self.saved > _STATE_INTERVAL:
            self.save()

    def save(self) -> None:
        """Writes what is known: asked for in this run first, so that a resumed file ends as an unbroken one."""
        if self.path is None:
            return
        order = [g for g, v in self.asked.items() if v is not None]
        order += [g for g in self.known if g not in self.asked]
        entries = []
        for genome in order:
            found = self.known[genome]
            failed = isinstance(found, str)
            entries.append(
                {
                    "genome": list(genome),
                    "accuracy": None if failed else found,
                    "failure": found if failed else None,
                }
            )
        write_document(self.path, *_STATE, {"key": self.key, "evaluations": entries})
        self.saved = time.monotonic()


def _measure(accuracy: Callable[[Recipe], float], recipe: Recipe) -> float | str:
    """What the callable says of a recipe, or why it says nothing; runs in the executor."""
    try:
        value = float(accuracy(recipe))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return value if math.isfinite(value) else f"returned {value}"


class _Evaluator:
    """Genomes to accuracy and cost, each genome once."""

    def __init__(
        self,
        index: TableIndex,
        accuracy: Accuracy,
        executor: concurrent.futures.Executor | None,
        archive: _Archive,
        offspring: int,
    ) -> None:
        if not callable(accuracy) and not isinstance(accuracy, (SensitivityTable, Mapping)):
            raise MixbitError(
                f"accuracy is a {type(accuracy).__name__}; expected a callable, {{genome: accuracy}} or a "
                "SensitivityTable"
            )
        if executor is not None and not isinstance(executor, concurrent.futures.Executor):
            raise MixbitError(
                f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor or None"
            )
        self.index, self.accuracy, self.archive = index, accuracy, archive
        self.executor, self.own = executor, None
        if executor is None and callable(accuracy) and _travels(accuracy):
            # Processes are spawned: a fork would copy the locks of torch's threads.
            workers = min(os.cpu_count() or 1, offspring)
            context = multiprocessing.get_context("spawn")
            self.executor = self.own = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)

    def __enter__(self) -> _Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        if self.own is not None:
            self.own.shutdown(cancel_futures=True)

    def __call__(self, genomes: Indices) -> tuple[Array, Array, np.ndarray[Any, np.dtype[np.bool_]]]:
        names = [self.index.genome(g) for g in genomes]
        if isinstance(self.accuracy, SensitivityTable):
            for name, value in zip(names, self.index.predicted_sqnr_db(genomes), strict=True):
                # Exact networks have no noise at all; JSON has no infinity.
                self.archive.asked[name] = self.archive.known[name] = min(float(value), 1e9)
        else:
            fresh = []
            for name in names:
                if self.archive.asked.setdefault(name, self.archive.known.get(name)) is None and name not in fresh:
                    fresh.append(name)
            self._measure(fresh)
        found = [self.archive.asked[name] for name in names]
        failed = np.array([not isinstance(v, float) for v in found])
        value = np.array([v if isinstance(v, float) else 0.0 for v in found])
        return value, self.index.totals(genomes), failed

    def _measure(self, genomes: list[Genome]) -> None:
        if isinstance(self.accuracy, Mapping):
            for genome in genomes:
                self.archive.record(genome, _looked_up(self.accuracy, genome))
            return
        assert callable(self.accuracy)
        recipes = {g: Recipe(layers=precisions(self.index.layers, g)) for g in genomes}
        if self.executor is None:
            for genome, recipe in recipes.items():
                self.archive.record(genome, _measure(self.accuracy, recipe))
            return
        waiting = {self.executor.submit(_measure, self.accuracy, r): g for g, r in recipes.items()}
        for future in concurrent.futures.as_completed(waiting):
            try:
                result = future.result()
            except Exception as error:
                # What the callable raises comes back as text: this is the executor's own failure.
                self.archive.save()
                hint = "; scripts that start processes need if __name__ == '__main__'" if self.own is not None else ""
                raise MixbitError(
                    f"executor: an evaluation was lost ({type(error).__name__}: {error}){hint}"
                ) from error
            self.archive.record(waiting[future], result)


def _looked_up(table: Mapping[Genome, float], genome: Genome) -> float | str:
    if genome not in table:
        return "not in the table"
    return _measure(lambda _: table[genome], Recipe())


def _travels(accuracy: object) -> bool:
    """Whether a callable can be sent to a fresh process."""
    if getattr(accuracy, "__module__", None) == "__main__":
        return False
    try:
        pickle.dumps(accuracy)
    except Exception:
        return False
    return True


def _front(index: TableIndex, archive: _Archive, predicted: bool, made_by: Mapping[str, Any]) -> Front:
    good = [(g, v) for g, v in archive.asked.items() if isinstance(v, float)]
    failures = tuple((g, v) for g, v in archive.asked.items() if isinstance(v, str))
    if not good:
        raise MixbitError(f"accuracy failed for all {len(failures)} choices; the first says: {failures[0][1]}")
    genomes = np.array([index.indices(g) for g, _ in good])
    value, cost = np.array([v for _, v in good]), index.totals(genomes)
    points = [Point(g, float(v), float(c)) for (g, _), v, c in zip(good, value, cost, strict=True)]
    uniform = sorted((p for p in points if len(set(p.genome)) == 1), key=lambda p: p.genome)
    return Front(
        index.layers,
        index.costs.unit,
        "predicted_sqnr_db" if predicted else "accuracy",
        tuple(points[i] for i in pareto_indices(cost, -value)),
        tuple(uniform),
        failures,
        len(archive.asked),
        made_by,
    )
