"""Estimates of the label noise from the probabilities of a model that was trained on noisy labels.

Everywhere T[i, j] is the probability that an example of class i is labelled j, every row summing to
one: what `label_smearing` takes. p are the model's probabilities.

Host side, in NumPy float64: once per data set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def anchor_noise_matrix(probabilities: ArrayLike, *, quantile: float = 1.0) -> np.ndarray:
    """The noise matrix from anchor points, examples that surely belong to one class.

        T[i, j] = p(j | x_i),    x_i = argmax_x p(i | x)

    Exact if p is the posterior of the noisy labels and every class i has an example whose true
    class is i with certainty.

    Use it for the corrections of `label_smearing` where every class has examples that are certain.

    Args:
        probabilities: p `[N, K]`, the noisy labels' probabilities, out of sample.
        quantile: of every class, take the example at this quantile of p(i | x), rounded down,
            instead of the largest: 0.97 in much public code, which guards against outliers where
            examples are many.

    Returns:
        T, NumPy float64 `[K, K]`.

    Raises:
        ValueError: no rows of probabilities, a quantile out of range.

    References:
        Patrini, Rozza, Menon, Nock, Qu, *Making Deep Neural Networks Robust to Label Noise: a Loss
        Correction Approach*, CVPR 2017, https://arxiv.org/abs/1609.03683.

        Much public code removes the largest probabilities of a class in place, so that later rows
        hold zeros and do not sum to one.

    >>> anchor_noise_matrix([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]])
    array([[0.9, 0.1],
           [0.3, 0.7]])
    """
    probs = _probabilities(probabilities)
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile must lie in [0, 1]; got {quantile}")
    order = np.argsort(probs, axis=0, kind="stable")
    return probs[order[int(quantile * (len(probs) - 1))]]


def confident_noise_matrix(probabilities: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The noise matrix from confident counts, as in confident learning.

        t_j = mean of p(j | x) over the examples labelled j
        C[s, j] = number of examples labelled s of confident class j,
                  the most probable of those with p(j | x) >= t_j
        Q[s, j] = N_s C[s, j] / sum_j' C[s, j'],    T[j, s] = Q[s, j] / sum_s' Q[s', j]

    with N_s the number of examples labelled s. Examples that reach no threshold are not counted. An
    estimate, even from exact posteriors: it is exact if the confident class of every example is its
    true class.

    Use it in place of `anchor_noise_matrix`, or to see which classes are confused, where the model is
    confident of the right class for most examples but no example is certain.

    Args:
        probabilities: p `[N, K]`, the noisy labels' probabilities, out of sample.
        labels: the noisy labels `[N]`, integers from 0 to K - 1; every class at least once.

    Returns:
        T, NumPy float64 `[K, K]`.

    Raises:
        TypeError: labels that are not integers.
        ValueError: no rows of probabilities; labels that do not fit, or lack a class.

    References:
        Northcutt, Jiang, Chuang, *Confident Learning: Estimating Uncertainty in Dataset Labels*,
        2021, https://arxiv.org/abs/1911.00068.

        As in cleanlab a threshold is reached up to 1e-6, and C[j, j] is at least one.

        Differs from cleanlab, which returns the transpose, rounds Q to integers, and gives an
        example of several confident classes to the most probable class of all, confident or not.

    >>> probabilities = [[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]
    >>> confident_noise_matrix(probabilities, [0, 0, 1, 1, 1])
    array([[0.66666667, 0.33333333],
           [0.        , 1.        ]])
    """
    probs = _probabilities(probabilities)
    classes = probs.shape[1]
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype} of shape {labels.shape}")
    if labels.shape != (len(probs),) or np.any((labels < 0) | (labels >= classes)):
        raise ValueError(
            f"labels must be {len(probs)} integers from 0 to {classes - 1}; got shape "
            f"{labels.shape}, from {labels.min(initial=0)} to {labels.max(initial=0)}"
        )
    counts = np.bincount(labels, minlength=classes)
    if np.any(counts == 0):
        raise ValueError(f"labels hold no example of class {int(np.argmin(counts))}")
    thresholds = np.zeros(classes)
    np.add.at(thresholds, labels, probs[np.arange(len(labels)), labels])
    confident = probs >= thresholds / counts - 1e-6
    guesses = np.argmax(np.where(confident, probs, -np.inf), axis=1)
    counted = confident.any(axis=1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[counted], guesses[counted]), 1.0)
    np.fill_diagonal(joint, np.maximum(np.diagonal(joint), 1.0))
    joint *= (counts / joint.sum(axis=1))[:, None]
    return (joint / joint.sum(axis=0)).T


def _probabilities(probabilities: ArrayLike) -> np.ndarray:
    probs = np.asarray(probabilities, np.float64)
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"probabilities have shape {probs.shape}; expected [N, K], N at least 1")
    wrong = ~(np.all(probs >= 0.0, axis=1) & np.isclose(probs.sum(axis=1), 1.0, atol=1e-3))
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise ValueError(
            f"probabilities must be rows that sum to one; row {row} is {probs[row].tolist()}"
        )
    return probs / probs.sum(axis=1, keepdims=True)
