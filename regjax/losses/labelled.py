"""What the losses of logits with integer labels share: their input, the label's entry, the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import class_labels, floating, mask_of_shape, zero_unless


def logits_and_labels(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Float32 logits `[..., K]`, K at least 2, and labels `[...]`, zero where `where` is false.

    Labels below zero become K, which is out of range too and gives NaN in `of_label`.
    """
    logits = floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits have shape {logits.shape}; expected [..., K], K at least 2")
    labels = class_labels(labels, logits.shape[:-1], logits.shape[-1])
    where = mask_of_shape(where, labels.shape)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    # Before the arithmetic as well as after it: the gradient of an ignored NaN would be NaN.
    return zero_unless(where, logits), labels, where


def of_label(array: jax.Array, labels: jax.Array) -> jax.Array:
    """`array [..., K]` at `labels [...]`; NaN where a label is out of range."""
    return jnp.take_along_axis(array, labels[..., None], axis=-1)[..., 0]


def is_label(labels: jax.Array, count: int) -> jax.Array:
    """`[..., K]`, true at the label."""
    return jnp.arange(count) == labels[..., None]


def log_rest(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """log(1 - p_label), which keeps its digits and a finite gradient as p_label tends to one."""
    others = jnp.where(is_label(labels, log_probs.shape[-1]), -jnp.inf, log_probs)
    return jax.nn.logsumexp(others, axis=-1)
