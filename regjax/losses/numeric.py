"""Losses of a predicted number, or of its quantiles, that are not of a grid.

Squared, absolute (`optax.losses.huber_loss` has both as limits) and Huber errors of plain
predictions are optax's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, numbers_of_shape, zero_unless


def pinball(
    quantiles: ArrayLike,
    targets: ArrayLike,
    levels: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Quantile loss of several predicted quantiles at once.

        loss = mean_t rho_t(y - q_t),    rho_t(u) = u (tau_t - [u < 0])

    The minimiser is the quantile of level tau; tau = 1/2 is half the absolute error. As a
    prediction take the mean of the quantiles; the mean of the lower ones is averse to risk.

    Use it where the spread of the prediction, or a quantile of it, is wanted beside its middle.

    Args:
        quantiles: q `[..., T]`, floating. They may cross, see `ordered_quantiles`.
        targets: y `[...]`, real numbers.
        levels: tau `[T]`, between 0 and 1.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: quantiles that are not floating.
        ValueError: shapes that do not fit; levels out of range, unless they are a JAX array.

    References:
        Koenker, Bassett, *Regression quantiles*, 1978. Dorka, *Quantile Regression for
        Distributional Reward Models in RLHF*, 2024, https://arxiv.org/abs/2409.10164, for rewards.

    >>> import numpy as np
    >>> quantiles = np.array([2.0, 2.5, 3.0, 3.5, 4.2])
    >>> print(f"{pinball(quantiles, 3.4, [0.1, 0.3, 0.5, 0.7, 0.9]):.4f}")
    0.1440
    """
    quantiles = floating(quantiles, "quantiles")
    if not isinstance(levels, jax.Array):
        given = np.asarray(levels)
        if not np.all((given > 0.0) & (given < 1.0)):
            raise ValueError(f"levels must lie between 0 and 1; got {given.tolist()}")
    levels = jnp.asarray(levels, jnp.float32)
    if quantiles.ndim < 1 or levels.shape != quantiles.shape[-1:]:
        raise ValueError(
            f"quantiles have shape {quantiles.shape} and levels {levels.shape}; expected [..., T] "
            "and [T]"
        )
    where = mask_of_shape(where, quantiles.shape[:-1])
    targets = zero_unless(where, numbers_of_shape(targets, "targets", quantiles.shape[:-1]))
    errors = targets[..., None] - zero_unless(where, quantiles)
    losses = jnp.maximum(levels * errors, (levels - 1.0) * errors).mean(axis=-1)
    return zero_unless(where, losses)


def ordered_quantiles(outputs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Quantiles that cannot cross, from the unconstrained outputs of a head.

        q_1 = o_1,    q_{t+1} = q_t + softplus(o_{t+1})

    Use it for the quantiles that `pinball` takes.

    Args:
        outputs: o `[..., T]`, floating.
        where: `[...]`, the examples that count; the others are read as zero.

    Returns:
        Float32 `[..., T]`, ascending.

    Raises:
        TypeError: outputs that are not floating.
        ValueError: outputs or a mask of a shape that does not fit.

    References:
        No paper is followed.

    >>> import numpy as np
    >>> [f"{quantile:.4f}" for quantile in ordered_quantiles(np.array([1.0, 0.0, -2.0]))]
    ['1.0000', '1.6931', '1.8201']
    """
    outputs = floating(outputs, "outputs")
    if outputs.ndim < 1:
        raise ValueError("outputs must have shape [..., T]; got a scalar")
    outputs = zero_unless(mask_of_shape(where, outputs.shape[:-1]), outputs)
    steps = jax.nn.softplus(outputs[..., 1:])
    return jnp.cumsum(jnp.concatenate([outputs[..., :1], steps], axis=-1), axis=-1)


def relative_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Symmetric relative error of a whole number, whatever its magnitude.

        loss = |yhat - y| / (|yhat| + |y| + eps)

    From zero to one; one wherever the signs differ, with no gradient there. For a number written in
    digits, the prediction is the sum over its places of 10^place times the expected digit, so that
    a wrong leading digit costs more than a wrong last one: a loss of each digit alone, as
    `number_token`, weighs them equally.

    Use it for numbers of very different magnitude.

    Args:
        predictions: yhat `[...]`, floating.
        targets: y `[...]`, real numbers.
        epsilon: eps, positive, so that zero for zero is free.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: predictions that are not floating.
        ValueError: shapes that do not fit; epsilon not positive.

    References:
        The number-level loss of the `ntloss` package, beside the digit-level losses of Zausinger et
        al., ICML 2025, https://arxiv.org/abs/2411.02083. Its eps is not known here.

    >>> import numpy as np
    >>> from regjax.losses.grid import expected_score
    >>> log_probs = np.log([[1e-9, 0.5, 0.5], [0.2, 0.6, 0.2]])
    >>> digits = expected_score(log_probs, [0.0, 1.0, 2.0], normalize=True)
    >>> print(f"{relative_error(digits @ np.array([10.0, 1.0]), 21.0):.4f}")
    0.1351
    """
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be positive; got {epsilon}")
    predictions = floating(predictions, "predictions")
    where = mask_of_shape(where, predictions.shape)
    targets = zero_unless(where, numbers_of_shape(targets, "targets", predictions.shape))
    predictions = zero_unless(where, predictions)
    scale = magnitude(predictions) + magnitude(targets) + epsilon
    return zero_unless(where, magnitude(predictions - targets) / scale)


def magnitude(array: jax.Array) -> jax.Array:
    """|array| with a gradient of zero at zero, where `jnp.abs` has one: a minimum is stationary."""
    return array * jnp.sign(array)
