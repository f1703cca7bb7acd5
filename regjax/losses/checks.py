"""The checks of their input that the losses share, and their masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def floating(array: ArrayLike, name: str) -> jax.Array:
    """`array` in float32; `TypeError` where it is not floating."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating; got {array.dtype} of shape {array.shape}")
    return array.astype(jnp.float32)


def numbers_of_shape(array: ArrayLike, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Real numbers of any type, in float32; `ValueError` where they have another shape."""
    array = jnp.asarray(array, jnp.float32)
    if array.shape != shape:
        raise ValueError(f"{name} have shape {array.shape}; expected {shape}")
    return array


def mask_of_shape(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`where` as booleans of that shape; `None`, where all count, stays."""
    if where is None:
        return None
    where = jnp.asarray(where, bool)
    if where.shape != shape:
        raise ValueError(f"where has shape {where.shape}; expected {shape}")
    return where


def zero_unless(where: jax.Array | None, array: jax.Array) -> jax.Array:
    """`array`, and zero where `where`, of its leading dimensions, is false."""
    if where is None:
        return array
    return jnp.where(where.reshape(where.shape + (1,) * (array.ndim - where.ndim)), array, 0.0)


def class_labels(labels: ArrayLike, shape: tuple[int, ...], size: int) -> jax.Array:
    """Integer `labels` of that shape, those below zero as `size`: out of range, not from the end."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype} of shape {labels.shape}")
    if labels.shape != shape:
        raise ValueError(f"labels have shape {labels.shape}; expected {shape}")
    return jnp.where(labels < 0, size, labels.astype(jnp.int32))


def per_class(values: ArrayLike, name: str, count: int) -> jax.Array:
    """Positive `values [K]` in float32; the sign is checked unless they are JAX arrays."""
    if not isinstance(values, jax.Array) and not np.all(np.asarray(values) > 0):
        raise ValueError(f"{name} must be positive; got {np.asarray(values).tolist()}")
    array = jnp.asarray(values, jnp.float32)
    if array.shape != (count,):
        raise ValueError(f"{name} have shape {array.shape}; expected ({count},), one per class")
    return array


def check_range(value: object, name: str, low: float, high: float = float("inf")) -> None:
    """Raises unless a Python number lies in [low, high]; arrays, of a schedule say, may be traced."""
    if isinstance(value, int | float) and not low <= value <= high:
        interval = f"[{low:g}, {high:g}]" if high < float("inf") else f"[{low:g}, inf)"
        raise ValueError(f"{name} must lie in {interval}; got {value}")


def check_temperature(temperature: ArrayLike) -> None:
    """Raises unless a Python number is positive; arrays, of a schedule say, may be traced."""
    if isinstance(temperature, int | float) and not temperature > 0.0:
        raise ValueError(f"temperature must be positive; got {temperature}")
