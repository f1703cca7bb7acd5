"""Losses of hidden states and a head whose logits over the vocabulary are never held at once.

Everywhere, for D the width and V the vocabulary,

    z = cap(hidden @ head) [..., V],    cap(x) = soft_cap tanh(x / soft_cap), or x without a cap

is made in tiles of `block` rows by `chunk` columns, once for the value (twice for a divergence) and
once more for the gradient. In place of `[..., V]` there are some tiles, the hidden states in float32
and a few numbers per row.

* `hidden [..., D]` and `head [D, V]` are of any floating type. The factors of every product have
  the wider of the two types, the tile's gradient too; its sums, and all other arithmetic, are
  float32. Gradients are accumulated in float32 and have their arrays' types.
* `where [...]`: the rows that count. The others have results and gradients of exactly zero, even
  where their hidden states are not finite. Rows that count are packed to the front and the loops
  end with them, so that the others cost nothing, but for up to a block.
* `mesh` and `axis`: the vocabulary is dealt out over that axis of the mesh, the first dimension of
  the rows over all its other axes. Numbers per row travel between the parts of a vocabulary, never
  logits. Sharded arrays without a mesh give the same numbers, but are gathered.
* `chunk` and `block` need not divide anything. Their defaults suit a CPU; give larger ones where a
  product of that size leaves an accelerator waiting.

Nothing here has a second derivative, or one with respect to a temperature or a soft cap.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from regjax.losses.checks import check_temperature, class_labels, mask_of_shape, zero_unless
from regjax.losses.divergence import Divergence
from regjax.losses.grid import expected_score
from regjax.losses.linear_divergence import projected_divergence
from regjax.losses.linear_picks import picks
from regjax.losses.linear_rows import Layout, over_rows, projection
from regjax.losses.top_k_teacher import top_k_distillation
from regjax.token_grid import TokenGrid

CHUNK = 2048
BLOCK = 512


def linear_cross_entropy(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Softmax cross-entropy with integer labels, `token_cross_entropy(hidden @ head, labels)`.

        loss = (1 - a) (logsumexp z - z_label) + a (logsumexp z - mean z) + b (logsumexp z)^2

    Use it for next tokens where the logits of all positions over the vocabulary do not fit into
    memory.

    Args:
        hidden: `[..., D]`.
        head: `[D, V]`.
        labels: `[...]`, integers from 0 to V - 1. Any other gives NaN.
        label_smoothing: a, from 0 to 1.
        z_loss: b, not negative; 1e-4 in T5X.
        soft_cap: of the logits, positive.
        where: `[...]`, the rows that count.
        chunk, block, mesh, axis: see `regjax.losses.linear`.

    Returns:
        Float32 `[...]`, one loss per row.

    Raises:
        TypeError: hidden states or a head that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, or do not divide among the devices; numbers out of range.

    References:
        Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, ICLR 2025,
        https://arxiv.org/abs/2411.09009, for the tiles and the online log-sum-exp. Differs in that
        no tile of small probabilities is left out of the gradient.
        Chowdhery et al., *PaLM: Scaling Language Modeling with Pathways*, 2022,
        https://arxiv.org/abs/2204.02311, for the last term.

    >>> import numpy as np
    >>> hidden, head = np.array([1.0, 0.0]), np.log([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    >>> print(f"{linear_cross_entropy(hidden, head, 1):.4f}")
    1.6094
    >>> print(f"{linear_cross_entropy(hidden, head, 1, label_smoothing=0.1, chunk=2):.4f}")
    1.5908
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative; got {z_loss}")
    student = projection(hidden, head, soft_cap=soft_cap)
    shape, size = student.hidden.shape[:-1], student.head.shape[1]
    labels = class_labels(labels, shape, size)
    where = mask_of_shape(where, shape)
    layout = Layout(chunk, block, mesh, axis)
    found = over_rows(picks, (student,), labels[..., None], where, layout)
    z_label = jnp.where(labels < size, found.picked[..., 0], jnp.nan)
    losses = jax.nn.softplus(found.log_rest - z_label)
    if label_smoothing > 0.0:
        losses = losses + label_smoothing * (z_label - found.mean)
    if z_loss > 0.0:
        losses = losses + z_loss * jnp.square(jnp.logaddexp(found.log_rest, z_label))
    return zero_unless(where, losses)


def linear_grid_log_probs(
    hidden: ArrayLike,
    head: ArrayLike,
    codec: TokenGrid,
    *,
    soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Log-probability of every value of a grid of single tokens, under the whole softmax.

        log p(str(y_k) | x) = z[token_k] - logsumexp_v z[v]

    With them, every loss of `regjax.losses.regression` is one of hidden states and a head: give
    them as logits, and `codec.values` as the grid.

    Use it for losses of a grid at many positions, or over a vocabulary that is dealt out over
    devices.

    Args:
        hidden: `[..., D]`, at the position that predicts the score.
        head: `[D, V]`.
        codec: the grid, one token a value.
        soft_cap: of the logits, positive.
        where: `[...]`, the rows that count; the others have log-probabilities of zero, which are
            of no distribution: leave them out of what follows, too.
        chunk, block, mesh, axis: see `regjax.losses.linear`.

    Returns:
        Float32 `[..., K]`, at most zero. NaN for a token beyond V.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`; a grid of several tokens a value.

    References:
        As `grid_log_probs`.

    >>> import numpy as np
    >>> from regjax.losses.regression import raft
    >>> codec = TokenGrid.from_ids([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    >>> log_probs = linear_grid_log_probs(np.ones(2), np.zeros((2, 8)), codec)
    >>> print(f"{raft(log_probs, 4, codec.values):.4f}")
    4.5156
    """
    if not codec.single_token:
        raise ValueError(
            f"a grid of up to {codec.tokens.shape[1]} tokens a value needs the hidden states of "
            "every candidate; give one of single tokens"
        )
    student = projection(hidden, head, soft_cap=soft_cap)
    shape, size = student.hidden.shape[:-1], student.head.shape[1]
    where = mask_of_shape(where, shape)
    ids = class_labels(codec.tokens[:, 0], codec.values.shape, size)
    every = jnp.broadcast_to(ids, (*shape, ids.shape[0]))
    found = over_rows(picks, (student,), every, where, Layout(chunk, block, mesh, axis))
    picked = jnp.where(ids < size, found.picked, jnp.nan)
    # Of logits with one entry for all tokens off the grid.
    logits = jnp.concatenate([picked, found.log_rest[..., None]], axis=-1)
    return zero_unless(where, jax.nn.log_softmax(logits)[..., :-1])


def linear_expected_score(
    hidden: ArrayLike,
    head: ArrayLike,
    codec: TokenGrid,
    *,
    normalize: bool = False,
    soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Expected score, `expected_score(hidden @ head, codec)`: the prediction of RAFT.

        yhat = sum_k p(str(y_k) | x) y_k

    Use it where the same holds of the prediction or of `raft`.

    Args:
        hidden: `[..., D]`, at the position that predicts the score.
        head: `[D, V]`.
        codec: the grid, one token a value.
        normalize: divide the probabilities by their sum over the grid.
        soft_cap, where, chunk, block, mesh, axis: as in `linear_cross_entropy`.

    Returns:
        Float32 `[...]`, in the units of the grid's values.

    Raises:
        TypeError, ValueError: as `linear_grid_log_probs`.

    References:
        Lukasik, Narasimhan, Menon, Yu, Kumar, *Regression-aware Inference with LLMs*, 2024,
        https://arxiv.org/abs/2403.04182, scoring estimator.

    >>> import numpy as np
    >>> codec = TokenGrid.from_ids([0, 2], [1.0, 5.0])
    >>> head = np.log([[0.1, 0.6, 0.3]])
    >>> print(f"{linear_expected_score(np.ones(1), head, codec):.4f}")
    1.6000
    >>> print(f"{linear_expected_score(np.ones(1), head, codec, normalize=True):.4f}")
    4.0000
    """
    log_probs = linear_grid_log_probs(
        hidden,
        head,
        codec,
        soft_cap=soft_cap,
        where=where,
        chunk=chunk,
        block=block,
        mesh=mesh,
        axis=axis,
    )
    where = mask_of_shape(where, log_probs.shape[:-1])
    return zero_unless(where, expected_score(log_probs, codec.values, normalize=normalize))


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
    mesh: Mesh | None = None,
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
    mesh: Mesh | None = None,
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
