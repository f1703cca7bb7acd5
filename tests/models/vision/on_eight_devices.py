"""Prints, as JSON, how far a training step on rows dealt out over all devices is from one device's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from regjax.models.vision import CifarResNet, build
from tests.models.vision.compiling import quick_jit

SHAPE = (8, 8, 3)


def gradients_and_statistics(classifier, params, statistics, images):
    @quick_jit
    def step(params, statistics, images):
        def loss(params):
            outputs, new = classifier.apply(params, statistics, images, training=True)
            return jnp.mean(jax.nn.logsumexp(outputs.logits, axis=-1)), (outputs, new)

        return jax.grad(loss, has_aux=True)(params)

    return step(params, statistics, images)


def largest_difference(config):
    classifier = build(config, SHAPE, 5)
    params, statistics = classifier.init(jax.random.key(0))
    # Each device's rows have a mean and a deviation of their own.
    random = np.random.default_rng(0)
    images = random.normal(size=(16, *SHAPE)) * (1 + np.arange(16).reshape(-1, 1, 1, 1) // 2)
    images = (images + np.arange(16).reshape(-1, 1, 1, 1)).astype(np.float32)
    alone = gradients_and_statistics(classifier, params, statistics, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (["data"], []))
    dealt_out = jax.device_put(images, rows)
    assert (
        len(dealt_out.addressable_shards) == 8
        and dealt_out.addressable_shards[0].data.shape[0] == 2
    )
    params, statistics = jax.device_put((params, statistics), everywhere)
    together = gradients_and_statistics(classifier, params, statistics, dealt_out)

    def difference(a, b):
        return float(np.abs(np.asarray(a) - b).max() / max(1e-2, np.abs(b).max()))

    return max(jax.tree.leaves(jax.tree.map(difference, together, jax.tree.map(np.asarray, alone))))


if __name__ == "__main__":
    print(json.dumps(largest_difference(CifarResNet(8))))
