"""Linear layers: with low-rank factors beside the kernel, and which of their results are worth keeping."""

import math
from typing import Any

import jax
from flax import nnx
from jax import Array


class AdaptedLinear(nnx.Module):
    """`base(x) + scale (x A) B`, of the type of `base(x)`; `base` is an `nnx.Linear`."""

    def __init__(self, base: nnx.Linear, a: Array, b: Array, scale: float):
        self.base, self.a, self.b, self.scale = base, nnx.Param(a), nnx.Param(b), scale

    def __call__(self, inputs: Array) -> Array:
        outputs = self.base(inputs)
        a, b = (factor[...].astype(outputs.dtype) for factor in (self.a, self.b))
        return outputs + (self.scale * (inputs.astype(outputs.dtype) @ a)) @ b


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
