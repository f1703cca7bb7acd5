import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from regjax import models
from regjax.errors import InputError

CONFIG = models.DecoderConfig(
    vocabulary_size=11, width=8, layers=2, heads=2, key_value_heads=2, head_dim=4, mlp_width=8
)
TOKENS = np.array([[1, 2, 3], [4, 5, 6]])


def test_apply_is_equal_for_equal_configs_and_traces_once():
    first, params = models.split(models.create(CONFIG, 0))
    second, _ = models.split(models.create(CONFIG, 1))
    other, _ = models.split(models.create(dataclasses.replace(CONFIG, sliding_window=2), 1))
    assert first == second and hash(first) == hash(second)
    assert first != other
    traces = []

    def run(apply, params):
        traces.append(apply)
        return apply(params, TOKENS)

    jitted = jax.jit(run, static_argnums=0)
    np.testing.assert_array_equal(jitted(first, params), jitted(second, params))
    assert len(traces) == 1


def test_apply_equals_the_module():
    model = models.create(CONFIG, 0)
    apply, params = models.split(model)
    np.testing.assert_array_equal(apply(params, TOKENS), model(TOKENS))
    np.testing.assert_array_equal(
        apply.head(params, apply.hidden(params, TOKENS)), model.head(model.hidden(TOKENS))
    )
    assert isinstance(params["layers"]["mlp"]["up"]["kernel"], jax.Array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_projection_is_what_the_head_computes(tied, dtype):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, logit_soft_cap=1.5, dtype=dtype)
    apply, params = models.split(models.create(config, 0))
    if tied:
        assert "head" not in params
    params = jax.tree.map(lambda leaf: 20.0 * leaf, params)
    hidden = apply.hidden(params, TOKENS)
    kernel, soft_cap = apply.projection(params)
    assert kernel.dtype == jnp.dtype(dtype) and soft_cap == 1.5
    exact = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(
        apply.head(params, hidden), 1.5 * np.tanh(exact / 1.5), rtol=1e-5, atol=1e-6
    )
    prompted = models.with_prompts(apply, ["task"])
    found, _ = prompted.projection(params | {"soft_prompt": {"task": jnp.ones((2, 8))}})
    np.testing.assert_array_equal(found, kernel)
    replaced = dataclasses.replace(apply, head=lambda params, hidden: 2.0 * hidden)
    assert replaced.projection(params) is None


def test_split_rejects_what_is_not_a_model():
    with pytest.raises(TypeError, match="no method hidden and no method head"):
        models.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    class Normed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def hidden(self, tokens):
            return tokens

        def head(self, hidden):
            return hidden

    with pytest.raises(TypeError, match=r"not nnx.Param: .*norm.*mean"):
        models.split(Normed())


def test_linen_module_gets_the_keywords_of_its_call():
    class Bag(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, tokens, positions=None):
            shift = 0 if positions is None else positions[..., None]
            return flax.linen.Embed(11, 5)(tokens) + shift

    module = Bag()
    variables = module.init(jax.random.key(0), TOKENS)
    apply = models.from_function(module.apply)
    assert not apply.takes_segments
    assert apply == models.from_function(module.apply)
    np.testing.assert_array_equal(apply(variables, TOKENS), module.apply(variables, TOKENS))
    np.testing.assert_array_equal(
        apply(variables, TOKENS, positions=np.full((2, 3), 2)), module.apply(variables, TOKENS) + 2
    )


def test_function_without_segments_refuses_rows_it_cannot_tell_apart():
    def function(params, tokens):
        return params[tokens].astype(jnp.bfloat16)

    table = jnp.eye(7)
    apply = models.from_function(function)
    right = apply(table, TOKENS, segment_ids=np.array([[1, 1, 0], [1, 1, 1]]))
    empty = apply(table, TOKENS, segment_ids=np.array([[0, 0, 0], [1, 1, 1]]))
    np.testing.assert_array_equal(empty, right)
    assert right.dtype == jnp.float32
    np.testing.assert_array_equal(right, np.eye(7)[TOKENS])
    for bad in ([1, 1, 2], [0, 1, 1], [1, 0, 1], [2, 2, 2]):
        with pytest.raises(InputError, match="row 1 is packed or padded on the left"):
            apply(table, TOKENS, segment_ids=np.array([[1, 1, 1], bad]))
    with pytest.raises(ValueError, match="not embeddings"):
        apply(table, embeddings=jnp.ones((1, 2, 3)))


def test_pair_of_hidden_and_head():
    def hidden(params, tokens, segment_ids=None):
        return params["table"][tokens] * segment_ids[..., None]

    def head(params, hidden):
        return hidden @ params["table"].T

    params = {"table": jnp.arange(14.0).reshape(7, 2)}
    apply = models.from_function(hidden=hidden, head=head)
    assert apply.takes_segments
    segment_ids = np.array([[1, 1, 2], [0, 3, 0]])
    rows = np.arange(14.0).reshape(7, 2)
    np.testing.assert_allclose(
        apply(params, TOKENS, segment_ids=segment_ids),
        (rows[TOKENS] * segment_ids[..., None]) @ rows.T,
    )


@pytest.mark.parametrize("given", [{}, {"hidden": len}, {"head": len}])
def test_from_function_needs_one_function_or_both(given):
    with pytest.raises(TypeError, match="either one function, or both"):
        models.from_function(**given)
    with pytest.raises(TypeError, match="either one function, or both"):
        models.from_function(len, hidden=len)
