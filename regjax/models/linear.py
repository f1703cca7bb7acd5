"""Linear layers: with low-rank factors beside the kernel, and which of their results are worth keeping."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class AdaptedLinear(nnx.Module):
    """`base(x) + scale (x A) B`, of the type of `base(x)`; `base` is an `nnx.Linear`."""

    def __init__(self, base: nnx.Linear, a: Array, b: Array, scale: float):
        self.base, self.a, self.b, self.scale = base, nnx.Param(a), nnx.Param(b), scale

    def __call__(self, inputs: Array) -> Array:
        outputs = self.base(inputs)
        low = self.scale * self._product(inputs.astype(outputs.dtype), self.a)
        return outputs + self._product(low, self.b)

    @property
    def kernel(self) -> Array:
        """`W + scale A B` in W's type, for code that reads the kernel rather than call the layer."""
        return shifted(self.base.kernel[...], self.a[...], self.b[...], self.scale)

    @property
    def bias(self) -> Any:
        """The layer's own."""
        return self.base.bias

    def _product(self, inputs: Array, factor: nnx.Param) -> Array:
        """As the layer computes its own."""
        axes = (((inputs.ndim - 1,), (0,)), ((), ()))
        kernel = factor[...].astype(inputs.dtype)
        return self.base.dot_general(inputs, kernel, axes, precision=self.base.precision)


def shifted(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`W + scale A B`, computed in float32 and rounded to the kernel's type."""
    change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)


def keep_projections(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: the results of linear layers are kept, cheap ones are not.

    Those of `dots_with_no_batch_dims_saveable`, but for products `x B` whose outputs are more than 8 times
    as many as what each is a sum of: B of an adapter, whose result is as large as its layer's own and
    would double what is kept, for the few operations that it costs to compute again.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *operands, **parameters
    ):
        return False
    (_, axes), _ = parameters["dimension_numbers"]
    kernel = operands[1].shape
    summed = math.prod(kernel[axis] for axis in axes)
    return math.prod(kernel) <= 8 * summed**2
