"""Logits in tiles: sums over a vocabulary, and their gradients, that never hold `[N, V]`.

A tile is the logits of `block` rows and of a chunk of the vocabulary. Chunks are the outer loop, so
that the columns of the head are read, and their gradient written, once; the rows of a block are the
inner one, which ends with the rows that count. The last chunk ends at V and overlaps the one before
it, so that the head is neither padded nor copied: `Columns.fresh` says which columns are new.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Rows: TypeAlias = Any
"""A pytree of arrays `[N, ...]`, or of their blocks."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Hidden states, and the head that makes logits of them.

    z = cap(hidden @ head) / T,    cap(x) = soft_cap tanh(x / soft_cap), or x where it is `None`
    """

    hidden: jax.Array
    """Float32 `[N, D]`, so that partial gradients of it are added in float32."""
    head: jax.Array
    """`[D, V]`."""
    temperature: jax.Array
    """T, a scalar. No gradient."""
    soft_cap: jax.Array | None
    dtype: Any = dataclasses.field(metadata={"static": True})
    """Of the factors of the products, whose sums are float32."""


class Columns(NamedTuple):
    """A chunk of the vocabulary."""

    start: jax.Array
    first: jax.Array
    """The first column that no chunk before held; more than `start` in the last chunk only."""
    size: int

    @property
    def fresh(self) -> jax.Array:
        """Bool `[size]`."""
        return self.start + jnp.arange(self.size) >= self.first

    def local(self, ids: jax.Array) -> jax.Array:
        """Positions in the chunk of `ids` of the vocabulary; `size`, beyond it, for all others."""
        inside = (ids >= self.first) & (ids < self.start + self.size)
        return jnp.where(inside, ids - self.start, self.size)


class Tiling(NamedTuple):
    """Sizes of a tile; `block` divides the number of rows."""

    block: int
    chunk: int


Visit: TypeAlias = Callable[[Rows, list[jax.Array], Rows, Columns], Rows]
"""`visit(state, tiles, rows, columns)`: the state `[block, ...]` with a tile of each projection."""
TileGradient: TypeAlias = Callable[[Rows, list[jax.Array], Rows, Columns], jax.Array]
"""`gradient(cotangents, tiles, rows, columns)`: of the first projection's tile, zero in columns
that are not fresh."""


def fold(
    visit: Visit,
    state: Rows,
    projections: tuple[Projection, ...],
    rows: Rows,
    kept: jax.Array,
    tiling: Tiling,
) -> Rows:
    """`state` of every row after `visit` has seen its whole vocabulary; not differentiable.

    Rows from `kept` on keep their state, but for those that fill the last block.
    """
    block, _ = tiling
    state, projections, rows = jax.lax.stop_gradient((state, projections, rows))

    def visit_columns(index: jax.Array, state: Rows) -> Rows:
        columns, heads = columns_at(index, projections, tiling)

        def visit_block(number: jax.Array, state: Rows) -> Rows:
            tiles = [
                tile_of(p, head, number, block) for p, head in zip(projections, heads, strict=True)
            ]
            new = visit(
                block_of(state, number, block), tiles, block_of(rows, number, block), columns
            )
            return write_block(state, new, number, block)

        return jax.lax.fori_loop(0, block_count(kept, block), visit_block, state)

    return jax.lax.fori_loop(0, chunk_count(projections, tiling), visit_columns, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradient(
    gradient: TileGradient,
    tiling: Tiling,
    values: Rows,
    projections: tuple[Projection, ...],
    rows: Rows,
    kept: jax.Array,
) -> Rows:
    """`values`, as functions of the first projection whose gradient is made tile by tile.

        d hidden = sum over chunks of G head^T,    d head = sum over blocks of hidden^T G
        G = gradient(...) dz / d(hidden @ head)

    The logits of every tile are made again: to keep them is what this avoids.
    """
    return values


def _forward(
    gradient: TileGradient,
    tiling: Tiling,
    values: Rows,
    projections: tuple[Projection, ...],
    rows: Rows,
    kept: jax.Array,
) -> tuple[Rows, tuple]:
    return values, (projections, rows, kept)


def _backward(gradient: TileGradient, tiling: Tiling, residuals: tuple, cotangents: Rows) -> tuple:
    projections, rows, kept = residuals
    arrays = tiled_gradient(gradient, tiling, projections, rows, kept, cotangents)
    of_first = gradient_of(projections[0], *arrays)
    return None, (of_first, *[None] * (len(projections) - 1)), None, None


with_gradient.defvjp(_forward, _backward)


def tiled_gradient(
    gradient: TileGradient,
    tiling: Tiling,
    projections: tuple[Projection, ...],
    rows: Rows,
    kept: jax.Array,
    cotangents: Rows,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `with_gradient`: d hidden, float32, and d head."""
    first = projections[0]
    block, _ = tiling

    def visit_columns(index: jax.Array, gradients: tuple) -> tuple:
        columns, heads = columns_at(index, projections, tiling)

        def visit_block(number: jax.Array, gradients: tuple) -> tuple:
            of_hidden, of_columns = gradients
            tiles = [
                tile_of(p, head, number, block) for p, head in zip(projections, heads, strict=True)
            ]
            of_tile = gradient(
                block_of(cotangents, number, block), tiles, block_of(rows, number, block), columns
            )
            of_block, of_tile_columns = pull_back(first, of_tile, tiles[0], heads[0], number, block)
            of_block = block_of(of_hidden, number, block) + of_block
            of_hidden = write_block(of_hidden, of_block, number, block)
            return of_hidden, of_columns + of_tile_columns

        of_hidden, of_head = gradients
        of_columns = jnp.zeros(heads[0].shape, jnp.float32)
        of_hidden, of_columns = jax.lax.fori_loop(
            0, block_count(kept, block), visit_block, (of_hidden, of_columns)
        )
        # The overlap of the last chunk has a gradient already, and gets a zero here.
        before = jax.lax.dynamic_slice_in_dim(of_head, columns.start, columns.size, axis=1)
        of_columns = before + of_columns.astype(of_head.dtype)
        return of_hidden, jax.lax.dynamic_update_slice_in_dim(
            of_head, of_columns, columns.start, axis=1
        )

    return jax.lax.fori_loop(
        0,
        chunk_count(projections, tiling),
        visit_columns,
        (jnp.zeros_like(first.hidden), jnp.zeros_like(first.head)),
    )


def chunk_count(projections: tuple[Projection, ...], tiling: Tiling) -> int:
    return -(-projections[0].head.shape[1] // tiling.chunk)


def block_count(kept: jax.Array, block: int) -> jax.Array:
    return (kept + block - 1) // block


def columns_at(
    index: jax.Array, projections: tuple[Projection, ...], tiling: Tiling
) -> tuple[Columns, list[jax.Array]]:
    """The chunk of that index, and its columns of every head."""
    size = projections[0].head.shape[1]
    chunk = min(tiling.chunk, size)
    first = index * chunk
    start = jnp.minimum(first, size - chunk)
    heads = [
        jax.lax.dynamic_slice_in_dim(p.head, start, chunk, axis=1).astype(p.dtype)
        for p in projections
    ]
    return Columns(start, first, chunk), heads


def tile_of(projection: Projection, head: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """Float32 logits `[block, chunk]`."""
    hidden = block_of(projection.hidden, number, block).astype(projection.dtype)
    logits = _dot(hidden, head, (1, 0))
    if projection.soft_cap is not None:
        logits = projection.soft_cap * jnp.tanh(logits / projection.soft_cap)
    return logits / projection.temperature


def pull_back(
    projection: Projection,
    of_tile: jax.Array,
    tile: jax.Array,
    head: jax.Array,
    number: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Float32 gradients of the block's hidden states `[block, D]` and the head's columns `[D, chunk]`."""
    of_tile = (of_tile * _slope(projection, tile)).astype(projection.dtype)
    hidden = block_of(projection.hidden, number, block).astype(projection.dtype)
    return _dot(of_tile, head, (1, 1)), _dot(hidden, of_tile, (0, 0))


def gradient_of(projection: Projection, of_hidden: jax.Array, of_head: jax.Array) -> Projection:
    temperature, soft_cap = jax.tree.map(
        jnp.zeros_like, (projection.temperature, projection.soft_cap)
    )
    return Projection(of_hidden, of_head, temperature, soft_cap, dtype=projection.dtype)


def _slope(projection: Projection, tile: jax.Array) -> jax.Array:
    """Derivative of the tile by the product that it is made of."""
    slope = 1.0 / projection.temperature
    if projection.soft_cap is not None:
        slope *= 1.0 - jnp.square(tile * projection.temperature / projection.soft_cap)
    return slope


def _dot(first: jax.Array, second: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        first,
        second,
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def block_of(rows: Rows, number: jax.Array, block: int) -> Rows:
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, number * block, block), rows
    )


def write_block(rows: Rows, new: Rows, number: jax.Array, block: int) -> Rows:
    return jax.tree.map(
        lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, number * block, 0),
        rows,
        new,
    )
