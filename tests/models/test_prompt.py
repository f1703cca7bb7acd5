"""Soft prompts against the same rows with real tokens in the prompt's place."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import models
from regjax.errors import InputError
from regjax.models.apply import Apply
from regjax.models.attention import segment_positions
from regjax.models.prompt import (
    with_prompts,
    without_prompts,
)
from regjax.objectives import Raft, Sft
from tests import tiny

EPSILON = float(np.finfo(np.float32).eps)
GEMMA_LIKE = dataclasses.replace(
    tiny.CONFIG,
    norm_scale_plus_one=True,
    tied_embeddings=True,
    scale_embeddings=True,
    attention_pattern=("local", "global"),
    sliding_window=4,
)
PREFIX = (7, 41, 19)
"""The real tokens whose embeddings a prompt is made of."""
LENGTH = 9
ROWS = ((5, 30, 31, 32), (5, 33), (5, 34, 35, 36, 37, 38, 39, 40, 41), (5,))
"""The first token, 5, stands for the begin-of-sequence one."""


@functools.cache
def decoder(config=tiny.CONFIG):
    apply, params = models.split(models.create(config, 0))
    return apply, params


def rows(sequences, length, side="right"):
    """`tokens` and `segment_ids` of the sequences, padded with a token that would be seen if it were."""
    tokens = np.full((len(sequences), length), 50, np.int32)
    segment_ids = np.zeros((len(sequences), length), np.int32)
    for index, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(len(sequence))
        tokens[index, place] = sequence
        segment_ids[index, place] = 1
    return {"tokens": tokens, "segment_ids": segment_ids}


def prefixed(sequences, after):
    return [(*row[:after], *PREFIX, *row[after:]) for row in sequences]


def real(values, batch):
    """The values `[B, L, ...]` at real tokens, row by row."""
    return [np.asarray(v)[s > 0] for v, s in zip(values, batch["segment_ids"], strict=True)]


def without_prefix(values, after):
    return [np.delete(row, range(after, after + len(PREFIX)), axis=0) for row in values]


def of_prefix(apply, params, name="task"):
    embeddings = apply.embed(params, jnp.asarray(PREFIX)).astype(jnp.float32)
    return params | {"soft_prompt": {name: embeddings}}


def assert_near(found, expected, roundings=200):
    """Within so many float32 roundings of the largest value."""
    for one, two in zip(found, expected, strict=True):
        scale = max(np.abs(two).max(), 1.0)
        np.testing.assert_allclose(one, two, rtol=0, atol=roundings * EPSILON * scale)


@functools.partial(jax.jit, static_argnums=0)
def logits(apply, params, **batch):
    return apply(params, **batch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("config", [tiny.CONFIG, GEMMA_LIKE], ids=["plain", "gemma-like"])
def test_a_prompt_of_real_embeddings_gives_the_logits_of_real_tokens(config, after, side):
    """P6, and positions and segments with it; `[5]` is shorter than what may stand before."""
    apply, params = decoder(config)
    prompted = with_prompts(apply, ["task"], after=after)
    batch = rows(ROWS, LENGTH, side)
    found = logits(prompted, of_prefix(apply, params), **batch)
    assert found.shape == (len(ROWS), LENGTH, tiny.VOCABULARY) and np.isfinite(found).all()

    # Padded on the other side and to another length: none of it may matter.
    longer = rows(prefixed(ROWS, after), LENGTH + 5, "left" if side == "right" else "right")
    expected = real(logits(apply, params, **longer), longer)
    assert_near(real(found, batch), without_prefix(expected, after))


def test_as_many_tokens_as_there_are_stand_before_the_prompt():
    apply, params = decoder()
    prompted = with_prompts(apply, ["task"], after=3)
    batch = rows(ROWS, LENGTH, "left")
    found = logits(prompted, of_prefix(apply, params), **batch)
    plain = logits(apply, params, **batch)
    short = [1, 3]
    assert_near(
        [real(found, batch)[index] for index in short],
        [real(plain, batch)[index] for index in short],
    )


def test_embeddings_in_place_of_tokens():
    apply, params = decoder(GEMMA_LIKE)
    prompted = with_prompts(apply, ["task"])
    params = of_prefix(apply, params)
    batch = rows(ROWS, LENGTH)
    embeddings = prompted.embed(params, batch["tokens"])
    np.testing.assert_array_equal(embeddings, apply.embed(without_prompts(params), batch["tokens"]))
    run = jax.jit(prompted.hidden)
    np.testing.assert_array_equal(
        run(params, embeddings=embeddings, segment_ids=batch["segment_ids"]), run(params, **batch)
    )
    for wrong in ({}, {"tokens": batch["tokens"], "embeddings": embeddings}):
        with pytest.raises(ValueError, match="either tokens"):
            prompted.hidden(params, **wrong)


@pytest.mark.parametrize("after", [0, 1])
def test_what_reaches_the_model(after):
    """Columns, positions and segments, by a model that returns what it is given."""
    given = {}

    def hidden(params, tokens=None, *, embeddings, positions, segment_ids):
        given.update(embeddings=embeddings, positions=positions, segment_ids=segment_ids)
        return embeddings

    apply = Apply(hidden, lambda params, x: x, embed=lambda params, ids: ids[..., None] * 1.0)
    params = {"soft_prompt": {"task": jnp.array([[-1.0], [-2.0]])}}
    prompted = with_prompts(apply, ["task"], after=after)
    tokens = jnp.array([[0, 0, 4, 5], [6, 7, 8, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    segment_ids = jnp.array([[0, 0, 1, 1], [3, 3, 3, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    states = prompted.hidden(params, tokens, segment_ids=segment_ids)
    np.testing.assert_array_equal(states[..., 0], tokens)
    expected = {
        0: [[0, 0, -1, -2, 4, 5], [-1, -2, 6, 7, 8, 0], [-1, -2, 9, 0, 0, 0]],
        1: [[0, 0, 4, -1, -2, 5], [6, -1, -2, 7, 8, 0], [9, -1, -2, 0, 0, 0]],
    }[after]
    np.testing.assert_array_equal(given["embeddings"][:3, :, 0], expected)
    np.testing.assert_array_equal(
        given["segment_ids"],
        [[0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 3, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    )
    inside = np.asarray(given["segment_ids"]) > 0
    by_default = np.asarray(segment_positions(given["segment_ids"]))
    np.testing.assert_array_equal(np.asarray(given["positions"])[inside], by_default[inside])

    positions = jnp.array([[9, 9, 3, 4], [10, 11, 12, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    prompted.hidden(params, tokens, positions=positions, segment_ids=segment_ids)
    first = np.array([[3], [10], [7]])
    np.testing.assert_array_equal(
        np.asarray(given["positions"])[:3][inside[:3]], (first + by_default[:3])[inside[:3]]
    )
    # Without segments every column is real.
    prompted.hidden(params, tokens[:2])
    np.testing.assert_array_equal(given["segment_ids"], np.ones((2, 6)))
    np.testing.assert_array_equal(given["positions"], np.tile(np.arange(6), (2, 1)))


def test_positions_given_are_counted_on():
    """The base model, called with explicit positions for the prefixed rows, gives the same logits."""
    apply, params = decoder()
    prompted = with_prompts(apply, ["task"])
    batch = rows(ROWS, LENGTH)
    stretched = 3 * np.asarray(segment_positions(jnp.asarray(batch["segment_ids"]))) + 2
    found = logits(prompted, of_prefix(apply, params), positions=stretched, **batch)

    longer = rows(prefixed(ROWS, 0), LENGTH + len(PREFIX))
    ahead = np.tile(2 + np.arange(len(PREFIX)), (len(ROWS), 1))
    positions = np.concatenate([ahead, stretched + len(PREFIX)], axis=1)
    expected = logits(apply, params, positions=positions, **longer)
    assert_near(real(found, batch), without_prefix(real(expected, longer), 0))
    unstretched = logits(prompted, of_prefix(apply, params), **batch)
    assert np.abs(np.asarray(found - unstretched)[0, :4]).max() > 0.01


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, LENGTH), min_size=4, max_size=4),
    side=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 99),
)
def test_padding_has_no_influence(lengths, side, seed):
    apply, params = decoder()
    prompted = with_prompts(apply, ["task"], after=1)
    random = np.random.default_rng(seed)
    sequences = [random.integers(3, tiny.VOCABULARY, length) for length in lengths]
    params = params | {"soft_prompt": {"task": random.normal(size=(3, 32)).astype(np.float32)}}
    one, two = rows(sequences, LENGTH, side), rows(sequences, LENGTH + 5, "right")
    two["tokens"] = np.where(two["segment_ids"] == 0, 3, two["tokens"])
    found, expected = logits(prompted, params, **one), logits(prompted, params, **two)
    assert np.isfinite(found).all()
    for a, b in zip(real(found, one), real(expected, two), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=200 * EPSILON * max(1, np.abs(found).max()))


def loss_of(apply):
    """A value of all real tokens' logits, and its gradient."""

    def loss(params, batch):
        values = jnp.sin(apply(params, **batch))
        return jnp.where(batch["segment_ids"][..., None] > 0, values, 0).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("names", "dtype"), [(["task"], "float32"), (["task", "other"], "bfloat16")]
)
def test_a_prompt_of_no_length_changes_no_bit(names, dtype):
    """S4."""
    apply, params = decoder(dataclasses.replace(GEMMA_LIKE, dtype=dtype))
    prompted = with_prompts(apply, names, after=1)
    empty = {name: jnp.zeros((0, tiny.CONFIG.width)) for name in names}
    if len(names) > 1:
        fixed = functools.partial(prompted.hidden, task_ids=np.arange(len(ROWS)) % 2)
        prompted = dataclasses.replace(prompted, hidden=fixed)
    plain_loss, loss = loss_of(apply), loss_of(prompted)
    for side in ("right", "left"):
        batch = rows(ROWS, LENGTH, side)
        value, gradient = plain_loss(params, batch)
        found, found_gradient = loss(params | {"soft_prompt": empty}, batch)
        assert found == value
        assert found_gradient.pop("soft_prompt")[names[0]].shape == (0, tiny.CONFIG.width)
        jax.tree.map(np.testing.assert_array_equal, found_gradient, gradient)


def test_a_prompt_of_no_length_hands_the_arguments_on():
    """On every device, then, the same is compiled, whatever the compiler does with its roundings."""
    calls = []

    def hidden(params, tokens=None, **given):
        calls.append((params, tokens, given))
        return tokens

    apply = Apply(hidden, lambda params, x: x, embed=lambda params, ids: ids[..., None] * 1.0)
    params = {"table": 1, "soft_prompt": {"task": jnp.zeros((0, 1))}}
    batch = rows(ROWS, LENGTH)
    assert with_prompts(apply, ["task"]).hidden(params, **batch) is batch["tokens"]
    given = {"embeddings": None, "positions": None, "segment_ids": batch["segment_ids"]}
    assert calls == [({"table": 1}, batch["tokens"], given)]


def test_gradient_is_that_of_the_embeddings_in_its_place():
    apply, params = decoder()
    prompted = with_prompts(apply, ["task"], after=1)
    batch, longer = (
        rows(texts, LENGTH + len(PREFIX), "left") for texts in (ROWS, prefixed(ROWS, 1))
    )
    random = np.random.default_rng(0)
    weights = random.normal(size=(len(ROWS), LENGTH + len(PREFIX), 64)).astype(np.float32)
    weights *= (batch["segment_ids"] > 0)[..., None]
    at = [LENGTH + 1 - len(row) for row in ROWS]
    moved = np.zeros_like(weights)
    for row, place in enumerate(at):
        moved[row, :place] = np.roll(weights[row], -len(PREFIX), axis=0)[:place]
        moved[row, place + len(PREFIX) :] = weights[row, place + len(PREFIX) :]

    @jax.jit
    @jax.value_and_grad
    def loss(prompt):
        values = prompted(params | {"soft_prompt": {"task": prompt}}, **batch)
        return (jnp.sin(values) * weights).sum()

    @jax.jit
    @jax.grad
    def by_column(embeddings):
        values = apply(params, embeddings=embeddings, segment_ids=longer["segment_ids"])
        return (jnp.sin(values) * moved).sum()

    prompt = apply.embed(params, jnp.asarray(PREFIX))
    _, found = loss(prompt)
    columns = np.asarray(by_column(apply.embed(params, longer["tokens"])))
    own = [row[place : place + len(PREFIX)] for row, place in zip(columns, at, strict=True)]
    assert np.abs(found).max() > 0.1
    assert_near([np.asarray(found)], [np.sum(own, axis=0)], roundings=2000)

    direction = random.normal(size=found.shape).astype(np.float32)
    step = 1e-3
    ahead, behind = (float(loss(prompt + sign * step * direction)[0]) for sign in (1, -1))
    slope = float((np.asarray(found, np.float64) * direction).sum())
    # Rounding of a sum of this many terms over the step, and the third derivative times its square.
    assert abs((ahead - behind) / (2 * step) - slope) < 0.02 * abs(slope) + 0.05


def test_rows_of_padding_have_no_gradient_and_do_no_harm():
    apply, params = decoder()
    prompted = with_prompts(apply, ["task"], after=1)
    batch = rows([(), ()], LENGTH)
    _, gradient = loss_of(prompted)(of_prefix(apply, params), batch)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)
    assert np.isfinite(logits(prompted, of_prefix(apply, params), **batch)).all()


def test_bfloat16_computes_with_a_float32_prompt_and_sums_its_gradient_in_float32():
    """The gradient of one prompt over many rows is the sum of each row's own, float32 rounding apart."""
    apply, params = decoder(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    count = 16
    random = np.random.default_rng(0)
    batch = rows(random.integers(3, 64, (count, LENGTH)).tolist(), LENGTH)
    prompt = random.normal(size=(4, tiny.CONFIG.width)).astype(np.float32)
    names = [f"row{index}" for index in range(count)]
    one, many = with_prompts(apply, ["task"]), with_prompts(apply, names)
    states = jax.eval_shape(one.hidden, params | {"soft_prompt": {"task": prompt}}, **batch)
    assert states.dtype == jnp.bfloat16

    each = dataclasses.replace(
        many, hidden=functools.partial(many.hidden, task_ids=np.arange(count))
    )
    _, together = loss_of(one)(params | {"soft_prompt": {"task": prompt}}, batch)
    _, apart = loss_of(each)(params | {"soft_prompt": dict.fromkeys(names, prompt)}, batch)
    together = together["soft_prompt"]["task"]
    assert together.dtype == jnp.float32
    apart = np.stack([apart["soft_prompt"][name] for name in names]).astype(np.float64)
    bound = count * EPSILON * np.abs(apart).sum(axis=0)
    assert (np.abs(np.asarray(together) - apart.sum(axis=0)) <= bound).all()
    # A bfloat16 sum would be off by far more.
    assert bound.max() < 2.0**-9 * np.abs(apart.sum(axis=0)).max()


def prompts_of(names, seed=0, length=3):
    random = np.random.default_rng(seed)
    shape = (length, tiny.CONFIG.width)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name in names}


def test_task_ids_choose_the_prompt_of_each_row():
    """S9: every row equals the single path with its own prompt; one name needs no task ids."""
    apply, params = decoder()
    names = ["a", "b", "c"]
    prompts = prompts_of(names)
    params = params | {"soft_prompt": prompts}
    mixed = with_prompts(apply, names)
    assert mixed.takes_tasks and not with_prompts(apply, ["a"]).takes_tasks
    batch, task_ids = rows(ROWS, LENGTH, "left"), np.array([2, 0, 1, 2])
    run = jax.jit(mixed.hidden)
    found = np.asarray(run(params, task_ids=task_ids, **batch))
    single = [
        np.asarray(jax.jit(with_prompts(apply, [name]).hidden)(params, **batch)) for name in names
    ]
    for row, task in enumerate(task_ids):
        np.testing.assert_array_equal(found[row], single[task][row])
    assert np.abs(single[0] - single[1])[batch["segment_ids"] > 0].max() > 0.01

    order = np.array([3, 1, 0, 2])
    shuffled = {name: array[order] for name, array in batch.items()}
    np.testing.assert_array_equal(run(params, task_ids=task_ids[order], **shuffled), found[order])
    # As batches come: one task a slot.
    whole = batch | {"task_ids": task_ids[:, None]}
    np.testing.assert_array_equal(jax.jit(mixed.hidden_of)(params, whole), found)

    with pytest.raises(ValueError, match=r"task_ids \[B\] are needed.*'a', 'b', 'c'"):
        mixed.hidden(params, **batch)
    for bad in (3, -1):
        with pytest.raises(InputError, match=f"row 1 has {bad}; expected 0 to 2.*a, b, c"):
            mixed.hidden(params, task_ids=np.array([0, bad, 0, 0]), **batch)
        inside = np.asarray(run(params, task_ids=np.array([0, bad, 0, 0]), **batch))
        assert np.isnan(inside[1][batch["segment_ids"][1] > 0]).all()
        np.testing.assert_array_equal(inside[2], single[0][2])


@pytest.mark.parametrize(
    ("config", "after", "side"),
    [
        (tiny.CONFIG, 0, "right"),
        (tiny.CONFIG, 1, "left"),
        (GEMMA_LIKE, 1, "right"),
        (GEMMA_LIKE, 0, "left"),
    ],
)
def test_prefill_and_step_equal_the_whole_row(config, after, side):
    """P6 with a cache: two tokens more, each after the row's last one."""
    apply, params = decoder(config)
    prompted, params_with = with_prompts(apply, ["task"], after=after), of_prefix(apply, params)
    more = np.array([[11, 12], [13, 14], [15, 16], [17, 18]])
    batch = rows(ROWS, LENGTH, side)
    states, cache = jax.jit(prompted.prefill, static_argnames="room")(params_with, room=2, **batch)
    assert states.shape == (4, LENGTH, tiny.CONFIG.width)
    assert cache.length == LENGTH + len(PREFIX)
    assert cache.positions.shape == (4, LENGTH + len(PREFIX) + 2)
    assert_near(real(states, batch), real(jax.jit(prompted.hidden)(params_with, **batch), batch))
    step = jax.jit(prompted.step)
    written = []
    for column in range(2):
        states, cache = step(params_with, more[:, column], cache)
        written.append(prompted.head(params_with, states))

    whole = [(*row, *new) for row, new in zip(prefixed(ROWS, after), more, strict=True)]
    longer = rows(whole, LENGTH + 5)
    expected = [row[-2:] for row in real(logits(apply, params, **longer), longer)]
    assert_near(np.stack(written, axis=1), expected)


def test_prefill_chooses_prompts_by_task():
    apply, params = decoder()
    params = params | {"soft_prompt": prompts_of(["a", "b"])}
    batch = rows(ROWS, LENGTH) | {"task_ids": np.array([[1], [0], [0], [1]])}
    mixed = with_prompts(apply, ["a", "b"])
    states, _ = mixed.prefill_of(params, batch, 1)
    assert_near(real(states, batch), real(mixed.hidden_of(params, batch), batch))


@pytest.mark.parametrize(
    ("objective", "codec"),
    [
        (Raft(cross_entropy=0.5), tiny.SINGLE),
        (Raft(cross_entropy=0.5), tiny.SEVERAL),
        (Sft(), tiny.SINGLE),
        (Sft(tokens="all"), tiny.SINGLE),
    ],
)
def test_objectives_need_no_change(objective, codec):
    """Their value on rows with a prompt is that on rows with its tokens, the labels the same."""
    apply, params = decoder()
    examples = tiny.examples(3, seed=1)
    batch = tiny.on_device(tiny.batch([[example] for example in examples], side="left"))
    told = [example._replace(prompt=PREFIX + example.prompt) for example in examples]
    longer = tiny.on_device(tiny.batch([[example] for example in told], length=30))

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params, batch):
        return objective(model, params, batch, jax.random.key(0), codec)

    found = run(with_prompts(apply, ["task"]), of_prefix(apply, params), batch)
    expected = run(apply, params, longer)
    if objective == Sft(tokens="all"):
        # The prefix is text there, and no label here.
        tokens = np.asarray(longer["tokens"])
        states = apply.hidden_of(params, longer)
        log_probs = tiny.log_softmax(apply.head(params, states))
        lost = sum(
            weight * -log_probs[row, column, tokens[row, column + 1]]
            for row, weight in enumerate(np.asarray(batch["weights"])[:, 0])
            for column in range(len(PREFIX))
        )
        np.testing.assert_allclose(found["loss"][0], expected["loss"][0] - lost, rtol=1e-5)
        return
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)


def test_the_result_is_a_static_argument():
    first, params = models.split(models.create(tiny.CONFIG, 0))
    second, _ = models.split(models.create(tiny.CONFIG, 1))
    assert with_prompts(first, ["a"]) == with_prompts(second, ("a",))
    assert hash(with_prompts(first, ["a"])) == hash(with_prompts(second, ["a"]))
    assert with_prompts(first, ["a"]) != with_prompts(first, ["b"])
    assert with_prompts(first, ["a"]) != with_prompts(first, ["a"], after=1)
    assert without_prompts(params | {"soft_prompt": {}}).keys() == params.keys()


def test_what_has_no_place_for_a_prompt_is_refused():
    apply, params = decoder()
    with pytest.raises(ValueError, match=r"takes tokens only.*dataclasses.replace"):
        with_prompts(tiny.bigram(5)[0], ["a"])
    for names in ([], ["a", "a"], [""], ["a/b"]):
        with pytest.raises(InputError, match="soft prompts are named"):
            with_prompts(apply, names)
    with pytest.raises(InputError, match="after is -1"):
        with_prompts(apply, ["a"], after=-1)

    tokens = np.array([[3, 4, 5], [3, 4, 5]])
    prompts = prompts_of(["a", "b"])
    prompts["b"] = prompts["b"][:2]
    one, both = with_prompts(apply, ["a"]), with_prompts(apply, ["a", "b"])
    with pytest.raises(ValueError, match="no soft_prompt/a; the prompts there are: none"):
        one.hidden(params, tokens)
    with pytest.raises(ValueError, match="no soft_prompt/a; the prompts there are: b"):
        one.hidden(params | {"soft_prompt": {"b": prompts["b"]}}, tokens)
    params = params | {"soft_prompt": prompts}
    with pytest.raises(InputError, match=r"'b' has shape \(2, 32\) and 'a' has \(3, 32\)"):
        both.hidden(params, tokens, task_ids=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"'a' has shape \(3, 31\); expected \[P, 32\]"):
        one.hidden(params | {"soft_prompt": {"a": prompts["a"][:, :31]}}, tokens)
    with pytest.raises(InputError, match="row 1 is packed"):
        one.hidden(params, tokens, segment_ids=np.array([[2, 2, 0], [1, 1, 2]]))


def test_a_function_without_segments_takes_rows_padded_on_the_right():
    """A running sum of the embeddings: each token's is larger by the prompt's."""

    def running(params, tokens, embeddings=None):
        return jnp.cumsum(params["table"][tokens] if embeddings is None else embeddings, axis=1)

    plain = models.from_function(running)
    apply = dataclasses.replace(plain, embed=lambda params, tokens: params["table"][tokens])
    params = {"table": jnp.arange(14.0).reshape(7, 2), "soft_prompt": {"a": jnp.ones((4, 2))}}
    prompted = with_prompts(apply, ["a"])
    batch = {"tokens": np.array([[1, 2, 3], [4, 5, 0]]), "segment_ids": [[1, 1, 1], [1, 1, 0]]}
    batch["segment_ids"] = np.array(batch["segment_ids"])
    found = prompted(params, **batch)
    np.testing.assert_array_equal(found, plain(params, batch["tokens"]) + 4)
    with pytest.raises(InputError, match="row 1 is packed or padded on the left"):
        prompted(params, batch["tokens"], segment_ids=np.array([[1, 1, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="takes tokens only"):
        with_prompts(plain, ["a"])
