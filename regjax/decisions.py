"""Decision rules: one number from a distribution over numbers (RAIL, Lukasik et al., 2024).

The number that a model should report depends on the metric it is judged by: the mean for squared
error, the median for absolute error, the mode for exact match, and for anything else the candidate
of least expected loss. Every rule takes a distribution as two arrays, `probabilities` and `values`.
For a grid scored by the model these are `[..., K]` and `[K]`; for sampled answers `from_samples`
gives both as `[..., N]`. All rules are traceable, work in float32 and accept NumPy arrays.

Probabilities need not sum to one (a model also puts mass on strings that are no number). Only the
mean depends on it, and has a keyword for it; the other rules never change when the probabilities of
one item are all multiplied by the same number. An item without any mass gives NaN.

Values that tie up to float32 rounding are one tie, and the smallest value wins it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax.errors import InputError

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Metric = Literal["squared_error", "absolute_error", "zero_one"]


def mean(probabilities: ArrayLike, values: ArrayLike, *, normalize: bool = False) -> jax.Array:
    """The expected value `sum_k p_k v_k`, the best prediction under squared error.

    Shapes: `probabilities [..., K]`, `values [K]` or `[..., K]` -> `[...]`.

    With `normalize=False` the sum is taken as written in Lukasik et al., 2025, eq. 4: mass outside
    the grid pulls the prediction toward 0, and this is what RAFT trains by default. With
    `normalize=True` it is divided by the grid's mass `sum_k p_k` (NaN where that is zero), which
    is the expectation under the distribution restricted to the grid.

    >>> float(mean([0.125, 0.125, 0.125, 0.125, 0.125], [1, 2, 3, 4, 5]))
    1.875
    >>> float(mean([0.125, 0.125, 0.125, 0.125, 0.125], [1, 2, 3, 4, 5], normalize=True))
    3.0
    """
    p, v = _distribution(probabilities, values)
    expected = jnp.sum(p * v, axis=-1)
    if not normalize:
        return expected
    total = jnp.sum(p, axis=-1)
    return jnp.where(total > 0, expected / jnp.where(total > 0, total, 1.0), jnp.nan)


def median(probabilities: ArrayLike, values: ArrayLike) -> jax.Array:
    """The smallest value that holds half of the mass at or below it: best under absolute error.

    `min { v_k : sum_j p_j [v_j <= v_k] >= (sum_j p_j) / 2 }`, the lower median where two values
    qualify. Shapes: `probabilities [..., K]`, `values [K]` or `[..., K]` -> `[...]`. The values may
    stand in any order and repeat. (TRACT's code returns the position plus one, which is the median
    on the grid 1..5 only.)

    >>> float(median([0.35, 0.05, 0.05, 0.25, 0.30], [1, 2, 3, 4, 5]))
    4.0
    """
    p, v = _distribution(probabilities, values)
    mass_up_to = _sum_where(v[..., None, :] <= v[..., :, None], p)
    half = jnp.sum(p, axis=-1, keepdims=True) / 2
    return _nan_without_mass(p, _smallest(v, mass_up_to >= half * (1 - _rounding(p))))


def mode(probabilities: ArrayLike, values: ArrayLike) -> jax.Array:
    """The most probable value, the best prediction under zero-one loss (exact match).

    The probabilities of equal values are added first, so that samples work as well as a grid; the
    smallest of several most probable values is taken. Shapes: `probabilities [..., K]`,
    `values [K]` or `[..., K]` -> `[...]`.

    >>> float(mode([0.35, 0.05, 0.05, 0.25, 0.30], [1, 2, 3, 4, 5]))
    1.0
    """
    p, v = _distribution(probabilities, values)
    mass_at = _sum_where(v[..., None, :] == v[..., :, None], p)
    highest = jnp.max(mass_at, axis=-1, keepdims=True)
    return _nan_without_mass(p, _smallest(v, mass_at >= highest * (1 - _rounding(p))))


def minimum_bayes_risk(
    probabilities: ArrayLike,
    values: ArrayLike,
    loss: Loss,
    *,
    candidates: ArrayLike | None = None,
) -> jax.Array:
    """The candidate of least expected loss, `argmin_c sum_k p_k loss(v_k, c)`.

    Shapes: `probabilities [..., K]`, `values [K]` or `[..., K]`, `candidates [C]` or `[..., C]`
    (the values themselves if not given, which for samples is the usual minimum-Bayes-risk
    decoding) -> `[...]`.

    `loss(truth, prediction)` gets arrays that broadcast against each other and returns their cost
    elementwise; negate a score that is to be maximised. It may be infinite: a value of probability
    zero adds nothing. A prediction that is not on the grid is found by passing finer candidates.

    >>> cubic = lambda truth, prediction: abs(truth - prediction) ** 3
    >>> float(minimum_bayes_risk([0.35, 0.05, 0.05, 0.25, 0.30], [1, 2, 3, 4, 5], cubic))
    3.0
    """
    p, v = _distribution(probabilities, values)
    c = v if candidates is None else jnp.asarray(candidates, jnp.float32)
    cost = jnp.asarray(loss(v[..., None, :], c[..., :, None]), jnp.float32)
    weight = p[..., None, :]
    risk = jnp.sum(jnp.where(weight > 0, weight * cost, 0.0), axis=-1)
    least = jnp.min(risk, axis=-1, keepdims=True)
    slack = jnp.where(jnp.isfinite(least), jnp.abs(least) * _rounding(p), 0.0)
    return _nan_without_mass(p, _smallest(c, risk <= least + slack))


def decide(
    probabilities: ArrayLike,
    values: ArrayLike,
    metric: Metric | Loss = "squared_error",
    *,
    normalize: bool = False,
) -> jax.Array:
    """The prediction that is best under `metric` (Lukasik et al., 2024, the table of rules).

    `"squared_error"`: `mean`, also the right score for ranking by how far apart the true values
    are; `"absolute_error"`: `median`; `"zero_one"`: `mode`; a callable `loss(truth, prediction)`:
    `minimum_bayes_risk` over the values. `normalize` is the mean's. Shapes as in `mean`.

    Raises `InputError` for another name.

    >>> p, v = [0.35, 0.05, 0.05, 0.25, 0.30], [1, 2, 3, 4, 5]
    >>> [round(float(decide(p, v, m)), 2) for m in ("squared_error", "absolute_error", "zero_one")]
    [3.1, 4.0, 1.0]
    """
    if callable(metric):
        return minimum_bayes_risk(probabilities, values, metric)
    if metric == "squared_error":
        return mean(probabilities, values, normalize=normalize)
    if metric == "absolute_error":
        return median(probabilities, values)
    if metric == "zero_one":
        return mode(probabilities, values)
    raise InputError(
        f"decide: metric is {metric!r}; give 'squared_error', 'absolute_error', 'zero_one' or a "
        "function loss(truth, prediction)"
    )


def temper(probabilities: ArrayLike, temperature: ArrayLike) -> jax.Array:
    """The enumerated distribution at another temperature, `q_k = p_k^(1/T) / sum_j p_j^(1/T)`.

    Shapes: `probabilities [..., K]`, `temperature` a number above 0 or an array that broadcasts
    against `probabilities` -> `[..., K]`, normalised whatever the mass was; zeros stay zero.
    `T -> 0` tends to the mode, `T = inf` is uniform on the values of positive probability.

    The exponent is `1/T` because here each value is counted once. The exponent `1/T - 1` belongs to
    samples, see `tempering_weights`; TRACT's code uses it on enumerated probabilities, so that its
    temperature 1 is uniform and its 0.5 leaves the probabilities as they are.

    >>> q = temper([0.35, 0.05, 0.05, 0.25, 0.30], 0.5)
    >>> round(float(mean(q, [1, 2, 3, 4, 5])), 4)
    2.9821
    """
    _check_temperature(temperature)
    p = jnp.asarray(probabilities, jnp.float32)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    return jax.nn.softmax(log_p / jnp.asarray(temperature, jnp.float32), axis=-1, where=p > 0)


def tempering_weights(log_probs: ArrayLike, temperature: ArrayLike) -> jax.Array:
    """Weights that make samples drawn at temperature 1 stand for temperature `T`.

    `w_i = p_i^(1/T - 1) / sum_j p_j^(1/T - 1)`: drawing already brought in one factor `p_i`, so
    that weighted averages tend to those under `p^(1/T)` as the number of samples grows. `T = 1`
    weights all alike.

    Shapes: `log_probs [..., N]`, the model's log-probability of each sampled answer (NaN or `-inf`
    where there is none: weight 0), `temperature` a number above 0 -> `[..., N]`, for
    `from_samples(samples, weights)`.

    >>> [round(float(w), 3) for w in tempering_weights(np.log([0.6, 0.2, 0.2]), 0.5)]
    [0.6, 0.2, 0.2]
    """
    _check_temperature(temperature)
    logits = jnp.asarray(log_probs, jnp.float32)
    known = jnp.isfinite(logits)
    exponent = 1 / jnp.asarray(temperature, jnp.float32) - 1
    return jax.nn.softmax(exponent * jnp.where(known, logits, 0.0), axis=-1, where=known)


class Empirical(NamedTuple):
    """The distribution of sampled answers; its first two fields are what every rule takes."""

    probabilities: jax.Array  # [..., N], sums to 1, or to 0 where no sample is left
    values: jax.Array  # [..., N], finite; the value of an ignored sample is 0
    unparsable: jax.Array  # [...] int32, samples that were no number


def from_samples(
    samples: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    unparsable: Literal["drop", "zero", "error"] = "drop",
) -> Empirical:
    """The empirical distribution of `samples [..., N]`, with `weights [..., N]` if given.

    An answer that could not be read as a number comes as NaN (infinities count as such too), is
    counted, and then, by `unparsable`:

    * `"drop"`: is ignored; an item with nothing left gives NaN under every normalised rule;
    * `"zero"`: is the number 0, as in Lukasik et al., 2025, eq. 1, which pulls the mean toward 0;
    * `"error"`: raises `InputError` (reads the samples, so it cannot be used inside `jax.jit`).

    Items with fewer samples than others are padded with samples of weight 0, which are not counted.

    >>> drawn = from_samples([4.0, 5.0, 5.0, float("nan")])
    >>> round(float(mean(drawn.probabilities, drawn.values)), 4), int(drawn.unparsable)
    (4.6667, 1)
    """
    if unparsable not in ("drop", "zero", "error"):
        raise InputError(
            f"from_samples: unparsable is {unparsable!r}; give 'drop', 'zero' or 'error'"
        )
    drawn = jnp.asarray(samples, jnp.float32)
    w = jnp.ones_like(drawn) if weights is None else jnp.asarray(weights, jnp.float32)
    try:
        w = jnp.broadcast_to(w, drawn.shape)
    except ValueError:
        raise ValueError(
            f"from_samples: weights {w.shape} do not fit samples {drawn.shape}"
        ) from None
    parsed = jnp.isfinite(drawn)
    failed = ~parsed & (w != 0)
    if unparsable == "error":
        _raise_on_unparsable(failed)
    if unparsable != "zero":
        w = jnp.where(parsed, w, 0.0)
    total = jnp.sum(w, axis=-1, keepdims=True)
    return Empirical(
        probabilities=w / jnp.where(total > 0, total, 1.0),
        values=jnp.where(parsed, drawn, 0.0),
        unparsable=jnp.sum(failed, axis=-1, dtype=jnp.int32),
    )


def _distribution(probabilities: ArrayLike, values: ArrayLike) -> tuple[jax.Array, jax.Array]:
    p, v = jnp.asarray(probabilities, jnp.float32), jnp.asarray(values, jnp.float32)
    if not p.ndim or not v.ndim or p.shape[-1] != v.shape[-1] or not v.shape[-1]:
        raise ValueError(
            f"probabilities {p.shape} and values {v.shape} need the same last axis, of at least one"
        )
    return p, v


def _sum_where(relation: jax.Array, p: jax.Array) -> jax.Array:
    """`sum_k p_k` over the `k` in relation: `[..., K, K]`, `[..., K]` -> `[..., K]`."""
    return jnp.einsum("...ck,...k->...c", relation.astype(p.dtype), p, precision="highest")


def _rounding(p: jax.Array) -> float:
    """Relative error to allow for in a float32 sum over the last axis."""
    return p.shape[-1] * float(np.finfo(np.float32).eps)


def _smallest(values: jax.Array, eligible: jax.Array) -> jax.Array:
    return jnp.min(jnp.where(eligible, values, jnp.inf), axis=-1)


def _nan_without_mass(p: jax.Array, decision: jax.Array) -> jax.Array:
    return jnp.where(jnp.sum(p, axis=-1) > 0, decision, jnp.nan)


def _check_temperature(temperature: ArrayLike) -> None:
    if not isinstance(temperature, jax.core.Tracer) and not np.all(np.asarray(temperature) > 0):
        raise InputError(
            f"temperature is {temperature}, expected a number above 0; at the limit 0 use `mode`"
        )


def _raise_on_unparsable(failed: jax.Array) -> None:
    if isinstance(failed, jax.core.Tracer):
        raise ValueError("from_samples: unparsable='error' cannot be traced; use 'drop' or 'zero'")
    where = np.argwhere(np.asarray(failed))
    if len(where):
        first = tuple(int(i) for i in where[0])
        raise InputError(
            f"from_samples: {len(where)} of {failed.size} samples are not numbers, the first at "
            f"index {first}; choose unparsable='drop' or 'zero', or sample again"
        )
