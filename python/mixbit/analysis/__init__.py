"""Sensitivity of every layer, without training and without labels."""

from mixbit.analysis.network import network_sqnr
from mixbit.analysis.sensitivity import POINTS, analyze

__all__ = ["POINTS", "analyze", "network_sqnr"]
