"""Layers of the image models, channels last; parameters and statistics float32, products in `dtype`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from regjax.errors import InputError
from regjax.models.config import Precision
from regjax.models.vision.convolution import Padding, convolve

DECAY = 0.9
"""What running statistics keep of themselves in each training step: 1 - torch's momentum."""
EPSILON = 1e-5
"""Added to the variance in batch norm, as in torch."""


class Draws:
    """Normal numbers for the kernels of one model, cut in turn from a single draw.

    A draw for each kernel would take many times as long to compile, once for every shape.

    >>> draws = Draws(jnp.arange(10.0))
    >>> draws((2, 2), deviation=1.0), draws((3,), deviation=0.5)
    (Array([[0., 1.],
           [2., 3.]], dtype=float32), Array([2. , 2.5, 3. ], dtype=float32))
    >>> draws.used
    7
    """

    def __init__(self, numbers: Array | None):
        """None: for shapes only; everything drawn is zero."""
        self.numbers, self.used = numbers, 0

    def __call__(self, shape: tuple[int, ...], deviation: float) -> Array:
        start, self.used = self.used, self.used + math.prod(shape)
        if self.numbers is None:
            return jnp.zeros(shape)
        return deviation * self.numbers[start : self.used].reshape(shape)


class Convolution(nnx.Module):
    """`convolve`, of a square kernel, plus a bias where it has one.

    The kernel is normal of variance `gain / (outputs size^2)`, with a bias `gain / (inputs size^2)`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding,
        bias: bool = False,
        gain: float = 2.0,
        dtype: Precision,
        draws: Draws,
    ):
        fan = (inputs if bias else outputs) * size**2
        self.kernel = nnx.Param(draws((size, size, inputs, outputs), math.sqrt(gain / fan)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride, self.padding, self.dtype = stride, padding, jnp.dtype(dtype)

    def __call__(self, images: Array) -> Array:
        return self.shifted(self.without_bias(images))

    def without_bias(self, images: Array) -> Array:
        images, kernel = images.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return convolve(images, kernel, stride=self.stride, padding=self.padding)

    def shifted(self, convolved: Array) -> Array:
        """Plus the bias."""
        return convolved if self.bias is None else convolved + self.bias[...].astype(self.dtype)


class Linear(nnx.Module):
    """`x kernel + bias` over the last axis, computed in `dtype`; the kernel normal of `deviation`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        deviation: float,
        dtype: Precision,
        draws: Draws,
    ):
        self.kernel = nnx.Param(draws((inputs, outputs), deviation))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, inputs: Array) -> Array:
        products = inputs.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return products if self.bias is None else products + self.bias[...].astype(self.dtype)


class BatchNorm(nnx.Module):
    """`scale (x - m) / sqrt(v + epsilon) + bias` for each channel, over all other axes.

    In training m and v are mean and (biased) variance of the batch, n values a channel, and the
    running ones move towards them: `mean <- .9 mean + .1 m`, `variance <- .9 variance + .1 v n / (n -
    1)`. Otherwise they are the running ones. All of it is float32; this is what torch computes.

    A batch that is dealt out over devices under `jax.jit` is one batch still.

    Raises:
        InputError: one value a channel, which has no variance.
    """

    def __init__(self, channels: int, *, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(channels, scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, inputs: Array, training: bool) -> Array:
        x = inputs.astype(jnp.float32)
        if training:
            normed, mean, variance = normalise(x, self.scale[...], self.bias[...])
            self._update(mean, variance, x.size // x.shape[-1])
        else:
            factor = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
            normed = (x - self.mean[...]) * factor + self.bias[...]
        return normed.astype(inputs.dtype)

    def _update(self, mean: Array, variance: Array, count: int) -> None:
        """The running ones, after a batch of `count` values a channel."""
        for running, new in ((self.mean, mean), (self.variance, variance * (count / (count - 1)))):
            running[...] = DECAY * running[...] + (1 - DECAY) * jax.lax.stop_gradient(new)


@jax.custom_vjp
def normalise(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """`scale (x - m) / sqrt(v + epsilon) + bias` by the mean and variance of x, and these: `[C]`.

    Float32, over all axes but the last. The gradient takes m and v for functions of x in the first of
    the three, and the other two for constants. Written out it reads x twice; what `jax.grad` makes of
    the forward pass reads it more often, which is what batch norm takes time for.

    Raises:
        InputError: one value a channel, which has no variance.
    """
    axes = tuple(range(x.ndim - 1))
    if x.size // x.shape[-1] < 2:
        raise InputError(
            f"batch norm in training got {x.shape}, one value a channel, which has no variance; "
            "use larger batches or larger images."
        )
    mean = jnp.mean(x, axis=axes)
    variance = jnp.mean(jnp.square(x - mean), axis=axes)
    factor = scale * jax.lax.rsqrt(variance + EPSILON)
    return (x - mean) * factor + bias, mean, variance


def _normalise_forward(x: Array, scale: Array, bias: Array) -> tuple[Any, Any]:
    normed, mean, variance = normalise(x, scale, bias)
    return (normed, mean, variance), (x, scale, mean, variance)


def _normalise_backward(given: Any, gradients: Any) -> tuple[Array, Array, Array]:
    (x, scale, mean, variance), gradient = given, gradients[0]
    axes = tuple(range(x.ndim - 1))
    inverse = jax.lax.rsqrt(variance + EPSILON)
    of_bias = jnp.sum(gradient, axis=axes)
    of_scale = inverse * jnp.sum(gradient * (x - mean), axis=axes)
    count = x.size // x.shape[-1]
    along = of_bias / count + (x - mean) * (inverse * of_scale / count)
    return scale * inverse * (gradient - along), of_scale, of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


def mean_of_pixels(images: Array) -> Array:
    """Global average pooling: float32 `[B, C]` of `[B, H, W, C]`."""
    return jnp.mean(images.astype(jnp.float32), axis=(1, 2))
