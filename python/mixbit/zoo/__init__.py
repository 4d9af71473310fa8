"""Networks with real weights, and the small data packs to run them on."""

from mixbit.zoo.cifar import CifarResNet, cifar_resnet
from mixbit.zoo.data import cifar10, data_dir, imagenet_compat
from mixbit.zoo.imagenet import MobileNetV2, mobilenet_v2, squeezenet1_1

__all__ = [
    "CifarResNet",
    "MobileNetV2",
    "cifar10",
    "cifar_resnet",
    "data_dir",
    "imagenet_compat",
    "mobilenet_v2",
    "squeezenet1_1",
]
