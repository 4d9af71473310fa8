"""Training loops that can be killed: data in memory, objectives, batch-norm statistics."""

from mixbit.training.arguments import check_fit
from mixbit.training.batchnorm import reestimate_batchnorm_
from mixbit.training.groups import param_groups, scale_groups, weight_groups
from mixbit.training.images import AUGMENTATIONS, Augmentation, Images, crop_flip
from mixbit.training.loop import AfterStep, History, train
from mixbit.training.objectives import Objective, cross_entropy, distill, in_bf16, unwrapped

__all__ = [
    "AUGMENTATIONS",
    "AfterStep",
    "Augmentation",
    "History",
    "Images",
    "Objective",
    "check_fit",
    "crop_flip",
    "cross_entropy",
    "distill",
    "in_bf16",
    "param_groups",
    "reestimate_batchnorm_",
    "scale_groups",
    "train",
    "unwrapped",
    "weight_groups",
]
