"""The one convolution of all image models: the compiler's own, but on CPUs in forms that are fast there.

XLA's CPU backend has fast kernels for a plain convolution of images `[B, H, W, C]` with a kernel `[h, w,
C, D]`, and for no other: the two gradients that `jax.grad` makes of it, and the grouped convolution that
`jax.vmap` makes of several, take 5 to 200 times as long. So here both gradients are plain convolutions
as well, and several kernels take turns.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

Padding = Literal["SAME", "VALID"] | int
Pads = tuple[tuple[int, int], tuple[int, int]]
"""Rows before and after, columns before and after. Below zero: left out."""

NARROW = 16
"""Up to how many channels, before and after, CPUs compute two pixels at once."""
GROUPS = 4
"""In how many groups of images CPUs sum the gradient of a kernel."""


def convolve(images: Array, kernel: Array, *, stride: int = 1, padding: Padding = "SAME") -> Array:
    """`y[b, i, j, d] = sum_{u, v, c} images[b, s i + u - p, s j + v - p, c] kernel[u, v, c, d]`.

    A cross-correlation, as everywhere in the field; what lies outside an image is zero. It has a
    gradient, but no second one and no `jax.jvp`. What is computed for a CPU has another form than
    elsewhere; the platform that the program is compiled for decides, not the one it is compiled on.

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
    if isinstance(padding, str):
        sizes, window = images.shape[1:3], kernel.shape[:2]
        rows, columns = jax.lax.padtype_to_pads(sizes, window, (stride, stride), padding)
    else:
        rows = columns = (padding, padding)
    return _convolve(images, kernel, stride, (rows, columns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    return jax.lax.platform_dependent(
        images,
        kernel,
        cpu=sequential_vmap(functools.partial(_outputs, stride=stride, pads=pads)),
        default=functools.partial(_plain, stride=stride, pads=pads),
    )


def _convolve_forward(
    images: Array, kernel: Array, stride: int, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(images, kernel, stride, pads), (images, kernel)


def _convolve_backward(
    stride: int, pads: Pads, inputs: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def by_autodiff(images: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        plain = functools.partial(_plain, stride=stride, pads=pads)
        return jax.vjp(plain, images, kernel)[1](gradient)

    @sequential_vmap
    def by_convolutions(images: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        of_images = _images_gradient(gradient, kernel, stride, pads, images.shape[1:3])
        of_kernel = _kernel_gradient(images, gradient, stride, pads, kernel.shape[:2])
        return of_images, of_kernel.astype(kernel.dtype)

    return jax.lax.platform_dependent(*inputs, gradient, cpu=by_convolutions, default=by_autodiff)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _plain(
    images: Array,
    kernel: Array,
    stride: int | tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int] = (1, 1),
) -> Array:
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride) if isinstance(stride, int) else stride,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _outputs(images: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """The convolution; between few channels for two neighbouring pixels at once.

    The two are two halves of twice as many outputs: of a kernel that is wider by the stride, with zeros
    where the other one reads. That is a third more products for 3 by 3, but XLA leaves a convolution
    between at most 16 channels to an older kernel, which is slower by more.
    """
    height, width, inputs, outputs = kernel.shape
    columns = (images.shape[2] + sum(pads[1]) - width) // stride + 1
    if max(inputs, outputs) > NARROW or columns % 2:
        return _plain(images, kernel, stride, pads)
    left, right = (
        jnp.pad(kernel, ((0, 0), beside, (0, 0), (0, 0))) for beside in ((0, stride), (stride, 0))
    )
    both = jnp.stack([left, right], axis=3).reshape(height, width + stride, inputs, 2 * outputs)
    pairs = _plain(images, both, (stride, 2 * stride), pads)
    return pairs.reshape(*pairs.shape[:2], columns, outputs)


def _images_gradient(
    gradient: Array, kernel: Array, stride: int, pads: Pads, sizes: tuple[int, ...]
) -> Array:
    """`sum_{i, j, d} gradient[b, i, j, d] kernel[y + p - s i, x + p - s j, c, d]`, at `[b, y, x, c]`.

    With `y = s a + r` and zeros before the kernel until s divides p, this is for each r below s a
    convolution over a with stride 1 and every s-th row of the kernel, the last one first; so too for
    columns. All `s^2` are one.
    """
    batch, channels = gradient.shape[0], kernel.shape[2]
    counts = [-(-size // stride) for size in sizes]
    around = []
    for dimension, (before, _) in enumerate(pads):
        axis = 2 * dimension  # the kernel becomes [taps, s, taps, s, C, D]
        early = -before % stride
        late = -(kernel.shape[axis] + early) % stride
        beyond = [(0, 0)] * kernel.ndim
        beyond[axis] = (early, late)
        kernel = jnp.pad(kernel, beyond)
        taps = kernel.shape[axis] // stride
        kernel = kernel.reshape(*kernel.shape[:axis], taps, stride, *kernel.shape[axis + 1 :])
        low = taps - 1 - (before + early) // stride
        around.append((low, counts[dimension] - gradient.shape[1 + dimension] - low + taps - 1))
    flipped = kernel[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)
    flipped = flipped.reshape(*flipped.shape[:3], stride * stride * channels)
    found = _outputs(gradient, flipped, 1, (around[0], around[1]))
    found = found.reshape(batch, *counts, stride, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    found = found.reshape(batch, counts[0] * stride, counts[1] * stride, channels)
    return found[:, : sizes[0], : sizes[1]]


def _kernel_gradient(
    images: Array, gradient: Array, stride: int, pads: Pads, window: tuple[int, ...]
) -> Array:
    """`sum_{b, i, j} images[b, s i + u - p, s j + v - p, c] gradient[b, i, j, d]`, at `[u, v, c, d]`.

    A convolution whose pixels are sums over b. `images` becomes one image `[H, W C]` whose every pixel
    has B values, `gradient` its kernel with holes of s rows and `s C` columns; what comes out is
    `[h, w C]`. Some images at a time, so that both stay in the cache and that nothing before is
    computed anew for the transposed order.
    """
    batch, height, width, channels = images.shape
    outputs = gradient.shape[3]
    after = (
        size + (count - 1) * stride - given - before
        for size, count, given, (before, _) in zip(
            window, gradient.shape[1:3], (height, width), pads, strict=True
        )
    )
    rows, columns = ((before, end) for (before, _), end in zip(pads, after, strict=True))
    columns = (columns[0] * channels, columns[1] * channels)
    groups = math.gcd(batch, GROUPS)

    def members(of: Array, group: Array) -> Array:
        # Of a batch that is dealt out over devices each has some of every group. Reshaped out of the
        # loop, XLA would compute the array a second time in that shape.
        return of.reshape(batch // groups, groups, *of.shape[1:])[:, group]

    def add(total: Array, group: Array) -> tuple[Array, None]:
        image = members(images, group).transpose(1, 2, 3, 0)
        image = image.reshape(1, height, width * channels, -1)
        kernel = members(gradient, group).transpose(1, 2, 0, 3)
        found = _plain(image, kernel, 1, (rows, columns), (stride, stride * channels))
        return total + found.astype(total.dtype), None

    zeros = jnp.zeros((1, window[0], window[1] * channels, outputs), _summed(images.dtype))
    total, _ = jax.lax.scan(add, zeros, jnp.arange(groups))
    return total.reshape(*window, channels, outputs)


def _summed(dtype: jnp.dtype) -> jnp.dtype:
    """Of sums: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
