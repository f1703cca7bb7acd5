"""Rows that count packed to the front, and rows and vocabulary dealt out over a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from regjax.losses.linear_chunks import Projection, Rows, Tiling


class Layout(NamedTuple):
    """How a loss is divided: into tiles, and over the axes of a mesh."""

    chunk: int
    block: int
    mesh: Mesh | AbstractMesh | None
    axis: str
    """Of the mesh, over which the vocabulary is dealt out; the rows are over all others."""


class Part(NamedTuple):
    """What one device computes."""

    kept: jax.Array
    """The number of rows that count, which come first."""
    tiling: Tiling
    axis: str | None
    """The axis over which the vocabulary is dealt out, if it is."""


Compute: TypeAlias = Callable[[tuple[Projection, ...], Rows, Part], Rows]
"""`compute(projections, rows [N, ...], part)`: arrays `[N, ...]`; those of rows from `part.kept` on
are ignored. The ids among `rows` are of the whole vocabulary, see `local_ids`."""


def projection(
    hidden: ArrayLike,
    head: ArrayLike,
    temperature: ArrayLike = 1.0,
    soft_cap: float | None = None,
    names: tuple[str, str] = ("hidden", "head"),
) -> Projection:
    """Of hidden states `[..., D]` and a head `[D, V]`, both checked.

    >>> projection(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 5), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    states, matrix = jnp.asarray(hidden), jnp.asarray(head)
    for name, array in zip(names, (states, matrix), strict=True):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating; got {array.dtype} of shape {array.shape}")
    if states.ndim < 1 or matrix.ndim != 2 or states.shape[-1] != matrix.shape[0]:
        raise ValueError(
            f"{names[0]} has shape {states.shape} and {names[1]} {matrix.shape}; expected [..., D] "
            "and [D, V]"
        )
    if matrix.shape[1] < 1:
        raise ValueError(f"{names[1]} has shape {matrix.shape}: no vocabulary")
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(f"the soft cap of the logits must be positive or None; got {soft_cap}")
    cap = None if soft_cap is None else jnp.float32(soft_cap)
    return Projection(
        states.astype(jnp.float32),
        matrix,
        jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32)),
        cap,
        dtype=jnp.promote_types(states.dtype, matrix.dtype),
    )


def over_rows(
    compute: Compute,
    projections: tuple[Projection, ...],
    rows: Rows,
    where: jax.Array | None,
    layout: Layout,
) -> Rows:
    """`compute` of the rows `[...]` that count; zero for the others, with a gradient of zero.

    Hidden states and `rows` have leading dimensions `[...]`, as the result. With a mesh, the first
    of them is dealt out over all axes but `layout.axis`, and every device packs its own rows.
    """
    for name in ("chunk", "block"):
        if getattr(layout, name) < 1:
            raise ValueError(f"{name} must be positive; got {getattr(layout, name)}")
    if layout.mesh is None:
        return _packed(compute, projections, rows, where, layout, None)
    _check_divides(projections[0], layout)
    row = P(tuple(name for name in layout.mesh.axis_names if name != layout.axis))
    specs = tuple(
        Projection(row, P(None, layout.axis), P(), P(), dtype=p.dtype)  # type: ignore[arg-type]
        for p in projections
    )

    axis = layout.axis if layout.mesh.shape[layout.axis] > 1 else None

    def on_device(projections: Any, rows: Any, where: Any) -> Rows:
        return _packed(compute, projections, rows, where, layout, axis)

    # Loops of different lengths on different devices, whose carries start as constants: what
    # `check_vma` would have to be told at each of them.
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(specs, row, row),
        out_specs=row,
        check_vma=False,
    )(projections, rows, where)


def local_ids(ids: jax.Array, head: jax.Array, part: Part) -> jax.Array:
    """Of ids of the whole vocabulary, the columns of this device's `head`, in it or not."""
    if part.axis is None:
        return ids
    return ids - jax.lax.axis_index(part.axis) * head.shape[1]


def total(array: jax.Array, part: Part) -> jax.Array:
    """Sum over the parts of the vocabulary."""
    return array if part.axis is None else jax.lax.psum(array, part.axis)


def largest(array: jax.Array, part: Part) -> jax.Array:
    """Over the parts of the vocabulary; no gradient."""
    array = jax.lax.stop_gradient(array)
    return array if part.axis is None else jax.lax.pmax(array, part.axis)


def total_log(log: jax.Array, part: Part) -> jax.Array:
    """Logsumexp over the parts of the vocabulary; -inf where all are."""
    if part.axis is None:
        return log
    top = largest(log, part)
    top = jnp.maximum(top, jnp.finfo(jnp.float32).min)
    return top + jnp.log(jax.lax.psum(jnp.exp(log - top), part.axis))


def _packed(
    compute: Compute,
    projections: tuple[Projection, ...],
    rows: Rows,
    where: jax.Array | None,
    layout: Layout,
    axis: str | None,
) -> Rows:
    shape = projections[0].hidden.shape[:-1]
    size = math.prod(shape)
    block = max(1, min(layout.block, size))
    padding = max(block, -(-size // block) * block) - size
    if where is None:
        kept = jnp.int32(size)
    else:
        where = where.reshape(size)
        kept = jnp.sum(where, dtype=jnp.int32)
        order = jnp.argsort(~where, stable=True)
        place = jnp.cumsum(where) - 1

    def pack(array: jax.Array) -> jax.Array:
        array = array.reshape(size, *array.shape[len(shape) :])
        if where is not None:
            # Zeros before the arithmetic as well: the gradient of an ignored NaN would be NaN.
            array = _zero_unless(jnp.arange(size) < kept, array[order])
        return jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))

    def unpack(array: jax.Array) -> jax.Array:
        array = array[:size]
        if where is not None:
            array = _zero_unless(where, array[place])
        return array.reshape(*shape, *array.shape[1:])

    packed = tuple(
        Projection(pack(p.hidden), p.head, p.temperature, p.soft_cap, dtype=p.dtype)
        for p in projections
    )
    part = Part(kept, Tiling(block, layout.chunk), axis)
    return jax.tree.map(unpack, compute(packed, jax.tree.map(pack, rows), part))


def _zero_unless(where: jax.Array, array: jax.Array) -> jax.Array:
    """As `divergence.zero_unless`, of integers too."""
    where = where.reshape(where.shape + (1,) * (array.ndim - 1))
    return jnp.where(where, array, jnp.zeros((), array.dtype))


def _check_divides(first: Projection, layout: Layout) -> None:
    sizes = dict(layout.mesh.shape)  # type: ignore[union-attr]
    if layout.axis not in sizes:
        raise ValueError(f"axis is {layout.axis!r}; expected one of the mesh's, {tuple(sizes)}")
    parts = sizes.pop(layout.axis)
    if first.head.shape[1] % parts:
        raise ValueError(
            f"the head's {first.head.shape[1]} columns do not divide among the {parts} devices of "
            f"the axis {layout.axis!r}; pad the head"
        )
    shape, devices = first.hidden.shape[:-1], math.prod(sizes.values())
    if not shape or shape[0] % devices:
        raise ValueError(
            f"rows of shape {shape} do not divide among the {devices} devices of the axes "
            f"{tuple(sizes)}; pad the first dimension, and leave the padding out with where"
        )
