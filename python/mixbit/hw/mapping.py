"""Mappings: a loop nest on an architecture, and how it is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from mixbit.errors import MixbitError
from mixbit.hw.documents import known, names, pairs
from mixbit.hw.workload import TENSORS

#: (dimension, factor)
Loop = tuple[str, int]

_LOOPS = {"temporal": "temporal_inner_to_outer", "spatial_x": "spatial_x", "spatial_y": "spatial_y"}


@dataclasses.dataclass(frozen=True)
class LevelMapping:
    """What happens at a level; its spatial loops stand inside its temporal ones.

    Attributes:
        level: Name of the level.
        keep: Tensors that it stores.
        temporal: Loops in time, inner to outer.
        spatial_x: Loops over the instances below, along x.
        spatial_y: The same along y.
    """

    level: str
    keep: tuple[str, ...] = ()
    temporal: tuple[Loop, ...] = ()
    spatial_x: tuple[Loop, ...] = ()
    spatial_y: tuple[Loop, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A loop nest: levels innermost first.

    Attributes:
        levels: One entry a level; a level that is not listed holds nothing.
    """

    levels: tuple[LevelMapping, ...]

    @classmethod
    def from_dict(cls, levels: Any) -> Mapping:
        """Builds a mapping from a list of {"level", "keep", "temporal_inner_to_outer", "spatial_x", "spatial_y"}.

        Raises:
            MixbitError: A key or a tensor is unknown (the nearest is named), or a loop is no (dimension, factor).
        """
        if not isinstance(levels, (list, tuple)):
            raise MixbitError(f"mapping is {levels!r}; expected a list of levels, innermost first")
        found = []
        for i, entry in enumerate(levels):
            where = f"mapping[{i}]"
            given = known(where, entry, ["level"], ["keep", *_LOOPS.values()])
            where = f"mapping: level {given['level']!r}"
            loops = {
                name: pairs(f"{where}: {key}", given.get(key, ()), "(dimension, factor)")
                for name, key in _LOOPS.items()
            }
            kept = tuple(names(f"{where}: keep", given.get("keep", ()), TENSORS))
            found.append(LevelMapping(str(given["level"]), kept, **loops))
        return cls(tuple(found))

    def to_dict(self) -> list[dict[str, Any]]:
        """As `from_dict` takes it."""
        return [
            {
                "level": level.level,
                "keep": list(level.keep),
                **{key: [list(loop) for loop in getattr(level, name)] for name, key in _LOOPS.items()},
            }
            for level in self.levels
        ]


def loop_nest(mapping: Mapping) -> str:
    """The mapping the way architects write it: outermost loop first, storage named where it stands.

    Example:
        >>> print(loop_nest(best.layers[0].mapping))
        DRAM [Weights, Inputs, Outputs]
        for q in 0..8
          shared_glb [Inputs, Outputs]
          ...
    """
    lines: list[str] = []
    depth = 0

    def loops(found: Iterable[Loop], keyword: str, axis: str = "") -> None:
        nonlocal depth
        for dim, factor in reversed(tuple(found)):
            if factor > 1:
                lines.append(f"{'  ' * depth}{keyword} {dim.lower()} in 0..{factor}{axis}")
                depth += 1

    for level in reversed(mapping.levels):
        if level.keep:
            lines.append(f"{'  ' * depth}{level.level} [{', '.join(level.keep)}]")
        loops(level.temporal, "for")
        loops(level.spatial_y, "parallel_for", " along y")
        loops(level.spatial_x, "parallel_for", " along x")
    lines.append(f"{'  ' * depth}multiply-accumulate")
    return "\n".join(lines)
