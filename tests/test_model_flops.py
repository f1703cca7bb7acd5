"""Model flops against the products in the model's own trace."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from regjax import model_flops, models
from regjax.models import DecoderConfig

CONFIG = DecoderConfig(
    vocabulary_size=96, width=32, layers=3, heads=4, key_value_heads=2, head_dim=16, mlp_width=64,
    scan_layers=False,
)  # fmt: skip


def products(jaxpr):
    """Flops of every product in a trace without loops, by whether both factors are activations."""
    kernels, attention = 0, 0
    for equation in jaxpr.eqns:
        for inner in core.jaxprs_in_params(equation.params):
            found = products(inner)
            kernels, attention = kernels + found[0], attention + found[1]
        if equation.primitive.name == "dot_general":
            (left, _), (batch, _) = equation.params["dimension_numbers"]
            operand, result = equation.invars[0].aval, equation.outvars[0].aval
            size = 2 * math.prod(result.shape) * math.prod(operand.shape[i] for i in left)
            if batch:
                attention += size
            else:
                kernels += size
    return kernels, attention


@pytest.mark.parametrize("length, head_rows", [(8, 8), (24, 1)])
def test_a_forward_pass_is_the_products_of_its_trace(length, head_rows):
    apply, params = models.split(models.create(CONFIG, 0))

    def forward(params, tokens):
        return apply.head(params, apply.hidden(params, tokens)[:, :head_rows])

    trace = jax.make_jaxpr(forward)(params, jnp.zeros((1, length), jnp.int32))
    kernels, attention = products(trace.jaxpr)
    found = model_flops.forward(CONFIG, length, head_rows)
    assert found.kernels + found.head == kernels
    # Of all L x L pairs a causal mask leaves L (L + 1) / 2.
    assert found.attention == pytest.approx(attention * (length + 1) / (2 * length))


def test_a_window_leaves_the_pairs_within_it():
    config = dataclasses.replace(
        CONFIG, attention_pattern=("local", "global", "local"), sliding_window=4
    )
    length = 10
    pairs = sum(0 <= i - j < 4 for i in range(length) for j in range(length))
    causal = length * (length + 1) // 2
    each = 4 * config.heads * config.head_dim
    assert model_flops.forward(config, length, 1).attention == each * (2 * pairs + causal)


@pytest.mark.parametrize("length", [1, 3, 16])
def test_what_is_trained_decides_the_backward_pass(length):
    once = model_flops.forward(CONFIG, length, 2)

    def training(*trained):
        return model_flops.training(CONFIG, length, 2, trained)

    assert training() == once.total
    assert training("embedding/table", "layers/mlp/up/kernel", "head/kernel") == 3 * once.total
    frozen = 2 * once.total + once.attention
    assert training("soft_prompt/main") == training("lora/layers/mlp/up/a") == frozen
    assert training("head/kernel") == once.total + 2 * once.head
    assert training("final_norm/scale") == once.total + once.head
