"""Policy gradients for groups of sampled answers, whose reward may depend on the parameters.

G answers are sampled for every prompt, the last of the leading dimensions. Advantages are numbers
without a gradient; losses are surrogates, of which the gradient is meant, not the value.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, numbers_of_shape, zero_unless
from regjax.losses.grid import Codec, expected_score
from regjax.losses.soft_labels import soft_label_loss, two_hot


def leave_one_out(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Advantages over the mean reward of the other answers to the same prompt.

        A_i = R_i - (1 / (G - 1)) sum_{j != i} R_j = (G / (G - 1)) (R_i - mean R)

    They sum to zero, and the policy gradient with them is unbiased. Equal rewards give exactly zero.

    Use it as the baseline of a policy gradient, where several answers are sampled per prompt.

    Args:
        rewards: R `[..., G]`, floating.
        where: `[..., G]`, the answers that count; the others get zero. One alone gets zero as well.

    Returns:
        Float32 `[..., G]`, without a gradient.

    Raises:
        TypeError: rewards that are not floating.
        ValueError: shapes that do not fit.

    References:
        Kool, van Hoof, Welling, *Buy 4 REINFORCE Samples, Get a Baseline for Free!*, 2019.

    >>> import numpy as np
    >>> [f"{advantage:.4f}" for advantage in leave_one_out(np.array([-4.0, -1.0, 0.0, -1.0]))]
    ['-3.3333', '0.6667', '2.0000', '0.6667']
    """
    rewards = floating(rewards, "rewards")
    if rewards.ndim < 1:
        raise ValueError("rewards must have shape [..., G]; got a scalar")
    where = mask_of_shape(where, rewards.shape)
    counted = jnp.ones(rewards.shape, bool) if where is None else where
    count = counted.sum(axis=-1, keepdims=True).astype(jnp.float32)
    # From the best reward, so that equal rewards leave no rounding for a normalisation to enlarge.
    best = jnp.max(jnp.where(counted, rewards, -jnp.inf), axis=-1, keepdims=True)
    behind = jnp.where(counted, rewards - jnp.where(count > 0.0, best, 0.0), 0.0)
    total = count * behind - behind.sum(axis=-1, keepdims=True)
    advantages = jnp.where(count > 1.0, total / jnp.maximum(count - 1.0, 1.0), 0.0)
    return jax.lax.stop_gradient(zero_unless(where, advantages))


def group_normalized(
    rewards: ArrayLike,
    *,
    clip: float | None = None,
    correction: int = 0,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Leave-one-out advantages over their standard deviation in the group.

        A_i / (std A + eps),    clipped to [-clip, clip]

    Free of the rewards' scale: of R and of 10 R they are the same. Up to eps it is
    (R_i - mean R) / std R, whatever the baseline.

    Use it where the scale of the rewards is arbitrary or differs between prompts.

    Args:
        rewards: R `[..., G]`, floating.
        clip: the largest advantage; `None`, any.
        correction: 0 for the population's deviation, 1 for the sample's, as in PyTorch's `std`.
        epsilon: eps.
        where: `[..., G]`, the answers that count; the others get zero.

    Returns:
        Float32 `[..., G]`, without a gradient; zero where all rewards of a group are equal.

    Raises:
        TypeError, ValueError: as `leave_one_out`.

    References:
        Zhang et al., *REAL*, 2026, https://arxiv.org/abs/2603.17145: clip 1. Shao et al.,
        *DeepSeekMath*, 2024, https://arxiv.org/abs/2402.03300: none.

    >>> import numpy as np
    >>> rewards = np.array([-4.0, -1.0, 0.0, -1.0])
    >>> [f"{advantage:.4f}" for advantage in group_normalized(rewards, clip=1.0)]
    ['-1.0000', '0.3333', '1.0000', '0.3333']
    """
    advantages = leave_one_out(rewards, where=where)
    counts = advantages.shape[-1] if where is None else jnp.sum(where, axis=-1, keepdims=True)
    squares = jnp.sum(jnp.square(advantages), axis=-1, keepdims=True)
    deviations = jnp.sqrt(squares / jnp.maximum(counts - correction, 1))
    normalized = advantages / (deviations + epsilon)
    return normalized if clip is None else jnp.clip(normalized, -clip, clip)


def generalized_policy_gradient(
    log_probs: ArrayLike,
    rewards: ArrayLike,
    advantages: ArrayLike,
    *,
    reward_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The policy gradient where the reward itself depends on the parameters.

        loss_i = -A_i log pi(c_i | x) - beta r(x, c_i)

    With r = r_theta, the gradient of J = E_c[r(x, c)] is E_c[r grad log pi(c | x) + grad r]. The
    mean of the losses over samples from pi has minus that gradient, in expectation, at beta = 1 and
    advantages that are rewards less a baseline that does not depend on the sample itself. Without
    the second term, a parameter that only the reward depends on gets no gradient.

    Use it where the reward is computed from the parameters that are trained.

    Args:
        log_probs: log pi(c_i | x) `[..., G]`, floating: of the whole sample, a sum over its tokens.
        rewards: r `[..., G]`, floating, with a gradient.
        advantages: A `[..., G]`, floating. No gradient.
        reward_weight: beta.
        where: `[..., G]`, the samples that count.

    Returns:
        Float32 `[..., G]`, one loss per sample.

    Raises:
        TypeError: arrays that are not floating.
        ValueError: shapes that do not fit.

    References:
        Schulman, Heess, Weber, Abbeel, *Gradient Estimation Using Stochastic Computation Graphs*,
        NeurIPS 2015, https://arxiv.org/abs/1506.05254.

    >>> import numpy as np
    >>> log_probs, rewards = np.log([0.5, 0.25]), np.array([1.0, 3.0])
    >>> losses = generalized_policy_gradient(log_probs, rewards, leave_one_out(rewards))
    >>> [f"{loss:.4f}" for loss in losses]
    ['-2.3863', '-0.2274']
    """
    log_probs, rewards = floating(log_probs, "log_probs"), floating(rewards, "rewards")
    advantages = floating(advantages, "advantages")
    for array, name in ((rewards, "rewards"), (advantages, "advantages")):
        if array.shape != log_probs.shape:
            raise ValueError(f"{name} have shape {array.shape}; expected {log_probs.shape}")
    where = mask_of_shape(where, log_probs.shape)
    log_probs, rewards = zero_unless(where, log_probs), zero_unless(where, rewards)
    advantages = jax.lax.stop_gradient(zero_unless(where, advantages))
    return -advantages * log_probs - reward_weight * rewards


def real(
    logits: ArrayLike,
    targets: ArrayLike,
    codec: Codec,
    reasoning_log_probs: ArrayLike,
    *,
    label_weight: float = 1.0,
    reward_weight: ArrayLike = 1.0,
    form: Literal["paper", "code"] = "paper",
    clip: float | None = 1.0,
    normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """REAL: regression-aware reinforcement learning of a score after sampled reasoning.

        r_i = -(yhat_i - y)^2 + lambda log p(y | x, c_i),    yhat_i = sum_k p(str(y_k) | x, c_i) y_k
        loss_i = -A_i log pi(c_i | x) - beta r_i

        paper: A = group_normalized(r)
        code:  A = group_normalized(-(yhat - y)^2) + lambda group_normalized(p(y | x, c))

    Use it to train reasoning before a score together with the score itself.

    Args:
        logits: `[..., G, V]`, `[..., G, K, T, V]` or `[..., G, K]`, see `regjax.losses.grid`, of
            the score after each reasoning.
        targets: y `[..., G]`, real numbers. Between two values of the grid, log p(y) is the mean of
            both of theirs, by distance: that of `two_hot`.
        codec: the grid, ascending.
        reasoning_log_probs: log pi(c_i | x) `[..., G]`, floating: sums over the tokens of the
            reasoning, not of the score.
        label_weight: lambda.
        reward_weight: beta; 1 is the exact weight beside unnormalised advantages. The authors'
            script has 0, and calls 0.01 the best.
        form: what the advantages are of.
        clip: the largest advantage of each kind; `None`, any.
        normalize: divide the probabilities by their sum over the grid.
        where: `[..., G]`, the samples that count.

    Returns:
        Float32 `[..., G]`, one loss per sample.

    Raises:
        TypeError: arrays that are not floating.
        ValueError: shapes that do not fit; an unknown `form`.

    References:
        Zhang, Chen, Zhou, Leong, Wu, Lukasik, *REAL: Regression-Aware Reinforcement Learning for
        LLM-as-a-Judge*, 2026, https://arxiv.org/abs/2603.17145.

        The authors' code also counts the score's token, with an advantage of zero, in the mean over
        tokens, and reads a grid from 1 to 5 where the paper's is said to be from 0 to 9.

    >>> import numpy as np
    >>> logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    >>> losses = real(logits, np.array([3.0, 3.0]), [1.0, 2.0, 3.0], np.log([0.5, 0.25]))
    >>> [f"{loss:.4f}" for loss in losses]
    ['4.1694', '1.9030']
    """
    # Once, so that the gradients of the score and of the label are added before they are rounded.
    logits = floating(logits, "logits")
    predictions = expected_score(logits, codec, normalize=normalize, where=where)
    targets = numbers_of_shape(targets, "targets", predictions.shape)
    targets = zero_unless(mask_of_shape(where, targets.shape), targets)
    rewards = of_error = -jnp.square(predictions - targets)
    labels = two_hot(targets, codec)
    log_label = -soft_label_loss(logits, labels, codec, normalize=normalize, where=where)
    if label_weight != 0.0:
        rewards = of_error + label_weight * log_label
    if form == "paper":
        advantages = group_normalized(rewards, clip=clip, where=where)
    elif form == "code":
        advantages = group_normalized(of_error, clip=clip, where=where)
        of_label = group_normalized(jnp.exp(log_label), clip=clip, where=where)
        advantages = advantages + label_weight * of_label
    else:
        raise ValueError(f"form must be 'paper' or 'code'; got {form!r}")
    return generalized_policy_gradient(
        reasoning_log_probs, rewards, advantages, reward_weight=reward_weight, where=where
    )


def sampled_kl(
    log_probs: ArrayLike,
    reference_log_probs: ArrayLike,
    *,
    kind: Literal["k1", "k2", "k3"] = "k3",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Estimates of KL(pi || reference) from samples of pi.

        d = log pi(c) - log reference(c)
        k1: d        k2: d^2 / 2        k3: exp(-d) - 1 + d

    k1 and k3 are unbiased values; k2 is not, k2 and k3 are never negative. As a loss it is the
    other way round: the mean gradient of k2 is that of KL(pi || reference), that of k3 the one of
    KL(reference || pi), and that of k1 is zero.

    Use k1 or k3 to report how far the policy is from the reference, k2 as a penalty to train with.

    Args:
        log_probs: log pi of the sampled tokens or answers `[...]`, floating.
        reference_log_probs: of the same samples `[...]`, floating. No gradient.
        kind: the estimator. k3 overflows float32 where the reference is e^88 times as likely.
        where: `[...]`, the samples that count.

    Returns:
        Float32 `[...]`, one number per sample.

    Raises:
        TypeError: arrays that are not floating.
        ValueError: shapes that do not fit; an unknown `kind`.

    References:
        Schulman, *Approximating KL Divergence*, 2020, http://joschu.net/blog/kl-approx.html. k3 is
        `low_var_kl` in verl.

    >>> import numpy as np
    >>> for kind in ("k1", "k2", "k3"):
    ...     print(f"{sampled_kl(np.log(0.5), np.log(0.25), kind=kind):.4f}")
    0.6931
    0.2402
    0.1931
    """
    log_probs = floating(log_probs, "log_probs")
    reference = floating(reference_log_probs, "reference_log_probs")
    if reference.shape != log_probs.shape:
        raise ValueError(
            f"reference_log_probs have shape {reference.shape}; expected {log_probs.shape}"
        )
    where = mask_of_shape(where, log_probs.shape)
    reference = jax.lax.stop_gradient(zero_unless(where, reference))
    ratio = zero_unless(where, log_probs) - reference
    if kind == "k1":
        return ratio
    if kind == "k2":
        return 0.5 * jnp.square(ratio)
    if kind == "k3":
        return jnp.expm1(-ratio) + ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3'; got {kind!r}")
