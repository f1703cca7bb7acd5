"""Augmentation: exactly the loop over images, with draws that are uniform and the key's alone."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from regjax.data.images import Augmentation, augment, mixup, standardise
from regjax.data.images.augmentation import Draws, _take, _take_by_products, draw, mixing
from regjax.errors import InputError

MEAN, STD = np.array([0.3, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])


def batch(count: int, height: int = 7, width: int = 9, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def looped(images: np.ndarray, draws: Draws, augmentation: Augmentation) -> np.ndarray:
    """One image after another in float64: pad, crop, flip, standardise, cut out."""
    count, height, width, channels = images.shape
    padding, size = augmentation.crop_padding, augmentation.cutout
    found = []
    for b in range(count):
        image = np.zeros((height + 2 * padding, width + 2 * padding, channels))
        image[padding : padding + height, padding : padding + width] = images[b]
        row, column = np.asarray(draws.offsets[b])
        image = image[row : row + height, column : column + width]
        if augmentation.flip and draws.flips[b]:
            image = image[:, ::-1]
        image = (image / 255 - MEAN[:channels]) / STD[:channels]
        if size:
            row, column = np.asarray(draws.centres[b]) - size // 2
            image[max(row, 0) : max(row + size, 0), max(column, 0) : max(column + size, 0)] = 0
        found.append(image)
    return np.stack(found)


@pytest.mark.parametrize(
    ("augmentation", "channels"),
    [
        (Augmentation(crop_padding=3), 3),
        (Augmentation(flip=True), 1),
        (Augmentation(cutout=4), 3),
        (Augmentation(crop_padding=6, flip=True, cutout=9), 3),
        (Augmentation(crop_padding=1, flip=True, cutout=1), 1),
    ],
)
def test_it_is_the_loop_over_the_images_and_the_key_decides(augmentation, channels):
    images = batch(64, channels=channels)

    @jax.jit
    def drawn_and_augmented(key):
        draws = draw(key, 64, 7, 9, augmentation)
        mean, std = MEAN[:channels], STD[:channels]
        return draws, augment(key, jnp.asarray(images), augmentation, mean, std)

    found = [drawn_and_augmented(jax.random.key(seed)) for seed in (3, 3, 4)]
    for draws, augmented in found:
        assert augmented.dtype == jnp.float32
        expected = looped(images, draws, augmentation)
        np.testing.assert_allclose(augmented, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert (np.asarray(found[0][1]) != np.asarray(found[2][1])).any()


def test_products_take_what_indexing_takes():
    """Every value of a pixel, and rows and columns in and out of the image."""
    images = batch(200, 5, 6)
    assert len(np.unique(images)) == 256
    random = np.random.default_rng(1)
    rows, columns = random.integers(-3, 8, (200, 5)), random.integers(-3, 9, (200, 6))
    expected = np.zeros_like(images)
    for b, i, k in np.ndindex(200, 5, 6):
        if 0 <= rows[b, i] < 5 and 0 <= columns[b, k] < 6:
            expected[b, i, k] = images[b, rows[b, i], columns[b, k]]
    for take in (_take, _take_by_products):
        np.testing.assert_array_equal(jax.jit(take)(images, rows, columns), expected)


def test_with_nothing_to_do_it_is_standardise():
    images = batch(5)
    found = augment(jax.random.key(0), jnp.asarray(images), Augmentation(mixup=0.5), MEAN, STD)
    np.testing.assert_array_equal(found, standardise(jnp.asarray(images), MEAN, STD))
    np.testing.assert_allclose(found, (images / 255 - MEAN) / STD, rtol=1e-6, atol=1e-6)


def test_every_offset_and_flip_is_as_likely_as_another():
    count = 30_000
    augmentation = Augmentation(crop_padding=2, flip=True, cutout=2)
    draws = draw(jax.random.key(1), count, 7, 9, augmentation)
    for values, number in [
        (draws.offsets[:, 0], 5),
        (draws.offsets[:, 1], 5),
        (5 * draws.offsets[:, 0] + draws.offsets[:, 1], 25),
        (draws.flips.astype(int), 2),
        (9 * draws.centres[:, 0] + draws.centres[:, 1], 63),
    ]:
        counts = np.bincount(np.asarray(values))
        assert len(counts) == number and stats.chisquare(counts).pvalue > 1e-4
    table = np.zeros((2, 5))
    np.add.at(table, (np.asarray(draws.flips, int), np.asarray(draws.offsets[:, 0])), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_mixup_mixes_images_and_targets_alike():
    images = batch(12) / np.float32(255)
    targets = np.eye(5, dtype=np.float32)[np.arange(12) % 5]

    @jax.jit
    def both(key):
        return mixing(key, 12, 0.4), mixup(key, jnp.asarray(images), jnp.asarray(targets), 0.4)

    (weight, order), (mixed, soft) = jax.tree.map(np.asarray, both(jax.random.key(4)))
    assert sorted(order.tolist()) == list(range(12)) and 0 < weight < 1
    for i, j in enumerate(order):
        expected = weight * images[i] + (1 - weight) * images[j]
        np.testing.assert_allclose(mixed[i], expected, rtol=1e-5, atol=1e-6)
        expected = weight * targets[i] + (1 - weight) * targets[j]
        np.testing.assert_allclose(soft[i], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-6)
    same, still = mixup(jax.random.key(4), images, targets, 0.0)
    assert same is images and still is targets


def test_weights_of_mixup_are_beta():
    keys = jax.random.split(jax.random.key(0), 4000)
    weights = jax.jit(jax.vmap(lambda key: mixing(key, 3, 0.2)[0]))(keys)
    assert stats.ks_1samp(np.asarray(weights), stats.beta(0.2, 0.2).cdf).pvalue > 1e-3


PROGRAM = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from regjax.data.images import Augmentation, augment, mixup
images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
targets = np.eye(16, dtype=np.float32)
mesh = Mesh(np.array(jax.devices()), ("data",))
images, targets = jax.device_put((images, targets), NamedSharding(mesh, PartitionSpec("data")))
augmentation = Augmentation(crop_padding=2, flip=True, cutout=3)

@jax.jit
def both(key, images, targets):
    found = augment(key, images, augmentation, np.full(3, .4), np.full(3, .2))
    return found, *mixup(key, found, targets, 0.3)

found = [np.asarray(array) for array in both(jax.random.key(7), images, targets)]
"""


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
def test_eight_devices_give_what_one_gives(tmp_path):
    path = tmp_path / "eight.npz"
    done = subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}\nnp.savez({str(path)!r}, len(jax.devices()), *found)"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as arrays:
        devices, *eight = (arrays[f"arr_{i}"] for i in range(4))
    assert devices == 8
    here: dict = {}
    exec(PROGRAM, here)
    np.testing.assert_array_equal(eight[0], here["found"][0])
    for found, one in zip(eight, here["found"], strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"crop_padding": -1}, {"cutout": -2}, {"mixup": -0.1}, {"mixup": float("nan")}]
)
def test_negative_numbers_are_refused(fields):
    with pytest.raises(
        InputError, match=f"augmentation.{next(iter(fields))} is .*: expected 0 or more"
    ):
        Augmentation(**fields)
