"""What is kept for the backward pass."""

import math

import jax
import numpy as np

from regjax import models
from regjax.models import DecoderConfig, Lora

CONFIG = DecoderConfig(
    layers=3,
    width=32,
    heads=4,
    key_value_heads=4,
    head_dim=8,
    mlp_width=96,
    vocabulary_size=64,
    rematerialisation="dots",
)
TOKENS = np.arange(33).reshape(3, 11)


def test_products_of_adapters_are_not_kept_beside_those_of_their_layers():
    lora = Lora(rank=2)
    model, params = models.split(models.create(CONFIG, 0))
    params = {**params, "lora": models.create_lora(lora, params, jax.random.key(0))}

    def loss(params):
        return (models.with_lora(model, lora).hidden(params, TOKENS) ** 2).mean()

    _, backward = jax.vjp(loss, params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
    kept = sorted(s[-1:] for s in shapes if s[:1] == (3,) and math.prod(s[1:-1]) == 3 * 11)
    # Of each layer its input and query, key, value, output, gate and up; of adapters `x A` alone.
    assert kept == [(2,)] * 7 + [(32,)] * 5 + [(96,)] * 2
