"""Memory of the compiled step, from shapes alone: no weights of these sizes are made."""

import functools

import jax
import jax.numpy as jnp
import pytest

from regjax import models, optim, paths, sharding
from regjax.losses import linear
from regjax.models import DecoderConfig
from regjax.objectives import Raft, Sft
from regjax.stages import init_state, make_update
from regjax.token_grid import TokenGrid

SMALL, LARGE = 32_000, 152_000
ROWS, LENGTH, LABELS, WIDTH = 8, 512, 8, 64
FLOAT32 = 4
ONE_MORE_LOGITS = ROWS * LENGTH * (LARGE - SMALL) * FLOAT32
"""What a `[B, L, V]` array takes more at the larger vocabulary: 1.97 GB."""
ONE_MORE_TABLE = WIDTH * (LARGE - SMALL) * FLOAT32
"""The same of one `[V, D]` array, such as a gradient of the embedding or of the head."""

SINGLE = TokenGrid.from_ids([10, 11, 12, 13, 14], [1.0, 2.0, 3.0, 4.0, 5.0])


@functools.cache
def temporary_bytes(objective, vocabulary):
    config = DecoderConfig(
        vocabulary_size=vocabulary,
        layers=2,
        width=WIDTH,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        mlp_width=128,
        rematerialisation="full",
    )
    apply = models.split(jax.eval_shape(lambda: models.create(config, 0)))[0]
    params = paths.flatten(jax.eval_shape(lambda: models.split(models.create(config, 0))[1]))
    everywhere = sharding.replicated(sharding.make_mesh())
    optimizer = optim.build(optim.Optimizer(), 100, params)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, everywhere), params)
    integers = {"tokens": LENGTH, "positions": LENGTH, "segment_ids": LENGTH}
    integers |= {"labels": LABELS, "label_positions": LABELS, "score_positions": 1}
    floats = {"label_weights": LABELS, "scores": 1, "weights": 1}
    batch = {
        name: jax.ShapeDtypeStruct((1, ROWS, size), dtype)
        for sizes, dtype in ((integers, jnp.int32), (floats, jnp.float32))
        for name, size in sizes.items()
    }
    update = make_update(apply, objective, optimizer, SINGLE, seed=0, sharding=everywhere)
    return update.lower(state, {}, batch).compile().memory_analysis().temp_size_in_bytes


def more_at_the_larger_vocabulary(objective):
    small, large = (temporary_bytes(objective, vocabulary) for vocabulary in (SMALL, LARGE))
    print(f"{objective}: {small} bytes at V = {SMALL}, {large} at V = {LARGE}")
    return large - small


@pytest.mark.parametrize("objective", [Raft(cross_entropy=0.1), Sft()], ids=repr)
def test_the_step_never_holds_logits_of_all_positions(objective):
    assert more_at_the_larger_vocabulary(objective) < ONE_MORE_LOGITS / 10


def test_language_modelling_holds_the_logits_of_a_block_of_rows():
    block = linear.BLOCK * (LARGE - SMALL) * FLOAT32
    assert ROWS * LENGTH == 8 * linear.BLOCK
    # The block's logits, and a few arrays of the parameters' shapes.
    found = more_at_the_larger_vocabulary(Sft(tokens="all"))
    assert block < found < block + 6 * ONE_MORE_TABLE < 0.25 * ONE_MORE_LOGITS


def test_the_measure_sees_full_logits():
    """The control: an objective that does hold them is found out."""

    def full(model, params, batch, key, codec):
        logits = model(params, batch["tokens"])
        return {"loss": (jax.nn.logsumexp(logits, axis=-1).sum(), jnp.float32(1))}

    assert more_at_the_larger_vocabulary(full) > ONE_MORE_LOGITS
