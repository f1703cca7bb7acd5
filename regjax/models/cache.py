"""What a decoder has read, in arrays of static shape: making, filling and reading a `Cache`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from regjax.errors import InputError
from regjax.models.apply import Cache
from regjax.models.config import DecoderConfig


def empty_cache(config: DecoderConfig, rows: int, columns: int) -> Cache:
    """A cache of no tokens, with `columns` to fill."""
    shape = (config.layers, rows, columns, config.key_value_heads, config.head_dim)
    nothing = jnp.zeros(shape, config.dtype)
    unused = jnp.zeros((rows, columns), jnp.int32)
    return Cache(nothing, nothing, unused, unused, jnp.zeros((), jnp.int32))


def append(
    cache: Cache, keys_values: tuple[Array, Array], positions: Array, segment_ids: Array
) -> Cache:
    """The cache with T columns more: keys and values `[N, B, T, K, C]`, the others `[B, T]`."""
    keys, values = keys_values

    def written(into: Array, new: Array, axis: int) -> Array:
        new = new.astype(into.dtype)
        return jax.lax.dynamic_update_slice_in_dim(into, new, cache.length, axis)

    return Cache(
        written(cache.keys, keys, 2),
        written(cache.values, values, 2),
        written(cache.positions, positions, 1),
        written(cache.segment_ids, segment_ids, 1),
        cache.length + positions.shape[1],
    )


def next_positions(cache: Cache) -> Array:
    """The position `[B]` after each row's last token: one more than its largest, 0 if it has none.

    >>> positions, segment_ids = jnp.array([[0, 1, 2, 9], [0, 0, 0, 0]]), jnp.array([[1, 1, 1, 0], [0] * 4])
    >>> next_positions(Cache(None, None, positions, segment_ids, 4))
    Array([3, 0], dtype=int32)
    """
    return jnp.where(cache.segment_ids > 0, cache.positions, -1).max(axis=1) + 1


def has_room(cache: Cache) -> Array:
    """Whether the cache has a free column, a bool scalar.

    Raises:
        ValueError: it has none, where that is known.
    """
    columns = cache.positions.shape[1]
    fits = cache.length < columns
    if is_known(fits) and not fits:
        raise ValueError(
            f"the cache is full: its {columns} columns are in use; prefill with more room"
        )
    return fits


def is_known(array: Any) -> bool:
    """Whether the values of an array can be looked at: not inside `jax.jit`, nor across hosts."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def require_unpacked(segment_ids: Any) -> None:
    """Raises where the values are known.

    Raises:
        InputError: a segment id that is neither 0 nor 1.
    """
    if not is_known(segment_ids):
        return
    packed = np.flatnonzero(~np.isin(np.asarray(segment_ids), (0, 1)).all(axis=-1))
    if packed.size:
        raise InputError(
            f"segment_ids: row {packed[0]} is packed, but what follows a row is written for one example "
            "a row, of segment 1: turn packing off."
        )
