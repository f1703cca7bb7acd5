import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax import models, scoring
from regjax.token_grid import TokenGrid
from tests import tiny

APPLY, PARAMS = tiny.decoder()
EXAMPLES = tiny.examples(5, seed=3, prompt=4, response=2)
UNPACKED = tiny.batch([[example] for example in EXAMPLES])
GRIDS = {"single": tiny.SINGLE, "several": tiny.SEVERAL}
each_grid = pytest.mark.parametrize("codec", GRIDS.values(), ids=GRIDS)

logits_of = jax.jit(lambda tokens: APPLY(PARAMS, tokens))


@jax.jit
def log_probs_of(batch, codec):
    return scoring.score_distribution(APPLY, PARAMS, batch, codec).log_probs


def score(batch, codec):
    names = ("tokens", "positions", "segment_ids", "score_positions")
    return np.asarray(log_probs_of({name: batch[name] for name in names}, codec))


def before_score(example):
    return (example.prompt + example.response)[:-1]


def brute_force(example, codec):
    """Each candidate written after the prompt, in a row of its own without padding."""
    context = before_score(example)
    found = []
    for candidate in codec.ids:
        logits = tiny.log_softmax(logits_of(np.array([[*context, *candidate]]))[0])
        places = range(len(context) - 1, len(context) + len(candidate) - 1)
        found.append(sum(logits[p, token] for p, token in zip(places, candidate, strict=True)))
    return found


@each_grid
def test_equals_every_candidate_written_out(codec):
    expected = np.array([brute_force(example, codec) for example in EXAMPLES])
    assert np.ptp(expected) > 2  # far from uniform
    np.testing.assert_allclose(score(UNPACKED, codec), expected, rtol=2e-6)


def test_single_tokens_are_the_full_log_softmax_at_the_score():
    names = ("tokens", "positions", "segment_ids")
    logits = tiny.log_softmax(
        APPLY(PARAMS, UNPACKED["tokens"], **{name: UNPACKED[name] for name in names[1:]})
    )
    at_score = logits[np.arange(5), UNPACKED["score_positions"][:, 0]]
    np.testing.assert_allclose(score(UNPACKED, tiny.SINGLE), at_score[:, 10:15], rtol=2e-6)


def test_mass_is_the_sum_of_the_probabilities():
    found = scoring.score_distribution(APPLY, PARAMS, UNPACKED, tiny.SEVERAL)
    assert found.log_probs.shape == (5, 6) and found.mass.shape == (5,)
    np.testing.assert_allclose(found.mass, np.exp(found.log_probs).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_candidates_at_once_changes_nothing(at_once):
    found = jax.jit(
        lambda batch: scoring.score_log_probs(
            APPLY, PARAMS, batch, tiny.SEVERAL, candidates_at_once=at_once
        )
    )(tiny.on_device(UNPACKED))
    np.testing.assert_allclose(found[:, 0], score(UNPACKED, tiny.SEVERAL), rtol=2e-6)


@each_grid
def test_what_stands_after_the_score_position_does_not_matter(codec):
    changed = {name: array.copy() for name, array in UNPACKED.items()}
    for row, last in enumerate(UNPACKED["score_positions"][:, 0]):
        changed["tokens"][row, last + 1 :] = 60 - np.arange(24 - last - 1)
        if codec is tiny.SEVERAL:  # also as tokens that claim to be the prompt's
            changed["segment_ids"][row, last + 1 :] = 1
    np.testing.assert_array_equal(score(changed, codec), score(UNPACKED, codec))


@each_grid
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [11, 40])
def test_padding_does_not_matter(codec, side, length):
    padded = tiny.batch([[example] for example in EXAMPLES], length=length, side=side)
    np.testing.assert_allclose(score(padded, codec), score(UNPACKED, codec), rtol=2e-6)


@each_grid
def test_positions_and_segments_may_be_left_out_where_padding_is_on_the_right(codec):
    bare = {name: UNPACKED[name] for name in ("tokens", "score_positions")}
    bare["score_positions"] = bare["score_positions"][:, 0]
    found = scoring.score_distribution(APPLY, PARAMS, bare, codec).log_probs
    np.testing.assert_allclose(found, score(UNPACKED, codec), rtol=2e-6)


def test_packed_rows_equal_unpacked_ones():
    packed = tiny.batch([EXAMPLES[:2], [EXAMPLES[2]], EXAMPLES[3:]])
    found = scoring.score_log_probs(APPLY, PARAMS, packed, tiny.SINGLE)
    assert found.shape == (3, 2, 5)
    real = packed["record_ids"] >= 0
    np.testing.assert_allclose(np.asarray(found)[real], score(UNPACKED, tiny.SINGLE), rtol=2e-6)


def test_gradients_are_those_of_full_rows():
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)

    def chunked(params):
        found = scoring.score_log_probs(APPLY, params, UNPACKED, tiny.SEVERAL, candidates_at_once=4)
        return (jnp.exp(found[:, 0]) * targets).sum() + (found[:, 0] * targets).sum()

    rows = np.zeros((5, 6, 16), np.int32)
    counts = np.zeros((5, 6, 16, tiny.VOCABULARY), np.float32)
    for b, example in enumerate(EXAMPLES):
        context = before_score(example)
        for k, candidate in enumerate(tiny.SEVERAL.ids):
            whole = [*context, *candidate]
            rows[b, k, : len(whole)] = whole
            counts[b, k, np.arange(len(context), len(whole)) - 1, candidate] = 1

    def naive(params):
        logits = APPLY(params, rows.reshape(30, 16)).reshape(counts.shape)
        log_probs = (jax.nn.log_softmax(logits) * counts).sum((2, 3))
        return ((jnp.exp(log_probs) + log_probs) * targets).sum()

    found, expected = jax.jit(jax.grad(chunked))(PARAMS), jax.jit(jax.grad(naive))(PARAMS)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.abs(other).max())
        assert largest > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)


@st.composite
def bigram_cases(draw):
    """Prompts and a grid of distinct sequences over five digits, ended by the token 5."""
    sequence = st.lists(st.integers(0, 4), min_size=1, max_size=3)
    grid = draw(st.lists(sequence, min_size=1, max_size=7, unique_by=tuple))
    prompts = draw(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1))
    return grid, prompts[:4], draw(st.integers(0, 3)), draw(st.integers(1, 9))


@settings(deadline=None, max_examples=8)
@given(bigram_cases(), st.integers(0, 1000))
def test_a_bare_function_scores_as_its_chain_rule_says(case, seed):
    grid, prompts, room, at_once = case
    apply, params = tiny.bigram(8, seed)
    codec = TokenGrid.from_ids(grid, np.arange(len(grid)), terminator=5)
    tokens = np.full((len(prompts), max(map(len, prompts)) + room), 7, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    batch = {"tokens": tokens, "score_positions": np.array([len(p) - 1 for p in prompts])}
    found = scoring.score_distribution(apply, params, batch, codec, candidates_at_once=at_once)
    table = tiny.log_softmax(params["table"])
    expected = [
        [sum(table[a, b] for a, b in zip([p[-1], *ids], ids, strict=False)) for ids in codec.ids]
        for p in prompts
    ]
    np.testing.assert_allclose(found.log_probs, expected, rtol=2e-6)
    assert (np.asarray(found.mass) <= 1 + 1e-6).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_probabilities_of_a_complete_prefix_free_grid_sum_to_one(depth):
    # Every token but 7 ends the number; after 7 another token follows.
    ids = [[7] * level + [token] for level in range(depth) for token in range(7)]
    ids.append([7] * depth)
    codec = TokenGrid.from_ids(ids, np.arange(len(ids)))
    assert codec.tokens.shape == (7 * depth + 1, depth)
    apply, params = tiny.bigram(8)
    batch = {"tokens": np.array([[3, 1, 4], [1, 5, 2]]), "score_positions": np.array([2, 1])}
    found = scoring.score_distribution(apply, params, batch, codec)
    np.testing.assert_allclose(found.mass, [1.0, 1.0], rtol=1e-6)


@each_grid
def test_positions_that_do_not_count_have_no_gradient_even_where_states_are_nan(codec):
    apply, params = tiny.bigram(tiny.VOCABULARY)
    poisoned = {"table": params["table"].at[50].set(jnp.nan)}
    batch = {"tokens": np.array([[3, 4], [3, 50]]), "score_positions": np.array([[1], [1]])}

    def total(params, batch, where):
        found = scoring.score_log_probs(apply, params, batch, codec, where=where)
        return found.sum(where=where[..., None])

    both = jax.value_and_grad(total)(poisoned, batch, jnp.array([[True], [False]]))
    first = {name: array[:1] for name, array in batch.items()}
    alone = jax.value_and_grad(total)(params, first, jnp.array([[True]]))
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(both[1]["table"], alone[1]["table"], rtol=1e-6, atol=1e-7)


def test_several_examples_a_row_are_refused_where_they_cannot_be_scored():
    packed = tiny.batch([EXAMPLES[:2]])
    with pytest.raises(ValueError, match=r"one example a row.*\(1, 2\).*score_log_probs"):
        scoring.score_distribution(APPLY, PARAMS, packed, tiny.SINGLE)
    with pytest.raises(ValueError, match=r"turn packing off.*\(1, 2\)"):
        scoring.score_log_probs(APPLY, PARAMS, packed, tiny.SEVERAL)


@pytest.mark.parametrize("ids", [[10, 64], [[10], [12, 64]]], ids=GRIDS)
def test_a_grid_of_another_vocabulary_is_refused(ids):
    codec = TokenGrid.from_ids(ids, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"grid value 2.0 .*vocabulary of 64"):
        scoring.score_distribution(APPLY, PARAMS, UNPACKED, codec)


def test_left_padding_is_refused_for_a_function_that_takes_no_segments():
    apply = models.from_function(lambda params, tokens: params["table"][tokens])
    left = tiny.batch([[EXAMPLES[0]]], side="left")
    with pytest.raises(ValueError, match="padded on the left"):
        scoring.score_distribution(apply, tiny.bigram(64)[1], left, tiny.SINGLE)
