"""Which types things are computed in, and what is kept for the backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from regjax import models

CONFIG = models.DecoderConfig(
    vocabulary_size=64,
    width=64,
    layers=4,
    heads=4,
    key_value_heads=2,
    head_dim=16,
    mlp_width=96,
    query_key_norm=True,
    initializer_scale=0.2,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))


def every_equation(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from every_equation(inner)


def types_of(equations, name):
    """Types of the first input and of the output of each operation of that name."""
    found = {
        (str(equation.invars[0].aval.dtype), str(equation.outvars[0].aval.dtype))
        for equation in equations
        if equation.primitive.name == name
    }
    assert found, f"no {name} in the program"
    return found


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_bfloat16_products_have_float32_sums_around_float32_functions(stored):
    config = dataclasses.replace(
        CONFIG, dtype="bfloat16", attention_soft_cap=20.0, logit_soft_cap=30.0
    )
    apply, params = models.split(models.create(config, 0))
    params = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    equations = list(every_equation(jax.make_jaxpr(apply)(params, TOKENS).jaxpr))
    kept = ("float32", "float32")
    # Norms, rotations, and caps and softmax of scores and logits.
    for name in ("rsqrt", "cos", "sin", "tanh", "exp", "reduce_max", "reduce_sum"):
        assert types_of(equations, name) == {kept}, name
    assert types_of(equations, "dot_general") == {
        ("bfloat16", "bfloat16"),  # projections
        ("bfloat16", "float32"),  # scores, their mixtures and logits
    }
    assert apply(params, TOKENS).dtype == jnp.float32


def test_gradients_have_the_types_of_parameters_and_bfloat16_products():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    apply, params = models.split(models.create(config, 0))

    def loss(params):
        return jnp.sum(jnp.sin(apply(params, TOKENS)))

    program = jax.make_jaxpr(jax.grad(loss))(params)
    assert {aval.dtype for aval in program.out_avals} == {jnp.dtype(jnp.float32)}
    for equation in every_equation(program.jaxpr):
        if equation.primitive.name == "dot_general":
            types = {str(operand.aval.dtype) for operand in equation.invars}
            low = equation.params["precision"] == jax.lax.DotAlgorithmPreset.BF16_BF16_F32
            assert low or types == {"bfloat16"}, equation


def test_bfloat16_parameters_give_what_float32_ones_rounded_give():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    apply, params = models.split(models.create(config, 0))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    np.testing.assert_array_equal(apply(low, TOKENS), apply(same, TOKENS))


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation_keeps_less_and_less(scan):
    """Floats kept for the backward pass, a token and layer, from their shapes."""
    batch, length = TOKENS.shape

    def kept(choice):
        config = dataclasses.replace(CONFIG, rematerialisation=choice, scan_layers=scan)
        apply, params = models.split(models.create(config, 0))
        embeddings = apply.embed(params, TOKENS)

        def hidden(layers, embeddings):
            return apply.hidden(params | {"layers": layers}, embeddings=embeddings)

        _, backward = jax.eval_shape(
            lambda *inputs: jax.vjp(hidden, *inputs), params["layers"], embeddings
        )
        sizes = [leaf.size for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32]
        of_parameters = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
        return (sum(sizes) - of_parameters) / (batch * length)

    none, dots, full = kept("none"), kept("dots"), kept("full")
    heads = (CONFIG.heads + 2 * CONFIG.key_value_heads) * CONFIG.head_dim
    projections = heads + CONFIG.width + 2 * CONFIG.mlp_width
    # `full` keeps each layer's input, and what all layers share: their mask and rotation.
    assert CONFIG.width <= full / CONFIG.layers < 2 * CONFIG.width
    # `dots` also what each projection returns, but for the last, which nothing needs.
    assert (dots - full) / CONFIG.layers == projections
    assert none > 2 * dots
