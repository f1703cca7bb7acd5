"""Early-learning regularisation: hold on to what the model believed before it memorised noise.

Everywhere t are the targets, of every example its own, and y is the label.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless
from regjax.losses.labelled import logits_and_labels, of_label


def early_learning(
    logits: ArrayLike,
    labels: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike = 3.0,
    floor: float = 1e-4,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with early-learning regularisation (ELR).

        loss = -log p_y + w log max(1 - sum_k p_k t_k, floor),    p = softmax(logits)

    The second term rewards agreement with the targets t, every example's own running mean of
    its past probabilities, see `early_learning_targets`: where label and targets disagree it undoes
    the pull of the label. It is not positive and, without the floor, unbounded below.

    Use it where labels are noisy and training is long enough to memorise them.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        targets: t `[..., K]`, floating, from 0 and of sum at most 1. No gradient.
        weight: w. The authors' configurations have 3 for CIFAR-10, 7 for CIFAR-100.
        floor: from 0 to 1; below it the second term has no gradient.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits or targets that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, a floor out of range.

    References:
        Liu, Niles-Weed, Razavian, Fernandez-Granda, *Early-Learning Regularization Prevents
        Memorization of Noisy Labels*, NeurIPS 2020, https://arxiv.org/abs/2007.00151.

        Differs from the authors' code, which clips every p_k to [1e-4, 1 - 1e-4] instead of 1 - sum
        p t; equal where neither acts.

    >>> import numpy as np
    >>> logits, targets = np.log([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.0])
    >>> print(f"{early_learning(logits, 1, targets):.4f}")
    0.0265
    """
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"floor must lie in [0, 1); got {floor}")
    logits, labels, where = logits_and_labels(logits, labels, where)
    targets = jax.lax.stop_gradient(floating(targets, "targets"))
    if targets.shape != logits.shape:
        raise ValueError(f"targets have shape {targets.shape}, but the logits {logits.shape}")
    log_probs = jax.nn.log_softmax(logits)
    # 1 - sum p t = sum p (1 - t), without its cancellation.
    distrust = jnp.maximum(1.0 - zero_unless(where, targets), 0.0)
    regularizer = jax.nn.logsumexp(log_probs, axis=-1, b=distrust)
    if floor > 0.0:
        regularizer = jnp.maximum(regularizer, math.log(floor))
    return zero_unless(where, -of_label(log_probs, labels) + weight * regularizer)


def early_learning_targets(
    targets: ArrayLike,
    logits: ArrayLike,
    *,
    momentum: float = 0.7,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The next targets of early-learning regularisation.

        t <- m t + (1 - m) softmax(logits)

    Start from zeros; keep one row per training example. The authors' code updates first and then
    takes the loss with the new targets.

    Use it once a step, on the rows of the batch, for the targets of `early_learning`.

    Args:
        targets: t `[..., K]`, floating.
        logits: `[..., K]`, floating.
        momentum: m, from 0 to 1. The authors' configurations have 0.7 for CIFAR-10, 0.9 for
            CIFAR-100.
        where: `[...]`, the examples that count; the others keep their targets.

    Returns:
        Float32 `[..., K]`, without a gradient.

    Raises:
        TypeError: arrays that are not floating.
        ValueError: shapes that do not fit, a momentum out of range.

    References:
        Liu et al., *Early-Learning Regularization Prevents Memorization of Noisy Labels*, NeurIPS
        2020, https://arxiv.org/abs/2007.00151.

        The authors' code clips the probabilities to [1e-4, 1 - 1e-4] and normalises them again.

    >>> import numpy as np
    >>> new = early_learning_targets(np.array([0.5, 0.3, 0.0]), np.log([0.7, 0.2, 0.1]))
    >>> [f"{target:.2f}" for target in new]
    ['0.56', '0.27', '0.03']
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1]; got {momentum}")
    targets, logits = floating(targets, "targets"), floating(logits, "logits")
    if logits.ndim < 1 or targets.shape != logits.shape:
        raise ValueError(f"targets have shape {targets.shape}, but the logits {logits.shape}")
    where = mask_of_shape(where, logits.shape[:-1])
    probs = jax.nn.softmax(zero_unless(where, logits))
    new = momentum * targets + (1.0 - momentum) * probs
    return jax.lax.stop_gradient(
        new if where is None else jnp.where(where[..., None], new, targets)
    )
