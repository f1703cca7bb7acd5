"""Losses of hidden states and a head whose logits over the vocabulary are never held at once.

Everywhere, for D the width and V the vocabulary,

    z = cap(hidden @ head) [..., V],    cap(x) = soft_cap tanh(x / soft_cap), or x without a cap

is made in tiles of `block` rows by `chunk` columns, once for the value (twice for a divergence) and
once more for the gradient. In place of `[..., V]` there are some tiles, the hidden states in float32
and a few numbers per row.

The cross-entropy makes its logits once where all its losses get the same cotangent, as in a sum or
a mean: give weights as `weights`, not afterwards. With the value it then makes the gradients, for
which it holds the logits of one block of rows, `[block, V]`, and the head's gradient, in float32.
Other cotangents are as exact and cost six products of the size of the logits' in place of three; over
a vocabulary that is dealt out it is always four.

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
  product of that size leaves an accelerator waiting, a smaller block where `[block, V]` is too much.

Nothing here has a second derivative, or one with respect to a temperature or a soft cap.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from regjax.losses.checks import class_labels, mask_of_shape, zero_unless
from regjax.losses.grid import expected_score
from regjax.losses.linear_at_once import picked_loss
from regjax.losses.linear_picks import Picks, picks
from regjax.losses.linear_rows import Layout, over_rows, projection
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
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "tensor",
) -> jax.Array:
    """Softmax cross-entropy with integer labels, `token_cross_entropy(hidden @ head, labels)`.

        loss = (1 - a) (logsumexp z - z_label) + a (logsumexp z - mean z) + b (logsumexp z)^2

    Use it for next tokens over a large vocabulary: it takes less time than logits held whole, and
    their memory is that of a block of rows.

    Args:
        hidden: `[..., D]`.
        head: `[D, V]`.
        labels: `[...]`, integers from 0 to V - 1. Any other gives NaN.
        label_smoothing: a, from 0 to 1.
        z_loss: b, not negative; 1e-4 in T5X.
        soft_cap: of the logits, positive.
        weights: `[...]`, by which the losses are multiplied.
        where: `[...]`, the rows that count.
        chunk, block, mesh, axis: see `regjax.losses.linear`.

    Returns:
        Float32 `[...]`, one loss per row, times its weight.

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
    losses, _ = linear_cross_entropy_and_hits(
        hidden,
        head,
        labels,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        weights=weights,
        where=where,
        chunk=chunk,
        block=block,
        mesh=mesh,
        axis=axis,
    )
    return losses


def linear_cross_entropy_and_hits(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "tensor",
) -> tuple[jax.Array, jax.Array]:
    """`linear_cross_entropy`, and whether the label is the most probable class, from the same logits.

        hit = z_label > max_(v != label) z_v

    Use it where the accuracy is reported beside the loss.

    Args:
        hidden, head, labels: as in `linear_cross_entropy`, and so are all others.

    Returns:
        Losses, float32 `[...]`, and hits, bool `[...]`: false where another class is as probable as
        the label, and in rows that do not count. Weights do not change hits.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.

    References:
        See `linear_cross_entropy`.

    >>> import numpy as np
    >>> hidden, head = np.ones((2, 1)), np.log([[0.7, 0.2, 0.1]])
    >>> losses, hits = linear_cross_entropy_and_hits(hidden, head, np.array([0, 1]))
    >>> print([f"{loss:.4f}" for loss in losses], hits)
    ['0.3567', '1.6094'] [ True False]
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative; got {z_loss}")
    student = projection(hidden, head, soft_cap=soft_cap)
    shape, size = student.hidden.shape[:-1], student.head.shape[1]
    labels = class_labels(labels, shape, size)
    where = mask_of_shape(where, shape)
    weights = jnp.asarray(1.0 if weights is None else weights, jnp.float32)
    if weights.shape not in ((), shape):
        raise ValueError(f"weights have shape {weights.shape}; expected {shape}")
    loss = functools.partial(
        _cross_entropy, size=size, label_smoothing=label_smoothing, z_loss=z_loss
    )
    losses, found = over_rows(
        functools.partial(picked_loss, loss=loss),
        (student,),
        (labels[..., None], jnp.broadcast_to(weights, shape)),
        where,
        Layout(chunk, block, mesh, axis),
    )
    hits = (labels < size) & (found.picked[..., 0] > found.top)
    return zero_unless(where, losses), hits if where is None else hits & where


def _cross_entropy(
    found: Picks, labels: jax.Array, *, size: int, label_smoothing: float, z_loss: float
) -> jax.Array:
    """`[N]`, of `labels [N, 1]`."""
    z_label = jnp.where(labels < size, found.picked, jnp.nan)[:, 0]
    losses = jax.nn.softplus(found.log_rest - z_label)
    if label_smoothing > 0.0:
        losses = losses + label_smoothing * (z_label - found.sum / size)
    if z_loss > 0.0:
        losses = losses + z_loss * jnp.square(jnp.logaddexp(found.log_rest, z_label))
    return losses


def linear_grid_log_probs(
    hidden: ArrayLike,
    head: ArrayLike,
    codec: TokenGrid,
    *,
    soft_cap: float | None = None,
    where: ArrayLike | None = None,
    chunk: int = CHUNK,
    block: int = BLOCK,
    mesh: Mesh | AbstractMesh | None = None,
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
    mesh: Mesh | AbstractMesh | None = None,
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
