"""Greedy decoding: with a cache, without one, and as transformers does it; and answers as text."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import models
from regjax.data import Data, Example, Examples
from regjax.errors import InputError
from regjax.generate import answers, greedy, make_greedy, texts
from tests import tiny, tokenizers
from tests.models.families import OPTIONS
from tests.models.test_cache import CONFIGS, noisy

LENGTH, NEW = 10, 6
PROMPTS = (4, 10, 7, 0, 1)
RANDOM = np.random.default_rng(3).integers(3, 61, (len(PROMPTS), LENGTH))
NO_END = 60_000


def rows(side, counts=PROMPTS, tokens=RANDOM):
    """A batch of prompts of these lengths, each at one side of its row."""
    batch = {
        name: np.zeros((len(counts), LENGTH), np.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    for row, count in enumerate(counts):
        columns = slice(LENGTH - count, LENGTH) if side == "left" else slice(0, count)
        batch["tokens"][row, columns] = tokens[row, :count]
        batch["positions"][row, columns] = range(count)
        batch["segment_ids"][row, columns] = 1
    return batch


def without_cache(model):
    return dataclasses.replace(model, prefill=None, step=None)


@pytest.fixture(scope="module")
def gemma():
    # Not tied: a tied model writes its last token over and over.
    return noisy(dataclasses.replace(CONFIGS["gemma3"], tied_embeddings=False))


def ended(written, end_token):
    """What rows decoded without an end token are with one."""
    after = np.cumsum(written == end_token, axis=1) > 0
    return np.where(after, end_token, written)


def test_cache_and_recomputation_write_the_same(gemma):
    model, params = gemma
    cached = make_greedy(model, NEW, NO_END)
    again = make_greedy(without_cache(model), NEW, NO_END)
    free = np.asarray(cached(params, rows("right")))
    assert free.dtype == np.int32 and free.shape == (len(PROMPTS), NEW)
    assert len(np.unique(free[[0, 1, 2, 4]])) > 8, "one token over and over shows nothing"
    np.testing.assert_array_equal(free[3], NO_END)
    for batch in (rows("right"), rows("left")):
        np.testing.assert_array_equal(cached(params, batch), free)
        np.testing.assert_array_equal(again(params, batch), free)
    # A row ends in the middle, others never do.
    end = int(free[0, 2])
    expected = np.where(np.arange(len(PROMPTS))[:, None] == 3, end, ended(free, end))
    assert not (expected == free).all() and (expected[1] != end).all()
    for one in (model, without_cache(model)):
        found = make_greedy(one, NEW, end)(params, rows("right"))
        np.testing.assert_array_equal(found, expected)


def test_each_token_is_the_most_likely_one(gemma):
    model, params = gemma
    batch = rows("right")
    written = np.asarray(make_greedy(model, NEW, NO_END)(params, batch))
    for row in (0, 2):
        count = PROMPTS[row]
        whole = np.concatenate([batch["tokens"][row, :count], written[row]])
        whole = np.pad(whole, (0, LENGTH + NEW - len(whole)))[None]
        best = np.asarray(jax.jit(model)(params, whole)).argmax(-1)[0]
        np.testing.assert_array_equal(written[row], best[count - 1 : count - 1 + NEW])


@pytest.mark.parametrize("name", ["llama-llama3-scaling", "gemma2-untied-biases"])
def test_transformers_writes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import torch_models

    reference = torch_models.random_model(OPTIONS[name])
    torch_models.write_folder(reference, OPTIONS[name], tmp_path)
    model, params = models.split(models.load(tmp_path))
    counts = tuple(count for count in PROMPTS if count)
    padded = rows("left", counts)
    free = make_greedy(model, NEW, NO_END)(params, rows("right", counts))
    assert len(np.unique(free)) > 8, "one token over and over shows nothing"
    end = int(free[0, 2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = reference.generate(
            torch.tensor(padded["tokens"], dtype=torch.long),
            attention_mask=torch.tensor(padded["segment_ids"], dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=end,
            pad_token_id=end,
        )[:, LENGTH:].numpy()
    theirs = np.pad(theirs, ((0, 0), (0, NEW - theirs.shape[1])), constant_values=end)
    for side in ("right", "left"):
        ours = make_greedy(model, NEW, end)(params, rows(side, counts))
        np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_tokens_are_within_rounding_of_the_best():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    model, params = noisy(config)
    batch = rows("right")
    written = np.asarray(make_greedy(model, NEW, NO_END)(params, batch))
    row = PROMPTS.index(LENGTH)
    whole = np.concatenate([batch["tokens"][row], written[row]])[None]
    logits = np.asarray(jax.jit(model)(params, whole))
    assert logits.dtype == np.float32
    logits = logits[0, LENGTH - 1 : LENGTH - 1 + NEW]
    chosen = logits[range(NEW), written[row]]
    # A few roundings of 2^-9 on logits of this size.
    assert (chosen >= logits.max(-1) - 2**-9 * 10 * np.abs(logits).max()).all()


def chain(table, token, count):
    """`count` steps of a bigram table in NumPy."""
    written = []
    for _ in range(count):
        token = int(np.asarray(table)[token].argmax())
        written.append(token)
    return written


def test_a_bare_function_decodes_by_recomputation():
    model, params = tiny.bigram(61)
    batch = rows("right")
    found = np.asarray(make_greedy(model, NEW, NO_END)(params, batch))
    for row, count in enumerate(PROMPTS):
        if count:
            last = RANDOM[row, count - 1]
            np.testing.assert_array_equal(found[row], chain(params["table"], last, NEW))
    no_places = {"tokens": RANDOM}
    found = np.asarray(make_greedy(model, NEW, NO_END)(params, no_places))
    for row, last in enumerate(RANDOM[:, -1]):
        np.testing.assert_array_equal(found[row], chain(params["table"], last, NEW))


def test_new_tokens_stand_right_after_the_last_with_its_places():
    """The hidden state is a checksum of the row, so that every column's places show in it."""
    seen = []

    def hidden(params, tokens, positions=None, segment_ids=None):
        jax.debug.callback(lambda *row: seen.append([np.array(a) for a in row]),
                           tokens, positions, segment_ids, ordered=True)  # fmt: skip
        return jax.nn.one_hot((tokens + 1) % 61, 61)

    model = models.from_function(hidden)
    found = greedy(model, {}, rows("right", (4, 10)), max_new_tokens=3, end_token=NO_END)
    jax.effects_barrier()
    np.testing.assert_array_equal(found, RANDOM[[0, 1], [3, 9], None] + np.arange(1, 4))
    tokens, positions, segment_ids = seen[-1]
    np.testing.assert_array_equal(tokens[0, :6], [*RANDOM[0, :4], *found[0, :2]])
    np.testing.assert_array_equal(positions[:, :6], np.tile(np.arange(6), (2, 1)))
    np.testing.assert_array_equal(positions[1], np.arange(12))
    np.testing.assert_array_equal(segment_ids.sum(1), [6, 12])
    np.testing.assert_array_equal(segment_ids[0, :6], 1)


@pytest.mark.parametrize("ends, reads", [((1, 3), 3), ((2, 2), 2), ((9, 1), NEW), ((1, 1), 1)])
def test_stops_when_every_row_has_ended(ends, reads):
    """Row r counts up from `-ends[r]`: its token number `ends[r]` is 0, the end token."""
    calls = []

    def hidden(params, tokens):
        jax.debug.callback(lambda: calls.append(1))
        return jax.nn.one_hot((tokens + 1) % 61, 61)

    model = models.from_function(hidden)
    batch = rows("right", (3, 5), np.full((2, LENGTH), 61) - np.array(ends)[:, None])
    found = greedy(model, {}, batch, max_new_tokens=NEW, end_token=0)
    jax.effects_barrier()
    counted = np.arange(1, NEW + 1) - np.array(ends)[:, None]
    np.testing.assert_array_equal(found, np.where(counted < 0, counted + 61, 0))
    assert len(calls) == reads


def test_one_compilation_for_repeated_calls_and_equal_models():
    model, params = noisy(tiny.CONFIG)
    traces = []

    def head(params, states):
        traces.append(states.shape)
        return model.head(params, states)

    counted = dataclasses.replace(model, head=head)
    first = make_greedy(counted, 3, 2)(params, rows("right"))
    once = len(traces)
    assert set(traces) == {(len(PROMPTS), tiny.CONFIG.width)}, "logits of one position a row"
    again = make_greedy(dataclasses.replace(model, head=head), 3, 2)
    np.testing.assert_array_equal(again(params, rows("right")), first)
    assert not np.array_equal(again(params, rows("right", (2, 3, 4, 5, 6))), first)
    assert len(traces) == once
    within = jax.jit(
        lambda params, batch: greedy(model, params, batch, max_new_tokens=3, end_token=2)
    )
    np.testing.assert_array_equal(within(params, rows("right")), first)


def test_tasks_reach_the_model():
    def hidden(params, tokens, *, task_ids, **places):
        return jax.nn.one_hot(jnp.broadcast_to(task_ids[:, None] + 7, tokens.shape), 20)

    model = models.Apply(hidden, lambda params, states: states, takes_tasks=True)
    batch = rows("right") | {"task_ids": np.array([[4], [1], [0], [2], [3]])}
    found = make_greedy(model, 2, 0)({}, batch)
    np.testing.assert_array_equal(found[:, 1], [11, 8, 7, 0, 10])


@pytest.mark.parametrize("compiled", [False, True])
def test_what_cannot_be_decoded_is_refused(compiled):
    model, params = tiny.bigram(8)
    decoder, decoder_params = noisy(tiny.CONFIG)

    def run(model, params, batch, count=2, end=2):
        if compiled:
            return make_greedy(model, count, end)(params, batch)
        return greedy(model, params, batch, max_new_tokens=count, end_token=end)

    with pytest.raises(InputError, match="no end token"):
        run(model, params, rows("right"), end=None)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        run(model, params, rows("right"), count=0)
    packed = rows("right")
    packed["segment_ids"][1, 5:] = 2
    for one, of_one in ((model, params), (decoder, decoder_params)):
        with pytest.raises(InputError, match="row 1 is packed"):
            run(one, of_one, packed)
    with pytest.raises(InputError, match="row 0 is padded on the left"):
        run(model, params, rows("left"))


def speller(tokenizer, sentences):
    """A model that goes on with the word that follows the last one in these sentences, then ends."""
    table = np.zeros((len(tokenizer), len(tokenizer)), np.float32)
    for sentence in sentences:
        ids = [*tokenizer(sentence, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        table[ids[:-1], ids[1:]] = 1
    return models.from_function(lambda params, tokens: params[tokens]), jnp.asarray(table)


def prompts_of(tokenizer, sentences):
    tokens = [np.array(tokenizer(s)["input_ids"], np.int32) for s in sentences]
    examples = [
        Example(ids, len(ids), len(ids), 0.0, 1.0, 10 * index) for index, ids in enumerate(tokens)
    ]
    count = 10 * len(tokens)
    return Examples(
        examples, [{}] * count, [f"line {i}" for i in range(count)], [""] * count, [], 0
    )


def test_answers_are_in_the_order_of_the_examples():
    tokenizer = tokenizers.word_level()
    model, params = speller(tokenizer, ["is high . good answer", "so 5"])
    prompts = ["the score is Rate how are so", "is", "the answer", "Rate how is high .", "so"]
    examples = prompts_of(tokenizer, prompts)
    data = Data(max_length=16, buckets=(2, 6))
    found = answers(model, params, tokenizer, examples, batch_size=2, max_new_tokens=5, data=data)
    assert found == ["5", "high . good answer", "", "good answer", "5"]
    cut = answers(
        model,
        params,
        tokenizer,
        examples,
        batch_size=2,
        max_new_tokens=2,
        stop=(".", "5"),
        data=data,
    )
    assert cut == ["", "high", "", "good answer", ""]


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("\n\n  yes\nno", ("\n",), "yes"),
        (" yes \n", (), "yes"),
        ("a, b. c", (".", ","), "a"),
        ("a, b. c", ("; ", ". c"), "a, b"),
        ("abcd", ("bc", "ab"), ""),
        ("good<|endoftext|>bad", (), "good"),
        ("<|im_start|>good<|bos|>", (), "good"),
        ("  \n", ("\n",), ""),
    ],
)
def test_answers_are_cut_and_stripped(text, stop, expected):
    tokenizer = tokenizers.byte_level_bpe()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    examples = prompts_of(tokenizer, ["the score is"])

    def written(params, batch):
        return jnp.tile(jnp.array(ids), (len(batch["tokens"]), 1))

    found = answers(
        None, None, tokenizer, examples, batch_size=3, max_new_tokens=9, stop=stop, greedy=written
    )
    assert found == [expected]


def test_answers_refuse_what_they_cannot_use():
    tokenizer = tokenizers.word_level()
    model, params = speller(tokenizer, ["is high"])
    examples = prompts_of(tokenizer, ["so", "is high"])

    def ask(examples=examples, tokenizer=tokenizer, **given):
        return answers(
            model, params, tokenizer, examples, batch_size=2, **{"max_new_tokens": 2} | given
        )

    with pytest.raises(InputError, match="packing"):
        ask(data=Data(packing=True))
    for stop in ("\n", ("a", "")):
        with pytest.raises(InputError, match="stop is"):
            ask(stop=stop)
    with pytest.raises(InputError, match="no end token"):
        ask(tokenizer=tokenizers.word_level(eos=False))
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        ask(max_new_tokens=-1)
    answered = [examples.examples[0], examples.examples[1]._replace(response_start=1)]
    with pytest.raises(InputError, match=r"line 10: .*prompts_only"):
        ask(dataclasses.replace(examples, examples=answered))


def test_texts_of_plain_strings():
    tokenizer = tokenizers.word_level()
    model, params = speller(tokenizer, ["is high . good answer", "so 5"])
    prompts = ["Rate how are so", "is", "the answer"]
    found = texts(model, params, tokenizer, prompts, max_new_tokens=5, stop=(".",), batch_size=2)
    assert found == ["5", "high", ""]
    assert texts(model, params, tokenizer, [], max_new_tokens=5) == []
    with pytest.raises(InputError, match="prompts is one text"):
        texts(model, params, tokenizer, "is", max_new_tokens=5)
    with pytest.raises(InputError, match=r"prompts\[1\] is ''"):
        texts(model, params, tokenizer, ["is", ""], max_new_tokens=5)


def test_texts_begin_with_the_tokenizers_special_tokens():
    tokenizer = tokenizers.sentencepiece_style()
    shift = 60

    def first_and_shift(params, tokens):
        ids = jnp.broadcast_to(tokens[:, :1] + shift, tokens.shape)
        return jax.nn.one_hot(ids, len(tokenizer))

    model = models.from_function(first_and_shift)
    expected = tokenizer.decode([tokenizer.bos_token_id + shift] * 2).strip()
    assert expected
    assert texts(model, {}, tokenizer, ["the score"], max_new_tokens=2) == [expected]
