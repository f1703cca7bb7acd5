"""Attention: which token sees which, positions within segments, and the weighted sum."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array


def segment_positions(segment_ids: Array) -> Array:
    """Index of each token within its segment, `[B, L]` int32, for `segment_ids [B, L]`.

    A segment is a run of one id, so the first token after left padding (id 0) is at 0.

    >>> segment_positions(jnp.array([[0, 0, 1, 1, 2, 2, 2, 0]]))
    Array([[0, 1, 0, 1, 0, 1, 2, 0]], dtype=int32)
    """
    index = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
    changes = jnp.diff(segment_ids, axis=-1) != 0
    starts = jnp.pad(jnp.where(changes, index[1:], 0), ((0, 0), (1, 0)))
    return index - jax.lax.cummax(starts, axis=1)


def causal_mask(segment_ids: Array, window: int | None = None) -> Array:
    """Which key each query sees, `[B, 1, L, L]` bool: at or before it, and of the same segment.

    With a `window`, only the last `window` tokens, the query's own included. Padding (id 0) is a
    segment like any other: no other token sees it, and as every token sees itself no softmax is
    empty, so what stands in padding is finite and so is its gradient.

    >>> causal_mask(jnp.array([[1, 1, 2]]))[0, 0].astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 1]], dtype=int32)
    """
    index = jnp.arange(segment_ids.shape[-1])[None]
    return visible(index, segment_ids, index, segment_ids, window)


def cached_mask(
    positions: Array,
    cached_positions: Array,
    cached_segment_ids: Array,
    window: int | None = None,
) -> Array:
    """Which of the S cached keys, and then the new ones, each new token sees: `[B, 1, L, S + L]` bool.

    New tokens have `positions [B, L]` and segment 1. In a row there may be padding between the cached
    tokens and the new ones, so that order and distance are those of positions, not of columns.

    >>> cached_mask(jnp.array([[2]]), jnp.array([[0, 1, 0]]), jnp.array([[1, 1, 0]]))[0, 0].astype(int)
    Array([[1, 1, 0, 1]], dtype=int32)
    """
    segment_ids = jnp.ones_like(positions)
    key_positions = jnp.concatenate([cached_positions, positions], axis=1)
    key_segment_ids = jnp.concatenate([cached_segment_ids, segment_ids], axis=1)
    return visible(positions, segment_ids, key_positions, key_segment_ids, window)


def visible(
    query_places: Array,
    query_segment_ids: Array,
    key_places: Array,
    key_segment_ids: Array,
    window: int | None,
) -> Array:
    """`[B, 1, L, S]`: same segment, and `0 <= query place - key place < window`.

    Places, of queries `[B, L]` and keys `[B, S]`, are columns or positions.
    """
    distance = query_places[:, :, None] - key_places[:, None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    same_segment = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return (same_segment & near)[:, None]


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    scale: float,
    soft_cap: float | None,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Array:
    """`softmax(cap(scale * query . key))` over the keys in `mask`, times `value`: `[B, L, H, C]`.

    `query [B, L, H, C]`; `key` and `value` `[B, S, K, C]`, each of whose K heads serves `H / K`
    query heads in a row; `mask [B, 1, L, S]` bool, with a key for every query. `cap(s) = soft_cap *
    tanh(s / soft_cap)`. Scores, softmax and sums are float32, the two products of the inputs' own
    type. `cudnn` is for bfloat16 without a cap, on a GPU, and L and S that are even if a gradient is
    taken.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation=implementation
        )
    batch, length, heads, size = query.shape
    query, key, value = (jnp.swapaxes(each, 1, 2) for each in (query, key, value))
    # The query heads that share a key head are rows of one product with it.
    groups = heads // key.shape[1]
    query = query.reshape(batch, -1, groups * length, size)
    scores = scale * _product("bklc,bksc->bkls", query, key)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # Added rather than selected by: the gradient then needs no mask.
    scores += jnp.where(jnp.tile(mask, (1, 1, groups, 1)), 0.0, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Divided by their sum after the product, which is smaller than they are.
    mixed = _product("bkls,bksc->bklc", weights.astype(value.dtype), value)
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)
    return jnp.swapaxes(mixed.reshape(batch, heads, length, size), 1, 2)


def product_precision(dtype: jnp.dtype) -> jax.lax.DotAlgorithmPreset | None:
    """Of products with float32 sums: with bfloat16 operands in the gradient too, for bfloat16 inputs."""
    return jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if dtype == jnp.bfloat16 else None


def _product(subscripts: str, first: Array, second: Array) -> Array:
    return jnp.einsum(
        subscripts,
        first,
        second,
        precision=product_precision(first.dtype),
        preferred_element_type=jnp.float32,
    )
