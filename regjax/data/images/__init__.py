"""Labelled images: sources, splits, label noise, long tails and augmentation."""

from regjax.data.images.augmentation import Augmentation, augment, mixup, standardise
from regjax.data.images.config import ImageData
from regjax.data.images.image_set import ImageSet, Split, channel_statistics
from regjax.data.images.noise import CIFAR10_PAIRS, LabelNoise, noisy_labels, read_human_labels
from regjax.data.images.sources import read_images
from regjax.data.images.splits import ImageSplits, prepare_images
from regjax.data.images.tails import LongTail, tail_counts

__all__ = [
    "CIFAR10_PAIRS",
    "Augmentation",
    "ImageData",
    "ImageSet",
    "ImageSplits",
    "LabelNoise",
    "LongTail",
    "Split",
    "augment",
    "channel_statistics",
    "mixup",
    "noisy_labels",
    "prepare_images",
    "read_human_labels",
    "read_images",
    "standardise",
    "tail_counts",
]
