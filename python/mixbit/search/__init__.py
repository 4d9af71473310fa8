"""Differentiable search: bits learned together with the weights, under a cost.

mixbit.prepare_(model, mixbit.search.Gates(precisions=(2, 4, 8)), example)
mixbit.calibrate_(model, batches)
penalty = mixbit.search.Penalty(model, costs, budget=0.4 * costs.uniform(8, 8), total_steps=steps)
# in the loop: loss = task_loss + penalty()
recipe = mixbit.search.extract(model)
"""

from mixbit.search.extract import extract, freeze_, param_groups, search_quantizers, unfreeze_
from mixbit.search.fit import Found, Together, fit
from mixbit.search.penalty import Penalty, reachable
from mixbit.search.quantizers import FractionalQuantizer, GatedQuantizer, MixtureQuantizer, SearchQuantizer
from mixbit.search.spaces import Fractional, Gates, Mixture

__all__ = [
    "Found",
    "Fractional",
    "FractionalQuantizer",
    "GatedQuantizer",
    "Gates",
    "Mixture",
    "MixtureQuantizer",
    "Penalty",
    "SearchQuantizer",
    "Together",
    "extract",
    "fit",
    "freeze_",
    "param_groups",
    "reachable",
    "search_quantizers",
    "unfreeze_",
]
