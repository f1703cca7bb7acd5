"""Losses for classes of very different frequency.

Everywhere z are the logits and y is the label; `counts` are the numbers of training examples
n `[K]` of the classes, or anything proportional to them, and pi_k = n_k / sum n.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, floating, per_class, zero_unless
from regjax.losses.labelled import is_label, log_rest, logits_and_labels, of_label


def logit_adjusted(
    logits: ArrayLike,
    labels: ArrayLike,
    counts: ArrayLike,
    *,
    tau: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Logit-adjusted cross-entropy, which trains for the balanced error.

        loss = -log softmax(z + tau log pi)_y = log(1 + sum_{k != y} (pi_k / pi_y)^tau e^(z_k - z_y))

    Train with it, predict with the plain logits z, and measure a validation loss with the
    adjustment, accuracy without it. With class costs c, `counts=1/c` is the cost-sensitive loss of
    `cost_weighted_distillation` on labels.

    Use it for the balanced error, the mean of the classes' error rates, where their frequencies
    differ.

    Args:
        logits: z `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        counts: `[K]`, positive; a common factor does not matter, so priors will do.
        tau: 1 is consistent for the balanced error; 0 is cross-entropy.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, counts that are not positive.

    References:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar, *Long-tail learning via logit adjustment*, ICLR
        2021, https://arxiv.org/abs/2007.07314.

        The authors' code adds 1e-12 to pi^tau in the logarithm.

    >>> import numpy as np
    >>> prior = np.array([0.5, 0.3, 0.15, 0.05])
    >>> print(f"{logit_adjusted(np.array([2.0, 1.0, 0.1, -1.0]), 3, prior):.4f}")
    5.5421
    """
    logits, labels, where = logits_and_labels(logits, labels, where)
    log_prior = jnp.log(per_class(counts, "counts", logits.shape[-1]))
    log_probs = jax.nn.log_softmax(logits + tau * log_prior)
    return zero_unless(where, -of_label(log_probs, labels))


def post_hoc_adjusted(logits: ArrayLike, counts: ArrayLike, *, tau: ArrayLike = 1.0) -> jax.Array:
    """Logits of a model that was trained with cross-entropy, adjusted for the balanced error.

        z - tau log pi

    Subtracted here where `logit_adjusted` adds; never do both. For weights learned on held-out
    examples instead, see `post_shift`.

    Use it for the balanced error where the model is not to be trained again.

    Args:
        logits: z `[..., K]`, floating.
        counts: `[K]`, positive.
        tau: 1 is consistent for calibrated probabilities; may be tuned.

    Returns:
        Float32 `[..., K]`, to take the argmax of.

    Raises:
        TypeError: logits that are not floating.
        ValueError: shapes that do not fit, counts that are not positive.

    References:
        Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021,
        https://arxiv.org/abs/2007.07314.

    >>> import numpy as np
    >>> int(np.argmax(post_hoc_adjusted(np.array([2.0, 1.0, 0.1]), [100, 10, 1])))
    2
    """
    logits = floating(logits, "logits")
    if logits.ndim < 1:
        raise ValueError(f"logits have shape {logits.shape}; expected [..., K]")
    counts = per_class(counts, "counts", logits.shape[-1])
    return logits - tau * jnp.log(counts / counts.sum())


def ldam(
    logits: ArrayLike,
    labels: ArrayLike,
    counts: ArrayLike,
    *,
    largest_margin: float = 0.5,
    scale: float = 30.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Label-distribution-aware margin loss (LDAM): rare classes must win by more.

        loss = -log softmax(s (z - m_y e_y))_y,    m_k = M (n_k / min n)^(-1/4)

    Deferred re-weighting (DRW) multiplies it by `class_balanced_weights(counts)[labels]` late in
    training.

    Use it for rare classes, on logits that are cosines of features and weights.

    Args:
        logits: z `[..., K]`, floating: cosines, of normalised features and class vectors.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        counts: `[K]`, positive.
        largest_margin: M, the margin of the rarest class.
        scale: s.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `logit_adjusted`; a negative margin or scale.

    References:
        Cao, Wei, Gaidon, Arechiga, Ma, *Learning Imbalanced Datasets with Label-Distribution-Aware
        Margin Loss*, NeurIPS 2019, https://arxiv.org/abs/1906.07413; the defaults are those of the
        authors' code.

    >>> import numpy as np
    >>> print(f"{ldam(np.array([0.8, 0.3, -0.1, -0.4]), 1, [1000, 300, 100, 10]):.4f}")
    21.4093
    """
    check_range(largest_margin, "largest_margin", 0.0)
    check_range(scale, "scale", 0.0)
    logits, labels, where = logits_and_labels(logits, labels, where)
    counts = per_class(counts, "counts", logits.shape[-1])
    margins = largest_margin * (counts / counts.min()) ** -0.25
    shifted = logits - jnp.where(is_label(labels, logits.shape[-1]), margins, 0.0)
    return zero_unless(where, -of_label(jax.nn.log_softmax(scale * shifted), labels))


def class_balanced_weights(counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    """Weights of the classes by their effective number of examples.

        w_k proportional to (1 - b) / (1 - b^n_k),    sum_k w_k = K

    Ones for b = 0, proportional to 1 / n_k for b = 1. Multiply an example's loss by its label's
    weight. PyTorch's weighted cross-entropy then divides by the batch's sum of weights, not by its
    size: let (sum, weight) of the objective say which.

    Use them to weigh classes of different frequency where 1 / n_k is too steep.

    Args:
        counts: n `[K]`, at least 1; true counts, not priors.
        beta: b, from 0 to 1. With deferred re-weighting 0 at first, 0.9999 after.

    Returns:
        Float32 `[K]`.

    Raises:
        ValueError: counts that are not positive, or not `[K]`; beta out of range.

    References:
        Cui, Jia, Lin, Song, Belongie, *Class-Balanced Loss Based on Effective Number of Samples*,
        CVPR 2019, https://arxiv.org/abs/1901.05555.

    >>> [f"{weight:.4f}" for weight in class_balanced_weights([1000, 300, 100, 10])]
    ['0.0367', '0.1182', '0.3510', '3.4941']
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1]; got {beta}")
    shape = np.shape(counts)
    if len(shape) != 1:
        raise ValueError(f"counts have shape {shape}; expected [K]")
    counts = per_class(counts, "counts", shape[0])
    if beta == 0.0:
        return jnp.ones_like(counts)
    # Not 1 - b^n, which keeps no digit for b near one.
    inverse = 1.0 / counts if beta == 1.0 else -1.0 / jnp.expm1(counts * math.log(beta))
    return inverse / inverse.mean()


def softmax_focal(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Focal loss of a softmax: less of what is already well classified.

        loss = -(1 - p_y)^gamma log p_y,    p = softmax(logits)

    For independent binary labels there is `optax.losses.sigmoid_focal_loss`; of two classes they are
    the same.

    Use it where the many easy examples outweigh the few hard ones.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        gamma: not negative; 0 is cross-entropy.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, a negative gamma.

    References:
        Lin, Goyal, Girshick, He, Dollar, *Focal Loss for Dense Object Detection*, ICCV 2017,
        https://arxiv.org/abs/1708.02002, whose gamma is 2.

        Class weights belong outside: code that gives them to the cross-entropy and takes p_y from
        it, as that of LDAM, has the wrong p_y.

    >>> import numpy as np
    >>> print(f"{softmax_focal(np.array([2.0, 1.0, 0.1, -1.0]), 0, gamma=1.0):.4f}")
    0.1626
    """
    check_range(gamma, "gamma", 0.0)
    logits, labels, where = logits_and_labels(logits, labels, where)
    log_probs = jax.nn.log_softmax(logits)
    focus = jnp.exp(gamma * log_rest(log_probs, labels))
    return zero_unless(where, -focus * of_label(log_probs, labels))


def vector_scaling(
    logits: ArrayLike,
    labels: ArrayLike,
    counts: ArrayLike,
    *,
    gamma: ArrayLike = 0.3,
    tau: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Vector-scaling (VS) loss: logits scaled and shifted by the frequency of their class.

        loss = -log softmax(z (n / max n)^gamma + tau log pi)_y

    gamma = 0 is `logit_adjusted`. Unlike an added constant, a factor still acts at the end of
    training, when the logits are large.

    Use it for the balanced error where the network can fit all training examples.

    Args:
        logits: z `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        counts: `[K]`, positive.
        gamma: of the factor.
        tau: of the shift.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `logit_adjusted`.

    References:
        Kini, Paraskevas, Oymak, Thrampoulidis, *Label-Imbalanced and Group-Sensitive Classification
        under Overparameterization*, NeurIPS 2021, https://arxiv.org/abs/2103.01550. The defaults
        are those of a public comparison of losses for the worst class.

    >>> import numpy as np
    >>> print(f"{vector_scaling(np.array([2.0, 1.0]), 1, [8, 1]):.4f}")
    3.5721
    """
    logits, labels, where = logits_and_labels(logits, labels, where)
    counts = per_class(counts, "counts", logits.shape[-1])
    relative = counts / counts.max()
    log_probs = jax.nn.log_softmax(logits * relative**gamma + tau * jnp.log(relative))
    return zero_unless(where, -of_label(log_probs, labels))
