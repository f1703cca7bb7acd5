"""How many runs fit side by side."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp

from regjax import optim
from regjax.classification.experiment import ImageExperiment
from regjax.classification.program import BLOCK
from regjax.classification.train import runs_by
from regjax.data.images import prepare_images
from regjax.models import vision

SHARE = 0.6
"""Of the memory, what runs may take: the compiler's buffers are not known before it has run."""


def runs_that_fit(experiment: ImageExperiment) -> int:
    """How many runs like `experiment` the device's memory holds side by side, at least 1.

    An estimate: images once; for every run its parameters, gradients and optimizer state, labels and
    teachers' logits; and what one step's forward and backward pass keeps (the compiler says so for one run
    of the largest stage), as often as there are runs, or once where runs take turns.
    """
    splits = prepare_images(experiment.data)
    images, classes = splits.train.images, len(splits.class_names)
    shared = images.nbytes + splits.test.images.nbytes
    largest = turns = 0.0
    for stage in experiment.stages:
        config = experiment.model_of(stage)
        classifier = vision.build(config, images.shape[1:], experiment.outputs_of(stage, classes))
        params, statistics = jax.eval_shape(classifier.init, jax.random.key(0))
        optimizer = optim.build(experiment.optimizer_of(stage), 1, params)
        state = _bytes((params, params, statistics, jax.eval_shape(optimizer.init, params)))
        cached = 4 * len(images) * (1 + classes * len(stage.teachers))
        passes = _pass_bytes(
            classifier, params, statistics, (experiment.batch_size, *images.shape[1:])
        )
        side_by_side = runs_by(experiment) == "vmap"
        batches = BLOCK * 4 * experiment.batch_size * math.prod(images.shape[1:])
        largest = max(largest, 2 * state + cached + passes * side_by_side)
        turns = max(turns, (passes + batches) * (not side_by_side))
    return max(1, math.floor((SHARE * _memory() - shared - turns) / largest))


def _pass_bytes(classifier, params, statistics, shape) -> int:
    def loss(params, statistics, images):
        outputs, _ = classifier.apply(params, statistics, images, training=True)
        return jnp.sum(jax.nn.logsumexp(outputs.logits, axis=-1))

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(params, statistics, images).compile()
    found = compiled.memory_analysis()
    return 0 if found is None else found.temp_size_in_bytes


def _bytes(tree) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _memory() -> int:
    """Bytes of the first device that are free to use; of a processor, its share of the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
