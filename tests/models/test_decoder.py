"""Properties of the decoder that need no other implementation."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import models
from regjax.errors import InputError
from regjax.models.attention import attend, causal_mask, segment_positions
from regjax.models.rope import rope_angles, rope_frequencies, rotate

SMALL = models.DecoderConfig(
    vocabulary_size=31,
    width=16,
    layers=3,
    heads=4,
    key_value_heads=2,
    head_dim=6,
    mlp_width=20,
    initializer_scale=0.3,
)
GEMMA_LIKE = dataclasses.replace(
    SMALL,
    norm_scale_plus_one=True,
    post_norms=True,
    query_key_norm=True,
    tied_embeddings=True,
    scale_embeddings=True,
    local_rope_theta=50.0,
    attention_pattern=("local", "global"),
    sliding_window=3,
    attention_soft_cap=5.0,
    logit_soft_cap=4.0,
    attention_bias=True,
    activation="gelu_tanh",
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 10))
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2, 3, 0, 0]])


def loss_and_gradient(config, params, segment_ids=SEGMENTS):
    apply, _ = models.split(models.create(config, 0))

    def loss(params):
        logits = apply(params, TOKENS, segment_ids=segment_ids)
        return jnp.sum(jnp.where(segment_ids[..., None] > 0, jnp.sin(logits), 0))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("config", [SMALL, GEMMA_LIKE], ids=["plain", "gemma-like"])
def test_scan_and_rematerialisation_change_nothing(config):
    _, params = models.split(models.create(config, 1))
    value, gradient = loss_and_gradient(config, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))
    for changes in (
        {"scan_layers": False},
        {"rematerialisation": "full"},
        {"rematerialisation": "dots"},
        {"rematerialisation": "full", "scan_layers": False},
    ):
        other, other_gradient = loss_and_gradient(dataclasses.replace(config, **changes), params)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(
            lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5),
            other_gradient,
            gradient,
        )


@pytest.mark.parametrize("config", [SMALL, GEMMA_LIKE], ids=["plain", "gemma-like"])
def test_padding_and_neighbours_have_no_influence(config):
    apply, params = models.split(models.create(config, 1))
    run = jax.jit(apply)
    before = np.asarray(run(params, TOKENS, segment_ids=SEGMENTS))
    assert np.isfinite(before).all()
    others = np.where(SEGMENTS == 1, TOKENS, (TOKENS + 7) % 31)
    after = np.asarray(run(params, others, segment_ids=SEGMENTS))
    np.testing.assert_array_equal(after[SEGMENTS == 1], before[SEGMENTS == 1])
    assert np.abs(after - before)[SEGMENTS == 2].max() > 0.1


def test_gradient_is_finite_where_a_row_is_all_padding():
    _, params = models.split(models.create(GEMMA_LIKE, 1))
    _, gradient = loss_and_gradient(GEMMA_LIKE, params, np.zeros_like(SEGMENTS))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


def test_default_positions_are_those_within_segments():
    apply, params = models.split(models.create(SMALL, 1))
    positions = np.asarray(segment_positions(jnp.asarray(SEGMENTS)))
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 0, 1, 2, 3, 0, 1, 2])
    given = apply.hidden(params, TOKENS, positions=positions, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(given, apply.hidden(params, TOKENS, segment_ids=SEGMENTS))


def test_causal_and_windowed_reach():
    """With one local layer of window w, token t depends on exactly the tokens t - w + 1 .. t."""
    config = dataclasses.replace(SMALL, layers=1, attention_pattern=("local",), sliding_window=4)
    apply, params = models.split(models.create(config, 1))
    embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 16)), jnp.float32)
    jacobian = jax.jacobian(lambda x: apply.hidden(params, embeddings=x)[0].sum(-1))(embeddings)
    depends = np.abs(np.asarray(jacobian[:, 0])).max(-1) > 1e-7
    distance = np.subtract.outer(np.arange(9), np.arange(9))
    np.testing.assert_array_equal(depends, (distance >= 0) & (distance < 4))


def test_bfloat16_is_near_float32_and_logits_are_float32():
    apply, params = models.split(models.create(SMALL, 1))
    low, _ = models.split(models.create(dataclasses.replace(SMALL, dtype="bfloat16"), 1))
    states = low.hidden(params, TOKENS)
    assert states.dtype == jnp.bfloat16
    exact, rounded = apply(params, TOKENS), low(params, TOKENS)
    assert rounded.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rounded))
    # A few roundings of 2^-9 on values of this size; zero would mean float32 was computed.
    assert 0 < error.max() < 2**-9 * 10 * float(jnp.abs(exact).max())


def test_embeddings_equal_tokens_and_one_of_them_is_required():
    apply, params = models.split(models.create(GEMMA_LIKE, 1))
    embeddings = apply.embed(params, TOKENS)
    np.testing.assert_allclose(
        embeddings, 4.0 * np.asarray(params["embedding"]["table"])[TOKENS], rtol=1e-6
    )
    np.testing.assert_array_equal(
        apply.hidden(params, embeddings=embeddings), apply.hidden(params, TOKENS)
    )
    with pytest.raises(ValueError, match="either tokens"):
        apply.hidden(params)
    with pytest.raises(ValueError, match="either tokens"):
        apply.hidden(params, TOKENS, embeddings=embeddings)


def test_parameters_are_named_stacked_and_drawn_as_described():
    config = dataclasses.replace(SMALL, initializer_scale=0.02, width=256, mlp_width=512)
    _, params = models.split(models.create(config, 0))
    layers = params["layers"]
    assert set(params) == {"embedding", "layers", "final_norm", "head"}
    assert layers["attention"]["query"]["kernel"].shape == (3, 256, 24)
    assert layers["mlp"]["down"]["kernel"].shape == (3, 512, 256)
    assert params["head"]["kernel"].shape == (256, 31)
    gate = np.asarray(layers["mlp"]["gate"]["kernel"])
    # A normal truncated at two deviations has 0.8796 of its deviation.
    np.testing.assert_allclose(gate.std(), 0.02 * 0.8796, rtol=0.01)
    assert np.abs(gate).max() <= 0.04
    assert np.abs(gate[0] - gate[1]).max() > 0.01
    np.testing.assert_array_equal(params["final_norm"]["scale"], 1)
    _, gemma = models.split(models.create(GEMMA_LIKE, 0))
    np.testing.assert_array_equal(gemma["layers"]["mlp_post_norm"]["scale"], np.zeros((3, 16)))
    assert "head" not in gemma


def test_created_under_jit_is_the_same():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, eager = models.split(models.create(GEMMA_LIKE, jax.random.key(5)))
    jitted = jax.jit(
        lambda seed: models.split(models.create(GEMMA_LIKE, seed))[1], out_shardings=sharding
    )(5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, eager)


def test_llama3_scaling_keeps_high_and_divides_low_frequencies():
    scaling = models.RopeScaling(
        "llama3",
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_max_positions=8192,
    )
    plain = rope_frequencies(128, 500_000.0, models.RopeScaling())
    scaled = rope_frequencies(128, 500_000.0, scaling)
    wavelengths = 2 * np.pi / plain
    high, low = wavelengths < 8192 / 4, wavelengths > 8192
    # i < 64 ln(2048 / 2 pi) / ln(500000) = 28.2, and i > 64 ln(8192 / 2 pi) / ln(500000) = 34.98.
    assert high.sum() == 29 and low.sum() == 64 - 35
    np.testing.assert_array_equal(scaled[high], plain[high])
    np.testing.assert_allclose(scaled[low], plain[low] / 8, rtol=1e-6)
    between = scaled[~high & ~low] / plain[~high & ~low]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    frequencies = rope_frequencies(8, 100.0, models.RopeScaling())
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(query_position, key_position):
        at = [rope_angles(jnp.array([[p]]), frequencies) for p in (query_position, key_position)]
        rotated = rotate(jnp.asarray(query), *at[0])
        np.testing.assert_allclose(jnp.sum(rotated**2), np.sum(query**2), rtol=1e-5)
        return float(jnp.sum(rotated * rotate(jnp.asarray(key), *at[1])))

    assert product(13, 4) == pytest.approx(product(9, 0), abs=1e-5)
    assert product(0, 0) == pytest.approx(float(np.sum(query * key)), abs=1e-5)
    assert abs(product(13, 4) - product(4, 13)) > 1e-3


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 5)),
)
def test_mask_is_what_its_definition_says(runs, window):
    ids = np.concatenate([np.full(count, label) for label, count in runs])
    mask = np.asarray(causal_mask(jnp.asarray(ids)[None], window))[0, 0]
    for query in range(len(ids)):
        for key in range(len(ids)):
            near = 0 <= query - key < (window or len(ids))
            assert mask[query, key] == (near and ids[query] == ids[key])


def test_attention_equals_a_loop_in_float64():
    random = np.random.default_rng(0)
    query = random.normal(size=(2, 5, 4, 3)).astype(np.float32)
    key, value = random.normal(size=(2, 2, 5, 2, 3)).astype(np.float32)
    mask = np.asarray(causal_mask(jnp.array([[0, 1, 1, 1, 2], [1, 1, 1, 1, 1]]), 3))
    for soft_cap in (None, 1.5):
        ours = attend(query, key, value, mask, scale=0.7, soft_cap=soft_cap)
        for row in range(2):
            for head in range(4):
                scores = 0.7 * query[row, :, head] @ key[row, :, head // 2].T.astype(np.float64)
                scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
                weights = np.where(mask[row, 0], np.exp(scores), 0)
                weights /= weights.sum(-1, keepdims=True)
                theirs = weights @ value[row, :, head // 2]
                np.testing.assert_allclose(ours[row, :, head], theirs, atol=1e-6)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"layers": 0}, "layers"),
        ({"key_value_heads": 3}, "key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"attention_pattern": ("local",)}, "sliding_window"),
        ({"attention_pattern": ()}, "attention_pattern"),
        ({"attention_pattern": ("chunked",)}, "attention_pattern"),
        ({"activation": "relu"}, "activation"),
        ({"dtype": "float16"}, "dtype"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_impossible_configs_are_named(changes, field):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(SMALL, **changes)


def test_new_parameters_have_strong_types():
    # A weakly typed parameter makes a jitted update, whose results are strong, compile twice.
    _, params = models.split(models.create(models.DecoderConfig(layers=1), 0))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))
