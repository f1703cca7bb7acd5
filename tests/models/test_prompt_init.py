"""How soft prompts begin: drawn, of a text, of labels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import models
from regjax.errors import InputError
from regjax.models.prompt import (
    SoftPrompt,
    common_ids,
    create_prompt,
    special_ids,
)
from tests import tiny, tokenizers

TOKENIZER = tokenizers.sentencepiece_style()


@functools.cache
def of_tokenizer(scale=False):
    config = dataclasses.replace(
        tiny.CONFIG,
        vocabulary_size=len(TOKENIZER) + 8,
        scale_embeddings=scale,
        tied_embeddings=scale,
    )
    return models.split(models.create(config, 3))


def made(seed=0, scale=False, **fields):
    apply, params = of_tokenizer(scale)
    prompt = create_prompt(SoftPrompt(**fields), apply, params, TOKENIZER, jax.random.key(seed))
    assert isinstance(prompt, jax.Array) and prompt.dtype == jnp.float32
    table = np.asarray(params["embedding"]["table"]) * (np.float32(32**0.5) if scale else 1)
    return np.asarray(prompt), table


def drawn_ids(prompt, table):
    """The ids whose rows the prompt's are; it is an error if one is no row."""
    is_row = (prompt[:, None] == table).all(axis=-1)
    assert is_row.any(axis=1).all()
    return is_row.argmax(axis=1)


@pytest.mark.parametrize("scale", [False, True])
def test_vocabulary_draws_rows_of_the_table(scale):
    """Scaled where the model scales: the prompt stands where the first layer takes it."""
    prompt, table = made(length=60, most_common=100, scale=scale)
    ids = drawn_ids(prompt, table)
    common = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids][:100]
    assert len(set(ids)) == 60 and set(ids) <= set(common)
    np.testing.assert_array_equal(made(length=60, most_common=100, scale=scale)[0], prompt)
    assert (made(1, length=60, most_common=100, scale=scale)[0] != prompt).any()
    everything, _ = made(length=100, most_common=100, scale=scale)
    assert set(drawn_ids(everything, table)) == set(common)
    if not scale:
        repeated, _ = made(length=40, most_common=30)
        assert set(drawn_ids(repeated, table)) <= set(common[:30])
        assert len(set(drawn_ids(repeated, table))) > 10


def test_uniform_is_in_its_range_whatever_the_model_scales():
    prompt, _ = made(length=200, init="uniform", scale=True)
    assert prompt.shape == (200, 32) and prompt.min() >= -0.5 and prompt.max() < 0.5
    # Of 6400 draws: the mean within five of its standard errors, the ends reached.
    assert abs(prompt.mean()) < 5 * 12**-0.5 / 80
    assert prompt.min() < -0.49 and prompt.max() > 0.49
    one_sided, _ = made(length=200, init="uniform", low=0.0, high=0.5)
    assert one_sided.min() >= 0 and 0.49 < one_sided.max() < 0.5
    np.testing.assert_array_equal(made(length=200, init="uniform", scale=True)[0], prompt)
    assert (made(1, length=200, init="uniform")[0] != prompt).all(axis=1).any()


@pytest.mark.parametrize("length", [2, 11])
def test_text_is_cut_or_repeated(length):
    text = "the score is low"
    prompt, table = made(length=length, init="text", text=text, scale=True)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert 2 < len(ids) < 11 and TOKENIZER(text)["input_ids"] != ids
    np.testing.assert_array_equal(prompt, table[(ids * length)[:length]])


def test_labels_are_means_of_their_tokens_and_the_rest_is_drawn():
    """P7."""
    labels = ("good", "the answer is no", "11")
    prompt, table = made(length=8, init="labels", labels=labels, most_common=50, scale=True)
    for row, label in zip(prompt, labels, strict=False):
        ids = TOKENIZER(label, add_special_tokens=False)["input_ids"]
        np.testing.assert_allclose(row, table[ids].astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    ids = drawn_ids(prompt[3:], table)
    assert len(set(ids)) == 5 and set(ids) <= set(common_ids(TOKENIZER, 50).tolist())
    assert len(TOKENIZER(labels[1], add_special_tokens=False)["input_ids"]) > 1
    full, _ = made(length=3, init="labels", labels=labels, scale=True)
    np.testing.assert_array_equal(full, prompt[:3])


def test_special_tokens_are_never_drawn():
    tokenizer = tokenizers.chat()
    unnamed = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert unnamed not in tokenizer.all_special_ids and unnamed in special_ids(tokenizer)
    ids = common_ids(tokenizer, 10_000)
    assert sorted({*ids.tolist(), *special_ids(tokenizer)}) == list(range(len(tokenizer)))
    assert not set(ids.tolist()) & special_ids(tokenizer)
    np.testing.assert_array_equal(common_ids(tokenizer, 7), ids[:7])


def test_a_prompt_of_bfloat16_embeddings_is_float32_and_can_be_made_beside_others():
    apply, params = models.split(
        models.create(dataclasses.replace(tiny.CONFIG, dtype="bfloat16", vocabulary_size=500), 0)
    )
    params = params | {"soft_prompt": {"other": jnp.ones((3, tiny.CONFIG.width))}}
    config = SoftPrompt(length=5)
    prompt = create_prompt(config, apply, params, TOKENIZER, jax.random.key(0))
    assert prompt.dtype == jnp.float32
    table = np.asarray(params["embedding"]["table"].astype(jnp.bfloat16).astype(jnp.float32))
    assert len(set(drawn_ids(np.asarray(prompt), table))) == 5
    traced = jax.jit(lambda params, key: create_prompt(config, apply, params, TOKENIZER, key))
    np.testing.assert_array_equal(traced(params, jax.random.key(0)), prompt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, r"SoftPrompt.length is 0"),
        ({"init": "random"}, r"SoftPrompt.init is 'random'"),
        ({"init": "uniform", "low": 0.5}, r"SoftPrompt.low is 0.5 and high is 0.5"),
        ({"init": "uniform", "high": float("nan")}, r"SoftPrompt.low .* high is nan"),
        ({"init": "uniform", "low": float("-inf")}, r"SoftPrompt.low is -inf"),
        ({"most_common": 0}, r"SoftPrompt.most_common is 0"),
        ({"init": "text"}, r"SoftPrompt.text is '', but init is 'text'"),
        ({"text": "a"}, r"SoftPrompt.text is 'a', but init is 'vocabulary'"),
        ({"init": "labels"}, r"SoftPrompt.labels is \(\), but init is 'labels'"),
        ({"init": "labels", "labels": "good"}, r"SoftPrompt.labels is 'good'; expected a tuple"),
        ({"init": "labels", "labels": ("a", "")}, r"SoftPrompt.labels .* none empty"),
        ({"init": "labels", "labels": ("a", "b"), "length": 1}, r"has 2 labels for length 1"),
        ({"init": "file"}, r"SoftPrompt.path is '', but init is 'file'"),
        ({"path": "a"}, r"SoftPrompt.path is 'a', but init is 'vocabulary'"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        SoftPrompt(**fields)


def test_what_cannot_be_made_is_named():
    with pytest.raises(InputError, match=r"SoftPrompt.path is 'x'.*prompt_files.load_prompt"):
        made(init="file", path="x")
    with pytest.raises(ValueError, match="takes tokens only"):
        create_prompt(SoftPrompt(), tiny.bigram(5)[0], {}, TOKENIZER, jax.random.key(0))
    apply, params = of_tokenizer()
    blank = tokenizers.wordpiece()
    for fields, name in (({"text": " "}, "text"), ({"labels": ("a", " ")}, r"labels\[1\]")):
        config = SoftPrompt(init=next(iter(fields)), **fields)
        with pytest.raises(InputError, match=rf"SoftPrompt.{name} is ' ', which has no tokens"):
            create_prompt(config, apply, params, blank, jax.random.key(0))
