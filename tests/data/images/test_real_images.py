"""The published figures of Fashion-MNIST, CIFAR-10 and CIFAR-N, where the files are at hand."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import pytest

from regjax.data.images import (
    ImageData,
    ImageSet,
    LongTail,
    channel_statistics,
    prepare_images,
    read_human_labels,
    read_images,
)
from regjax.data.images.folders import labelled, tar_files

DATA = pathlib.Path(__file__).resolve().parents[3].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs ../shared/data, which is outside of the repository"
)


def test_fashion_mnist():
    train = read_images(f"idx:{DATA / 'fashion_mnist'}:train")
    mean, std = channel_statistics(train.images)
    np.testing.assert_allclose([mean[0], std[0]], [0.28604, 0.35302], atol=5e-6)
    assert train.images.shape == (60_000, 28, 28, 1)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    test = read_images(f"idx:{DATA / 'fashion_mnist'}:test")
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@pytest.fixture(scope="module")
def cifar_labels():
    """Labels of the 50,000 training images from the archive, no image decoded."""
    files = tar_files(DATA / "cifar10_jpg" / "train.tar.xz")
    return np.array([CIFAR10.index(file.class_name) for file in files])


def test_cifar10_is_in_its_official_order(cifar_labels):
    assert len(cifar_labels) == 50_000
    assert np.bincount(cifar_labels).tolist() == [5000] * 10
    counts = [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert np.bincount(cifar_labels[:10_000]).tolist() == counts
    first = itertools.islice(tar_files(DATA / "cifar10_jpg" / "train.tar.xz"), 200)
    found = labelled(first)
    assert found.images.shape == (200, 32, 32, 3) and found.class_names == CIFAR10
    np.testing.assert_array_equal(found.labels, cifar_labels[:200])
    # The frog of the first image, as its first pixel is known, up to the loss of JPEG.
    np.testing.assert_allclose(found.images[0, 0, 0].astype(int), [59, 62, 63], atol=25)


def test_a_long_tail_of_cifar10_has_the_published_size(cifar_labels):
    nothing = np.zeros((50_000, 1, 1, 1), np.uint8)
    images = ImageSet(nothing, cifar_labels, CIFAR10, range(50_000))
    splits = prepare_images(ImageData(images, images, tail=LongTail("exponential", 100)))
    assert len(splits.train.labels) == 12_406
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert np.bincount(splits.train.labels).tolist() == counts


@pytest.mark.parametrize(
    ("column", "rate"),
    [
        ("aggre_label", 0.0901),
        ("random_label1", 0.17234),
        ("random_label2", 0.18122),
        ("random_label3", 0.1764),
        ("worse_label", 0.40208),
    ],
)
def test_noise_rates_of_cifar_n(cifar_labels, column, rate):
    file = str(DATA / "cifar_n" / "CIFAR-10_human.npz")
    labels = read_human_labels(file, column, cifar_labels)
    assert np.mean(labels != cifar_labels) == pytest.approx(rate, abs=5e-6)
