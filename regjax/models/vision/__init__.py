"""Image classifiers: `build(config, image_shape, num_classes)` gives `init` and `apply`."""

from regjax.models.vision.classifier import Classifier, Outputs, VisionModel, build
from regjax.models.vision.convolution import convolve
from regjax.models.vision.resnet import CifarResNet, ResNet
from regjax.models.vision.small import Mlp, SmallCnn
from regjax.models.vision.transformer import VisionTransformer

__all__ = [
    "CifarResNet",
    "Classifier",
    "Mlp",
    "Outputs",
    "ResNet",
    "SmallCnn",
    "VisionModel",
    "VisionTransformer",
    "build",
    "convolve",
]
