"""Of every row's logits: those of some ids, and the log-sum-exp and the sum of the others."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax.losses.linear_chunks import Columns, Projection, Rows, fold, with_gradient
from regjax.losses.linear_rows import Part, local_ids, total, total_log


class Picks(NamedTuple):
    """Float32 numbers of a row of logits z `[V]` and its k ids."""

    picked: jax.Array
    """`[..., k]`, z at the ids; 0 for ids that are not of the vocabulary."""
    log_rest: jax.Array
    """`[...]`, logsumexp of z at all other ids; -inf where there is none."""
    mean: jax.Array
    """`[...]`, of z over the whole vocabulary."""


def picks(projections: tuple[Projection, ...], ids: jax.Array, part: Part) -> Picks:
    """`Picks` of the logits of one projection and of ids `[N, k]`, distinct within a row.

    The other entries apart, not all of them: the cross-entropy of an entry is then
    log(1 + exp(log_rest - picked)), exact where it is small.
    """
    [student] = projections
    ids = local_ids(ids, student.head, part)
    rows = ids.shape[0]
    state = {
        "picked": jnp.zeros(ids.shape, jnp.float32),
        # Finite, so that a chunk without other entries leaves exp(top - top) defined.
        "top": jnp.full(rows, jnp.finfo(jnp.float32).min),
        "scaled": jnp.zeros(rows, jnp.float32),
        "sum": jnp.zeros(rows, jnp.float32),
    }
    state = fold(_visit, state, projections, ids, part.kept, part.tiling)
    log_rest = state["top"] + jnp.log(state["scaled"])
    found = with_gradient(
        _gradient,
        part.tiling,
        Picks(state["picked"], log_rest, state["sum"]),
        projections,
        (ids, log_rest),
        part.kept,
    )
    size = total(jnp.float32(student.head.shape[1]), part)
    return Picks(
        total(found.picked, part),
        total_log(found.log_rest, part),
        total(found.mean, part) / size,
    )


def _visit(state: Rows, tiles: list[jax.Array], ids: jax.Array, columns: Columns) -> Rows:
    [tile] = tiles
    at = columns.local(ids)
    here = jnp.take_along_axis(tile, jnp.minimum(at, columns.size - 1), axis=1)
    rest = jnp.where(columns.fresh, tile, -jnp.inf)
    rest = jnp.put_along_axis(rest, at, -jnp.inf, axis=1, inplace=False, mode="drop")
    top = jnp.maximum(state["top"], jnp.max(rest, axis=1))
    scaled = state["scaled"] * jnp.exp(state["top"] - top)
    return {
        "picked": jnp.where(at < columns.size, here, state["picked"]),
        "top": top,
        "scaled": scaled + jnp.sum(jnp.exp(rest - top[:, None]), axis=1),
        "sum": state["sum"] + jnp.sum(jnp.where(columns.fresh, tile, 0.0), axis=1),
    }


def _gradient(cotangents: Picks, tiles: list[jax.Array], rows: Rows, columns: Columns) -> jax.Array:
    [tile], (ids, log_rest) = tiles, rows
    of_sum = cotangents.mean[:, None]
    share = jnp.exp(tile - log_rest[:, None])
    of_tile = cotangents.log_rest[:, None] * share + of_sum
    of_tile = jnp.where(columns.fresh, of_tile, 0.0)
    of_picked = cotangents.picked + of_sum
    return jnp.put_along_axis(
        of_tile, columns.local(ids), of_picked, axis=1, inplace=False, mode="drop"
    )
