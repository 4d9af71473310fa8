"""Networks with real weights, and the small data packs to run them on."""

from mixbit.zoo.cifar import VGG9, CifarResNet, ResNet8, cifar_resnet, resnet8, vgg9
from mixbit.zoo.data import (
    cifar10,
    cifar10_jpeg,
    cifar10_jpeg_pixels,
    cifar10_pixels,
    coco,
    data_dir,
    imagenet_compat,
    person_labels,
)
from mixbit.zoo.fastestdet import FastestDet, fastestdet
from mixbit.zoo.imagenet import (
    MobileNetV1,
    MobileNetV2,
    mobilenet_v1,
    mobilenet_v2,
    squeezenet1_1,
    vww_mobilenet,
)
from mixbit.zoo.ssd import SSD, ssd_mobilenet_v2, ssdlite_mobilenet_v2
from mixbit.zoo.yolov2 import YoloV2, yolov2

__all__ = [
    "SSD",
    "VGG9",
    "CifarResNet",
    "FastestDet",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet8",
    "YoloV2",
    "cifar10",
    "cifar10_jpeg",
    "cifar10_jpeg_pixels",
    "cifar10_pixels",
    "cifar_resnet",
    "coco",
    "data_dir",
    "fastestdet",
    "imagenet_compat",
    "mobilenet_v1",
    "mobilenet_v2",
    "person_labels",
    "resnet8",
    "squeezenet1_1",
    "ssd_mobilenet_v2",
    "ssdlite_mobilenet_v2",
    "vgg9",
    "vww_mobilenet",
    "yolov2",
]
