"""Noise matrices: recovered exactly where they can be, and against a loop written differently."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.losses.noise import anchor_noise_matrix, confident_noise_matrix

NOISE = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.1, 0.6]])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 6))
def test_anchor_points_give_the_matrix_of_exact_posteriors(seed, classes):
    rng = np.random.default_rng(seed)
    noise = 0.6 * np.eye(classes) + 0.4 * rng.dirichlet(np.ones(classes), classes)
    clean = np.concatenate([np.eye(classes), rng.dirichlet(np.ones(classes), 40)])
    noisy = rng.permutation(clean) @ noise
    np.testing.assert_allclose(anchor_noise_matrix(noisy), noise, rtol=1e-12)


def test_without_noise_the_anchors_are_the_identity():
    rows = np.concatenate([np.eye(3), np.full((4, 3), 1 / 3)])
    np.testing.assert_array_equal(anchor_noise_matrix(rows), np.eye(3))


def test_an_anchor_at_a_quantile_is_below_the_largest():
    first = np.linspace(0.0, 1.0, 101)
    probs = np.stack([first, 1.0 - first], axis=-1)
    np.testing.assert_allclose(anchor_noise_matrix(probs, quantile=0.97)[0], [0.97, 0.03])
    np.testing.assert_allclose(anchor_noise_matrix(probs, quantile=0.975)[1], [0.03, 0.97])
    np.testing.assert_array_equal(anchor_noise_matrix(probs), np.eye(2))
    np.testing.assert_array_equal(anchor_noise_matrix(probs, quantile=0.0), np.eye(2)[::-1])


def test_rows_sum_to_one_at_any_quantile():
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 300)
    matrix = anchor_noise_matrix(probs, quantile=0.9)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


def test_confident_counts_of_a_model_that_sees_the_true_class():
    # Of every ten examples of class i, ten NOISE[i, j] are labelled j.
    truth = np.repeat(np.arange(3), 10)
    labels = np.concatenate(
        [np.repeat(np.arange(3), np.rint(10 * row).astype(int)) for row in NOISE]
    )
    posteriors = np.eye(3)[truth] * 0.9 + 0.1 / 3
    # The thresholds are reached by the true class and by no other.
    np.testing.assert_allclose(confident_noise_matrix(posteriors, labels), NOISE)


def looped(probs, labels):
    count, classes = probs.shape
    thresholds = [probs[labels == k, k].mean() for k in range(classes)]
    joint = np.zeros((classes, classes))
    for i in range(count):
        sure = [k for k in range(classes) if probs[i, k] >= thresholds[k] - 1e-6]
        if sure:
            joint[labels[i], max(sure, key=lambda k: probs[i, k])] += 1
    for k in range(classes):
        joint[k, k] = max(joint[k, k], 1)
    matrix = np.zeros((classes, classes))
    for given_label in range(classes):
        share = np.mean(labels == given_label) / joint[given_label].sum()
        for true in range(classes):
            matrix[true, given_label] = joint[given_label, true] * share
    return matrix / matrix.sum(axis=1, keepdims=True)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5))
def test_confident_counts_are_those_of_a_loop(seed, classes):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), 60)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 60 - classes)])
    matrix = confident_noise_matrix(probs, labels)
    np.testing.assert_allclose(matrix, looped(probs, labels), rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


def test_of_several_confident_classes_the_most_probable_confident_one_counts():
    # Class 0 is the most probable of the last row, but only 1 and 2 reach their thresholds.
    probs = np.array([[0.9, 0.05, 0.05], [0.4, 0.2, 0.4], [0.4, 0.4, 0.2], [0.4, 0.35, 0.25]])
    labels = np.array([0, 1, 2, 2])
    # Thresholds .9, .2, .225: row 1 counts as class 2, rows 2 and 3 as class 1.
    joint = np.array([[1.0, 0, 0], [0, 1, 1], [0, 2, 1]])
    joint *= np.array([1.0, 1.0, 2.0])[:, None] / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        confident_noise_matrix(probs, labels), (joint / joint.sum(axis=0)).T, rtol=1e-12
    )


def test_equal_probabilities_reach_their_mean():
    # In float64 the mean of three times 0.1 is a little more.
    rows = [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.4, 0.1, 0.5], [0.4, 0.1, 0.5], [0.2, 0.2, 0.6]]
    matrix = confident_noise_matrix(rows, [0, 1, 1, 1, 2])
    np.testing.assert_allclose(matrix, [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("probabilities", "labels", "error", "message"),
    [
        (np.full((2, 2), 0.5), [0, 0], ValueError, "no example of class 1"),
        (np.full((2, 2), 0.5), [0, 2], ValueError, r"2 integers from 0 to 1; got .* from 0 to 2"),
        (np.full((2, 2), 0.5), [0, -1], ValueError, r"got .* from -1 to 0"),
        (np.full((2, 2), 0.5), [0], ValueError, r"got shape \(1,\)"),
        (np.full((2, 2), 0.5), [0.0, 1.0], TypeError, "labels must be integers; got float64"),
        (np.full((2, 2), 0.6), [0, 1], ValueError, r"sum to one; row 0 is \[0.6, 0.6\]"),
        ([[0.5, 0.5], [1.5, -0.5]], [0, 1], ValueError, "row 1 is"),
        ([[0.5, 0.5], [np.nan, 0.5]], [0, 1], ValueError, "row 1 is"),
        (np.full(2, 0.5), [0, 1], ValueError, r"shape \(2,\); expected \[N, K\]"),
        (np.zeros((0, 2)), np.zeros(0, int), ValueError, "N at least 1"),
    ],
)
def test_input_that_does_not_fit_raises(probabilities, labels, error, message):
    with pytest.raises(error, match=message):
        confident_noise_matrix(probabilities, labels)


def test_anchors_check_their_input_too():
    with pytest.raises(ValueError, match=r"quantile must lie in \[0, 1\]; got 97"):
        anchor_noise_matrix(np.full((2, 2), 0.5), quantile=97)
    with pytest.raises(ValueError, match=r"sum to one; row 1 is \[0.6, 0.6\]"):
        anchor_noise_matrix([[0.5, 0.5], [0.6, 0.6]])
