"""Targets as distributions over the values of a grid, and the loss of a distribution against them.

A number y becomes probabilities q `[..., K]`: over the two values beside it (`two_hot`), over the
levels of a rating scale (`gaussian_levels`), or over the bins of a histogram (`histogram_levels`).
`soft_label_loss` and `regjax.losses.ordinal.earth_mover` take them. Labels carry no gradient.

Unlike `raft`, whose minimiser is any distribution of the right mean, cross-entropy has one
minimiser, E[q | x]; of two-hot labels it has the mean that `raft` looks for.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr, log_ndtr, ndtr
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless
from regjax.losses.grid import Codec, grid_log_probs, grid_values
from regjax.scores import ScoreGrid, TokenGrid


def soft_label_loss(
    logits: ArrayLike,
    soft_labels: ArrayLike,
    codec: Codec,
    *,
    kind: Literal["cross_entropy", "kl"] = "cross_entropy",
    normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy, or Kullback-Leibler divergence, of soft labels over the values of a grid.

        cross_entropy: -sum_k q_k log p(str(y_k) | x)        kl: sum_k q_k log(q_k / p(str(y_k) | x))

    Terms with q_k = 0 are zero. The two differ by the entropy of the labels, so have one gradient.

    Use it where a label is a distribution: ratings of several people, or a number between two
    values of the grid.

    Args:
        logits: `[..., V]`, `[..., K, T, V]` or `[..., K]`, see `regjax.losses.grid`.
        soft_labels: q `[..., K]`, floating, probabilities. No gradient.
        codec: the grid.
        kind: the loss.
        normalize: divide p by its sum over the grid. The default also punishes mass off the grid.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits or labels that are not floating.
        ValueError: shapes that do not fit; a token id beyond V; an unknown `kind`.

    References:
        You et al., *Teaching Large Language Models to Regress Accurate Image Quality Scores using
        Score Distribution*, CVPR 2025, https://arxiv.org/abs/2501.11561: `kind="kl"`, under the
        softmax over all V, where scores are read out under the softmax over the levels alone.

        Their code adds it inside the next-token loss, so its weight there, 1.0, is multiplied by
        that of the next token, 0.05.

    >>> import numpy as np
    >>> logits = np.log([0.2, 0.5, 0.3])
    >>> print(f"{soft_label_loss(logits, np.array([0.0, 0.8, 0.2]), [1.0, 2.0, 3.0]):.4f}")
    0.7953
    """
    logits, soft_labels = floating(logits, "logits"), floating(soft_labels, "soft_labels")
    count = grid_values(codec).shape[0]
    if soft_labels.ndim < 1 or soft_labels.shape[-1] != count:
        raise ValueError(f"soft_labels have shape {soft_labels.shape}; expected [..., {count}]")
    log_probs = grid_log_probs(logits, codec, normalize=normalize, where=where)
    if log_probs.shape != soft_labels.shape:
        raise ValueError(
            f"soft_labels have shape {soft_labels.shape}, but the logits are of a grid "
            f"{log_probs.shape}"
        )
    where = mask_of_shape(where, soft_labels.shape[:-1])
    soft_labels = jax.lax.stop_gradient(zero_unless(where, soft_labels))
    losses = -jnp.sum(soft_labels * jnp.where(soft_labels == 0.0, 0.0, log_probs), axis=-1)
    if kind == "kl":
        losses -= entr(soft_labels).sum(axis=-1)
    elif kind != "cross_entropy":
        raise ValueError(f"kind must be 'cross_entropy' or 'kl'; got {kind!r}")
    return zero_unless(where, losses)


def two_hot(targets: ArrayLike, codec: Codec) -> jax.Array:
    """Labels on the two values around a target, by linear interpolation: their mean is the target.

        q_k = (v_{k+1} - y) / (v_{k+1} - v_k),  q_{k+1} = 1 - q_k    for v_k <= y <= v_{k+1}

    Use it for numbers between the values of a grid, with no width to choose.

    Args:
        targets: y `[...]`, real numbers. Those off the range become its end.
        codec: the grid, values v `[K]` ascending.

    Returns:
        Float32 `[..., K]`, without a gradient.

    Raises:
        ValueError: values that do not ascend, unless they are a JAX array.

    References:
        Bellemare, Dabney, Munos, *A Distributional Perspective on Reinforcement Learning*, ICML
        2017, https://arxiv.org/abs/1707.06887, the projection onto fixed values.

    >>> [f"{probability:.2f}" for probability in two_hot(3.2, [1.0, 2.0, 3.0, 4.0, 5.0])]
    ['0.00', '0.00', '0.80', '0.20', '0.00']
    """
    values = _ascending(codec)
    targets = jnp.clip(jnp.asarray(targets, jnp.float32), values[0], values[-1])
    gaps = jnp.diff(values)
    # How far y has come from each value to the next, from 0 to 1: differences are the weights.
    passed = jnp.clip((targets[..., None] - values[:-1]) / gaps, 0.0, 1.0)
    start, end = jnp.ones((*targets.shape, 1)), jnp.zeros((*targets.shape, 1))
    come = jnp.concatenate([start, passed], axis=-1)
    return jax.lax.stop_gradient(come - jnp.concatenate([passed, end], axis=-1))


def gaussian_levels(
    means: ArrayLike,
    deviations: ArrayLike,
    codec: Codec,
    *,
    kind: Literal["cdf", "pdf"] = "cdf",
    renormalize: bool = True,
    narrow: float = 0.2,
    tolerance: float = 0.1,
) -> jax.Array:
    """DeQA labels: a rating's mean and deviation as probabilities of the levels of a scale.

        cdf: p_k = Phi((v_k + d/2 - mu) / s) - Phi((v_k - d/2 - mu) / s)
        pdf: p_k = d phi((v_k - mu) / s) / s
        q_k = max(a p_k + b, 0),   a = (mu - c) / sum_j (v_j - c) p_j,   b = (1 - a sum_j p_j) / K

    with d the distance of the levels and c their mean: a and b make the sum one and the mean mu.
    At mu = c both parts of a vanish; there a is the limit, 1 / (d/dmu sum_j (v_j - c) p_j). Where
    the deviation is below `narrow` or the mean of q is off by more than `tolerance`, q is `two_hot`.

    Use it for ratings of which a mean and a standard deviation are known, such as opinion scores of
    images.

    Args:
        means: mu `[...]`, in the units of the values.
        deviations: s `[...]`, standard deviations of the ratings, in the units of the values.
            Scores from m to M go onto levels 1..5 by mu -> 4 (mu - m) / (M - m) + 1 and
            s -> 4 s / (M - m).
        codec: the grid, values v `[K]` ascending by d, K at least 2.
        kind: integrate the density over each level, or take it at the level. The authors take
            `"cdf"` for data of small deviations, `"pdf"` for others.
        renormalize: divide by the sum, which the cut at zero makes larger than one.
        narrow: in units of d.
        tolerance: in units of d.

    Returns:
        Float32 `[..., K]`, without a gradient.

    Raises:
        ValueError: values that are not evenly ascending, unless they are a JAX array; shapes that
            do not fit; an unknown `kind`.

    References:
        You et al., *Teaching Large Language Models to Regress Accurate Image Quality Scores using
        Score Distribution*, CVPR 2025, https://arxiv.org/abs/2501.11561.

        Differs from the authors' code, which adds 1e-9 to the denominator of a, so that a mean in
        the exact middle of the scale gives the uniform distribution, and does not renormalise.

    >>> [f"{level:.4f}" for level in gaussian_levels(3.4, 0.6, [1.0, 2.0, 3.0, 4.0, 5.0])]
    ['0.0004', '0.0658', '0.5001', '0.4009', '0.0328']
    """
    values = _ascending(codec, evenly=True)
    means, deviations = jnp.asarray(means, jnp.float32), jnp.asarray(deviations, jnp.float32)
    if means.shape != deviations.shape:
        raise ValueError(f"means have shape {means.shape}, but deviations {deviations.shape}")
    step, middle = values[1] - values[0], (values[0] + values[-1]) / 2.0
    # In units of the step from here on, around the middle of the scale.
    levels, mean = (values - middle) / step, ((means - middle) / step)[..., None]
    deviation = (deviations / step)[..., None]
    is_narrow = deviation < narrow
    deviation = jnp.where(is_narrow, 1.0, deviation)
    lower, upper = (levels - 0.5 - mean) / deviation, (levels + 0.5 - mean) / deviation
    if kind == "cdf":
        raw = jnp.exp(_log_normal_between(lower, upper))
        slopes = (norm.pdf(lower) - norm.pdf(upper)) / deviation
    elif kind == "pdf":
        raw = norm.pdf((levels - mean) / deviation) / deviation
        slopes = raw * (levels - mean) / deviation**2
    else:
        raise ValueError(f"kind must be 'cdf' or 'pdf'; got {kind!r}")
    moment = jnp.sum(levels * raw, axis=-1, keepdims=True)
    slope = jnp.sum(levels * slopes, axis=-1, keepdims=True)
    # The quotient is even in the mean, so that the limit is right to second order.
    central = jnp.abs(mean) < 0.01 * deviation
    scale = jnp.where(central, 1.0 / slope, mean / jnp.where(central, 1.0, moment))
    shift = (1.0 - scale * raw.sum(axis=-1, keepdims=True)) / len(levels)
    adjusted = jnp.maximum(scale * raw + shift, 0.0)
    error = jnp.abs(jnp.sum(levels * adjusted, axis=-1, keepdims=True) - mean)
    if renormalize:
        adjusted /= adjusted.sum(axis=-1, keepdims=True)
    # Not `error > tolerance`: a mean far off the scale leaves no density, and NaN.
    usable = ~is_narrow & (error <= tolerance)
    return jax.lax.stop_gradient(jnp.where(usable, adjusted, two_hot(means, values)))


def histogram_levels(targets: ArrayLike, edges: ArrayLike, *, sigma: ArrayLike) -> jax.Array:
    """HL-Gauss labels: a Gaussian around the target, cut to the histogram, as its bins' masses.

        q_i = (Phi((e_{i+1} - y) / s) - Phi((e_i - y) / s)) / (Phi((e_K - y) / s) - Phi((e_0 - y) / s))

    Computed from logarithms, so that the tails are exact and a target beyond the edges, where all
    of these differences are zero in float32, has labels too: of the nearest bin, in the limit. The
    cut pulls the labels' mean inwards near the edges; sigma -> 0 is the one-hot of the bin.

    Predict with the mean over the bins' centres, `expected_score(logits, centers, normalize=True)`.

    Use it to learn a real number as a histogram over bins.

    Args:
        targets: y `[...]`, real numbers.
        edges: e `[K + 1]`, ascending. For the centres of the first and last of K bins at low and
            high: `np.linspace(low - h, high + h, K + 1)` with h = (high - low) / (2 K - 2).
        sigma: s, positive, a number or `[...]`, in the units of the targets.

    Returns:
        Float32 `[..., K]`, without a gradient.

    Raises:
        ValueError: edges that do not ascend, unless they are a JAX array; sigma not positive;
            shapes that do not fit.

    References:
        Imani, White, *Improving Regression Performance with Distributional Losses*, ICML 2018,
        https://arxiv.org/abs/1806.04613.

        `hl-gauss-pytorch` takes two widths of a bin as sigma where none is given, and by default
        gives targets beyond the edges a loss of about zero.

    >>> [f"{q:.4f}" for q in histogram_levels(3.2, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], sigma=0.75)]
    ['0.0116', '0.1638', '0.4807', '0.3034', '0.0405']
    """
    if isinstance(sigma, int | float) and not sigma > 0.0:
        raise ValueError(f"sigma must be positive; got {sigma}")
    edges = _ascending(edges, name="edges")
    targets, sigma = jnp.asarray(targets, jnp.float32), jnp.asarray(sigma, jnp.float32)
    if sigma.shape not in ((), targets.shape):
        raise ValueError(f"sigma has shape {sigma.shape}; expected () or {targets.shape}")
    scaled = (edges - targets[..., None]) / sigma[..., None]
    log_masses = _log_normal_between(scaled[..., :-1], scaled[..., 1:])
    return jax.lax.stop_gradient(jax.nn.softmax(log_masses, axis=-1))


def _log_normal_between(lower: jax.Array, upper: jax.Array) -> jax.Array:
    """log(Phi(upper) - Phi(lower)) for lower < upper."""
    # In the upper tail of the normal its mirror image, where Phi is small and not close to one.
    mirrored = lower > 0.0
    low, high = jnp.where(mirrored, -upper, lower), jnp.where(mirrored, -lower, upper)
    tail = log_ndtr(high) + jnp.log(-jnp.expm1(log_ndtr(low) - log_ndtr(high)))
    straddling = (lower <= 0.0) & (upper >= 0.0)
    inside = jnp.where(straddling, ndtr(upper) - ndtr(lower), 1.0)
    return jnp.where(straddling, jnp.log(inside), tail)


def _ascending(codec: Codec, *, name: str = "values", evenly: bool = False) -> jax.Array:
    """The values in float32, checked unless they are a JAX array."""
    given = codec.values if isinstance(codec, TokenGrid | ScoreGrid) else codec
    if not isinstance(given, jax.Array):
        gaps = np.diff(np.asarray(given, np.float64))
        if gaps.size < 1 or not np.all(gaps > 0.0):
            raise ValueError(f"{name} must ascend, at least two; got {np.asarray(given).tolist()}")
        if evenly and not np.allclose(gaps, gaps[0], rtol=1e-4):
            raise ValueError(f"{name} must be evenly spaced; got {np.asarray(given).tolist()}")
    return grid_values(codec)
