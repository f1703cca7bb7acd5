"""Prints, as JSON, the largest difference that dealing splash attention out over a mesh makes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from regjax.models import splash
from regjax.sharding import AXES

# Rows and heads divide; more parts than key heads; neither rows nor key heads divide.
CASES = [((2, 1, 2), 4, 4, 2), ((1, 1, 4), 2, 4, 2), ((1, 2, 2), 3, 3, 3)]


def value_and_gradients(query, key, value, segment_ids):
    def total(query, key, value):
        mixed = splash.attend(
            query, key, value, segment_ids, window=5, scale=0.3, soft_cap=None, interpret=True
        )
        return jnp.sum(jnp.sin(mixed)), mixed

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), gradients = jax.jit(gradient)(query, key, value)
    return [np.asarray(array) for array in (mixed, *gradients)]


def largest_difference(axes, rows, heads, key_heads):
    random = np.random.default_rng(0)
    shapes = [(rows, 20, count, 8) for count in (heads, key_heads, key_heads)]
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    arrays.append(jnp.asarray(np.cumsum(random.random((rows, 20)) < 0.2, axis=1), jnp.int32))
    alone = value_and_gradients(*arrays)
    with jax.set_mesh(jax.make_mesh(axes, AXES, axis_types=(AxisType.Auto,) * 3)):
        together = value_and_gradients(*arrays)
    return max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))


if __name__ == "__main__":
    print(json.dumps([largest_difference(*case) for case in CASES]))
