"""The probabilities a model gives to the values of a score grid, and their mean.

Every function of a grid, here and in `regjax.losses.regression`, starts with `(logits, codec)` or
`(logits, targets, codec)`. What `logits` is follows from `codec`, for K values of at most T tokens:

=========================================  =====================================================
`codec`                                    `logits`
=========================================  =====================================================
`TokenGrid`, one token a value (T = 1)     `[..., V]`, at the position that predicts the score
`TokenGrid`, several tokens (T > 1)        `[..., K, T, V]`: every candidate teacher-forced,
                                           position t of candidate k predicts its token t
`ScoreGrid`, or a plain array of values    `[..., K]`: already log p(str(y_k)), for example from
`[K]`                                      a pass over all candidates
=========================================  =====================================================

`...` are the same leading dimensions everywhere: those of `targets` and of the result. Logits are
of any floating type, all arithmetic is float32. The tokens of a `TokenGrid` are compared with V
where they are NumPy arrays; on the device, a token beyond V gives NaN.

`normalize` chooses between the two readings of the literature: `False`, probabilities under the
softmax over the full vocabulary, whose sum over the grid, the mass, is below one; `True`,
the same divided by their sum.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless
from regjax.scores import ScoreGrid, TokenGrid

Codec: TypeAlias = TokenGrid | ScoreGrid | ArrayLike


def grid_log_probs(
    logits: ArrayLike,
    codec: Codec,
    *,
    normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Log-probability of every value of a grid, a sum over the tokens that write it.

        log p(str(y_k) | x) = sum_t ( logits[k, t, token_kt] - logsumexp_v logits[k, t, v] )

    Only the grid's own entries are normalised: no float32 log-softmax over V is kept.

    Use it for the exact distribution of a model over the scores, in a loss or a decision rule of
    your own.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`. Candidates'
            logits at padding are ignored, even where they are not finite.
        codec: the grid.
        normalize: subtract the log of the grid's mass, so that the probabilities sum to one. For
            single tokens, entries off the grid then have a gradient of exactly zero. Where every
            probability is exactly zero the result is uniform, with zero gradient: what a large
            negative finite logit in place of -inf would give.
        where: `[...]`, the examples that count; the others have log-probabilities of zero, which
            are of no distribution: leave them out of what follows, too.

    Returns:
        Float32 `[..., K]`, at most zero.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: a shape of logits or of `where` that does not fit the grid; a token id beyond V.

    References:
        Lukasik, Narasimhan, Menon, Yu, Kumar, *Regression-aware Inference with LLMs*, 2024,
        https://arxiv.org/abs/2403.04182, the distribution that its estimators read.

    >>> import numpy as np
    >>> codec = TokenGrid.from_ids([0, 2], [1.0, 5.0])
    >>> logits = np.log([0.1, 0.6, 0.3])
    >>> [f"{prob:.4f}" for prob in jnp.exp(grid_log_probs(logits, codec))]
    ['0.1000', '0.3000']
    >>> [f"{prob:.4f}" for prob in jnp.exp(grid_log_probs(logits, codec, normalize=True))]
    ['0.2500', '0.7500']
    """
    logits = floating(logits, "logits")
    where = mask_of_shape(where, _leading_shape(logits, codec))
    # Before the arithmetic as well as after it: the gradient of an ignored NaN would be NaN.
    logits = zero_unless(where, logits)
    if not isinstance(codec, TokenGrid):
        log_probs = logits
    elif codec.single_token:
        log_probs = jnp.take(logits, codec.tokens[:, 0], axis=-1)
        if not normalize:
            log_probs = _log_softmax_of(log_probs, logits)
    else:
        log_probs = _candidate_log_probs(logits, codec)
    if normalize:
        impossible = jnp.all(log_probs == -jnp.inf, axis=-1, keepdims=True)
        log_probs = jax.nn.log_softmax(jnp.where(impossible, 0.0, log_probs), axis=-1)
    return zero_unless(where, log_probs)


def grid_mass(logits: ArrayLike, codec: Codec, *, where: ArrayLike | None = None) -> jax.Array:
    """Probability that the model writes any value of the grid.

        mass = sum_k p(str(y_k) | x)

    Use it as the diagnostic beside every grid loss: near zero, the tokens of the grid are not the
    ones the model writes here.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        codec: the grid.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, from zero to one up to rounding.

    Raises:
        TypeError, ValueError: as `grid_log_probs`.

    References:
        Lukasik, Narasimhan, Menon, Yu, Kumar, *Regression-aware Inference with LLMs*, 2024,
        https://arxiv.org/abs/2403.04182, what the scoring estimator is divided by with
        `normalize=True`.

    >>> import numpy as np
    >>> print(f"{grid_mass(np.log([0.1, 0.2, 0.4]), [1.0, 2.0, 3.0]):.4f}")
    0.7000
    """
    log_probs = grid_log_probs(logits, codec, where=where)
    where = mask_of_shape(where, log_probs.shape[:-1])
    return zero_unless(where, jnp.exp(log_probs).sum(axis=-1))


def expected_score(
    logits: ArrayLike,
    codec: Codec,
    *,
    normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Expected score, the regression-aware prediction under squared error.

        yhat = sum_k p(str(y_k) | x) y_k

    `normalize=False`, as published, pulls the prediction toward zero by the probability that the
    model writes something else: yhat = mass * yhat_normalized.

    Use it as the prediction where the metric is the squared error, whatever the model was trained
    with.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        codec: the grid.
        normalize: divide the probabilities by their sum over the grid.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, in the units of the grid's values.

    Raises:
        TypeError, ValueError: as `grid_log_probs`.

    References:
        Lukasik, Narasimhan, Menon, Yu, Kumar, *Regression-aware Inference with LLMs*, 2024,
        https://arxiv.org/abs/2403.04182, scoring estimator.

        TRACT's and REAL's code do not normalise, `RAFTInferenceFn` of regress-lm does. TRACT's takes
        the softmax in the type of the logits, bfloat16.

    >>> import numpy as np
    >>> log_probs = np.log([0.1, 0.2, 0.4])
    >>> print(f"{expected_score(log_probs, [1.0, 2.0, 3.0]):.4f}")
    1.7000
    >>> print(f"{expected_score(log_probs, [1.0, 2.0, 3.0], normalize=True):.4f}")
    2.4286
    """
    probs = jnp.exp(grid_log_probs(logits, codec, normalize=normalize, where=where))
    where = mask_of_shape(where, probs.shape[:-1])
    return zero_unless(where, jnp.sum(probs * grid_values(codec), axis=-1))


def grid_values(codec: Codec) -> jax.Array:
    """The values `[K]` of any of the three forms of a grid, in float32."""
    on_grid = codec.values if isinstance(codec, TokenGrid | ScoreGrid) else codec
    values = jnp.asarray(on_grid, jnp.float32)
    if values.ndim != 1:
        raise ValueError(f"the values of a grid must have shape [K]; got shape {values.shape}")
    return values


def _leading_shape(logits: jax.Array, codec: Codec) -> tuple[int, ...]:
    """The shape `[...]` before what the grid asks for; `ValueError` where the logits are not of it."""
    if not isinstance(codec, TokenGrid):
        count = grid_values(codec).shape[0]
        if logits.ndim < 1 or logits.shape[-1] != count:
            raise ValueError(
                f"a grid given by its {count} values needs their log-probabilities, "
                f"[..., {count}]; got shape {logits.shape}. For logits over a vocabulary, "
                "give a TokenGrid"
            )
        return logits.shape[:-1]
    count, length = codec.tokens.shape
    if codec.single_token:
        if logits.ndim < 1:
            raise ValueError("a grid of single tokens needs logits [..., V]; got a scalar")
        leading = logits.shape[:-1]
    else:
        if logits.ndim < 3 or logits.shape[-3:-1] != (count, length):
            raise ValueError(
                f"a grid of {count} values of up to {length} tokens needs the logits of every "
                f"candidate, [..., {count}, {length}, V]; got shape {logits.shape}"
            )
        leading = logits.shape[:-3]
    _check_tokens_in_vocabulary(codec, logits.shape[-1])
    return leading


def _candidate_log_probs(logits: jax.Array, codec: TokenGrid) -> jax.Array:
    """`[..., K]` from the logits `[..., K, T, V]` of every candidate."""
    mask = jnp.asarray(codec.mask)
    tokens = jnp.asarray(codec.tokens)[..., None]
    tokens = tokens.reshape((1,) * (logits.ndim - 3) + tokens.shape)
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    # Before the softmax as well as after it: the gradient of an ignored NaN would be NaN.
    logits = jnp.where(mask[..., None], logits, 0.0)
    log_probs = _log_softmax_of(chosen, logits)[..., 0]
    return jnp.where(mask, log_probs, 0.0).sum(axis=-1)


def _log_softmax_of(chosen: jax.Array, logits: jax.Array) -> jax.Array:
    """Log-softmax over the last axis of `logits`, of the entries `chosen` from that axis."""
    # Subtracting the maximum first keeps float32's digits for what differs between the entries.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_total = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    return (chosen - top) - log_total


def _check_tokens_in_vocabulary(codec: TokenGrid, size: int) -> None:
    if not isinstance(codec.tokens, np.ndarray):
        return
    outside = codec.mask & ((codec.tokens < 0) | (codec.tokens >= size))
    if np.any(outside):
        row = int(np.argwhere(outside)[0, 0])
        raise ValueError(
            f"grid value {codec.values[row]} is written with tokens "
            f"{codec.tokens[row][codec.mask[row]].tolist()}, but the logits have a vocabulary of "
            f"{size}: is the grid of another tokenizer?"
        )
