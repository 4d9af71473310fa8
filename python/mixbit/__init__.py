"""mixbit: the bits every layer deserves, trained at those bits, shipped verified.

The public names below are loaded on first use, so that `import mixbit` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixbit import costs, export, hw, ops, quantizers, report, retrain, runtime, search, training, zoo
    from mixbit._build_info import VERSION as __version__
    from mixbit.analysis import analyze
    from mixbit.assignment import assign
    from mixbit.errors import MixbitError
    from mixbit.evaluation import evaluate
    from mixbit.network import layers
    from mixbit.profiling import profile
    from mixbit.quantizers import (
        calibrate_,
        correct_bias_,
        equalize_,
        fold_batchnorm_,
        optimize_rounding_,
        prepare_,
        restore_,
    )
    from mixbit.recipe import LayerPrecision, Recipe
    from mixbit.refinement import refine
    from mixbit.sweeps import sweep
    from mixbit.tables import CostTable, SensitivityTable

__all__ = [
    "CostTable",
    "LayerPrecision",
    "MixbitError",
    "Recipe",
    "SensitivityTable",
    "__version__",
    "analyze",
    "assign",
    "calibrate_",
    "correct_bias_",
    "costs",
    "equalize_",
    "evaluate",
    "export",
    "fold_batchnorm_",
    "hw",
    "layers",
    "ops",
    "optimize_rounding_",
    "prepare_",
    "profile",
    "quantizers",
    "refine",
    "report",
    "restore_",
    "retrain",
    "runtime",
    "search",
    "sweep",
    "training",
    "zoo",
]

# Public name -> (module, attribute); without an attribute the module itself.
_WHERE: dict[str, tuple[str, str | None]] = {
    "__version__": ("mixbit._build_info", "VERSION"),
    "MixbitError": ("mixbit.errors", "MixbitError"),
    "LayerPrecision": ("mixbit.recipe", "LayerPrecision"),
    "Recipe": ("mixbit.recipe", "Recipe"),
    "SensitivityTable": ("mixbit.tables", "SensitivityTable"),
    "CostTable": ("mixbit.tables", "CostTable"),
    "layers": ("mixbit.network", "layers"),
    "analyze": ("mixbit.analysis", "analyze"),
    "assign": ("mixbit.assignment", "assign"),
    "sweep": ("mixbit.sweeps", "sweep"),
    "refine": ("mixbit.refinement", "refine"),
    "profile": ("mixbit.profiling", "profile"),
    "prepare_": ("mixbit.quantizers", "prepare_"),
    "restore_": ("mixbit.quantizers", "restore_"),
    "calibrate_": ("mixbit.quantizers", "calibrate_"),
    "correct_bias_": ("mixbit.quantizers", "correct_bias_"),
    "equalize_": ("mixbit.quantizers", "equalize_"),
    "fold_batchnorm_": ("mixbit.quantizers", "fold_batchnorm_"),
    "optimize_rounding_": ("mixbit.quantizers", "optimize_rounding_"),
    "evaluate": ("mixbit.evaluation", "evaluate"),
    "costs": ("mixbit.costs", None),
    "export": ("mixbit.export", None),
    "hw": ("mixbit.hw", None),
    "ops": ("mixbit.ops", None),
    "quantizers": ("mixbit.quantizers", None),
    "report": ("mixbit.report", None),
    "retrain": ("mixbit.retrain", None),
    "runtime": ("mixbit.runtime", None),
    "search": ("mixbit.search", None),
    "training": ("mixbit.training", None),
    "zoo": ("mixbit.zoo", None),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mixbit' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value: Any = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
