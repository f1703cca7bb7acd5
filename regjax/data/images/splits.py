"""Training, held-out and test images of a run, every one checked before anything is trained."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from regjax.data.images.config import ImageData
from regjax.data.images.image_set import ImageSet, Split
from regjax.data.images.noise import noisy_labels, read_human_labels
from regjax.data.images.sources import read_images
from regjax.data.images.tails import tail_counts
from regjax.errors import InputError

# Words of the generator that orders epochs, apart from those of any seed there.
STREAM = zlib.crc32(b"image splits") << 64


class ImageSplits(NamedTuple):
    """What `prepare_images` makes of a source."""

    train: Split
    held_out: Split | None
    test: Split
    class_names: tuple[str, ...]
    noise_matrix: np.ndarray  # float64 [C, C], P(label j | true class i)


def prepare_images(data: ImageData) -> ImageSplits:
    """Reads the sources and takes the splits; labels are the true ones.

    Every class has a random order of its images, a function of (`split_seed`, rows of the source).
    `limit` keeps the first of each order, `held_out` takes round(share n_k) from its end, at least
    one, and `tail` keeps the first of what is left, n_k of `tail_counts` from the smallest class's
    size.

    `noise_matrix` is that of `noisy_labels` with the seed `split_seed`: for instance noise another
    seed gives another one.

    Raises:
        InputError: a source that cannot be read (see `read_images`), training and test images of
            different shapes or classes, a class left without training or held-out images, noise or
            augmentation that does not go with the images.
    """
    source, test = read_images(data.train, data.image_size), read_images(data.test, data.image_size)
    _check_alike(source, test)
    classes = len(source.class_names)
    height, width = source.images.shape[1:3]
    data.augmentation.check(height, width)
    if data.noise is not None and data.noise.kind == "human":
        read_human_labels(
            data.noise.file, data.noise.column, source.labels, num_classes=classes
        )  # the whole file, which no subset of the rows shows
    rows, ranks = _limited(source, data)
    counts = np.bincount(source.labels[rows], minlength=classes)
    held = np.zeros(classes, np.int64)
    if data.held_out:
        held = np.maximum([round(data.held_out * count) for count in counts.tolist()], 1)
    kept = counts - held
    if np.any(kept < 1):
        short = int(np.argmin(kept))
        raise InputError(
            f"class {short}, {source.class_names[short]!r}, has {counts[short]} training images, too few "
            f"to hold out {data.held_out:g} and train on the rest: every class needs one of each; lower "
            "held_out, raise limit, or give the class more images"
        )
    if data.tail is not None:
        wanted = tail_counts(data.tail, int(kept.min()), classes)
        if np.any(wanted < 1):
            short = int(np.argmin(wanted))
            raise InputError(
                f"a tail of ratio {data.tail.ratio:g} leaves class {short}, "
                f"{source.class_names[short]!r}, without a training image ({kept.min()} in the largest "
                "class): lower the ratio"
            )
        trained = wanted
    else:
        trained = kept
    labels = source.labels[rows]
    train = _split(source, rows[ranks < trained[labels]])
    held_out = _split(source, rows[ranks >= kept[labels]]) if data.held_out else None
    _, matrix = noisy_labels(train, data.noise, classes, data.split_seed)
    tested = _split(test, _limited(test, data)[0])
    return ImageSplits(train, held_out, tested, source.class_names, matrix)


def _check_alike(source: ImageSet, test: ImageSet) -> None:
    if source.class_names != test.class_names:
        pairs = zip(source.class_names, test.class_names, strict=False)
        number = next(
            (i for i, (first, second) in enumerate(pairs) if first != second),
            min(len(source.class_names), len(test.class_names)),
        )
        raise InputError(
            f"training images are of {len(source.class_names)} classes, test images of "
            f"{len(test.class_names)}, and they differ from class {number} on "
            f"({_name(source, number)} and {_name(test, number)}): give sources of the same classes"
        )
    if source.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"training images have shape {source.images.shape[1:]}, test images "
            f"{test.images.shape[1:]}: give sources of the same kind, or an image_size"
        )


def _name(images: ImageSet, number: int) -> str:
    return repr(images.class_names[number]) if number < len(images.class_names) else "none"


def _limited(source: ImageSet, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """Rows that `limit` leaves, ascending, and the place of each in its class's order."""
    labels = source.labels
    counts = np.bincount(labels, minlength=len(source.class_names))
    random = np.random.Philox(key=(data.split_seed % 2**64) + STREAM)
    by_class = np.lexsort((random.random_raw(len(labels)), labels))
    ranks = np.empty(len(labels), np.int64)
    ranks[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    if not data.limit or data.limit >= len(labels):
        return np.arange(len(labels)), ranks
    if data.limit < len(counts):
        raise InputError(
            f"limit is {data.limit}: expected at least one image for each of {len(counts)} classes"
        )
    # By place in units of the class's size, so that every prefix has the classes in proportion and
    # the first C rows are one of each.
    rows = np.sort(np.lexsort((labels, ranks / counts[labels]))[: data.limit])
    return rows, ranks[rows]


def _split(source: ImageSet, rows: np.ndarray) -> Split:
    labels = source.labels[rows]
    return Split(source.images[rows], labels, labels, rows.astype(np.int32))
