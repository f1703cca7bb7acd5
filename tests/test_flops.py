"""Model flops: counted from the trace, against formulas by hand."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from regjax import models, paths
from regjax.flops import training_flops
from regjax.objectives import Raft
from regjax.token_grid import TokenGrid
from tests.kills import ROOT

A, B, X = jnp.ones((4, 5)), jnp.ones((5, 6)), jnp.ones((3, 4))


def test_what_is_not_trained_needs_less_backward():
    """Forward 2 * 3 * 4 * 5 = 120 and 2 * 3 * 5 * 6 = 180."""

    def loss(trained, rest):
        weights = {**trained, **rest}
        return (jnp.tanh(X @ weights["a"]) @ weights["b"]).sum()

    assert training_flops(loss, {"a": A, "b": B}, {}) == 2 * 120 + 3 * 180
    assert training_flops(loss, {"a": A}, {"b": B}) == 2 * 120 + 2 * 180
    assert training_flops(loss, {"b": B}, {"a": A}) == 120 + 2 * 180
    assert training_flops(loss, {}, {"a": A, "b": B}) == 120 + 180


SQUARE = jnp.ones((4, 4))  # X @ SQUARE: 2 * 3 * 4 * 4 = 96


def custom(x, w):
    return x @ w


custom_gradient = jax.custom_vjp(custom)
custom_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T,) * 2)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda w: jax.checkpoint(lambda x: jnp.tanh(x @ w))(X), 2 * 96),
        (lambda w: jax.jit(custom)(X, w), 2 * 96),
        (lambda w: custom_gradient(X, w), 2 * 96),
        (lambda w: jax.lax.stop_gradient(X @ w) @ w, 2 * 96 + 2 * 96),
        # Its state depends on the weights from the second round on, so it does.
        (lambda w: jax.lax.scan(lambda x, _: (x @ w, None), X, None, length=7)[0], 7 * 3 * 96),
        (lambda w: jax.lax.scan(lambda _, x: (None, x @ w), None, jnp.ones((7, 3, 4)))[1], 7 * 192),
        (lambda w: jax.lax.cond(w[0, 0] > 0, lambda: X @ w, lambda: X), 2 * 96),
        (lambda w: (X @ w)[jnp.argmax(X @ w, -1)], 4 * 96),
        (lambda w: jnp.ones((4, 4))[jnp.argmax(w, -1)] @ w, 2 * 2 * 4**3),
        (lambda w: jnp.einsum("bik,bkj->bij", jnp.ones((7, 3, 4)), jnp.stack([w] * 7)), 7 * 192),
    ],
)
def test_what_surrounds_a_product(loss, expected):
    assert training_flops(loss, SQUARE) == expected


def test_convolution():
    """2 * results * window * input channels: 8 x 6 x 6 x 5 results of 3 x 3 windows of 4 channels."""
    images, kernel = jnp.ones((8, 8, 8, 4)), jnp.ones((3, 3, 4, 5))

    def loss(kernel, images):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=dimensions
        )

    assert training_flops(loss, kernel, images) == 2 * 2 * (8 * 6 * 6 * 5) * (3 * 3 * 4)


CONFIG = models.DecoderConfig(
    vocabulary_size=80, layers=3, width=16, heads=4, key_value_heads=2, head_dim=8, mlp_width=24
)
GRID = TokenGrid.from_ids([11, 12, 13, 14, 15], [1, 2, 3, 4, 5])
ROWS, LENGTH = 6, 32


def batch():
    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    row = integers(ROWS, LENGTH)
    one = {
        "score_positions": integers(ROWS, 1),
        "scores": floats(ROWS, 1),
        "weights": floats(ROWS, 1),
    }
    return {"tokens": row, "positions": row, "segment_ids": row, **one}


@pytest.mark.parametrize("choices", [{}, {"scan_layers": True}, {"rematerialisation": "full"}])
def test_a_decoder_is_six_times_its_matrices_and_attention(choices):
    """6 N flops a token for the N parameters of a layer's matrices, 12 H L head_dim for attention; the
    head's matrix at the score's position only. Looking up embeddings is no product. The first layer's
    queries, keys and values depend on the embeddings, so they count in full."""
    config = dataclasses.replace(CONFIG, **choices)
    model, params = models.split(models.create(config, 0))

    def loss(params, batch):
        return Raft()(model, paths.unflatten(params), batch, jax.random.key(0), GRID)["loss"][0]

    width, inner = 16, 4 * 8
    matrices = 3 * (2 * width * inner + 2 * width * 2 * 8 + 3 * width * 24)
    attention = 3 * 12 * LENGTH * inner
    expected = ROWS * LENGTH * (6 * matrices + attention) + 6 * ROWS * width * 80
    assert training_flops(loss, paths.flatten(params), batch()) == expected


def test_shards_count_together():
    code = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from regjax import sharding
from regjax.flops import training_flops
mesh = sharding.make_mesh(sharding.MeshShape(data=4, tensor=2))
def loss(w, x):
    return jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"), mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor", None)), out_specs=P("data", None),
    )(x, w).sum()
assert training_flops(loss, jnp.ones((6, 5)), jnp.ones((8, 6))) == 2 * 2 * 8 * 6 * 5
"""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
