"""Accelerators: architectures, workloads, proven optimal mappings, and the co-search of bits with them."""

from mixbit.hw.arch import Architecture, Level, Mac
from mixbit.hw.cosearch import ENGINES, Settings, cosearch
from mixbit.hw.front import Front, Point, exact_front
from mixbit.hw.mapping import LevelMapping, Mapping, loop_nest
from mixbit.hw.workload import Layer, Use, Workload

__all__ = [
    "ENGINES",
    "Architecture",
    "Front",
    "Layer",
    "Level",
    "LevelMapping",
    "Mac",
    "Mapping",
    "Point",
    "Settings",
    "Use",
    "Workload",
    "cosearch",
    "exact_front",
    "loop_nest",
]
