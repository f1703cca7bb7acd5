"""Attention by JAX's sparse flash ("splash") kernel for TPUs: no `[B, H, L, L]` array, either way."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType, PartitionSpec

from regjax.sharding import AXES

*ROWS, HEADS = AXES

LANES = 128
"""Rows are padded to a multiple of this many tokens, the width of a TPU's vector registers."""

LARGEST_BLOCK = 512
"""Tokens in a block at most; twice as many leave too little of a TPU's vector memory for the rest."""

RESIDUALS = "attention"
"""What rematerialisation knows the kernel's output and log-sum-exp by."""


def attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> Array:
    """`regjax.models.attention.attend` with `causal_mask(segment_ids, window)`: `[B, L, H, C]`.

    A block of keys that no query of a block of queries sees is skipped, where that follows from the
    order and the window. Softmax and both sums are float32.

    Under `jax.set_mesh`, rows are dealt out over the axes `data` and `fsdp` and heads over `tensor`,
    each where it divides them: the compiler cannot partition the kernel by itself.

    Args:
        query: `[B, L, H, C]`.
        key: `[B, L, K, C]`, and so `value`; K divides H.
        segment_ids: int32 `[B, L]`, each example in one run.
        window: how many tokens a query sees, its own included; None: all before it.
        scale: of the scores.
        soft_cap: scores s become `soft_cap * tanh(s / soft_cap)`.
        interpret: run the kernel's operations one by one, on any device: for tests.

    Source:
        `jax.experimental.pallas.ops.tpu.splash_attention`; Dao, 2023, FlashAttention-2.
    """
    length = query.shape[1]
    query = query * jnp.asarray(scale, query.dtype)
    # On the right of a causal row nobody sees what is added.
    to_lanes = [(0, 0), (0, -length % LANES), (0, 0), (0, 0)]
    query, key, value = (jnp.pad(heads, to_lanes) for heads in (query, key, value))
    segment_ids = jnp.pad(segment_ids, to_lanes[:2])

    def on_device(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        kernel = _kernel(query.shape[1], query.shape[2], window, soft_cap, interpret)
        by_head = [jnp.swapaxes(heads, 1, 2) for heads in (query, key, value)]
        mixed = jax.vmap(kernel)(*by_head, splash.SegmentIds(segment_ids, segment_ids))
        return jnp.swapaxes(mixed, 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: size
        for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if sizes:
        parts = sizes.get(HEADS, 1)
        if key.shape[2] < parts and query.shape[2] % parts == 0 == parts % key.shape[2]:
            # Each part's query heads share one key head: a copy of it for each part.
            copies = parts // key.shape[2]
            key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
        rows = tuple(name for name in ROWS if name in sizes)
        divides = query.shape[0] % math.prod(sizes[name] for name in rows) == 0
        of_rows = rows if divides else None
        of_heads = HEADS if HEADS in sizes and key.shape[2] % parts == 0 else None
        spec = PartitionSpec(of_rows, None, of_heads)
        on_device = jax.shard_map(
            on_device,
            in_specs=(spec, spec, spec, PartitionSpec(of_rows)),
            out_specs=spec,
            axis_names=set(sizes),
            # The kernel's outputs do not say along which axes they vary.
            check_vma=False,
        )
    return on_device(query, key, value, segment_ids)[:, :length]


def block_size(length: int) -> int:
    """The largest multiple of `LANES` up to `LARGEST_BLOCK` that divides `length`, one itself.

    >>> block_size(2048), block_size(1152), block_size(640)
    (512, 384, 128)
    """
    blocks = range(LANES, min(length, LARGEST_BLOCK) + 1, LANES)
    return max(block for block in blocks if length % block == 0)


def _kernel(
    length: int, heads: int, window: int | None, soft_cap: float | None, interpret: bool
) -> Callable[..., Array]:
    """The kernel of one row, of `query [H, L, C]`, `key` and `value` `[K, L, C]`, and segment ids."""
    shape, block = (length, length), block_size(length)
    if window is None:
        mask: splash.Mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
