"""Splits: every class its share, nothing twice, and every check before training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data.images import (
    Augmentation,
    ImageData,
    ImageSet,
    LabelNoise,
    LongTail,
    prepare_images,
    tail_counts,
)
from regjax.errors import InputError

NAMES = ("ape", "bee", "cat", "dog")


def image_set(counts, seed: int = 0, size: int = 2) -> ImageSet:
    """Images whose pixels tell their row."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels)
    rows = np.arange(len(labels))
    images = np.zeros((len(labels), size, size, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = rows % 256, rows // 256
    return ImageSet(images, labels, NAMES[: len(counts)], [f"row {row}" for row in rows])


def data(counts, test=(3, 3, 3, 3), **fields) -> ImageData:
    return ImageData(image_set(counts), image_set(test[: len(counts)], seed=1), **fields)


def by_class(split, classes: int) -> list[int]:
    return np.bincount(split.true_labels, minlength=classes).tolist()


def check_split(split, source: ImageSet) -> None:
    """Rows ascend, and images and labels are theirs."""
    assert (np.diff(split.index) > 0).all() and split.index.dtype == np.int32
    np.testing.assert_array_equal(split.images, source.images[split.index])
    np.testing.assert_array_equal(split.true_labels, source.labels[split.index])
    np.testing.assert_array_equal(split.labels, split.true_labels)
    assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


def test_by_default_everything_is_as_it_was():
    config = data((5, 4))
    splits = prepare_images(config)
    check_split(splits.train, config.train)
    check_split(splits.test, config.test)
    assert len(splits.train.index) == 9 and len(splits.test.index) == 6
    assert splits.held_out is None and splits.class_names == ("ape", "bee")
    np.testing.assert_array_equal(splits.noise_matrix, np.eye(2))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(2, 60), min_size=2, max_size=4),
    share=st.floats(0.01, 0.6),
    limit=st.integers(0, 200),
    ratio=st.none() | st.floats(1, 3),
    seed=st.integers(-(2**63), 2**64),
)
def test_every_class_gives_its_share(counts, share, limit, ratio, seed):
    tail = None if ratio is None else LongTail("exponential", ratio)
    config = data(counts, held_out=share, limit=limit, tail=tail, split_seed=seed)
    classes, total = len(counts), sum(counts)
    taken = np.array(counts)
    if 0 < limit < total:
        if limit < classes:
            with pytest.raises(InputError, match=f"limit is {limit}: expected at least one"):
                prepare_images(config)
            return
        unlimited = prepare_images(dataclasses.replace(config, held_out=0.0, tail=None))
        taken = np.array(by_class(unlimited.train, classes))
        assert taken.sum() == limit and (taken >= 1).all()
        # The largest shares of the classes differ by less than one image.
        assert (np.abs(taken - limit * np.array(counts) / total) <= classes).all()
    held = np.array([max(1, round(share * count)) for count in taken.tolist()])
    kept = taken - held
    trained = kept if tail is None or kept.min() < 1 else tail_counts(tail, kept.min(), classes)
    if kept.min() < 1 or trained.min() < 1:
        with pytest.raises(InputError, match=r"class \d, '(ape|bee|cat|dog)'"):
            prepare_images(config)
        return
    splits = prepare_images(config)
    for split, source in (
        (splits.train, config.train),
        (splits.held_out, config.train),
        (splits.test, config.test),
    ):
        check_split(split, source)
    assert by_class(splits.held_out, classes) == held.tolist()
    assert by_class(splits.train, classes) == trained.tolist()
    assert not set(splits.train.index.tolist()) & set(splits.held_out.index.tolist())


def test_splits_are_a_function_of_the_split_seed():
    config = data((50, 40, 30), held_out=0.2, tail=LongTail("step", 4), limit=100)
    first, second = prepare_images(config), prepare_images(config)
    np.testing.assert_array_equal(first.held_out.index, second.held_out.index)
    other = prepare_images(dataclasses.replace(config, split_seed=1))
    assert (first.held_out.index != other.held_out.index).any()
    # Noise and augmentation have no say in it.
    noisy = dataclasses.replace(
        config, noise=LabelNoise("symmetric", 0.5), augmentation=Augmentation(flip=True)
    )
    for name in ("train", "held_out", "test"):
        found, same = getattr(prepare_images(noisy), name), getattr(first, name)
        np.testing.assert_array_equal(found.index, same.index)
        np.testing.assert_array_equal(found.labels, found.true_labels)


def test_more_is_more_of_the_same():
    """A larger limit, a smaller held-out share and a shorter tail contain what the smaller has."""
    config = data((50, 40, 30))

    def rows(name: str, **fields) -> set[int]:
        return set(
            getattr(prepare_images(dataclasses.replace(config, **fields)), name).index.tolist()
        )

    assert rows("train", limit=30) < rows("train", limit=60) < rows("train")
    assert rows("held_out", held_out=0.1) < rows("held_out", held_out=0.3)
    assert rows("train", tail=LongTail("step", 5)) < rows("train", tail=LongTail("step", 2))


def test_every_image_is_held_out_as_often_as_another():
    config = data((20, 10), held_out=0.2)
    times = np.zeros(30)
    for seed in range(400):
        times[prepare_images(dataclasses.replace(config, split_seed=seed)).held_out.index] += 1
    spread = np.sqrt(400 * 0.2 * 0.8)
    assert np.abs(times - 80).max() < 4.5 * spread


def test_the_limit_is_of_the_test_images_too():
    splits = prepare_images(data((20, 20), test=(30, 10), limit=8))
    assert by_class(splits.train, 2) == [4, 4] and by_class(splits.test, 2) == [6, 2]


def test_the_noise_matrix_is_that_of_the_noise():
    splits = prepare_images(data((9, 9, 9), noise=LabelNoise("symmetric", 0.3)))
    expected = np.full((3, 3), 0.15) + 0.55 * np.eye(3)
    np.testing.assert_allclose(splits.noise_matrix, expected, rtol=1e-12)


def test_human_labels_are_checked_against_all_of_the_source(tmp_path):
    config = data((9, 8), held_out=0.2, tail=LongTail("step", 2))
    labels = config.train.labels
    file = tmp_path / "human.npz"
    noise = LabelNoise("human", file=str(file), column="worse_label")
    config = dataclasses.replace(config, noise=noise)
    np.savez(file, worse_label=1 - labels, clean_label=labels)
    np.testing.assert_array_equal(prepare_images(config).noise_matrix, [[0, 1], [1, 0]])
    np.savez(file, worse_label=np.append(labels, 0))
    with pytest.raises(InputError, match="18 labels for 17 images"):
        prepare_images(config)
    np.savez(file, worse_label=labels, clean_label=1 - labels)
    with pytest.raises(InputError, match="disagrees with the source on 17 of 17 images"):
        prepare_images(config)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            data((5, 1), held_out=0.1),
            "class 1, 'bee', has 1 training images, too few to hold out 0.1",
        ),
        (
            data((9, 3), held_out=0.9),
            "class 0, 'ape', has 9 training|class 1, 'bee', has 3 training",
        ),
        (
            data((9, 5), tail=LongTail("step", 6)),
            "ratio 6 leaves class 1, 'bee', without a training",
        ),
        (data((5, 5), limit=1), "limit is 1: expected at least one image for each of 2 classes"),
        (
            data((5, 5), augmentation=Augmentation(crop_padding=2)),
            "crop_padding is 2: .* 2 x 2 pix",
        ),
        (data((5, 5), augmentation=Augmentation(cutout=3)), "cutout is 3: expected at most"),
        (data((5, 5), noise=LabelNoise("asymmetric", 0.1, ((0, 2),))), "classes from 0 to 1"),
        (
            ImageData(image_set((5, 5)), image_set((5, 5, 5))),
            "differ from class 2 on .none and 'cat'.",
        ),
        (
            ImageData(image_set((5, 5)), image_set((5, 5))._replace(class_names=("ape", "dog"))),
            "differ from class 1 on .'bee' and 'dog'.",
        ),
        (
            ImageData(image_set((5, 5)), image_set((5, 5), size=3)),
            r"\(2, 2, 1\), test images \(3, 3",
        ),
        (
            ImageData(image_set((5, 5))._replace(labels=np.ones(10, int)), image_set((5, 5))),
            "no image",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(config, match):
    with pytest.raises(InputError, match=match):
        prepare_images(config)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"train": "", "test": "tar:a.tar"}, "train is empty: give a source"),
        ({"train": "tar:a.tar"}, "test is empty: give a source"),
        ({"train": "a", "test": "b", "held_out": 1.0}, "held_out is 1.0"),
        ({"train": "a", "test": "b", "held_out": -0.1}, "held_out is -0.1"),
        ({"train": "a", "test": "b", "limit": -1}, "limit is -1"),
        ({"train": "a", "test": "b", "image_size": -1}, "image_size is -1"),
    ],
)
def test_fields_are_checked(fields, match):
    with pytest.raises(InputError, match=match):
        ImageData(**fields)


def test_an_image_size_holds_for_both_sources():
    config = ImageData(image_set((5, 5), size=4), image_set((5, 5), size=6), image_size=3)
    splits = prepare_images(config)
    assert splits.train.images.shape == (10, 3, 3, 1) == splits.test.images.shape
