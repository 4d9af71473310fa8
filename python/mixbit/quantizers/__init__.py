"""Quantizers on models: prepare, calibrate, fold, restore."""

from mixbit.quantizers.calibrate import calibrate_, first_images
from mixbit.quantizers.corrections import correct_bias_, equalize_
from mixbit.quantizers.fold import fold_batchnorm_
from mixbit.quantizers.modules import (
    Add,
    Cat,
    JoinedTensors,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    apply_layer,
)
from mixbit.quantizers.prepare import bypass, prepare_, quantized_layers, restore_
from mixbit.quantizers.quantizer import (
    KINDS,
    LSQ,
    PACT,
    TQT,
    ClippedStraightThrough,
    FixedRange,
    LSQPlus,
    Quantizer,
    StraightThrough,
    effective_scales,
)
from mixbit.quantizers.rounding import optimize_rounding_
from mixbit.quantizers.space import SearchSpace, check_precisions
from mixbit.quantizers.statistics import METHODS, TensorStatistics, input_statistics, weight_scales
from mixbit.quantizers.tensors import record_tensors_

__all__ = [
    "KINDS",
    "LSQ",
    "METHODS",
    "PACT",
    "TQT",
    "Add",
    "Cat",
    "ClippedStraightThrough",
    "FixedRange",
    "JoinedTensors",
    "LSQPlus",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "Quantizer",
    "SearchSpace",
    "StraightThrough",
    "TensorStatistics",
    "apply_layer",
    "bypass",
    "calibrate_",
    "check_precisions",
    "correct_bias_",
    "effective_scales",
    "equalize_",
    "first_images",
    "fold_batchnorm_",
    "input_statistics",
    "optimize_rounding_",
    "prepare_",
    "quantized_layers",
    "record_tensors_",
    "restore_",
    "weight_scales",
]
