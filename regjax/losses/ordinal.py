"""Losses for ordered labels: thresholds, distances between distributions, pairs."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import ndtr
from jax.typing import ArrayLike

from regjax.losses.checks import (
    class_labels,
    floating,
    mask_of_shape,
    numbers_of_shape,
    zero_unless,
)
from regjax.losses.grid import Codec, grid_log_probs, grid_values
from regjax.losses.numeric import magnitude


def coral(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """CORAL: one binary cross-entropy for every threshold between K ordered classes.

        loss = sum_{k=0}^{K-2} BCE(z_k, [y > k]),    P(y > k) = sigmoid(z_k)

    A sum, so it grows with K. The probabilities fall with k only if the logits do: by a weight
    shared by all thresholds and ordered biases, z_k = w x + b_k. The authors' layer starts the
    biases at (K - 1) / (K - 1), ..., 2 / (K - 1), 1 / (K - 1).

    Use it for ordered classes, with a head that shares its weight between the thresholds.

    Args:
        logits: z `[..., K - 1]`, floating, one for each threshold.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; the published loss is their mean.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit.

    References:
        Cao, Mirjalili, Raschka, *Rank consistent ordinal regression for neural networks with
        application to age estimation*, 2020, https://arxiv.org/abs/1901.07884.

    >>> import numpy as np
    >>> print(f"{coral(np.array([2.1, 1.8, -2.1, -1.8]), 2):.4f}")
    0.5370
    """
    logits, labels, where = _thresholds(logits, labels, where)
    above = labels[..., None] > jnp.arange(logits.shape[-1])
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, above).sum(axis=-1)
    return zero_unless(where, jnp.where(labels > logits.shape[-1], jnp.nan, losses))


def corn(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """CORN: every threshold is learned from the examples that pass the one before it.

        loss = sum_{k <= y} BCE(z_k, [y > k]),    P(y > k) = prod_{j <= k} sigmoid(z_j)

    Use it for ordered classes with any head: P(y > k) falls with k whatever the logits.

    Args:
        logits: z `[..., K - 1]`, floating, of y > k given y > k - 1. Any logits are consistent.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example, a sum over its min(y + 1, K - 1) thresholds. The
        published loss divides the sum over all examples by the number of all their thresholds.

    Raises:
        TypeError, ValueError: as `coral`.

    References:
        Shi, Cao, Raschka, *Deep Neural Networks for Rank-Consistent Ordinal Regression Based On
        Conditional Probabilities*, 2021, https://arxiv.org/abs/2111.08851.

        Older releases of coral-pytorch divide the sum by K instead, so that it grows with the batch.

    >>> import numpy as np
    >>> logits = np.array([[2.1, 1.8, -2.1, -1.8], [1.9, -1.0, -1.5, -1.3]])
    >>> labels = np.array([2, 1])
    >>> print(f"{corn(logits, labels).sum() / np.minimum(labels + 1, 4).sum():.4f}")
    0.1673
    """
    logits, labels, where = _thresholds(logits, labels, where)
    thresholds = jnp.arange(logits.shape[-1])
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, labels[..., None] > thresholds)
    losses = jnp.where(labels[..., None] >= thresholds, losses, 0.0).sum(axis=-1)
    return zero_unless(where, jnp.where(labels > logits.shape[-1], jnp.nan, losses))


def exceedance(logits: ArrayLike, *, kind: Literal["coral", "corn"]) -> jax.Array:
    """Probabilities P(y > k) of the K - 1 thresholds of `coral` or `corn`.

        coral: sigmoid(z_k)        corn: prod_{j <= k} sigmoid(z_j)

    Their sum is the expected class, the number above 1/2 the predicted class, and the differences
    of 1, P(y > 0), ..., P(y > K - 2), 0 are the probabilities of the classes.

    Use it to read out a model that was trained with `coral` or `corn`.

    Args:
        logits: z `[..., K - 1]`, floating.
        kind: the loss that trained them.

    Returns:
        Float32 `[..., K - 1]`.

    Raises:
        TypeError: logits that are not floating.
        ValueError: an unknown `kind`.

    References:
        Cao, Mirjalili, Raschka, 2020, https://arxiv.org/abs/1901.07884, and Shi, Cao, Raschka,
        2021, https://arxiv.org/abs/2111.08851.

        The documentation of coral-pytorch names the last axis of these logits by the number of
        classes K; its code has K - 1, too.

    >>> import numpy as np
    >>> probabilities = exceedance(np.array([2.1, 1.8, -2.1, -1.8]), kind="corn")
    >>> print(f"{probabilities.sum():.4f}", (probabilities > 0.5).sum())
    1.7507 2
    """
    log_probs = jax.nn.log_sigmoid(floating(logits, "logits"))
    if kind == "corn":
        log_probs = jnp.cumsum(log_probs, axis=-1)
    elif kind != "coral":
        raise ValueError(f"kind must be 'coral' or 'corn'; got {kind!r}")
    return jnp.exp(log_probs)


def earth_mover(
    logits: ArrayLike,
    soft_labels: ArrayLike,
    codec: Codec,
    *,
    kind: Literal["plain", "squared", "root_mean_squared"] = "plain",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Earth mover's distance between the distribution over a grid and soft labels.

        plain:   sum_k |P_k - Q_k| (v_{k+1} - v_k)
        squared: sum_k (P_k - Q_k)^2 (v_{k+1} - v_k)        root_mean_squared: sqrt(squared / K)

    with P and Q the cumulative sums of the probabilities, normalised over the grid. The plain one
    is the Wasserstein-1 distance, for a point mass `number_token`; its minimiser for random labels
    is a median, that of the squared one their distribution.

    Use it where the label is a distribution over ordered values and a mistake costs by its
    distance.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        soft_labels: q `[..., K]`, floating, probabilities of sum one; of a class, its one-hot.
        codec: the grid, values v `[K]` ascending.
        kind: the distance.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; in the units of the values where `kind` is plain.

    Raises:
        TypeError: logits or labels that are not floating.
        ValueError: shapes that do not fit; a token id beyond V; an unknown `kind`.

    References:
        Hou, Yu, Samaras, *Squared Earth Mover's Distance-based Loss for Training Deep Neural
        Networks*, 2016, https://arxiv.org/abs/1611.05916, on unit distances. Talebi, Milanfar,
        *NIMA: Neural Image Assessment*, 2018, https://arxiv.org/abs/1709.05424, for the root.

    >>> import numpy as np
    >>> logits = np.log([0.35, 0.05, 0.05, 0.25, 0.30])
    >>> for kind in ("plain", "squared", "root_mean_squared"):
    ...     print(f"{earth_mover(logits, np.eye(5)[3], [1.0, 2.0, 3.0, 4.0, 5.0], kind=kind):.4f}")
    1.5000
    0.5750
    0.3391
    """
    logits, soft_labels = floating(logits, "logits"), floating(soft_labels, "soft_labels")
    values = grid_values(codec)
    if soft_labels.ndim < 1 or soft_labels.shape[-1] != len(values):
        raise ValueError(
            f"soft_labels have shape {soft_labels.shape}; expected [..., {len(values)}]"
        )
    probs = jnp.exp(grid_log_probs(logits, codec, normalize=True, where=where))
    if probs.shape != soft_labels.shape:
        raise ValueError(
            f"soft_labels have shape {soft_labels.shape}, but the logits are of a grid {probs.shape}"
        )
    where = mask_of_shape(where, soft_labels.shape[:-1])
    soft_labels = jax.lax.stop_gradient(zero_unless(where, soft_labels))
    differences = jnp.cumsum(probs - soft_labels, axis=-1)[..., :-1]
    gaps = jnp.diff(values)
    if kind == "plain":
        return zero_unless(where, jnp.sum(gaps * magnitude(differences), axis=-1))
    losses = zero_unless(where, jnp.sum(gaps * differences**2, axis=-1))
    if kind == "squared":
        return losses
    if kind != "root_mean_squared":
        raise ValueError(f"kind must be 'plain', 'squared' or 'root_mean_squared'; got {kind!r}")
    # The root has an infinite slope at zero; there the loss is at its minimum.
    equal = losses == 0.0
    return jnp.where(equal, 0.0, jnp.sqrt(jnp.where(equal, 1.0, losses / len(values))))


def thurstone(first: ArrayLike, second: ArrayLike, *, variance: ArrayLike = 2.0) -> jax.Array:
    """Probability that the first of two items with normal scores is the better one.

        P = Phi((first - second) / sqrt(variance))

    Use it for the preference between two items whose scores are uncertain.

    Args:
        first: `[...]`, floating, the mean score of the first item.
        second: `[...]`, floating, of the second.
        variance: of the difference, the sum of both items' variances; a positive number or `[...]`.

    Returns:
        Float32 `[...]`.

    Raises:
        TypeError: scores that are not floating.
        ValueError: shapes that do not fit.

    References:
        Thurstone, *A law of comparative judgment*, 1927, case III, without correlation.

    >>> print(f"{thurstone(3.5, 3.0):.4f} {thurstone(4.0, 2.5, variance=2 * 0.6**2):.4f}")
    0.6382 0.9615
    """
    return ndtr(_standardized(first, second, variance, None))


def fidelity(
    first: ArrayLike,
    second: ArrayLike,
    preferences: ArrayLike,
    *,
    variance: ArrayLike = 2.0,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Fidelity loss of a pair: whether two predicted scores prefer the item that people prefer.

        loss = 1 - sqrt(P G + eps) - sqrt((1 - P) (1 - G) + eps)
        P = thurstone(first, second),    G = preferences

    From about zero, at P = G, to one, so a pair that is far wrong has a bounded loss, and hardly
    a gradient.

    Use it for pairs of items of which one is preferred, with a probability.

    Args:
        first: `[...]`, floating, predicted scores of the first items.
        second: `[...]`, floating, of the second items.
        preferences: G `[...]`, floating, from 0 to 1: for items with ratings,
            `thurstone(mean_a, mean_b, variance=variance_a + variance_b)`. No gradient.
        variance: of the predicted difference; 2.0, a unit deviation for every item.
        epsilon: eps, which keeps the gradient of the roots finite. The least loss is -sqrt(eps).
        where: `[...]`, the pairs that count.

    Returns:
        Float32 `[...]`, one loss per pair.

    Raises:
        TypeError: scores or preferences that are not floating.
        ValueError: shapes that do not fit; epsilon not positive.

    References:
        Tsai et al., *FRank: A Ranking Method with Fidelity Loss*, SIGIR 2007; as in You et al.,
        CVPR 2025, https://arxiv.org/abs/2501.11561.

        The code of You et al. also adds 1e-8 to the variance of the ratings.

    >>> preferences = thurstone(4.0, 2.5, variance=2 * 0.6**2)
    >>> print(f"{fidelity(3.5, 3.0, preferences):.4f}")
    0.0986
    """
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be positive; got {epsilon}")
    preferences = floating(preferences, "preferences")
    where = mask_of_shape(where, preferences.shape)
    scores = _standardized(first, second, variance, where)
    if preferences.shape != scores.shape:
        raise ValueError(f"preferences have shape {preferences.shape}; expected {scores.shape}")
    preferences = jax.lax.stop_gradient(zero_unless(where, preferences))
    agreed = jnp.sqrt(ndtr(scores) * preferences + epsilon)
    losses = 1.0 - agreed - jnp.sqrt(ndtr(-scores) * (1.0 - preferences) + epsilon)
    return zero_unless(where, losses)


def _standardized(
    first: ArrayLike, second: ArrayLike, variance: ArrayLike, where: jax.Array | None
) -> jax.Array:
    first, second = floating(first, "first"), floating(second, "second")
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape}, but second {second.shape}")
    variance = jnp.asarray(variance, jnp.float32)
    if variance.ndim > 0:
        variance = numbers_of_shape(variance, "variance", first.shape)
        variance = variance if where is None else jnp.where(where, variance, 1.0)
    if where is not None and where.shape != first.shape:
        raise ValueError(f"first has shape {first.shape}; expected {where.shape}")
    return (zero_unless(where, first) - zero_unless(where, second)) / jnp.sqrt(variance)


def _thresholds(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Float32 logits `[..., K - 1]`, and labels `[...]`, K or more where they are out of range."""
    logits = floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits have shape {logits.shape}; expected [..., K - 1], K at least 2")
    labels = class_labels(labels, logits.shape[:-1], logits.shape[-1] + 1)
    where = mask_of_shape(where, labels.shape)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    return zero_unless(where, logits), labels, where
