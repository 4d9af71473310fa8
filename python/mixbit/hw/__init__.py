"""Accelerators: architectures, workloads, proven optimal mappings, and the co-search of bits with them."""

from mixbit.hw.arch import Architecture, Level, Mac
from mixbit.hw.cosearch import ENGINES, Settings, cosearch
from mixbit.hw.front import Front, Point, exact_front
from mixbit.hw.mapper import (
    OBJECTIVES,
    LayerMapping,
    NetworkMapping,
    Sweep,
    count_mappings,
    evaluate,
    map_network,
    mapper_table,
    network_bits,
    pareto,
    random_search,
    sweep,
)
from mixbit.hw.mapping import LevelMapping, Mapping, loop_nest
from mixbit.hw.pe import PE_KINDS, LayerEnergy, NetworkEnergy, ProcessingElement, pe_energy, proportional_share
from mixbit.hw.workload import Layer, Use, Workload

__all__ = [
    "ENGINES",
    "OBJECTIVES",
    "PE_KINDS",
    "Architecture",
    "Front",
    "Layer",
    "LayerEnergy",
    "LayerMapping",
    "Level",
    "LevelMapping",
    "Mac",
    "Mapping",
    "NetworkEnergy",
    "NetworkMapping",
    "Point",
    "ProcessingElement",
    "Settings",
    "Sweep",
    "Use",
    "Workload",
    "cosearch",
    "count_mappings",
    "evaluate",
    "exact_front",
    "loop_nest",
    "map_network",
    "mapper_table",
    "network_bits",
    "pareto",
    "pe_energy",
    "proportional_share",
    "random_search",
    "sweep",
]
