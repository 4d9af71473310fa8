"""Sensitivity of every layer, without training and without labels."""

from mixbit.analysis.analyze import POINTS, analyze
from mixbit.analysis.network import network_sqnr

__all__ = ["POINTS", "analyze", "network_sqnr"]
