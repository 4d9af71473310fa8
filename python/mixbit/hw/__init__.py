"""Accelerators: architectures, workloads, proven optimal mappings, and the co-search of bits with them."""

from mixbit.hw.cosearch import ENGINES, Settings, cosearch
from mixbit.hw.front import Front, Point, exact_front

__all__ = ["ENGINES", "Front", "Point", "Settings", "cosearch", "exact_front"]
