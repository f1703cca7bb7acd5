"""The one convolution of all image models."""

from typing import Literal

import jax
from jax import Array

Padding = Literal["SAME", "VALID"] | int


def convolve(images: Array, kernel: Array, *, stride: int = 1, padding: Padding = "SAME") -> Array:
    """`y[b, i, j, d] = sum_{u, v, c} images[b, s i + u - p, s j + v - p, c] kernel[u, v, c, d]`.

    A cross-correlation, as everywhere in the field; what lies outside an image is zero.

    Args:
        images: `[B, H, W, C]`.
        kernel: `[h, w, C, D]`, of the images' type.
        stride: s.
        padding: p of every side, as torch's; or `"VALID"`, none; or `"SAME"`, which gives
            `ceil(H / s)` rows and, where it has to be uneven, pads more at the end.

    Returns:
        `[B, H', W', D]`.

    >>> import jax.numpy as jnp
    >>> convolve(jnp.arange(3.0).reshape(1, 1, 3, 1), jnp.ones((1, 3, 1, 1))).ravel()
    Array([1., 3., 3.], dtype=float32)
    """
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        padding if isinstance(padding, str) else ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
