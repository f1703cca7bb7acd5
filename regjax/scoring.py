"""The exact distribution of a model over a score grid.

A grid whose values are single tokens costs one row of logits an example: the hidden state before the
score is gathered first, and the head is applied to it alone. A grid of several tokens a value is scored
by teacher forcing, one row a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import losses
from regjax.models import Apply
from regjax.token_grid import TokenGrid

CANDIDATES_AT_ONCE = 8
"""How many candidates of a multi-token grid go through the model together, by default."""


class Scores(NamedTuple):
    """What a model says of a grid: `log_probs` `[B, K]` and their total probability `mass` `[B]`."""

    log_probs: jax.Array
    mass: jax.Array


def score_distribution(
    model: Apply,
    params,
    batch: Mapping[str, jax.Array],
    codec: TokenGrid,
    *,
    candidates_at_once: int = CANDIDATES_AT_ONCE,
) -> Scores:
    """Exact log-probability of every grid value after each prompt, one example a row.

    `log_probs[b, k] = log p(str(y_k) | x_b)` under the softmax over the whole vocabulary, summed over
    the tokens of `str(y_k)` (and the grid's terminator, where it carries one);
    `mass[b] = sum_k exp(log_probs[b, k])`, at most 1. Follows Lukasik et al., 2025 (RAFT), eq. 4.

    Args:
      model: the pure functions of a model, see `regjax.models.split`.
      params: its parameters.
      batch: `tokens` `[B, L]` and `score_positions` `[B]` or `[B, 1]`, the index of the last token
        before the score; `positions` and `segment_ids` `[B, L]` where rows are padded on the left.
        What stands in a row after the score position is not looked at.
      codec: the grid's tokens.
      candidates_at_once: for a grid of several tokens a value, how many candidates are scored in one
        pass; memory grows with it, the result does not depend on it.

    Raises:
      ValueError: if rows hold several examples (see `score_log_probs`).
    """
    score_positions = jnp.asarray(batch["score_positions"])
    if score_positions.ndim == 2 and score_positions.shape[1] != 1:
        raise ValueError(
            f"score_distribution takes one example a row; score_positions has shape "
            f"{score_positions.shape}. Use score_log_probs for packed rows."
        )
    log_probs = score_log_probs(model, params, batch, codec, candidates_at_once=candidates_at_once)
    log_probs = log_probs[:, 0]
    return Scores(log_probs, jnp.exp(jax.nn.logsumexp(log_probs, axis=-1)))


def score_log_probs(
    model: Apply,
    params,
    batch: Mapping[str, jax.Array],
    codec: TokenGrid,
    *,
    candidates_at_once: int = CANDIDATES_AT_ONCE,
    where: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities `[B, S, K]` of every grid value at each of the S score positions of a row.

    As `score_distribution`, and differentiable; packed rows (S > 1) need a grid of single tokens.

    Args:
      model: as in `score_distribution`, and so are `params`, `batch` and `codec`.
      candidates_at_once: as in `score_distribution`.
      where: `[B, S]`, the score positions that count. At the others the head is given zeros, so that
        their log-probabilities mean nothing and their gradient is exactly zero even where the hidden
        state is not finite.

    Raises:
      ValueError: packed rows with a grid of several tokens a value; a token of the grid that the
        model's vocabulary does not have.
    """
    score_positions = jnp.asarray(batch["score_positions"])
    if score_positions.ndim == 1:
        score_positions = score_positions[:, None]
    batch = {**batch, "score_positions": score_positions}
    if codec.single_token:
        rows = _rows(model.hidden_of(params, batch), score_positions, where)
        return losses.grid_log_probs(model.head(params, rows), codec)
    if score_positions.shape[1] != 1:
        raise ValueError(
            "a grid of several tokens a value needs one example a row: turn packing off "
            f"(score_positions has shape {score_positions.shape})"
        )
    by_candidate = _candidate_log_probs(model, params, batch, codec, candidates_at_once, where)
    return by_candidate[:, None, :]


def _rows(hidden: jax.Array, positions: jax.Array, where: jax.Array | None) -> jax.Array:
    """`[B, N, D]`: the hidden states at `positions` `[B, N]`, zeros where `where` is False."""
    rows = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    return rows if where is None else jnp.where(where[..., None], rows, 0)


def _candidate_log_probs(
    model: Apply,
    params,
    batch: Mapping[str, jax.Array],
    codec: TokenGrid,
    at_once: int,
    where: jax.Array | None,
) -> jax.Array:
    """`[B, K]`: every candidate written after the prompt in a row of its own."""
    tokens = jnp.asarray(batch["tokens"])
    last = batch["score_positions"]  # [B, 1]
    count, length = codec.tokens.shape
    columns = jnp.arange(tokens.shape[1] + length)
    offset = columns - last - 1  # [B, L + T]: which candidate token stands in this column
    inside = (offset >= 0) & (offset < length)

    def widen(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (0, length)))

    segment_ids = batch.get("segment_ids")
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
    own_segment = jnp.take_along_axis(segment_ids, last, axis=1)
    row = {
        "segment_ids": jnp.where(inside, own_segment, jnp.where(offset < 0, widen(segment_ids), 0))
    }
    if batch.get("positions") is not None:
        positions = jnp.asarray(batch["positions"])
        own_position = jnp.take_along_axis(positions, last, axis=1)
        row["positions"] = jnp.where(inside, own_position + 1 + offset, widen(positions))
    if "task_ids" in batch:
        row["task_ids"] = jnp.asarray(batch["task_ids"])
    prompt = widen(tokens)
    predicts = last + jnp.arange(length)  # [B, T]
    grid_structure = jax.tree.structure(codec)

    @jax.checkpoint
    def score(candidate: jax.Array, mask: jax.Array) -> jax.Array:
        written = jnp.where(inside, candidate[jnp.clip(offset, 0, length - 1)], prompt)
        rows = _rows(model.hidden_of(params, {**row, "tokens": written}), predicts, where)
        logits = model.head(params, rows)  # [B, T, V]
        # The grid is checked against the vocabulary as a whole: one candidate is traced, its
        # numbers are not known.
        every = jax.ShapeDtypeStruct((len(logits), count, *logits.shape[1:]), logits.dtype)
        jax.eval_shape(lambda logits: losses.grid_log_probs(logits, codec), every)
        one = jax.tree.unflatten(grid_structure, (candidate[None], mask[None], codec.values[:1]))
        return losses.grid_log_probs(logits[:, None], one)[:, 0]

    candidates = (jnp.asarray(codec.tokens), jnp.asarray(codec.mask))
    by_candidate = jax.lax.map(
        lambda pair: score(*pair), candidates, batch_size=min(at_once, count)
    )
    return by_candidate.T
