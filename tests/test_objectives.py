import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax import losses, models
from regjax.objectives import NumberToken, Raft, Sft, sft
from regjax.token_grid import TokenGrid
from tests import tiny

APPLY, PARAMS = tiny.decoder()
HEAD_ONLY = dataclasses.replace(APPLY, head=APPLY.head.logits)
KEY = jax.random.key(0)
OBJECTIVES = {
    "sft-response": Sft(label_smoothing=0.1),
    "sft-all": Sft(tokens="all"),
    "raft": Raft(cross_entropy=0.1),
    "raft-normalized": Raft(normalize=True, loss="huber"),
    "number-token": NumberToken(),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@jax.jit
def sums_of_all(batch):
    return {
        name: objective(APPLY, PARAMS, batch, KEY, tiny.SINGLE)
        for name, objective in OBJECTIVES.items()
    }


def value_and_grad(objective, batch, codec=tiny.SINGLE, apply=APPLY, params=PARAMS):
    def loss(params):
        sums = objective(apply, params, tiny.on_device(batch), KEY, codec)
        return sums["loss"][0], sums

    (_, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return sums, grads


def assert_close(found, expected, rtol, floor=0.0):
    """Leaf by leaf, with `floor` times the leaf's largest entry as absolute tolerance."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=rtol, atol=floor * largest)


@settings(deadline=None, max_examples=15)
@given(
    lists=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
    seed=st.integers(0, 10**6),
)
def test_packed_rows_have_the_sums_and_weights_of_unpacked_ones(lists, seed):
    examples = iter(tiny.examples(sum(lists), seed, prompt=5))
    packed = [[next(examples) for _ in range(count)] for count in lists]
    unpacked = [[example] for row in packed for example in row]
    unpacked += [[]] * (12 - len(unpacked))
    expected = sums_of_all(tiny.on_device(tiny.batch(unpacked, slots=1)))
    found = sums_of_all(tiny.on_device(tiny.batch(packed, slots=3)))
    # A log-probability of logits up to 16 is right to some units of 1e-6, and the mass is its exponential.
    assert_close(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def rows():
    """Four examples, their batch and, in float64, the log-softmax of every position."""
    examples = tiny.examples(4, seed=5)
    batch = tiny.batch([[example] for example in examples])
    logits = APPLY(
        PARAMS, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return examples, batch, logits


def test_sft_of_the_response_is_its_weighted_negative_log_likelihood(rows):
    examples, batch, logits = rows
    log_probs, loss, correct, weight = tiny.log_softmax(logits), 0.0, 0.0, 0.0
    for row, example in enumerate(examples):
        whole = example.prompt + example.response
        for place in range(len(example.prompt), len(whole)):
            loss -= example.weight * log_probs[row, place - 1, whole[place]]
            correct += example.weight * (log_probs[row, place - 1].argmax() == whole[place])
            weight += example.weight
    sums, _ = value_and_grad(Sft(), batch)
    np.testing.assert_allclose(sums["loss"], [loss, weight], rtol=1e-6)
    np.testing.assert_allclose(sums["token_accuracy"], [correct, weight], rtol=1e-6)


def test_sft_of_all_tokens_is_the_text_after_its_first_token(rows):
    examples, batch, logits = rows
    log_probs, loss, weight = tiny.log_softmax(logits), 0.0, 0.0
    for row, example in enumerate(examples):
        whole = example.prompt + example.response
        places = np.arange(1, len(whole))
        loss -= example.weight * log_probs[row, places - 1, np.array(whole[1:])].sum()
        weight += example.weight * len(places)
    sums, _ = value_and_grad(Sft(tokens="all"), batch)
    np.testing.assert_allclose(sums["loss"], [loss, weight], rtol=1e-6)


@pytest.mark.parametrize(
    ("smoothing", "apply"), [(0.0, APPLY), (0.2, APPLY), (0.0, HEAD_ONLY), (0.2, HEAD_ONLY)]
)
def test_sft_and_its_gradient_are_optax_on_full_logits(rows, smoothing, apply, monkeypatch):
    monkeypatch.setattr(sft, "CHUNK", 7)
    _, batch, _ = rows

    def plain(model, params, batch, key, codec):
        logits = model(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        chosen = jnp.take_along_axis(logits, batch["label_positions"][..., None], axis=1)
        onehot = jax.nn.one_hot(batch["labels"], tiny.VOCABULARY)
        smooth = optax.smooth_labels(onehot, smoothing)
        weights = batch["label_weights"]
        loss = (optax.losses.softmax_cross_entropy(chosen, smooth) * weights).sum()
        return {"loss": (loss, weights.sum())}

    sums, grads = value_and_grad(Sft(label_smoothing=smoothing), batch, apply=apply)
    expected, expected_grads = value_and_grad(plain, batch)
    np.testing.assert_allclose(sums["loss"], expected["loss"], rtol=1e-6)
    assert_close(grads, expected_grads, rtol=0, floor=1e-5)


@pytest.mark.parametrize(
    # Gradients of bfloat16 parameters' products are themselves rounded to bfloat16, each side's once.
    ("dtype", "floor", "rounding"),
    [("float32", 1e-5, 0.0), ("bfloat16", 1e-2, 2**-7)],
    ids=["float32", "bfloat16"],
)
def test_sft_by_projection_is_sft_by_head(rows, dtype, floor, rounding):
    """Of a tied table, a soft cap, and all tokens with some of weight zero."""
    config = dataclasses.replace(tiny.CONFIG, tied_embeddings=True, logit_soft_cap=2.0, dtype=dtype)
    apply, params = models.split(models.create(config, 0))
    _, batch, _ = rows
    found = value_and_grad(Sft(tokens="all"), batch, apply=apply, params=params)
    head_only = dataclasses.replace(apply, head=apply.head.logits)
    expected = value_and_grad(Sft(tokens="all"), batch, apply=head_only, params=params)
    assert_close(found[0], expected[0], rtol=1e-6)
    assert_close(found[1], expected[1], rtol=rounding, floor=floor)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
def test_raft_is_its_loss_on_full_logits(rows, normalize, loss):
    _, batch, logits = rows
    last = batch["score_positions"][:, 0]
    at_score = np.asarray(logits)[np.arange(4), last]
    targets, weights = batch["scores"][:, 0], batch["weights"][:, 0]
    each = losses.raft(at_score, targets, tiny.SINGLE, normalize=normalize, loss=loss)
    mass = np.exp(tiny.log_softmax(at_score))[:, 10:15].sum(-1)
    sums = Raft(normalize=normalize, loss=loss)(
        APPLY, PARAMS, tiny.on_device(batch), KEY, tiny.SINGLE
    )
    np.testing.assert_allclose(sums["loss"], [each @ weights, weights.sum()], rtol=1e-6)
    np.testing.assert_allclose(sums["grid_mass"], [mass @ weights, weights.sum()], rtol=1e-6)


def constant_model(probabilities):
    """Every next token has these probabilities; the parameters are the logits."""
    apply = models.from_function(
        lambda params, tokens: jnp.broadcast_to(params["logits"], (*tokens.shape, 6))
    )
    return apply, {"logits": jnp.log(jnp.asarray(probabilities, jnp.float32))}


P = np.array([0.1, 0.3, 0.2, 0.25, 0.1, 0.05])
THREE = TokenGrid.from_ids([1, 3, 4], [1.0, 2.0, 4.0])
# Expected score .3 + 2 x .25 + 4 x .1 = 1.2, mass .65.
ONE = {
    "tokens": np.zeros((1, 2), np.int32),
    "score_positions": np.array([[1]]),
    "scores": np.array([[2.2]], np.float32),
    "weights": np.array([[0.5]], np.float32),
}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_raft_with_cross_entropy_has_the_gradient_of_its_formula(share):
    apply, params = constant_model(P)
    sums, grads = value_and_grad(Raft(cross_entropy=share), ONE, THREE, apply, params)
    loss = (2.2 - 1.2) ** 2 - share * np.log(0.25)  # 2 is nearest to 2.2
    np.testing.assert_allclose(sums["loss"], [0.5 * loss, 0.5], rtol=1e-6)
    np.testing.assert_allclose(sums["grid_mass"], [0.5 * 0.65, 0.5], rtol=1e-6)
    on_grid = np.array([0, 1, 0, 2, 4, 0])
    expected = 2 * (1.2 - 2.2) * P * (on_grid - 1.2) + share * (P - np.eye(6)[3])
    np.testing.assert_allclose(grads["logits"], 0.5 * expected, rtol=1e-5, atol=1e-7)


def test_cross_entropy_moves_a_model_that_is_sure_of_a_wrong_value():
    apply, params = constant_model([1e-9, 1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    _, stuck = value_and_grad(Raft(), ONE, THREE, apply, params)
    _, moved = value_and_grad(Raft(cross_entropy=0.1), ONE, THREE, apply, params)
    assert jnp.abs(stuck["logits"]).max() < 1e-6
    np.testing.assert_allclose(moved["logits"][3], -0.1 * 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "distance"),
    # Renormalised .3, .25, .1 over .65; the mean is 1.2 / .65.
    [
        ("wasserstein", (0.3 * 1.2 + 0.25 * 0.2 + 0.1 * 1.8) / 0.65),
        ("mse", (1.2 / 0.65 - 2.2) ** 2),
    ],
)
def test_number_token_adds_its_distance_to_the_cross_entropy(kind, distance):
    apply, params = constant_model(P)
    sums, _ = value_and_grad(NumberToken(kind=kind, weight=0.7), ONE, THREE, apply, params)
    nll = -np.log(0.25)
    np.testing.assert_allclose(sums["number_token"], [0.5 * distance, 0.5], rtol=1e-5)
    np.testing.assert_allclose(sums["cross_entropy"], [0.5 * nll, 0.5], rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], [0.5 * (nll + 0.7 * distance), 0.5], rtol=1e-5)
    np.testing.assert_allclose(sums["grid_mass"], [0.5 * 0.65, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("target", "value"), [(-3.0, 0), (1.5, 0), (2.9, 1), (3.0, 1), (9.0, 2)])
def test_cross_entropy_is_that_of_the_nearest_value_the_lower_of_two(target, value):
    apply, params = constant_model(P)
    batch = {**ONE, "scores": np.array([[target]], np.float32)}
    sums, _ = value_and_grad(NumberToken(), batch, THREE, apply, params)
    expected = -np.log(P[[1, 3, 4][value]])
    np.testing.assert_allclose(sums["cross_entropy"][0], 0.5 * expected, rtol=1e-6)


def test_a_weight_multiplies_its_example_and_nothing_else():
    """The sum over examples of weight times the example's own sum at weight 1."""
    examples = tiny.examples(3, seed=8)

    def sums_of(rows):
        return sums_of_all(tiny.on_device(tiny.batch(rows + [[]] * (12 - len(rows)), slots=1)))

    total = sums_of([[example] for example in examples])
    parts = [
        jax.tree.map(lambda x, e=example: e.weight * x, sums_of([[example._replace(weight=1.0)]]))
        for example in examples
    ]
    assert_close(total, jax.tree.map(lambda *x: sum(x), *parts), rtol=1e-6)


@each_objective
@pytest.mark.parametrize("several", [False, True], ids=["single", "several"])
def test_what_has_weight_0_contributes_nothing_not_even_nan(objective, several):
    codec = tiny.SEVERAL if several else tiny.SINGLE
    examples = tiny.examples(3, seed=9)
    apply = models.from_function(
        hidden=lambda params, tokens: params["table"][tokens],
        head=lambda params, hidden: hidden @ params["kernel"],
    )
    random = np.random.default_rng(0)
    table, kernel = (random.normal(size=size) for size in ((64, 4), (4, 64)))
    params = {"table": jnp.float32(table), "kernel": jnp.float32(kernel)}
    ignored = examples[2]._replace(weight=0.0, score=float("nan"))
    poison = ignored.prompt[-1], *ignored.response
    keep = {token for example in examples[:2] for token in example.prompt + example.response}
    poison = [token for token in (0, *poison) if token not in keep]
    assert len(poison) > 1
    # The states of padding (token 0) and of the ignored example are not finite.
    if several:  # whose candidates hold tokens that the others need
        poison = [ignored.prompt[-1]]
    poisoned = {**params, "table": params["table"].at[jnp.array(poison)].set(jnp.nan)}
    few = tiny.batch([[example] for example in examples[:2]])
    many = tiny.batch([[examples[0]], [], [ignored], [examples[1]]])
    many["scores"][1] = np.nan
    many["labels"][1] = -100
    expected, expected_grads = value_and_grad(objective, few, codec, apply, params)
    sums, grads = value_and_grad(objective, many, codec, apply, poisoned)
    assert_close(sums, expected, rtol=1e-6)
    assert_close(grads, expected_grads, rtol=1e-6, floor=1e-6)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss must be 'squared', 'absolute' or 'huber'"):
        value_and_grad(Raft(loss="cubic"), ONE, THREE, *constant_model(P))
