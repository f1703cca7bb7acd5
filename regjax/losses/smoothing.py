"""Label smoothing and the corrections for label noise, as one family of matrices on the losses.

Everywhere K is the number of classes, p = softmax(logits), l_j = -log p_j, a is the rate and M its
`smearing_matrix`, or any matrix whose rows are probabilities.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, zero_unless
from regjax.losses.labelled import log_rest, logits_and_labels, of_label

Smearing = Literal["smoothing", "backward", "forward"]


def label_smearing(
    logits: ArrayLike,
    labels: ArrayLike,
    rate: ArrayLike,
    *,
    kind: Smearing = "smoothing",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with smoothed labels, or corrected for a known label noise.

        smoothing:  sum_j M[y, j] l_j
        backward:   sum_j (M^-1)[y, j] l_j
        forward:    -log sum_i M[i, y] p_i

    with p = softmax(logits), l_j = -log p_j and M either a row-stochastic matrix or, for a rate a,

        M = (1 - a) I + (a / K) J,    M^-1 = I / (1 - a) - (a / ((1 - a) K)) J,    J all ones.

    For the corrections M[i, j] is the probability that class i is labelled j. A label that stays
    with probability 1 - r, and else becomes any of the K - 1 others, is the rate
    a = r K / (K - 1), see `smearing_rate`.

    The rates form a group: smearing by a, then by b, is smearing by a + b - a b, so the backward
    correction by a is smoothing by the negative rate -a / (1 - a), and the other way round. The
    backward correction is unbiased, its mean over the noisy labels is the clean loss; the forward
    correction has the clean posterior as minimiser and lies between -log(1 - a + a / K) and
    log(K / a). With a negative rate, and with the backward correction, the loss is unbounded below
    and falls as the logits grow: cap the logits, decay the weights or stop early. Nothing is
    clipped here.

    Use smoothing as a regulariser, and against label noise of an unknown rate; a correction where
    the noise is known, or estimated by `anchor_noise_matrix` or `confident_noise_matrix`.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        rate: a, at most K / (K - 1), and of any size below zero unless `kind` is forward; or M
            `[K, K]`. Rows, not columns, of M sum to one: transpose what cleanlab calls
            `noise_matrix`. A JAX array, which may be traced, is not checked.
        kind: the loss.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example. No one-hot is made and, for a number, no matrix.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, a rate out of range, a matrix that is not row-stochastic
            or, for the backward correction, singular; an unknown kind.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML
        2020, https://arxiv.org/abs/2003.02819. Patrini, Rozza, Menon, Nock, Qu, *Making Deep Neural
        Networks Robust to Label Noise: a Loss Correction Approach*, CVPR 2017,
        https://arxiv.org/abs/1609.03683. Wei et al., *To Smooth or Not? When Label Smoothing Meets
        Noisy Labels*, ICML 2022, https://arxiv.org/abs/2106.04149, for negative rates; they report
        the better of training from scratch and from a model warmed up with cross-entropy.

        As in `optax.smooth_labels`, timm, PyTorch and Keras a / K goes to every class, the label's
        too. In Flax's WMT example, tensor2tensor, ESPnet, icefall and big_vision e / (K - 1) goes to
        the others only: pass `smearing_rate(e, K)`. The WMT example also subtracts the entropy of
        the smoothed label. A class that `optax.smooth_labels` leaves out by its mask still gets a
        share, for the loss to mask again; here a matrix says which classes get one.

    >>> import numpy as np
    >>> logits = np.array([2.0, 1.0, 0.1, -1.0])
    >>> for kind in ("smoothing", "backward", "forward"):
    ...     print(f"{label_smearing(logits, 0, 0.1, kind=kind):.4f}")
    0.5968
    0.2854
    0.5121
    """
    logits, labels, where = logits_and_labels(logits, labels, where)
    log_probs = jax.nn.log_softmax(logits)
    if np.ndim(rate) == 2:
        losses = _matrix_losses(log_probs, labels, rate, kind)
    elif np.ndim(rate) == 0:
        losses = _rate_losses(log_probs, labels, rate, kind)
    else:
        raise ValueError(f"rate has shape {np.shape(rate)}; expected () or [K, K]")
    return zero_unless(where, losses)


def smearing_matrix(rate: float, num_classes: int) -> np.ndarray:
    """The matrix of a rate, for smoothing or for noise.

        M = (1 - a) I + (a / K) J,    J all ones

    Row-stochastic for a from 0 to K / (K - 1). With a negative rate -a / (1 - a), the inverse of
    that of a.

    Use it to compose a rate with other matrices, or to draw noisy labels from its rows.

    Args:
        rate: a.
        num_classes: K.

    Returns:
        NumPy float64 `[K, K]`.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML
        2020, https://arxiv.org/abs/2003.02819, its smearing matrices for smoothing and, inverted,
        for the correction.

    >>> smearing_matrix(0.4, 2)
    array([[0.8, 0.2],
           [0.2, 0.8]])
    """
    return (1.0 - rate) * np.eye(num_classes) + rate / num_classes


def smearing_rate(rate_of_others: float, num_classes: int) -> float:
    """The rate a of `label_smearing` from a rate r that is spread over the K - 1 other classes.

        a = r K / (K - 1)

    For noise, r is the probability that a label flips, to any other class alike. For smoothing, it
    is the mass e taken from the label in Flax's WMT example, tensor2tensor or big_vision.

    Use it to take over a flip probability, or a smoothing rate of code that leaves the label's
    class out.

    Args:
        rate_of_others: r, from 0 to 1.
        num_classes: K, at least 2.

    Returns:
        a, from 0 to K / (K - 1).

    Raises:
        ValueError: a rate out of range, fewer than two classes.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML
        2020, https://arxiv.org/abs/2003.02819, whose symmetric noise flips a label with probability
        r.

    >>> print(f"{smearing_rate(0.2, 10):.4f} {smearing_rate(0.2, 100):.4f}")
    0.2222 0.2020
    """
    check_range(rate_of_others, "rate_of_others", 0.0, 1.0)
    check_range(num_classes, "num_classes", 2)
    return rate_of_others * num_classes / (num_classes - 1)


def optimal_smoothing_rate(clean_rate: float, noise_rate: float) -> float:
    """The smoothing rate for labels with symmetric noise, from the best rate for clean labels.

        r = 1 - (1 - r') / (1 - a)

    Smoothing by r after noise of rate a is, in expectation, smoothing the clean labels by r'. It is
    negative if a > r'.

    Use it to carry a rate that was tuned on clean labels over to noisy ones.

    Args:
        clean_rate: r', at most 1.
        noise_rate: a, from 0 to below 1, see `smearing_rate`.

    Returns:
        r, at most 1.

    Raises:
        ValueError: rates out of range.

    References:
        Wei et al., *To Smooth or Not? When Label Smoothing Meets Noisy Labels*, ICML 2022,
        https://arxiv.org/abs/2106.04149, for two classes, where a is twice their flip rate e and
        r = (r' - 2 e) / (1 - 2 e). For K classes it follows from the composition of rates.

    >>> print(f"{optimal_smoothing_rate(0.1, smearing_rate(0.2, 2)):.4f}")
    -0.5000
    """
    check_range(clean_rate, "clean_rate", -math.inf, 1.0)
    if not 0.0 <= noise_rate < 1.0:
        raise ValueError(f"noise_rate must lie in [0, 1); got {noise_rate}")
    return 1.0 - (1.0 - clean_rate) / (1.0 - noise_rate)


def _rate_losses(
    log_probs: jax.Array, labels: jax.Array, rate: ArrayLike, kind: Smearing
) -> jax.Array:
    count = log_probs.shape[-1]
    if isinstance(rate, int | float):
        low = 0.0 if kind == "forward" else -math.inf
        if not low <= rate <= count / (count - 1) or (kind == "backward" and rate == 1.0):
            raise ValueError(
                f"rate must lie in [{low:g}, {count}/{count - 1}] for {kind} with {count} classes"
                f"{', and not be 1' if kind == 'backward' else ''}; got {rate}"
            )
    rate = jnp.asarray(rate, jnp.float32)
    log_label = of_label(log_probs, labels)
    if kind == "forward":
        # The label's own share and that of the others, both of probability above zero: as a
        # mixture with the uniform distribution a rate above one would have a negative term.
        on = jnp.log(1.0 - rate * ((count - 1) / count)) + log_label
        off = jnp.log(rate / count) + log_rest(log_probs, labels)
        return -jnp.logaddexp(on, off)
    if kind == "backward":
        rate = -rate / (1.0 - rate)
    elif kind != "smoothing":
        raise _unknown(kind)
    return -(1.0 - rate) * log_label - rate * log_probs.mean(axis=-1)


def _matrix_losses(
    log_probs: jax.Array, labels: jax.Array, matrix: ArrayLike, kind: Smearing
) -> jax.Array:
    count = log_probs.shape[-1]
    if np.shape(matrix) != (count, count):
        raise ValueError(f"rate has shape {np.shape(matrix)}; expected () or {(count, count)}")
    if not isinstance(matrix, jax.Array):
        matrix = np.asarray(matrix, np.float64)
        if np.any(matrix < 0.0) or not np.allclose(matrix.sum(axis=1), 1.0, atol=1e-4):
            raise ValueError(
                "rate must be a matrix of probabilities whose rows, one per true class, sum to "
                f"one; got rows that sum to {matrix.sum(axis=1).tolist()}"
            )
    if kind == "forward":
        column = jnp.take(jnp.asarray(matrix, jnp.float32).T, labels, axis=0)
        return -jax.nn.logsumexp(log_probs, axis=-1, b=column)
    if kind == "backward":
        matrix = _inverse(matrix)
    elif kind != "smoothing":
        raise _unknown(kind)
    row = jnp.take(jnp.asarray(matrix, jnp.float32), labels, axis=0)
    # An impossible class may have no weight, and zero times infinity is NaN.
    return -jnp.sum(row * jnp.where(row == 0.0, 0.0, log_probs), axis=-1)


def _inverse(matrix: ArrayLike) -> ArrayLike:
    if isinstance(matrix, jax.Array):
        return jnp.linalg.inv(matrix.astype(jnp.float32))
    if np.linalg.cond(matrix) > 1e12:
        raise ValueError("rate is a singular matrix, so this noise has no backward correction")
    return np.linalg.inv(matrix)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"kind must be 'smoothing', 'backward' or 'forward'; got {kind!r}")
