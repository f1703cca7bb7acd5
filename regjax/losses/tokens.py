"""Cross-entropy of tokens, on integer labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.grid import floating


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
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype} of shape {labels.shape}")
    if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, but the logits {logits.shape}; expected [...] and "
            "[..., V]"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing}")
    if where is not None:
        where = jnp.asarray(where, bool)
        if where.shape != labels.shape:
            raise ValueError(f"where has shape {where.shape}, but the labels {labels.shape}")
        labels = jnp.where(where, labels, 0)
        logits = jnp.where(where[..., None], logits, 0.0)
    # An index of -100 would count from the end of the vocabulary; beyond it, it gives NaN.
    labels = jnp.where(labels < 0, logits.shape[-1], labels.astype(jnp.int32))
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing > 0.0:
        to_uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * to_uniform
    return losses if where is None else jnp.where(where, losses, 0.0)
