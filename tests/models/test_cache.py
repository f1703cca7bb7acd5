"""Token by token through a cache is what the whole row gives at once."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from regjax import models
from regjax.errors import InputError
from regjax.models.attention import cached_mask
from regjax.models.hf_config import config_from_json
from tests.models.families import OPTIONS
from tests.models.test_decoder import SMALL

FAMILIES = (
    "llama-llama3-scaling",
    "mistral",
    "qwen2-window",
    "qwen3-tied-biases",
    "gemma2",
    "gemma3",
)
CONFIGS = {name: config_from_json(OPTIONS[name]) for name in FAMILIES}
CONFIGS["looped"] = dataclasses.replace(
    CONFIGS["gemma3"], scan_layers=False, rematerialisation="full"
)

COLUMNS, STEPS = 9, 4
PROMPTS = np.array([3, 7, 9, 0, 7, 1])
LEFT = np.array([True, True, False, False, False, True])
TOKENS = np.random.default_rng(0).integers(1, 31, (len(PROMPTS), COLUMNS + STEPS))


def noisy(config):
    """`(apply, params)` where every parameter matters: no zero bias, no scale of one."""
    apply, shapes = models.split(nnx.eval_shape(lambda: models.create(config, 0)))
    random = np.random.default_rng(0)
    return apply, jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * random.normal(size=leaf.shape), leaf.dtype), shapes
    )


def padded(filling=0):
    """The prompts in `COLUMNS` columns, each on its side, and their segment ids."""
    tokens = np.full((len(PROMPTS), COLUMNS), filling)
    segment_ids = np.zeros_like(tokens)
    for row, (count, left) in enumerate(zip(PROMPTS, LEFT, strict=True)):
        columns = slice(COLUMNS - count, COLUMNS) if left else slice(0, count)
        tokens[row, columns] = TOKENS[row, :count]
        segment_ids[row, columns] = 1
    return tokens, segment_ids


def following():
    """`[STEPS, B]`: the tokens after each prompt."""
    return np.stack([TOKENS[range(len(PROMPTS)), PROMPTS + step] for step in range(STEPS)])


@functools.partial(jax.jit, static_argnums=0)
def stepped(apply, params, tokens, segment_ids, steps, positions=None):
    """States of the rows, states `[STEPS, B, D]` after them, and the cache before and after."""
    hidden, cache = apply.prefill(
        params, tokens, room=len(steps), positions=positions, segment_ids=segment_ids
    )

    def step(cache, tokens):
        states, cache = apply.step(params, tokens, cache)
        return cache, states

    last, states = jax.lax.scan(step, cache, steps)
    return hidden, states, cache, last


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_whole_rows_padded_on_either_side(name):
    apply, params = noisy(CONFIGS[name])
    tokens, segment_ids = padded()
    hidden, states, cache, last = stepped(apply, params, tokens, segment_ids, following())
    whole = np.asarray(jax.jit(apply.hidden)(params, TOKENS))
    # Sums over three layers in another order: tens of roundings of 6e-8 of these magnitudes.
    tolerance = 5e-6 * np.abs(whole).max()
    for row, (count, left) in enumerate(zip(PROMPTS, LEFT, strict=True)):
        columns = slice(COLUMNS - count, COLUMNS) if left else slice(0, count)
        np.testing.assert_allclose(hidden[row, columns], whole[row, :count], atol=tolerance)
        after = whole[row, count : count + STEPS]
        np.testing.assert_allclose(states[:, row], after, atol=tolerance)
        np.testing.assert_array_equal(last.positions[row, COLUMNS:], count + np.arange(STEPS))
    assert cache.length == COLUMNS and last.length == COLUMNS + STEPS
    np.testing.assert_array_equal(cache.segment_ids[:, :COLUMNS], segment_ids)
    np.testing.assert_array_equal(cache.segment_ids[:, COLUMNS:], 0)
    np.testing.assert_array_equal(last.segment_ids[:, COLUMNS:], 1)


def test_cache_of_steps_is_that_of_a_longer_prefill():
    apply, params = noisy(CONFIGS["gemma3"])
    ones = np.ones_like(TOKENS)
    _, _, _, grown = stepped(
        apply, params, TOKENS[:, :COLUMNS], ones[:, :COLUMNS], TOKENS[:, COLUMNS:].T
    )
    _, at_once = jax.jit(functools.partial(apply.prefill, room=0))(params, TOKENS)
    for one, other in zip(grown, at_once, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=5e-6 * np.abs(other).max())


def test_cached_keys_are_rotated_and_values_are_not():
    config = dataclasses.replace(SMALL, layers=1)
    apply, params = noisy(config)
    _, cache = jax.jit(functools.partial(apply.prefill, room=2))(params, TOKENS[:1, :5])
    assert cache.keys.shape == (1, 1, 7, 2, 6) and cache.keys.dtype == jnp.float32
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["layers"])
    rows = np.asarray(params["embedding"]["table"], np.float64)[TOKENS[0, :5]]
    rows = rows / np.sqrt(np.mean(rows**2, -1, keepdims=True) + config.norm_epsilon)
    rows = rows * layer["attention_norm"]["scale"]
    keys = (rows @ layer["attention"]["key"]["kernel"]).reshape(5, 2, 6)
    values = (rows @ layer["attention"]["value"]["kernel"]).reshape(5, 2, 6)
    angles = np.arange(5)[:, None, None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = (keys[..., :3] + 1j * keys[..., 3:]) * np.exp(1j * angles)
    keys = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(cache.keys[0, 0, :5], keys, atol=5e-6 * np.abs(keys).max())
    np.testing.assert_allclose(cache.values[0, 0, :5], values, atol=5e-6 * np.abs(values).max())
    np.testing.assert_array_equal(cache.keys[0, 0, 5:], 0)


def test_window_counts_positions_across_right_padding():
    """One local layer of window 4: the second token after a prompt of 6 sees its last two."""
    config = dataclasses.replace(SMALL, layers=1, attention_pattern=("local",), sliding_window=4)
    apply, params = noisy(config)

    @jax.jit
    def second(prompt):
        tokens = jnp.pad(prompt[None], ((0, 0), (0, 6)), constant_values=30)
        segment_ids = jnp.arange(12)[None] < 6
        states = stepped(apply, params, tokens, segment_ids.astype(int), np.array([[5], [6]]))[1]
        return states[1, 0]

    prompt = np.array([1, 2, 3, 4, 5, 6])
    changed = [prompt + 9 * (np.arange(6) == column) for column in range(6)]
    states = np.stack([second(one) for one in (prompt, *changed)])
    depends = (states[1:] != states[0]).any(-1)
    np.testing.assert_array_equal(depends, [False] * 4 + [True] * 2)


def test_what_stands_in_padding_has_no_influence():
    apply, params = noisy(CONFIGS["gemma2"])
    tokens, segment_ids = padded()
    states = stepped(apply, params, tokens, segment_ids, following())[1]
    others = stepped(apply, params, padded(17)[0], segment_ids, following())[1]
    np.testing.assert_array_equal(states, others)


def test_a_token_follows_the_largest_position():
    apply, params = noisy(SMALL)
    positions = np.tile([0, 1, 2, 7, 8], (len(TOKENS), 1))
    tokens, steps = TOKENS[:, :4], TOKENS[:, 4:5].T
    _, states, _, cache = stepped(
        apply, params, tokens, np.ones_like(tokens), steps, positions[:, :4]
    )
    hidden = jax.jit(apply.hidden)
    whole = hidden(params, TOKENS[:, :5], positions=positions)
    np.testing.assert_allclose(states[0], whole[:, 4], atol=5e-6 * np.abs(whole).max())
    elsewhere = hidden(params, TOKENS[:, :5], positions=np.tile(np.arange(5), (len(TOKENS), 1)))
    assert np.abs(elsewhere[:, 4] - whole[:, 4]).max() > 1e-3
    np.testing.assert_array_equal(cache.positions[:, 4], 8)


def test_embeddings_fill_a_cache_as_tokens_do():
    apply, params = noisy(SMALL)
    prefill = jax.jit(functools.partial(apply.prefill, room=1))
    given = prefill(params, embeddings=apply.embed(params, TOKENS[:2, :5]))
    read = prefill(params, TOKENS[:2, :5])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), given, read)


def test_bfloat16_cache_is_near_the_whole_row():
    apply, params = noisy(dataclasses.replace(SMALL, dtype="bfloat16"))
    tokens, segment_ids = padded()
    hidden, states, cache, last = stepped(apply, params, tokens, segment_ids, following())
    for array in (hidden, states, cache.keys, cache.values, last.keys, last.values):
        assert array.dtype == jnp.bfloat16
    assert jax.eval_shape(apply.head, params, states[0]).dtype == jnp.float32
    whole = np.asarray(jax.jit(apply.hidden)(params, TOKENS), np.float32)
    rows = range(len(PROMPTS))
    for step in range(STEPS):
        # A few roundings of 2^-9 on values of this size.
        np.testing.assert_allclose(
            np.asarray(states[step], np.float32),
            whole[rows, PROMPTS + step],
            atol=2**-9 * 10 * np.abs(whole).max(),
        )


def test_full_cache_is_refused_or_gives_nan():
    apply, params = noisy(SMALL)
    _, cache = jax.jit(functools.partial(apply.prefill, room=1))(params, TOKENS[:2, :3])
    step = jax.jit(apply.step)
    states, full = step(params, TOKENS[:2, 3], cache)
    assert np.isfinite(states).all()
    assert np.isnan(step(params, TOKENS[:2, 4], full)[0]).all()
    with pytest.raises(ValueError, match="the cache is full: its 4 columns"):
        apply.step(params, TOKENS[:2, 4], full)


def test_packed_rows_and_bad_arguments_are_refused():
    apply, params = noisy(SMALL)
    packed = np.array([[1, 1, 0], [1, 1, 2]])
    with pytest.raises(InputError, match="row 1 is packed"):
        apply.prefill(params, TOKENS[:2, :3], room=1, segment_ids=packed)
    with pytest.raises(ValueError, match="either tokens"):
        apply.prefill(params, room=1)


def test_split_finds_the_cache_and_compares_equal():
    first, second = noisy(SMALL)[0], noisy(SMALL)[0]
    assert first == second and hash(first) == hash(second)
    assert first.prefill is not None and first.step is not None and first.prefill != first.step
    assert models.from_function(len).step is None


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    cached=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=6),
    new=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    window=st.one_of(st.none(), st.integers(1, 5)),
)
def test_cached_mask_is_what_its_definition_says(cached, new, window):
    positions, segment_ids = (jnp.array([column]) for column in zip(*cached, strict=True))
    mask = cached_mask(jnp.array([new]), positions, segment_ids, window)
    keys = cached + [(position, 1) for position in new]
    expected = [
        [segment == 1 and 0 <= query - key < (window or 99) for key, segment in keys]
        for query in new
    ]
    np.testing.assert_array_equal(mask[0, 0], expected)
