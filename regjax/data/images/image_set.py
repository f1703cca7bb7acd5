"""Labelled images in memory, and what every set of them has to satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from regjax.errors import InputError


class ImageSet(NamedTuple):
    """Images of one size with their classes, in the order of their source."""

    images: np.ndarray  # uint8 [N, H, W, C], C is 1 (gray) or 3 (RGB)
    labels: np.ndarray  # int32 [N], from 0 to len(class_names) - 1
    class_names: tuple[str, ...]
    places: Sequence[str]  # [N], "train-images-idx3-ubyte.gz[12]", "train.tar: cat/0001.png"


class Split(NamedTuple):
    """Some images of a set, in its order."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N], as trained on
    true_labels: np.ndarray  # int32 [N]
    index: np.ndarray  # type: ignore[assignment]  # int32 [N], rows of the source


def checked(images: ImageSet, source: str) -> ImageSet:
    """The set with labels as int32, once it is known to be whole; `source` names it in errors.

    Raises:
        InputError: no image, arrays of another shape or kind, numbers of labels or places that
            differ from that of the images, a label out of range, fewer than two classes, a name
            that two classes share, or a class without an image.
    """
    pixels, labels = np.asarray(images.images), np.asarray(images.labels)
    names = tuple(images.class_names)
    if not pixels.size:
        raise InputError(f"{source} holds no image: the array has shape {pixels.shape}")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise InputError(
            f"{source}: images are {pixels.dtype} of shape {pixels.shape}: expected uint8 [N, H, W, C] "
            "with one channel or three"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != pixels.shape[:1]:
        raise InputError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}: expected an integer for "
            f"each of {len(pixels)} images"
        )
    if len(images.places) != len(pixels):
        raise InputError(f"{source}: {len(images.places)} places for {len(pixels)} images")
    if len(names) < 2 or len(set(names)) != len(names):
        raise InputError(
            f"{source}: the classes are {', '.join(names)}: expected at least two, named differently"
        )
    wrong = (labels < 0) | (labels >= len(names))
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise InputError(
            f"{source}: {images.places[row]} has label {labels[row]}: expected 0 to {len(names) - 1}, "
            f"one of {len(names)} classes"
        )
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        empty = int(np.argmin(counts))
        raise InputError(
            f"{source}: class {empty}, {names[empty]!r}, has no image: add some, or leave the class out"
        )
    return ImageSet(pixels, labels.astype(np.int32), names, images.places)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel's pixels as parts of 255, exactly.

        m = sum_v v h(v) / 255 N,   s^2 = sum_v (v / 255 - m)^2 h(v) / N

    with h(v) the number of pixels of value v. A channel that is the same everywhere has s = 1, so
    that it standardises to 0.

    Args:
        images: uint8 `[N, H, W, C]`.

    Returns:
        (m, s), float64 `[C]` each.

    >>> channel_statistics(np.array([0, 255, 255, 255], np.uint8).reshape(1, 2, 2, 1))
    (array([0.75]), array([0.4330127]))
    """
    values = np.arange(256) / 255.0
    means, deviations = [], []
    for channel in range(images.shape[3]):
        histogram = np.zeros(256)
        for start in range(0, len(images), 4096):  # bincount makes an int64 of every pixel
            part = images[start : start + 4096, :, :, channel]
            histogram += np.bincount(part.ravel(), minlength=256)
        share = histogram / histogram.sum()
        mean = float(share @ values)
        deviation = float(np.sqrt(share @ (values - mean) ** 2))
        constant = np.count_nonzero(histogram) == 1
        means.append(mean)
        deviations.append(1.0 if constant else deviation)
    return np.array(means), np.array(deviations)
