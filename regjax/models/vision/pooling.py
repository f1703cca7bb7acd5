"""Pooling over pixels."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def max_pool(images: Array, window: int) -> Array:
    """The largest of each `window` by `window` pixels, windows side by side: `[B, H // w, W // w, C]`.

    Rows and columns that fill no window are dropped. The gradient goes to the first of equal pixels,
    row by row, as torch's; there is no `jax.jvp`.

    >>> max_pool(jnp.arange(12.0).reshape(1, 2, 6, 1), 2).ravel()
    Array([ 7.,  9., 11.], dtype=float32)
    """
    rows, columns = (size - size % window for size in images.shape[1:3])
    return _max_pool(images[:, :rows, :columns], window)


# A windowed maximum, and still more its gradient, takes CPUs many times as long.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(images: Array, window: int) -> Array:
    return jnp.max(_windows(images, window), axis=(2, 4))


def _max_pool_forward(images: Array, window: int) -> tuple[Array, Array]:
    return _max_pool(images, window), images


def _max_pool_backward(window: int, images: Array, gradient: Array) -> tuple[Array]:
    windows = _windows(images, window)
    largest = windows[:, :, 0, :, 0]
    first = jnp.zeros(largest.shape, jnp.int32)
    for place in range(1, window * window):
        pixel = windows[:, :, place // window, :, place % window]
        first = jnp.where(pixel > largest, place, first)
        largest = jnp.maximum(largest, pixel)
    places = jnp.arange(window * window).reshape(window, 1, window, 1)
    chosen = first[:, :, None, :, None] == places
    return (jnp.where(chosen, gradient[:, :, None, :, None], 0).reshape(images.shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _windows(images: Array, window: int) -> Array:
    """`[B, H / w, w, W / w, w, C]`."""
    batch, height, width, channels = images.shape
    return images.reshape(batch, height // window, window, width // window, window, channels)
