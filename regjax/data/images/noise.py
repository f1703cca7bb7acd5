"""Labels that are wrong at times: by chance, by the image, or as people gave them."""

from __future__ import annotations

import dataclasses
import io
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import special

from regjax.data.images.image_set import Split
from regjax.errors import InputError

CIFAR10_PAIRS = ((9, 1), (2, 0), (4, 7), (3, 5), (5, 3))
"""Truck to automobile, bird to airplane, deer to horse, cat to dog and back (Patrini et al., 2017)."""

# A stream of its own: the words that order an epoch are of the same generator, and a run may have
# one seed for both.
STREAM = zlib.crc32(b"label noise") << 64


@dataclasses.dataclass(frozen=True)
class LabelNoise:
    """How training labels are made wrong.

    - `symmetric`: with probability `rate` the label flips to another class, each alike. The a of
      `regjax.losses.label_smearing`, which may draw the true class again, is larger by L / (L - 1)
      for L classes: `regjax.losses.smearing_rate(rate, L)`.
    - `asymmetric`: with probability `rate` a label flips to the one class that `pairs` gives.
    - `instance`: each image has a probability of its own, on average about `rate`, and its own
      distribution over the other classes, see `noisy_labels`.
    - `human`: the labels of a file, see `read_human_labels`.

    Raises:
        InputError: an unknown kind, a rate out of range, a field that the kind does not have or that
            it lacks.
    """

    kind: Literal["symmetric", "asymmetric", "instance", "human"] = "symmetric"
    rate: float = 0.0
    """Probability of a wrong label, 0 to 1; 0: every label is right. Not of `human`."""
    pairs: tuple[tuple[int, int], ...] = ()
    """For `asymmetric`: classes and what they flip to, others keep their labels; empty: the next class."""
    file: str = ""
    """For `human`: the .npz file."""
    column: str = ""
    """For `human`: the array in the file, such as worse_label."""

    def __post_init__(self) -> None:
        if self.kind not in ("symmetric", "asymmetric", "instance", "human"):
            raise InputError(
                f"noise is {self.kind!r}: expected symmetric, asymmetric, instance or human"
            )
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(f"the noise rate is {self.rate}: expected 0 to 1")
        if self.kind == "human" and not (self.file and self.column and self.rate == 0.0):
            raise InputError(
                f"human noise has file={self.file!r}, column={self.column!r}, rate={self.rate}: expected "
                "a file and a column, whose labels have a rate of their own"
            )
        if self.kind != "human" and (self.file or self.column):
            raise InputError(f"file and column are for human noise, not for {self.kind}")
        if self.kind != "asymmetric" and self.pairs:
            raise InputError(f"pairs are for asymmetric noise, not for {self.kind}")
        if len({pair[0] for pair in self.pairs}) < len(self.pairs):
            raise InputError(f"noise pairs are {self.pairs}: a class can flip to one class only")


def noisy_labels(
    split: Split, noise: LabelNoise | None, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with noise, and the noise matrix T[i, j] = P(label j | true class i).

    T is what `regjax.losses.label_smearing` and the corrections take: exact for symmetric (1 - rate
    on the diagonal, rate / (L - 1) elsewhere) and asymmetric noise, and the shares that were drawn or
    found for instance and human noise. Without noise it is the identity.

    A function of the split and the seed. Symmetric and asymmetric noise of an image depends on
    (seed, row in the source) alone, so that it is the same in every subset.

    Instance noise, of an image with pixels x (each less its mean over the split, all divided by
    their standard deviation) and true class y:

        q ~ normal(rate, 0.1^2) within [0, 1],    W_y ~ normal(0, 1) [pixels, L]
        P(label j) = q softmax_{k != y}(x W_y)_j for j != y,    P(label y) = 1 - q

    The softmax is close to a maximum. Cutting the normal raises the mean rate where `rate` is below
    about 0.2 and lowers it above 0.8; a rate of 0 leaves every label as it is.

    Args:
        split: images, true labels `[N]` and rows in the source `[N]`.
        noise: what is wrong; None: nothing.
        num_classes: L.
        seed: decides what is drawn; human noise has none.

    Returns:
        (labels int32 `[N]`, T float64 `[L, L]`).

    Raises:
        InputError: pairs out of range, or a file of human labels that does not go with the split.

    References:
        Xia, Liu, Han, Wang, Gong, Liu, Niu, Tao, Sugiyama, *Part-dependent Label Noise: Towards
        Instance-dependent Label Noise*, NeurIPS 2020, https://arxiv.org/abs/2006.07836. A
        reconstruction: the scale of x is not given there, and public code differs in it.

    >>> true = np.array([0, 1, 2])
    >>> split = Split(np.zeros((3, 1, 1, 1), np.uint8), true, true, np.arange(3))
    >>> noisy_labels(split, LabelNoise("asymmetric", 1.0), 3, seed=0)[0]
    array([1, 2, 0], dtype=int32)
    """
    true = np.asarray(split.true_labels, np.int32)
    if noise is None or (noise.rate == 0.0 and noise.kind != "human"):
        return true.copy(), np.eye(num_classes)
    if noise.kind == "human":
        labels = read_human_labels(noise.file, noise.column, true, split.index, num_classes)
        return labels, _shares(true, labels, num_classes)
    uniform = _uniform(seed, int(split.index.max()) + 1, 2)[split.index]
    if noise.kind == "symmetric":
        matrix = np.full((num_classes, num_classes), noise.rate / (num_classes - 1))
        np.fill_diagonal(matrix, 1.0 - noise.rate)
        other = (true + 1 + (uniform[:, 1] * (num_classes - 1)).astype(np.int32)) % num_classes
        return np.where(uniform[:, 0] < noise.rate, other, true), matrix
    if noise.kind == "asymmetric":
        target = _targets(noise, num_classes)
        matrix = (1.0 - noise.rate) * np.eye(num_classes)
        matrix[np.arange(num_classes), target] += noise.rate
        return np.where(uniform[:, 0] < noise.rate, target[true], true), matrix
    labels = _by_instance(split.images, true, uniform, noise.rate, num_classes, seed)
    return labels, _shares(true, labels, num_classes)


def _uniform(seed: int, *shape: int, stream: int = 0) -> np.ndarray:
    """Numbers in [0, 1) from the words of Philox, the same with every version of NumPy."""
    random = np.random.Philox(key=(int(seed) % 2**64) + STREAM + (stream << 96))
    return (random.random_raw(int(np.prod(shape))) >> np.uint64(11)).reshape(shape) * 2.0**-53


def _targets(noise: LabelNoise, num_classes: int) -> np.ndarray:
    if not noise.pairs:
        return (np.arange(num_classes, dtype=np.int32) + 1) % num_classes
    target = np.arange(num_classes, dtype=np.int32)
    for source, to in noise.pairs:
        if not (0 <= source < num_classes and 0 <= to < num_classes) or source == to:
            raise InputError(
                f"noise pairs hold ({source}, {to}): expected two different classes from 0 to "
                f"{num_classes - 1}"
            )
        target[source] = to
    return target


def _by_instance(
    images: np.ndarray,
    true: np.ndarray,
    uniform: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
) -> np.ndarray:
    low, high = special.ndtr((0.0 - rate) / 0.1), special.ndtr((1.0 - rate) / 0.1)
    flip_rates = rate + 0.1 * special.ndtri(low + uniform[:, 0] * (high - low))
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    squares = sum(float(np.sum((part - mean) ** 2)) for part in np.array_split(pixels, 64))
    scale = np.sqrt(squares / pixels.size) or 1.0
    labels = true.copy()
    for label in range(num_classes):
        rows = np.flatnonzero(true == label)
        # A half step keeps the smallest word from becoming minus infinity.
        draws = _uniform(seed, pixels.shape[1], num_classes, stream=1 + label) + 2.0**-54
        logits = (pixels[rows] - mean) / scale @ special.ndtri(draws)
        logits[:, label] = -np.inf
        shares = flip_rates[rows, None] * special.softmax(logits, axis=1)
        shares[:, label] = 1.0 - flip_rates[rows]
        edges = np.cumsum(shares, axis=1)
        edges[:, -1] = 1.0
        labels[rows] = np.argmax(uniform[rows, 1:] < edges, axis=1)
    return labels


def _shares(true: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (true, labels), 1.0)
    totals = counts.sum(axis=1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1.0), np.eye(num_classes))


def read_human_labels(
    file: str,
    column: str,
    true_labels: np.ndarray,
    index: np.ndarray | None = None,
    num_classes: int | None = None,
) -> np.ndarray:
    """Labels that people gave, from an array of an `.npz` file, one for each image of the source.

    CIFAR-N's files hold `aggre_label`, `worse_label`, `random_label1` to 3 for CIFAR-10, and
    `noisy_label` and `noisy_coarse_label` for CIFAR-100, besides the true labels: `clean_label`, of
    coarse columns `clean_coarse_label`. Where these are there they have to be those of the source,
    so that another order of the images does not pass for noise.

    Args:
        file: the `.npz` file.
        column: the name of the array.
        true_labels: the true labels of the rows.
        index: the rows `[N]` of the source that are wanted; None: all, in order, as many as the file
            has.
        num_classes: the number of classes; None: that of the true labels.

    Returns:
        int32 `[N]`.

    Raises:
        InputError: a file that cannot be read, no such array, one that is not integers in range, of
            another length, or true labels that disagree.
    """
    path = Path(file).expanduser()
    try:
        # From bytes: NumPy leaves a file that it opened itself, and cannot read, open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            names = list(arrays.files)
            clean_name = "clean_coarse_label" if "coarse" in column else "clean_label"
            labels = arrays[column] if column in names else None
            clean = arrays[clean_name] if clean_name in names else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # NumPy and zipfile raise many kinds; each means that it is no .npz
        raise InputError(f"{path} cannot be read as .npz: {error}") from error
    if labels is None:
        raise InputError(f"{path} has no array {column!r}: expected one of {', '.join(names)}")
    true = np.asarray(true_labels)
    classes = int(true.max()) + 1 if num_classes is None else num_classes
    labels = _in_range(labels, f"{path}: {column}", classes)
    if index is None and len(labels) != len(true):
        raise InputError(
            f"{path}: {column} has {len(labels)} labels for {len(true)} images: expected one for each "
            "image of the source, in its order"
        )
    rows = np.arange(len(true)) if index is None else np.asarray(index)
    if rows.max(initial=0) >= len(labels):
        raise InputError(
            f"{path}: {column} has {len(labels)} labels, but the source has a row {rows.max()}"
        )
    if clean is not None:
        clean = _in_range(clean, f"{path}: {clean_name}", classes)
        if len(clean) != len(labels):
            raise InputError(
                f"{path}: {len(clean)} labels in {clean_name}, {len(labels)} in {column}"
            )
        wrong = int(np.count_nonzero(clean[rows] != true))
        if wrong:
            raise InputError(
                f"{path}: {clean_name} disagrees with the source on {wrong} of {len(true)} images: "
                "the file is of other images, or of another order of them"
            )
    return labels[rows]


def _in_range(labels: np.ndarray, place: str, num_classes: int) -> np.ndarray:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{place} is {labels.dtype} of shape {labels.shape}: expected integers [N]"
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise InputError(
            f"{place} holds {labels[row]} at row {row}: expected classes from 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)
