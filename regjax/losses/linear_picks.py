"""Of every row's logits: those of some ids, and the log-sum-exp and the sum of the others."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax.losses.linear_chunks import Columns, Projection, Rows, fold, with_gradient
from regjax.losses.linear_rows import Part, largest, local_ids, total, total_log


class Picks(NamedTuple):
    """Float32 numbers of a row of logits z `[V]` and its k ids."""

    picked: jax.Array
    """`[..., k]`, z at the ids; 0 for ids that are not of the vocabulary."""
    log_rest: jax.Array
    """`[...]`, logsumexp of z at all other ids; -inf where there is none."""
    sum: jax.Array
    """`[...]`, of z over the whole vocabulary."""
    top: jax.Array
    """`[...]`, the largest z at all other ids; float32's least number where there is none. No
    gradient."""


def picks(projections: tuple[Projection, ...], ids: jax.Array, part: Part) -> Picks:
    """`Picks` of the logits of one projection and of ids `[N, k]`, distinct within a row.

    The other entries apart, not all of them: the cross-entropy of an entry is then
    log(1 + exp(log_rest - picked)), exact where it is small.
    """
    [student] = projections
    ids = local_ids(ids, student.head, part)
    found = end(fold(visit, begin(ids), projections, ids, part.kept, part.tiling))
    found = with_gradient(
        tile_gradient, part.tiling, found, projections, (ids, found.log_rest), part.kept
    )
    return Picks(
        total(found.picked, part),
        total_log(found.log_rest, part),
        total(found.sum, part),
        largest(found.top, part),
    )


def begin(ids: jax.Array) -> Rows:
    """What is known of rows of which no logits were seen."""
    rows = ids.shape[0]
    return {
        "picked": jnp.zeros(ids.shape, jnp.float32),
        # Finite, so that a chunk without other entries leaves exp(top - top) defined.
        "top": jnp.full(rows, jnp.finfo(jnp.float32).min),
        "scaled": jnp.zeros(rows, jnp.float32),
        "sum": jnp.zeros(rows, jnp.float32),
    }


def visit(state: Rows, tiles: list[jax.Array], ids: jax.Array, columns: Columns) -> Rows:
    """What is known with one chunk more of the logits."""
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


def end(state: Rows) -> Picks:
    log_rest = state["top"] + jnp.log(state["scaled"])
    return Picks(state["picked"], log_rest, state["sum"], state["top"])


def tile_gradient(
    cotangents: Picks, tiles: list[jax.Array], rows: Rows, columns: Columns
) -> jax.Array:
    """Of the tile; `rows` are the ids and their `log_rest`."""
    [tile], (ids, log_rest) = tiles, rows
    of_sum = cotangents.sum[:, None]
    share = jnp.exp(tile - log_rest[:, None])
    of_tile = cotangents.log_rest[:, None] * share + of_sum
    of_tile = jnp.where(columns.fresh, of_tile, 0.0)
    of_picked = cotangents.picked + of_sum
    return jnp.put_along_axis(
        of_tile, columns.local(ids), of_picked, axis=1, inplace=False, mode="drop"
    )
