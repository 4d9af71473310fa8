"""Training at the bits of a recipe (quantization-aware training).

mixbit.prepare_(model, recipe, example)
mixbit.calibrate_(model, batches)
history = mixbit.retrain.fit(model, training_batches, epochs=3, teacher=float_model)
"""

from mixbit.retrain import storage
from mixbit.retrain.distances import threshold_distances, threshold_histograms
from mixbit.retrain.fit import MakeOptimizer, fit
from mixbit.retrain.mechanisms import Mechanisms
from mixbit.retrain.oscillations import Dampening, IterativeFreezing
from mixbit.retrain.schedule import Schedule
from mixbit.retrain.switches import SwitchTracker
from mixbit.retrain.thresholds import ThresholdAware

__all__ = [
    "Dampening",
    "IterativeFreezing",
    "MakeOptimizer",
    "Mechanisms",
    "Schedule",
    "SwitchTracker",
    "ThresholdAware",
    "fit",
    "storage",
    "threshold_distances",
    "threshold_histograms",
]
