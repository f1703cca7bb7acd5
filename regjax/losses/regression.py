"""Losses for numeric targets that a language model writes as the tokens of a grid.

Everywhere y is the target, y_k are the values of the grid and p(str(y_k) | x) the probability that
the model writes one. The forms of `logits` and `codec`, and the meaning of `normalize`, are those of
`regjax.losses.grid`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless
from regjax.losses.grid import Codec, expected_score, grid_log_probs, grid_mass, grid_values
from regjax.losses.numeric import magnitude

ErrorLoss = Literal["squared", "absolute", "huber"]


def raft(
    logits: ArrayLike,
    targets: ArrayLike,
    codec: Codec,
    *,
    normalize: bool = False,
    loss: ErrorLoss = "squared",
    delta: float = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Regression-aware fine-tuning: the error of the expected score.

        loss = (y - yhat)^2,    yhat = sum_k p(str(y_k) | x) y_k

    With logits z of single tokens, s_k the value of token k on the grid and zero off it, the
    gradient is 2 (yhat - y) p_k (s_k - yhat) for every k of the vocabulary; with `normalize=True`
    the same of the renormalised probabilities, and zero off the grid. It vanishes where p is
    one-hot on a wrong value, however large the loss: start from a model with spread, or add
    cross-entropy.

    Use it to fine-tune a model whose prediction is `expected_score` and whose metric is the squared
    error.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        targets: `[...]` real numbers, on the grid or not.
        codec: the grid.
        normalize: divide the probabilities by their sum over the grid. The default, as published,
            does not: values below the grid then can be reached, and mass off the grid is punished.
        loss: `"squared"`, e^2 without a factor 1/2, as published; `"absolute"`, |e|; `"huber"`,
            `optax.losses.huber_loss`: e^2 / 2 up to `delta`, then delta (|e| - delta / 2).
        delta: where the Huber loss becomes linear, in units of the score.
        where: `[...]`, the examples that count. The others get a loss and a gradient of exactly
            zero, whatever their target and even where their logits are not finite.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: shapes that do not fit; a token id beyond V; an unknown `loss`.

    References:
        Lukasik, Meng, Narasimhan, Chang, Menon, Yu, Kumar, *Better autoregressive regression with
        LLMs via regression-aware fine-tuning*, ICLR 2025, https://openreview.net/forum?id=xGs7Ch3Vyo

        TRACT's code divides the mean over a batch by the size of the batch once more, so that a
        weight of 1 beside its cross-entropy is one of 1 / B.

    >>> import numpy as np
    >>> from regjax.scores import TokenGrid
    >>> codec = TokenGrid.from_ids([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    >>> print(f"{raft(np.zeros(8), 4, codec):.4f}")
    4.5156
    >>> print(f"{raft(np.zeros(8), 4, codec, normalize=True):.4f}")
    1.0000
    """
    predictions = expected_score(logits, codec, normalize=normalize, where=where)
    targets = _targets_of_shape(targets, predictions.shape, where)
    return _error_loss(predictions, targets, loss, delta)


def expected_risk(
    logits: ArrayLike,
    targets: ArrayLike,
    codec: Codec,
    *,
    normalize: bool = True,
    loss: ErrorLoss = "squared",
    delta: float = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Minimum-Bayes-risk training: the expected error of the score, not the error of its mean.

        loss = sum_k p(str(y_k) | x) (y_k - y)^2

    Normalised and squared, it is `raft` plus the variance of the score, and its minimiser is
    one-hot on one grid value: the precision of the prediction is that of the grid.

    Use it where the model answers with one value of the grid rather than with a mean.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        targets: `[...]` real numbers, on the grid or not.
        codec: the grid.
        normalize: divide the probabilities by their sum over the grid. Unlike in `raft` this is the
            default: the unnormalised sum is zero for a model that writes no number at all.
        loss: `"squared"`, `"absolute"` or `"huber"`, as in `raft`.
        delta: where the Huber loss becomes linear, in units of the score.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `raft`.

    References:
        Lukasik et al., *Better autoregressive regression with LLMs via regression-aware
        fine-tuning*, ICLR 2025, https://openreview.net/forum?id=xGs7Ch3Vyo, the variant compared
        with there.

    >>> import numpy as np
    >>> print(f"{expected_risk(np.log([0.25, 0.5, 0.25]), 2.5, [1.0, 2.0, 3.0]):.4f}")
    0.7500
    """
    probs = jnp.exp(grid_log_probs(logits, codec, normalize=normalize, where=where))
    targets = _targets_of_shape(targets, probs.shape[:-1], where)
    values, targets = jnp.broadcast_arrays(grid_values(codec), targets[..., None])
    risks = jnp.sum(probs * _error_loss(values, targets, loss, delta), axis=-1)
    return zero_unless(mask_of_shape(where, risks.shape), risks)


def number_token(
    logits: ArrayLike,
    targets: ArrayLike,
    codec: Codec,
    *,
    kind: Literal["wasserstein", "mse"] = "wasserstein",
    squash: float | None = None,
    reweigh: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Number token loss, on the distribution q renormalised over the grid.

        wasserstein: sum_k q_k |y_k - y|        mse: (sum_k q_k y_k - y)^2
        squashed:    sum_k q_k D(|y_k - y|),    D(d) = 1 + (s - 1) (d - d_min) / (d_max - d_min)

    The first is the Wasserstein-1 distance between q and a point mass at the target, with the true
    gaps between the values, so it holds for any spacing and for targets off the grid. Neither sees
    the mass outside the grid: add cross-entropy (the paper: 0.3 times this loss), and report
    `grid_mass(logits, codec)`.

    Use it beside the cross-entropy of text with numbers in it, with the digits as the grid.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        targets: `[...]` real numbers, on the grid or not.
        codec: the grid.
        kind: `"wasserstein"` or `"mse"`. The latter has spurious minima: half the mass on 0 and
            half on 8 is free for a target of 4.
        squash: s, above 1, how many times as much the farthest value of the grid costs as the
            nearest wrong one; `None`, in proportion to their distances. For `"wasserstein"`: d_min is the
            smallest distance of two values of the grid, d_max the largest, and D(d) = d / d_min
            below d_min, so that D(0) = 0. Not in the paper.
        reweigh: mass * loss + 1.01 * d * (1 - mass), with d the largest distance on the grid (its
            square for `"mse"`, s if squashed), so that leaving the grid is never cheaper than the
            worst value on it. Not in the paper.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: shapes that do not fit; a token id beyond V; an unknown `kind`; `squash` not
            above 1, or for `"mse"`.

    References:
        Zausinger et al., *Regress, Don't Guess: A Regression-like Loss on Number Tokens for
        Language Models*, ICML 2025, https://arxiv.org/abs/2411.02083.

        Differs from the authors' code, which adds up differences of cumulative sums without the
        gaps between values and so is exact for sorted values of unit spacing only, and takes targets
        as token ids, in the `ntloss` package of single digits only unless told otherwise. That
        package reweighs by default; of digits, d is 9, and 81 for `"mse"`.

    >>> import numpy as np
    >>> digits = np.arange(10.0)
    >>> logits = np.log(np.full(10, 0.05))
    >>> print(f"{number_token(logits, 4, digits):.4f} of mass {grid_mass(logits, digits):.4f}")
    2.5000 of mass 0.5000
    >>> print(f"{number_token(logits, 4, digits, kind='mse'):.4f}")
    0.2500
    >>> print(f"{number_token(logits, 4, digits, reweigh=True):.4f}")
    5.7950
    """
    # Once, so that the gradients of the loss and of the mass are added before they are rounded.
    logits = floating(logits, "logits")
    values = grid_values(codec)
    span = jnp.max(values) - jnp.min(values)
    if squash is not None and not (kind == "wasserstein" and squash > 1.0):
        raise ValueError(
            f"squash must be above 1, and is of kind 'wasserstein' only; got {squash} and {kind!r}"
        )
    if kind == "mse":
        losses, largest = raft(logits, targets, codec, normalize=True, where=where), span**2
    elif kind != "wasserstein":
        raise ValueError(f"kind must be 'wasserstein' or 'mse'; got {kind!r}")
    elif squash is None:
        losses = expected_risk(logits, targets, codec, loss="absolute", where=where)
        largest = span
    else:
        probs = jnp.exp(grid_log_probs(logits, codec, normalize=True, where=where))
        targets = _targets_of_shape(targets, probs.shape[:-1], where)
        losses = jnp.sum(probs * _squashed_distances(targets, values, squash), axis=-1)
        largest = jnp.float32(squash)
    if reweigh:
        mass = grid_mass(logits, codec, where=where)
        losses = mass * losses + 1.01 * largest * (1.0 - mass)
    return zero_unless(mask_of_shape(where, losses.shape), losses)


def _squashed_distances(targets: jax.Array, values: jax.Array, factor: float) -> jax.Array:
    """`[..., K]`: 1 for the smallest distance of two values, `factor` for the largest, else linear."""
    distances = magnitude(values - targets[..., None])
    gaps = jnp.diff(jnp.sort(values))
    smallest = jnp.min(gaps, where=gaps > 0.0, initial=jnp.inf)
    # At least twice the smallest distance is the largest of three values; of two it is the same.
    beyond = jnp.maximum(jnp.max(values) - jnp.min(values) - smallest, smallest)
    far = jnp.maximum(distances - smallest, 0.0) / beyond
    return jnp.minimum(distances / smallest, 1.0) + (factor - 1.0) * far


def _error_loss(
    predictions: jax.Array, targets: jax.Array, loss: ErrorLoss, delta: float
) -> jax.Array:
    if loss == "squared":
        return optax.losses.squared_error(predictions, targets)
    if loss == "absolute":
        return magnitude(predictions - targets)
    if loss == "huber":
        return optax.losses.huber_loss(predictions, targets, delta=delta)
    raise ValueError(f"loss must be 'squared', 'absolute' or 'huber'; got {loss!r}")


def _targets_of_shape(
    targets: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None
) -> jax.Array:
    targets = jnp.asarray(targets, jnp.float32)
    if targets.shape != shape:
        raise ValueError(
            f"targets have shape {targets.shape}; expected {shape}, the leading dimensions of the "
            "logits: see regjax.losses.grid for the shapes that go with each form of grid"
        )
    return zero_unless(mask_of_shape(where, shape), targets)
