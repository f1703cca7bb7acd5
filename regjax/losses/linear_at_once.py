"""Losses of picked logits whose gradient is made in the forward pass, from logits made once.

A gradient made from rows and columns of logits in the backward pass needs them again: four products
of the size of `[N, D] x [D, V]`, where a loss that holds all logits needs three. Here a block of
rows keeps its logits over the whole vocabulary, `[block, V]`, until their normalizers are known, and
turns them into the gradients of its losses at once: three products. They are the gradients for
cotangents of one,

    d hidden_n = sum_v u_nv head_v,    d head_v = sum_n u_nv hidden_n,    u_nv = dloss_n / dz_nv

and with a cotangent g_n of every loss, g_n times the first is exact, the second only where all g_n
are equal, or where the head is not trained. A loss that is summed or averaged has such; weights
belong into the losses, before. For any other, the gradients are made anew, in tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from regjax.losses.linear_chunks import (
    Projection,
    Tiling,
    block_count,
    block_of,
    chunk_count,
    columns_at,
    gradient_of,
    pull_back,
    tile_of,
    tiled_gradient,
    write_block,
)
from regjax.losses.linear_picks import Picks, begin, end, picks, tile_gradient, visit
from regjax.losses.linear_rows import Part

Loss: TypeAlias = Callable[[Picks, jax.Array], jax.Array]
"""`loss(found, ids)`: a loss `[N]` of the picks of every row, whose ids `[N, k]` are."""


def picked_loss(
    projections: tuple[Projection, ...],
    rows: tuple[jax.Array, jax.Array],
    part: Part,
    *,
    loss: Loss,
) -> tuple[jax.Array, Picks]:
    """`weights * loss(picks, ids)` `[N]` and the picks, those without gradient.

    Of `rows`, the ids `[N, k]` and the weights `[N]`, which are zero in rows that do not count. In
    tiles where the vocabulary is dealt out over devices.
    """
    ids, weights = rows
    if part.axis is not None:
        found = picks(projections, ids, part)
        return weights * loss(found, ids), jax.lax.stop_gradient(found)
    losses, found = _at_once(loss, part.tiling, projections, ids, weights, part.kept)
    return losses, jax.lax.stop_gradient(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_once(
    loss: Loss,
    tiling: Tiling,
    projections: tuple[Projection, ...],
    ids: jax.Array,
    weights: jax.Array,
    kept: jax.Array,
) -> tuple[jax.Array, Picks]:
    found = picks(projections, ids, Part(kept, tiling, None))
    return weights * loss(found, ids), found


def _forward(loss: Loss, tiling: Tiling, *primals: Any) -> tuple[tuple[jax.Array, Picks], tuple]:
    """Results and, of a head that is differentiated, its gradient; two products of one that is not."""
    trained = primals[0][0].head.perturbed
    projections, ids, weights, kept = jax.tree.map(lambda leaf: leaf.value, primals)
    [first] = projections
    block, _ = tiling
    count, size = first.hidden.shape[0], first.head.shape[1]
    chunks = chunk_count(projections, tiling)

    def visit_block(number: jax.Array, carry: tuple) -> tuple:
        rows, of_hidden, of_head, kept_tiles = carry
        own_ids, own_weights = block_of((ids, weights), number, block)

        def read(index: jax.Array, carry: tuple) -> tuple:
            state, kept_tiles = carry
            columns, [head] = columns_at(index, projections, tiling)
            tile = tile_of(first, head, number, block)
            kept_tiles = jax.lax.dynamic_update_index_in_dim(kept_tiles, tile, index, 0)
            return visit(state, [tile], own_ids, columns), kept_tiles

        state, kept_tiles = jax.lax.fori_loop(0, chunks, read, (begin(own_ids), kept_tiles))
        found = end(state)
        losses, pull = jax.vjp(lambda found: loss(found, own_ids), found)
        [cotangents] = pull(own_weights)

        def differentiate(index: jax.Array, carry: tuple) -> tuple:
            of_block, of_head = carry
            columns, [head] = columns_at(index, projections, tiling)
            tile = jax.lax.dynamic_index_in_dim(kept_tiles, index, 0, keepdims=False)
            of_tile = tile_gradient(cotangents, [tile], (own_ids, found.log_rest), columns)
            of_rows, of_columns = pull_back(first, of_tile, tile, head, number, block)
            if not trained:
                return of_block + of_rows, None
            before = jax.lax.dynamic_slice_in_dim(of_head, columns.start, columns.size, axis=1)
            of_head = jax.lax.dynamic_update_slice_in_dim(
                of_head, before + of_columns, columns.start, axis=1
            )
            return of_block + of_rows, of_head

        of_block = jnp.zeros((block, first.hidden.shape[1]), jnp.float32)
        of_block, of_head = jax.lax.fori_loop(0, chunks, differentiate, (of_block, of_head))
        rows = write_block(rows, (losses, found), number, block)
        return rows, write_block(of_hidden, of_block, number, block), of_head, kept_tiles

    chunk = min(tiling.chunk, size)
    zero = jnp.zeros(count, jnp.float32)
    rows = (zero, Picks(jnp.zeros(ids.shape, jnp.float32), zero, zero, zero))
    of_head = jnp.zeros(first.head.shape, jnp.float32) if trained else None
    kept_tiles = jnp.zeros((chunks, block, chunk), jnp.float32)
    (losses, found), of_hidden, of_head, _ = jax.lax.fori_loop(
        0,
        block_count(kept, block),
        visit_block,
        (rows, jnp.zeros_like(first.hidden), of_head, kept_tiles),
    )
    residuals = (projections, ids, weights, kept, losses, found, of_hidden, of_head)
    return (weights * losses, found), residuals


def _backward(
    loss: Loss, tiling: Tiling, residuals: tuple, of_results: tuple[jax.Array, Picks]
) -> tuple:
    projections, ids, weights, kept, losses, found, of_hidden, of_head = residuals
    [first] = projections
    cotangents, _ = of_results

    of_weights = cotangents * losses
    if of_head is None:
        of_first = gradient_of(first, cotangents[:, None] * of_hidden, jnp.zeros_like(first.head))
        return (of_first,), None, of_weights, None

    def multiplied() -> tuple[jax.Array, jax.Array]:
        return cotangents[:, None] * of_hidden, (cotangents[0] * of_head).astype(first.head.dtype)

    def anew() -> tuple[jax.Array, jax.Array]:
        _, pull = jax.vjp(lambda found: loss(found, ids), found)
        [of_found] = pull(cotangents * weights)
        rows = (ids, found.log_rest)
        return tiled_gradient(tile_gradient, tiling, projections, rows, kept, of_found)

    ignored = jnp.arange(ids.shape[0]) >= kept
    equal = jnp.all(ignored | (cotangents == cotangents[0]))
    of_first = gradient_of(first, *jax.lax.cond(equal, multiplied, anew))
    return (of_first,), None, of_weights, None


_at_once.defvjp(_forward, _backward, symbolic_zeros=True)
