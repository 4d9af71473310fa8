"""Sensitivity of every layer: without training and labels (`analyze`), or from the loss (`fisher`)."""

from mixbit.analysis.fisher import fisher
from mixbit.analysis.network import network_sqnr
from mixbit.analysis.sensitivity import POINTS, analyze

__all__ = ["POINTS", "analyze", "fisher", "network_sqnr"]
