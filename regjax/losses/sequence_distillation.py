"""Distillation of sequence models: one number per sequence."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, zero_unless
from regjax.losses.distillation import distillation
from regjax.losses.divergence import Divergence, student_and_teacher
from regjax.losses.tokens import token_cross_entropy


def sequence_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    kind: Divergence | Literal["cross_entropy"] = "forward",
    beta: float = 0.5,
    length_normalize: bool = False,
    squared_temperature: bool = True,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Word-level distillation: that of every token, added over the sequence.

        loss = sum_t distillation(student_t, teacher_t)

    Position t of both models sees the same prefix, gold or sampled from the student. With
    `kind="cross_entropy"` and a one-hot teacher it is `sequence_cross_entropy`. For a mean over all
    tokens of a batch, leave the sum and divide once by the number of tokens of the whole batch: a
    mean of means over sequences gives tokens of short ones more weight.

    Use it where the teacher's logits are at hand, on gold text or on the student's samples.

    Args:
        student: logits `[..., L, V]`.
        teacher: logits `[..., L, V]`.
        length_normalize: divide by the number of tokens that count.
        temperature, kind, beta, squared_temperature, teacher_gradient: as in `distillation`.
        where: `[..., L]`, the tokens that count.

    Returns:
        Float32 `[...]`, one loss per sequence; 0 without tokens.

    Raises:
        TypeError, ValueError: as `distillation`.

    References:
        Kim, Rush, *Sequence-Level Knowledge Distillation*, EMNLP 2016,
        https://arxiv.org/abs/1606.07947, word-level.
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024,
        https://arxiv.org/abs/2306.13649, on the student's own samples.

        Tunix averages over all positions, those of the padding too.

    >>> import numpy as np
    >>> student, teacher = np.log([[0.5, 0.5], [0.5, 0.5]]), np.log([[0.8, 0.2], [0.5, 0.5]])
    >>> print(f"{sequence_distillation(student, teacher):.4f}")
    0.1927
    """
    losses = distillation(
        student,
        teacher,
        temperature=temperature,
        kind=kind,
        beta=beta,
        squared_temperature=squared_temperature,
        teacher_gradient=teacher_gradient,
        where=where,
    )
    return _over_tokens(losses, where, length_normalize)


def sequence_cross_entropy(
    student: ArrayLike,
    tokens: ArrayLike,
    *,
    length_normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Sequence-level distillation: minus the log-probability of a sequence of the teacher's.

        loss = sum_t -log p(token_t | tokens before t)

    The teacher is in the tokens: its beam-search output, or, interpolated, the candidate of its
    beam that is most similar to the reference, `candidates[jnp.argmax(similarities)]`. Several
    candidates are one more leading dimension, weighed by the caller.

    Use it where of the teacher only its text is at hand, or where the student is to copy its beam
    search.

    Args:
        student: logits `[..., L, V]`, position t predicting token t.
        tokens: `[..., L]`, integers.
        length_normalize: divide by the number of tokens that count.
        where: `[..., L]`, the tokens that count.

    Returns:
        Float32 `[...]`, one loss per sequence; 0 without tokens.

    Raises:
        TypeError, ValueError: as `token_cross_entropy`.

    References:
        Kim, Rush, *Sequence-Level Knowledge Distillation*, EMNLP 2016,
        https://arxiv.org/abs/1606.07947.

    >>> import numpy as np
    >>> print(f"{sequence_cross_entropy(np.log([[0.5, 0.5], [0.8, 0.2]]), np.array([1, 0])):.4f}")
    0.9163
    """
    losses = token_cross_entropy(student, tokens, where=where)
    return _over_tokens(losses, where, length_normalize)


def discounted_returns(
    rewards: ArrayLike,
    *,
    gamma: float,
    length_normalize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Rewards still to come, each step's multiplied by gamma once more.

        G_t = sum_{s >= t} gamma^(s - t) reward_s
        length_normalize: G_t / sum_{s >= t} gamma^(s - t)

    Use it for the advantages of a policy gradient over the steps of a sequence.

    Args:
        rewards: `[..., L]`, floating.
        gamma: from 0, only the step's own reward, to 1.
        length_normalize: divide by the sum of the same weights.
        where: `[..., L]`, the tokens that count. The others have reward and weight zero.

    Returns:
        Float32 `[..., L]`, zero where `where` is false.

    Raises:
        TypeError: rewards of a type that is not floating.
        ValueError: gamma out of range, a mask that does not fit.

    References:
        Gu, Dong, Wei, Huang, *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024,
        https://arxiv.org/abs/2306.08543, in the form documented by TRL.

        Differs from TRL's code, whose weights reach into the padding, and which without
        normalisation returns gamma^t G_t.

    >>> import numpy as np
    >>> discounted_returns(np.array([1.5, 1.0, 2.0, 2.0]), gamma=0.5).tolist()
    [2.75, 2.5, 3.0, 2.0]
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
    rewards = floating(rewards, "rewards")
    if rewards.ndim < 1:
        raise ValueError("rewards need a shape [..., L]; got a scalar")
    where = mask_of_shape(where, rewards.shape)
    counted = jnp.ones_like(rewards) if where is None else where.astype(jnp.float32)

    def step(later: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = now + gamma * later
        return total, total

    both = jnp.stack([zero_unless(where, rewards), counted])
    _, sums = jax.lax.scan(
        step, jnp.zeros_like(both[..., 0]), jnp.moveaxis(both, -1, 0), reverse=True
    )
    returns, weights = jnp.moveaxis(sums, 0, -1)
    if length_normalize:
        returns = returns / jnp.where(weights > 0.0, weights, 1.0)
    return zero_unless(where, returns)


def on_policy_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    tokens: ArrayLike,
    *,
    gamma: float = 0.0,
    single_step: bool = True,
    length_normalize: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Reverse divergence of whole sequences, on a sequence that the student sampled (MiniLLM).

        single_step: loss = sum_t KL(p_t || q_t) - sum_t A_t log p_t(token_t),    A_t = gamma G_{t+1}
        else:        loss = -sum_t A_t log p_t(token_t),    A_t = G_t
        G = discounted_returns(reward),    reward_t = log q_t(token_t) - log p_t(token_t)

    A_t has no gradient. With `single_step` it leaves out the step's own reward, of which the first
    sum holds minus the mean over all tokens. The value says little: it is the gradient that
    estimates the gradient of KL(p || q) over sequences, without bias for gamma = 1 and no length
    normalisation, where the tokens are samples of softmax(student). With gamma = 0 and
    `single_step`, the default of TRL, it is `sequence_distillation(kind="reverse")`.

    Use it on the student's own samples, where it is not to write what the teacher finds improbable.

    Args:
        student: logits `[..., L, V]`, position t predicting token t.
        teacher: logits `[..., L, V]`. No gradient.
        tokens: `[..., L]`, integers from 0 to V - 1, sampled from the student.
        gamma: from 0 to 1.
        single_step: split each step's own divergence off, which lowers the variance.
        length_normalize: divide A_t by the weights of G_t, sum_{s >= t} gamma^(s - t). That the
            same divisor is used with `single_step` is a choice made here.
        where: `[..., L]`, the tokens that count.

    Returns:
        Float32 `[...]`, one loss per sequence.

    Raises:
        TypeError, ValueError: as `sequence_distillation`; tokens that are not integers or do not
            fit; gamma out of range.

    References:
        Gu, Dong, Wei, Huang, *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024,
        https://arxiv.org/abs/2306.08543, in the form documented by TRL; without the paper's
        sampling from a mixture with the teacher and without its language modelling loss.

        Without `single_step`, gamma = 0 is what TRL calls the on-policy distillation of Tinker.
        TRL's mask of the advantages is of ones, so that padding on the right enters them.

    >>> import numpy as np
    >>> student, teacher = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
    >>> print(f"{on_policy_distillation(student, teacher, np.array([0])):.4f}")
    0.2231
    """
    student, teacher, where = student_and_teacher(student, teacher, where)
    if student.ndim < 2:
        raise ValueError(f"student has shape {student.shape}; expected [..., L, V]")
    log_student = -token_cross_entropy(student, tokens, where=where)
    log_teacher = -token_cross_entropy(teacher, tokens, where=where)
    rewards = jax.lax.stop_gradient(log_teacher - log_student)
    advantages = discounted_returns(rewards, gamma=gamma, where=where)
    if single_step:
        advantages = advantages - rewards
    if length_normalize:
        ones = jnp.ones_like(rewards)
        weights = discounted_returns(ones, gamma=gamma, where=where)
        advantages = advantages / jnp.where(weights > 0.0, weights, 1.0)
    losses = -advantages * log_student
    if single_step:
        losses = losses + distillation(student, teacher, kind="reverse", where=where)
    return zero_unless(where, losses).sum(axis=-1)


def _over_tokens(losses: jax.Array, where: ArrayLike | None, length_normalize: bool) -> jax.Array:
    """Sum or mean `[...]` of losses `[..., L]` that are zero where they do not count."""
    if losses.ndim < 1:
        raise ValueError("a sequence has logits [..., L, V]; got those of one token")
    if not length_normalize:
        return losses.sum(axis=-1)
    counted = jnp.ones_like(losses) if where is None else jnp.asarray(where, jnp.float32)
    return losses.sum(axis=-1) / jnp.maximum(counted.sum(axis=-1), 1.0)
