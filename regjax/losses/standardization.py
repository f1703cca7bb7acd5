"""Z-scores along an axis, with a zero gradient where all values are equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless


def standardize_logits(
    logits: ArrayLike,
    *,
    ddof: int = 1,
    epsilon: float = 1e-7,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Every example's logits with mean zero and standard deviation one.

        (z - mean z) / (std z + epsilon)

    Applied to both student and teacher before any distillation loss, it makes the student match
    the order and the relative gaps of the teacher's logits and not their size:

        distillation(standardize_logits(student), standardize_logits(teacher), temperature=2.0)

    Use it where the logits of student and teacher differ much in size.

    Args:
        logits: `[..., K]`, floating.
        ddof: 1 divides the squares by K - 1, as the authors' code and torchdistill; 0 by K.
        epsilon: added to the standard deviation.
        where: `[...]`, the examples that count; give it here as well as to the loss if the others
            may not be finite.

    Returns:
        Float32 `[..., K]`. Where all logits of an example are equal, and where an example does not
        count, zero with a gradient of zero.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: no more than `ddof` logits, or a mask that does not fit.

    References:
        Sun, Ren, Li, Wang, Cao, *Logit Standardization in Knowledge Distillation*, CVPR 2024,
        https://arxiv.org/abs/2403.01427.

    >>> import numpy as np
    >>> [f"{z:.4f}" for z in standardize_logits(np.array([1.0, 2.0, 3.0]))]
    ['-1.0000', '0.0000', '1.0000']
    """
    logits = floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] <= ddof:
        raise ValueError(f"logits have shape {logits.shape}; expected [..., K], K above {ddof}")
    logits = zero_unless(mask_of_shape(where, logits.shape[:-1]), logits)
    centred, squares = centred_and_squares(logits, axis=-1)
    variance = squares / (logits.shape[-1] - ddof)
    return scaled(centred, variance, epsilon)


def centred_and_squares(
    array: jax.Array, *, axis: int, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`array` less its mean over `axis`, zero where `where` is false; the sum of its squares."""
    if where is None:
        mean = jnp.mean(array, axis=axis, keepdims=True)
        centred = array - mean
    else:
        count = jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)
        mean = jnp.sum(array, axis=axis, keepdims=True, where=where) / count
        centred = jnp.where(where, array - mean, 0.0)
    return centred, jnp.sum(jnp.square(centred), axis=axis, keepdims=True)


def root(squares: jax.Array) -> jax.Array:
    """Square root, with a gradient of zero at zero."""
    positive = squares > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def scaled(centred: jax.Array, variance: jax.Array, epsilon: float) -> jax.Array:
    """Deviations over their standard deviation; zero, with a gradient of zero, where it is zero."""
    spread = variance > 0.0
    return jnp.where(spread, centred / (root(variance) + jnp.where(spread, epsilon, 1.0)), 0.0)
