"""Distillation from hidden states and a head, never holding the logits of either model.

Everything that `regjax.losses.linear` says of its arguments holds here, too.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from regjax.losses.checks import check_temperature, mask_of_shape
from regjax.losses.divergence import Divergence
from regjax.losses.linear import BLOCK, CHUNK
from regjax.losses.linear_divergence import projected_divergence
from regjax.losses.linear_picks import picks
from regjax.losses.linear_rows import Layout, over_rows, projection
from regjax.losses.top_k_teacher import top_k_distillation


def linear_distillation(
    hidden: ArrayLike,
    head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    squared_temperature: bool = True,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Divergence of the student from a teacher of which there are hidden states and a head.

        loss = T^2 D(q || p),    q = softmax(teacher_hidden @ teacher_head / T),    p = softmax(z / T)

    That is `distillation(hidden @ head, teacher_hidden @ teacher_head)`, without gradient to the
    teacher. Logits are made twice for the value: once for both normalizers, once for terms that are
    each non-negative. Once would do for the forward and the reverse kind, as a difference of sums
    that cancel where the two are alike.

    Use it for a teacher that is at hand, where neither model's logits fit into memory.

    Args:
        hidden: `[..., D]`.
        head: `[D, V]`.
        teacher_hidden: `[..., E]`; E may be another width.
        teacher_head: `[E, V]`.
        temperature: T, a positive scalar; an array is not checked.
        kind: `"forward"`, `"reverse"`, `"jensen_shannon"` or `"skew"`, as in `distillation`.
        beta: from 0 to 1, the teacher's share of the mixture.
        squared_temperature: multiply by T^2.
        soft_cap, teacher_soft_cap: of the logits, before they are divided by T.
        where: `[...]`, the rows that count.
        chunk, block, mesh, axis: see `regjax.losses.linear`.

    Returns:
        Float32 `[...]`, one loss per row; non-negative.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`; an unknown kind, beta or temperature out of
            range, vocabularies of two sizes.

    References:
        See `distillation`.

    >>> import numpy as np
    >>> student, teacher = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
    >>> print(f"{linear_distillation(np.ones(1), student, np.ones(1), teacher):.4f}")
    0.1927
    """
    _check_temperature(temperature)
    student = projection(hidden, head, temperature, soft_cap)
    names = ("teacher_hidden", "teacher_head")
    teacher = projection(teacher_hidden, teacher_head, temperature, teacher_soft_cap, names)
    shape = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != shape or teacher.head.shape[1] != student.head.shape[1]:
        raise ValueError(
            f"student has rows {shape} and {student.head.shape[1]} logits, teacher "
            f"{teacher.hidden.shape[:-1]} and {teacher.head.shape[1]}; expected the same"
        )
    where = mask_of_shape(where, shape)
    compute = functools.partial(projected_divergence, kind=kind, beta=beta)
    layout = Layout(chunk, block, mesh, axis)
    losses = over_rows(compute, (student, teacher), (), where, layout)
    if squared_temperature:
        losses = losses * jax.lax.stop_gradient(jnp.square(temperature))
    return losses


def linear_top_k_distillation(
    hidden: ArrayLike,
    head: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    teacher_log_tail: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    tail: Literal["bucket", "renormalize"] = "bucket",
    squared_temperature: bool = True,
    soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Divergence of the student from a cached teacher of k tokens and a tail.

        bucket:       T^2 D(q_1, ..., q_k, 1 - sum_j q_j || p_1, ..., p_k, 1 - sum_j p_j)
        renormalize:  T^2 D(q / sum_j q_j || p / sum_j p_j), on the k tokens

    That is `top_k_distillation(hidden @ head, ...)`: p = softmax(z / T) over all V tokens, and the
    student's tail is summed over the other tokens, not one less the k.

    Use it for a teacher in a cache, where the student's logits do not fit into memory.

    Args:
        hidden: `[..., D]`.
        head: `[D, V]`.
        teacher_ids: `[..., k]`, integers below V, each at most once in a row. Negative ones are
            padding. One beyond V gives NaN.
        teacher_log_probs: `[..., k]`, at temperature T under the softmax over all V, see
            `teacher_top_k`. No gradient.
        teacher_log_tail: `[...]`, of all other tokens, or `None`: one less the k.
        temperature, kind, beta, tail, squared_temperature: as in `top_k_distillation`.
        soft_cap: of the student's logits, before they are divided by T.
        where: `[...]`, the rows that count.
        chunk, block, mesh, axis: see `regjax.losses.linear`.

    Returns:
        Float32 `[...]`, one loss per row; non-negative.

    Raises:
        TypeError, ValueError: as `top_k_distillation`, as `linear_cross_entropy`.

    References:
        See `top_k_distillation`.

    >>> import numpy as np
    >>> from regjax.losses.top_k_teacher import teacher_top_k
    >>> teacher = teacher_top_k(np.log([0.6, 0.3, 0.1]), 1)
    >>> head = np.log([[0.2, 0.4, 0.4]])
    >>> print(f"{linear_top_k_distillation(np.ones(1), head, *teacher):.4f}")
    0.3819
    """
    _check_temperature(temperature)
    student = projection(hidden, head, temperature, soft_cap)
    shape, size = student.hidden.shape[:-1], student.head.shape[1]
    ids = jnp.asarray(teacher_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"teacher_ids must be integers; got {ids.dtype} of shape {ids.shape}")
    if ids.ndim < 1 or ids.shape[:-1] != shape:
        raise ValueError(f"teacher_ids have shape {ids.shape}; expected [..., k] with {shape}")
    where = mask_of_shape(where, shape)
    layout = Layout(chunk, block, mesh, axis)
    found = over_rows(picks, (student,), ids.astype(jnp.int32), where, layout)
    known = ids >= 0
    picked = jnp.where(known, jnp.where(ids < size, found.picked, jnp.nan), -jnp.inf)
    # The k tokens and one for all others are a vocabulary with the same loss.
    losses = top_k_distillation(
        jnp.concatenate([picked, found.log_rest[..., None]], axis=-1),
        jnp.where(known, jnp.arange(ids.shape[-1]), -1),
        teacher_log_probs,
        teacher_log_tail,
        kind=kind,
        beta=beta,
        tail=tail,
        where=where,
    )
    if squared_temperature:
        losses = losses * jax.lax.stop_gradient(jnp.square(temperature))
    return losses


def _check_temperature(temperature: ArrayLike) -> None:
    check_temperature(temperature)
    if jnp.ndim(temperature) > 0:
        raise ValueError(f"temperature has shape {jnp.shape(temperature)}; expected a scalar")
