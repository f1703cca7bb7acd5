"""Gradients of true and of shuffled labels, against closed forms and against all gradients in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import InputError, alignment, models, paths
from regjax.alignment import LAST_LAYER_GROUPS, Gradients
from regjax.objectives import Raft, Sft
from tests import tiny

APPLY, PARAMS = tiny.decoder()
EPS = float(np.finfo(np.float32).eps)
PATHS = {
    "mlp": [f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")],
    **{name: [f"layers/attention/{name}/kernel"] for name in ("query", "key", "value")},
}


def labelled(seed, shift=0):
    """Six inputs of `seed`, each with the score that is `shift` places on."""
    examples = tiny.examples(6, seed)
    scores = np.roll([example.score for example in examples], shift)
    rows = [
        [example._replace(response=(*example.response[:-1], 9 + int(score)), score=float(score))]
        for example, score in zip(examples, scores, strict=True)
    ]
    return tiny.on_device(tiny.batch(rows))


TRUE, SHUFFLED = labelled(3), labelled(3, shift=1)


@pytest.fixture(scope="module")
def gradients():
    return alignment.make_gradients(APPLY, Sft())


def all_gradients(objective, batch, apply=APPLY, params=PARAMS, codec=None):
    """Of every parameter, by path, in float64; and the weight."""

    def loss(params):
        return objective(apply, params, batch, jax.random.key(0), codec)["loss"]

    found, weight = jax.jit(jax.grad(loss, has_aux=True))(params)
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in paths.flatten(found).items()}
    return flat, float(weight)


def cosine(g, h):
    g, h = (np.asarray(x, np.float64).ravel() for x in (g, h))
    return g @ h / np.sqrt((g @ g) * (h @ h))


def test_an_unshuffled_batch_has_a_cosine_of_exactly_1(gradients):
    one, other = gradients(PARAMS, TRUE), gradients(PARAMS, dict(TRUE))
    for name in LAST_LAYER_GROUPS:
        np.testing.assert_array_equal(one.sums[name], other.sums[name])
    assert alignment.cosines(one, other) == dict.fromkeys(LAST_LAYER_GROUPS, 1.0)


def test_the_groups_are_the_last_layers_kernels(gradients):
    found, shuffled = gradients(PARAMS, TRUE), gradients(PARAMS, SHUFFLED)
    g, weight = all_gradients(Sft(), TRUE)
    h, _ = all_gradients(Sft(), SHUFFLED)
    assert found.sums.keys() == PATHS.keys()
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6)
    expected = {}
    for name, members in PATHS.items():
        one, other = (np.concatenate([grads[p][-1].ravel() for p in members]) for grads in (g, h))
        # In whatever order the members come.
        np.testing.assert_allclose(
            np.sort(found.sums[name]), np.sort(one), rtol=0, atol=1e-5 * np.abs(one).max()
        )
        expected[name] = cosine(one, other)
    cosines = alignment.cosines(found, shuffled)
    np.testing.assert_allclose(
        [cosines[name] for name in PATHS], list(expected.values()), atol=2e-5, rtol=0
    )
    assert max(expected.values()) < 0.9 and len({round(c, 3) for c in expected.values()}) == 4


@pytest.mark.parametrize("layer", [0, None])
def test_another_layer_or_all_of_them_and_parameters_that_are_no_stack(layer):
    path = "layers/attention/query/kernel"
    groups = {"query": path, "table": "^embedding/table$", "both": f"{path}|table$"}
    found = alignment.gradient_alignment(
        APPLY, Raft(), PARAMS, TRUE, SHUFFLED, tiny.SINGLE, groups=groups, layer=layer
    )
    g, _ = all_gradients(Raft(), TRUE, codec=tiny.SINGLE)
    h, _ = all_gradients(Raft(), SHUFFLED, codec=tiny.SINGLE)
    query = [grads[path][slice(None) if layer is None else layer].ravel() for grads in (g, h)]
    table = [grads["embedding/table"].ravel() for grads in (g, h)]
    both = [np.concatenate(pair) for pair in zip(query, table, strict=True)]
    expected = {"query": cosine(*query), "table": cosine(*table), "both": cosine(*both)}
    assert found.keys() == expected.keys()
    for name in groups:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5)


def test_layers_in_a_list_are_whole_parameters():
    kernels = {"layers": {"0": {"kernel": jnp.array([2.0, 3.0])}, "1": {"kernel": jnp.ones(2)}}}

    def objective(model, params, batch, key, codec):
        one, other = params["layers"]["0"]["kernel"], params["layers"]["1"]["kernel"]
        return {"loss": ((batch["x"] * one**2 * other).sum(), jnp.float32(4))}

    make = alignment.make_gradients(APPLY, objective, groups={"first": "^layers/0/"})
    found = make(kernels, {"x": jnp.array([1.0, 5.0])})
    np.testing.assert_array_equal(found.sums["first"], [4.0, 30.0])
    assert found.weight == 4


def test_batches_are_added_before_the_cosine(gradients):
    halves = [{name: leaf[part] for name, leaf in TRUE.items()} for part in (np.s_[:2], np.s_[2:])]
    first, second = (gradients(PARAMS, half) for half in halves)
    both, whole = alignment.add(first, second), gradients(PARAMS, TRUE)
    np.testing.assert_allclose(both.weight, whole.weight, rtol=1e-6)
    for name, sums in whole.sums.items():
        scale = float(jnp.abs(sums).max())
        np.testing.assert_allclose(both.sums[name], sums, rtol=0, atol=1e-5 * scale)
        # A sum, neither an average nor one of the two.
        assert float(jnp.abs(first.sums[name] - sums).max()) > 0.01 * scale


@pytest.mark.parametrize("same", [0, 1, 3, 6])
def test_a_model_that_knows_nothing_has_the_closed_form_of_how_many_labels_stay(same):
    # Each input has a row of logits of its own, all zero: a row's gradient is 1/V - [label], and
    # cos = (share of equal labels - 1/V) / (1 - 1/V).
    size = 8
    apply, _ = tiny.bigram(size)
    params = {"table": jnp.zeros((size, size))}
    labels = np.array([6, 7, 6, 7, 6, 7])
    tokens = np.stack([np.arange(6), labels], axis=1).astype(np.int32)

    def batch(labels):
        return {
            "tokens": jnp.asarray(tokens),
            "labels": jnp.asarray(labels[:, None]),
            "label_positions": jnp.zeros((6, 1), jnp.int32),
            "label_weights": jnp.ones((6, 1)),
        }

    changed = np.where(np.arange(6) < same, labels, 13 - labels)
    found = alignment.gradient_alignment(
        apply, Sft(), params, batch(labels), batch(changed), groups={"all": "table"}
    )
    assert found["all"] == pytest.approx((same / 6 - 1 / size) / (1 - 1 / size), abs=4 * EPS)


def test_a_soft_prompt_is_a_parameter_like_any_other():
    def rest(params):
        return {name: tree for name, tree in params.items() if name != "soft_prompt"}

    def hidden(params, tokens, **places):
        embeddings = APPLY.embed(rest(params), tokens) + params["soft_prompt"]["task"].sum(0)
        return APPLY.hidden(rest(params), embeddings=embeddings, **places)

    apply = dataclasses.replace(
        APPLY, hidden=hidden, head=lambda params, states: APPLY.head(rest(params), states)
    )
    params = {**PARAMS, "soft_prompt": {"task": 0.1 * jnp.ones((3, tiny.CONFIG.width))}}
    groups = {"prompt": "^soft_prompt/task$", "key": LAST_LAYER_GROUPS["key"]}
    make = alignment.make_gradients(apply, Sft(), groups=groups)
    found, shuffled = make(params, TRUE), make(params, SHUFFLED)
    g, h = (all_gradients(Sft(), b, apply, params)[0] for b in (TRUE, SHUFFLED))
    cosines = alignment.cosines(found, shuffled)
    one, other = g["soft_prompt/task"], h["soft_prompt/task"]
    scale = np.abs(one).max()
    np.testing.assert_allclose(found.sums["prompt"], one.ravel(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(cosines["prompt"], cosine(one, other), rtol=0, atol=2e-5)


def test_gradients_are_of_the_chosen_parameters_alone(gradients):
    """No array as large as the embedding comes out of the differentiated function."""
    found = jax.eval_shape(gradients, PARAMS, TRUE)
    width, inner = tiny.CONFIG.width, tiny.CONFIG.mlp_width
    sizes = {"mlp": 3 * width * inner, "query": width * 32, "key": width * 16, "value": width * 16}
    assert {name: leaf.shape for name, leaf in found.sums.items()} == {
        name: (size,) for name, size in sizes.items()
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_parameters_of_half_the_width_have_float32_gradients(gradients):
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    found = gradients(halves, TRUE)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    cosines = alignment.cosines(found, gradients(PARAMS, TRUE))
    assert all(0.9 < value <= 1 + EPS for value in cosines.values())


def pair(g, h):
    one, other = (Gradients({"all": jnp.asarray(x, jnp.float32)}, jnp.float32(1)) for x in (g, h))
    return alignment.cosines(one, other)["all"]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_cosine_does_not_depend_on_the_size_of_the_gradients(size):
    random = np.random.default_rng(0)
    g, h = random.normal(size=(2, 1000))
    # Products of rounded numbers, summed: at most the norm times a few roundings.
    assert pair(size * g, 3 * h) == pytest.approx(cosine(g, h), abs=16 * EPS)
    assert pair(size * g, size * g) == 1.0
    assert pair(size * g, -size * g) == -1.0


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_a_direction_has_no_cosine(value):
    assert math.isnan(pair([1.0, 2.0], [value, value]))
    assert math.isnan(pair([value, value], [1.0, 2.0]))


def test_a_batch_of_no_weight_has_gradients_of_0(gradients):
    empty = {**TRUE, "label_weights": jnp.zeros_like(TRUE["label_weights"])}
    found = gradients(PARAMS, empty)
    assert found.weight == 0
    assert all(math.isnan(c) for c in alignment.cosines(found, found).values())


@pytest.mark.parametrize(
    ("groups", "layer", "message"),
    [
        ({"mlp": "^decoder/mlp"}, -1, r"'\^decoder/mlp' matches no parameter"),
        ({"query": "query"}, 2, "layer is 2, but layers/attention/query/kernel holds a stack of 2"),
        ({"query": "query"}, -3, "layer is -3, but layers/attention/query/kernel"),
    ],
)
def test_groups_and_layers_that_are_not_there_are_refused(groups, layer, message):
    with pytest.raises(InputError, match=message):
        alignment.gradient_alignment(
            APPLY, Sft(), PARAMS, TRUE, SHUFFLED, groups=groups, layer=layer
        )


def test_the_default_groups_are_there_in_a_decoder():
    flat = paths.flatten(models.split(models.create(tiny.CONFIG, 0))[1])
    for name, pattern in LAST_LAYER_GROUPS.items():
        assert sorted(paths.split_by_patterns(flat, [pattern])[0]) == sorted(PATHS[name])
