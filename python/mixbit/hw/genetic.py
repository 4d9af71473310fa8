"""NSGA-II (Deb et al., IEEE TEC 6(2), 2002) over bit-width genomes, through pymoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2, RankAndCrowdingSurvival, TournamentSelection, binary_tournament
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.sampling import Sampling
from pymoo.core.selection import Selection
from pymoo.core.survival import Survival
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from mixbit.hw.front import Array, Indices, TableIndex

if TYPE_CHECKING:
    from mixbit.hw.cosearch import Settings

#: Genomes of width indices [N, 2 L] to (accuracy [N], cost [N], failed [N]).
Evaluate = Callable[[Indices], tuple[Array, Array, "np.ndarray[Any, np.dtype[np.bool_]]"]]


_KEEP_PAIR = 0.95
_MUTATE_LAYER = 0.10


class _Space(Problem):
    def __init__(self, genes: int, widths: int, evaluate: Evaluate) -> None:
        super().__init__(n_var=genes, n_obj=2, n_ieq_constr=1, xl=0, xu=widths - 1, vtype=int)
        self.evaluate_genomes = evaluate

    def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
        accuracy, cost, failed = self.evaluate_genomes(np.asarray(x, dtype=np.int64))
        out["F"] = np.column_stack([np.where(failed, 0.0, -accuracy), cost])
        # A choice whose accuracy could not be had is infeasible: it never beats one that could.
        out["G"] = failed.astype(float)[:, None]


class _Start(Sampling):
    """Given genomes, then random ones up to the size of the population where asked."""

    def __init__(self, given: Indices, fill: bool) -> None:
        super().__init__()
        self.given, self.fill = given, fill

    def _do(self, problem: Any, n_samples: int, *_: Any, random_state: Any = None, **__: Any) -> Any:
        more = max(n_samples - len(self.given), 0) if self.fill else 0
        drawn = random_state.integers(0, problem.xu[0] + 1, (more, problem.n_var))
        return np.concatenate([self.given, drawn.astype(np.int64)])


class _Tie(Repair):
    def __init__(self, index: TableIndex) -> None:
        super().__init__()
        self.index = index

    def _do(self, problem: Any, X: Any, **_: Any) -> Any:
        return self.index.tied(np.asarray(X, dtype=np.int64))


class _TwoAtRandom(Selection):
    def _do(
        self, _: Any, pop: Any, n_select: int, n_parents: int, *__: Any, random_state: Any = None, **___: Any
    ) -> Any:
        if len(pop) < n_parents:
            return np.zeros((n_select, n_parents), dtype=int)
        return np.array([random_state.choice(len(pop), n_parents, replace=False) for _ in range(n_select)])


class _Pairs(Crossover):
    """Each layer's (act, weight) pair comes from one of two parents; `reset`: chance that it is widest instead."""

    def __init__(self, reset: float) -> None:
        super().__init__(2, 1, prob=1.0)
        self.reset = reset

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        shape = (X.shape[1], X.shape[2] // 2)
        second = random_state.random(shape) < 0.5
        widest = random_state.random(shape) < self.reset
        child = np.where(np.repeat(second, 2, axis=1), X[1], X[0])
        return np.where(np.repeat(widest, 2, axis=1), problem.xu, child)[None].astype(X.dtype)


class _OneLayer(Mutation):
    """With some probability one layer's pair is drawn anew."""

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        changed = X.copy()
        for row in changed:
            if random_state.random() < _MUTATE_LAYER:
                layer = int(random_state.integers(len(row) // 2))
                row[2 * layer : 2 * layer + 2] = random_state.integers(0, int(problem.xu[0]) + 1, 2)
        return changed


class _Genes(Mutation):
    """Each gene with probability 1 / genes: by one width, or to any."""

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        top = int(problem.xu[0])
        move = random_state.random(X.shape) < 1.0 / X.shape[1]
        near = np.clip(X + random_state.choice([-1, 1], X.shape), 0, top)
        far = random_state.integers(0, top + 1, X.shape)
        return np.where(move, np.where(random_state.random(X.shape) < 0.5, near, far), X)


class _Crowding(Survival):
    """Fronts one after the other; of the one that does not fit, the most crowded point goes, again and again."""

    def __init__(self) -> None:
        super().__init__(filter_infeasible=True)
        self.scale: Array | None = None

    def _do(self, _: Any, pop: Any, *__: Any, n_survive: int = 0, **___: Any) -> Any:
        objectives = pop.get("F").astype(float)
        if self.scale is None:
            # The widest genome is the last of the uniform ones that every search starts with.
            widest = objectives[np.argmax(pop.get("X").sum(axis=1))]
            self.scale = np.where(widest == 0, 1.0, np.abs(widest))
        survivors: list[int] = []
        for rank, front in enumerate(NonDominatedSorting().do(objectives)):
            kept = list(front)
            while len(survivors) + len(kept) > n_survive:
                kept.pop(int(np.argmin(self._distances(objectives[kept]))))
            pop[front].set("rank", rank)
            survivors += kept
            if len(survivors) >= n_survive:
                break
        return pop[survivors]

    def _distances(self, objectives: Array) -> Array:
        total = np.zeros(len(objectives))
        assert self.scale is not None
        for column, scale in zip(objectives.T, self.scale, strict=True):
            order = np.argsort(column, kind="stable")
            total[order[[0, -1]]] = np.inf
            total[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / scale
        return total


def evolve(
    index: TableIndex,
    start: Indices,
    evaluate: Evaluate,
    settings: Settings,
    generations: int,
    seed: int,
    each: Callable[[int], None],
) -> None:
    """Runs the search; everything evaluated goes through `evaluate`, so the caller keeps the archive.

    Args:
        index: Tables and widths.
        start: Genomes of width indices [N, 2 L] of generation 0.
        evaluate: See `Evaluate`; called once per generation.
        settings: Population and operators.
        generations: After generation 0.
        seed: Of every random draw.
        each: Called with the number of each finished generation.
    """
    published = settings.published
    algorithm = NSGA2(
        pop_size=settings.parents,
        n_offsprings=settings.offspring,
        sampling=_Start(start, fill=not published),
        selection=_TwoAtRandom() if published else TournamentSelection(func_comp=binary_tournament),
        crossover=_Pairs(1.0 - _KEEP_PAIR if published else 0.0),
        mutation=_OneLayer() if published else _Genes(),
        survival=_Crowding() if published else RankAndCrowdingSurvival(),
        repair=_Tie(index),
        eliminate_duplicates=not published,
    )
    problem = _Space(2 * len(index.layers), len(index.widths), evaluate)
    algorithm.setup(problem, termination=("n_gen", generations + 1), seed=seed, verbose=False)
    generation = 0
    while algorithm.has_next():
        algorithm.next()
        each(generation)
        generation += 1
