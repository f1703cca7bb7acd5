"""Cross-entropy of tokens, on integer labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import (
    check_range,
    class_labels,
    floating,
    mask_of_shape,
    zero_unless,
)


def token_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Softmax cross-entropy with integer labels, smoothed without a one-hot.

        loss = (1 - a) (logsumexp z - z_label) + a (logsumexp z - mean z)

    with a the smoothing: the cross-entropy with the target (1 - a) onehot + a / V, which is that of
    `optax.smooth_labels`.

    Use it for next tokens and for plain classification.

    Args:
        logits: `[..., V]`, floating.
        labels: `[...]`, integers from 0 to V - 1. Any other gives NaN, negative ones too.
        label_smoothing: a, from 0 to 1.
        where: `[...]`, the tokens that count. The others get a loss and a gradient of exactly zero,
            whatever their label and even where their logits are not finite.

    Returns:
        Float32 `[...]`, one loss per token.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, smoothing out of range.

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016,
        https://arxiv.org/abs/1512.00567, section 7.

    >>> import numpy as np
    >>> logits = np.log([0.7, 0.2, 0.1])
    >>> print(f"{token_cross_entropy(logits, 1):.4f}")
    1.6094
    >>> print(f"{token_cross_entropy(logits, 1, label_smoothing=0.1):.4f}")
    1.5908
    """
    logits = floating(logits, "logits")
    if logits.ndim < 1:
        raise ValueError("logits must have shape [..., V]; got a scalar")
    labels = class_labels(labels, logits.shape[:-1], logits.shape[-1])
    check_range(label_smoothing, "label_smoothing", 0.0, 1.0)
    where = mask_of_shape(where, labels.shape)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    # Before the arithmetic as well as after it: the gradient of an ignored NaN would be NaN.
    logits = zero_unless(where, logits)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing > 0.0:
        to_uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * to_uniform
    return zero_unless(where, losses)
