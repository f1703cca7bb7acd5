"""Free text as tokens: exact ids, where the response begins, merging, cuts, and unusable records."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from regjax.data import Data, Examples, Record, Template, encode_records, load_examples
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from tests.tokenizers import byte_level_bpe, chat, sentencepiece_style, word_level, wordpiece

TOKENIZERS = {
    "byte-level": byte_level_bpe,
    "byte-level, digits": lambda: byte_level_bpe(split_digits=True),
    "pieces": sentencepiece_style,
    "pieces, no space": lambda: sentencepiece_style(prefix_space=False),
    "unigram": lambda: sentencepiece_style(False, False, "unigram"),
    "wordpiece": wordpiece,
    "word-level": word_level,
}
LEADING = {"pieces": 1, "pieces, no space": 1, "unigram": 1, "wordpiece": 1}
TEMPLATE = Template("Rate {a} and {b|cut}.\nThe answer is:", response=" so {c}, {a}")
RECORDS = [
    {"a": "the score is high", "b": "no, 12 or 3", "c": "(5)"},
    {"a": "{b}, low", "b": " rate\nthe two  ", "c": 12.5},
]
SKIP = Data(on_bad_record="skip")


def load(records, template=TEMPLATE, tokenizer=None, data=None, **options) -> Examples:
    tokenizer = tokenizer or byte_level_bpe()
    return load_examples(records, data or Data(), template, tokenizer, None, None, **options)


def encode(texts, tokenizer, data=None, **options) -> Examples:
    """Records of a prompt p and a response r that stand side by side."""
    records = [Record(f"r{i}", {"p": p, "r": r}) for i, (p, r) in enumerate(texts)]
    return encode_records(
        records, data or Data(), Template("{p}", "{r}"), tokenizer, None, None, **options
    )


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_prompt_and_response_then_the_end(name):
    tokenizer = TOKENIZERS[name]()
    loaded = load(RECORDS, tokenizer=tokenizer)
    for index, (example, record) in enumerate(zip(loaded.examples, RECORDS, strict=True)):
        leading = tokenizer("a")["input_ids"][: LEADING.get(name, 0)]
        prompt = f"Rate {record['a']} and {record['b']}.\nThe answer is:"
        whole = prompt + f" so {record['c']}, {record['a']}"
        expected = leading + plain(tokenizer, whole) + [tokenizer.eos_token_id]
        assert example.tokens.dtype == np.int32
        assert example.tokens.tolist() == expected
        assert example.response_start == example.score_start
        assert example.response_start == len(leading) + len(plain(tokenizer, prompt))
        assert math.isnan(example.score)
        assert (example.weight, example.record, example.task) == (1, index, 0)
    assert loaded.records == RECORDS and not loaded.bad and not loaded.truncated


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_the_answer_the_prompt_is_left(name):
    tokenizer = TOKENIZERS[name]()
    whole = load(RECORDS, tokenizer=tokenizer).examples
    questions = [{"a": record["a"], "b": record["b"]} for record in RECORDS]
    for options in ({"prompts_only": True}, {"labelled": False}):
        prompts = load(questions, tokenizer=tokenizer, **options).examples
        for full, prompt in zip(whole, prompts, strict=True):
            assert prompt.tokens.tolist() == full.tokens[: full.response_start].tolist()
            assert prompt.response_start == prompt.score_start == len(prompt.tokens)
            assert math.isnan(prompt.score)


def test_no_score_is_read():
    records = [{**record, "score": "nonsense"} for record in RECORDS]
    [one, two], [same, again] = load(records).examples, load(RECORDS).examples
    assert one.tokens.tolist() == same.tokens.tolist()
    assert two.tokens.tolist() == again.tokens.tolist()
    # The field may even be the answer itself.
    [example] = load([{"a": "x", "label": "yes"}], Template("{a}:\n", "{label}"),
                     data=Data(score_field="label")).examples  # fmt: skip
    assert byte_level_bpe().decode(example.tokens) == "x:\nyes<|endoftext|>"


def test_chat_tokens_are_those_of_the_rendered_chat():
    template = Template("Rate {a}.", "so {c}", system="Be fair.", chat=True)
    tokenizer = chat()
    [example] = load(RECORDS[:1], template, tokenizer).examples
    turns = [("system", "Be fair."), ("user", "Rate the score is high."), ("assistant", "so (5)")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        messages[:2], return_dict=False, add_generation_prompt=True
    )
    # The chat template goes on with a new line after the last turn's end token.
    assert example.tokens.tolist() == ids[:-1]
    assert example.response_start == len(prompt)


def test_special_tokens_in_a_record_stay_text():
    tokenizer = chat()
    template = Template("Rate <| {a}<|", "{c} now", chat=True)
    texts = ["<|im_end|>", "x <|im_start|>user\nhi<|im_end|>", "im_end|>", "plain"]
    records = [{"a": a, "c": c} for a in texts for c in texts]
    turn = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")]
    for example, record in zip(load(records, template, tokenizer).examples, records, strict=True):
        ids = example.tokens.tolist()
        assert [ids.count(token) for token in turn] == [2, 2] and ids[-1] == turn[1]
        written = template.skeleton(tokenizer).render(record)
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == written.text
        prompt = tokenizer.decode(ids[: example.response_start], clean_up_tokenization_spaces=False)
        assert prompt == written.text[: written.response_start]


MERGING = [
    ("byte-level", "The answer is ", "high", False),  # " high" is one token
    ("byte-level", "The answer is", " high", True),
    ("byte-level", "The answer is:\n", "high", True),
    ("byte-level", "the sco", "re is low", False),
    ("pieces", "The answer is ", "high", False),
    ("pieces", "The answer is", " high", True),
    ("wordpiece", "The answer is ", "high", True),  # spaces are lost
    ("wordpiece", "the sco", "re is low", False),
    ("word-level", "so,", "no", True),
]


@pytest.mark.parametrize(("name", "prompt", "response", "usable"), MERGING)
def test_a_response_that_merges_with_its_prompt(name, prompt, response, usable):
    tokenizer = TOKENIZERS[name]()
    other = ("The answer is:", " no") if name != "word-level" else ("so,", "low")
    encoded = encode([other, (prompt, response), other], tokenizer, SKIP)
    assert [example.record for example in encoded.examples] == ([0, 1, 2] if usable else [0, 2])
    if not usable:
        [bad] = encoded.bad
        assert bad.place == "r1" and "prompt and response merge" in bad.reason
        assert "begin with a space" in bad.reason and "end with a new line" in bad.reason


def test_merging_far_from_the_boundary():
    """The 64 letters before "b" and "x" before them are one piece, but only if "b" follows."""
    run = 64 * "a"
    merges = [(2**n * "a", 2**n * "a") for n in range(6)] + [(run, "b"), ("x", run + "b")]
    pieces = ["a", "b", "x", "c", "</s>"] + ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), eos_token="</s>"
    )
    encoded = encode([("x" + run, "b"), ("x" + run, "c"), ("c" + run, "b")], tokenizer)
    assert [example.record for example in encoded.examples] == [1]
    [example] = encoded.examples
    names = tokenizer.convert_ids_to_tokens(example.tokens)
    assert names == ["x", run, "c", "</s>"] and example.response_start == 2


CHARACTERS = st.text("aeh 5(\n:é😀<|>", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", ["byte-level", "byte-level, digits", "pieces", "wordpiece"])
@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(
        st.tuples(CHARACTERS, CHARACTERS | st.sampled_from(["<|endoftext|>", " <s>", "</s>a"])),
        min_size=1,
        max_size=5,
    )
)
def test_the_prompts_own_tokens_or_unusable(name, texts):
    tokenizer = TOKENIZERS[name]()
    ids = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    encoded = encode(texts, tokenizer, SKIP)
    by_record = {example.record: example for example in encoded.examples}
    assert len(by_record) + len(encoded.bad) == len(texts)
    for index, (prompt, response) in enumerate(texts):
        before, both = ids(prompt)["input_ids"], ids(prompt + response)["input_ids"]
        follows = both[: len(before)] == before and len(both) > len(before)
        assert (index in by_record) == follows
        if follows:
            start = LEADING.get(name, 0)
            example = by_record[index]
            assert example.tokens[start:].tolist() == [*both, tokenizer.eos_token_id]
            assert example.response_start == start + len(before)
            [alone] = encode([(prompt, response)], tokenizer, prompts_only=True).examples
            assert alone.tokens.tolist() == example.tokens[: example.response_start].tolist()


WORDS = ["score", "high", "low", "good", "bad", "Rate", "similar"]
CUT = Template("the {a|cut} is {b} so {c|cut} , the answer is", response=" ( {d} , {a}")


def words(minimum: int, maximum: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(WORDS), min_size=minimum, max_size=maximum)


@settings(deadline=None, max_examples=50)
@given(a=words(1, 9), b=words(1, 3), c=words(1, 12), d=words(1, 6), max_length=st.integers(14, 45))
def test_cutting_shortens_the_prompts_longest_field_and_never_the_response(a, b, c, d, max_length):
    tokenizer = word_level()
    record = {"a": " ".join(a), "b": " ".join(b), "c": " ".join(c), "d": " ".join(d)}
    answer = f" ( {record['d']} , {record['a']}"
    fixed = len(plain(tokenizer, "the is so , the answer is")) + len(b)
    fixed += len(plain(tokenizer, answer)) + 1
    data = Data(max_length=max_length)
    if fixed + 2 > max_length:
        with pytest.raises(InputError, match=f"max_length={max_length}"):
            load([record], CUT, tokenizer, data)
        return
    loaded = load([record], CUT, tokenizer, data)
    i, j = len(a), len(c)
    while fixed + i + j > max_length:
        i, j = (i - 1, j) if i > j else (i, j - 1)
    prompt = f"the {' '.join(a[:i])} is {record['b']} so {' '.join(c[:j])} , the answer is"
    [example] = loaded.examples
    start = example.response_start
    assert example.tokens[:start].tolist() == plain(tokenizer, prompt)
    assert example.tokens[start:].tolist() == [*plain(tokenizer, answer), tokenizer.eos_token_id]
    assert loaded.truncated == ((i, j) != (len(a), len(c)))
    [asked] = load([record], CUT, tokenizer, data, prompts_only=True).examples
    assert len(asked.tokens) == min(fixed - len(plain(tokenizer, answer)) + len(a) + len(c) - 1,
                                    max_length - 1)  # fmt: skip


def test_only_long_prompts_are_cut_and_the_rest_stays_in_order():
    tokenizer = byte_level_bpe()
    template = Template("Rate {a|cut}|\nSo:", " {c}")
    texts = ["x", "no " * 40, "low", "😀" * 40, "high " * 40]
    records = [{"a": text, "c": f"answer {i}"} for i, text in enumerate(texts)]
    loaded = load(records, template, tokenizer, Data(max_length=40))
    assert loaded.truncated == 3
    for index, (example, text) in enumerate(zip(loaded.examples, texts, strict=True)):
        assert example.record == index and len(example.tokens) <= 40
        written = tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
        kept = written.removeprefix("Rate ").removesuffix(f"|\nSo: answer {index}<|endoftext|>")
        assert text.startswith(kept) and len(kept) < len(written) - 20
        assert (kept == text) == (index in (0, 2))
    alone = load(records[1:2], template, tokenizer, Data(max_length=40)).examples[0]
    assert alone.tokens.tolist() == loaded.examples[1].tokens.tolist()


BAD = [
    ({"a": "x", "b": "y"}, "field 'c' is missing"),
    ({"a": "x", "b": "y", "c": ""}, "c = '': is empty"),
    ({"a": "x", "b": "y", "c": " \n"}, "is empty: expected text"),
    ({"a": "x", "b": "y", "c": True}, "c = True: is neither text nor a number"),
    ({"a": "x", "b": "y", "c": ["z"]}, "is neither text nor a number"),
    ({"a": "x", "b": "y", "c": "\udcff"}, "holds half of a surrogate pair"),
    ({"a": "x", "b": "y", "c": "z " * 600}, "more than max_length=512"),
    ({"a": "x", "c": "z"}, "field 'b' is missing"),
    ([1], "is a list: expected an object"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_stops_or_is_listed(record, message):
    with pytest.raises(InputError) as error:
        load([RECORDS[0], record, RECORDS[1]])
    assert "1 of 3 records cannot be used" in str(error.value)
    assert "records[1]: " in str(error.value) and message in str(error.value)
    loaded = load([RECORDS[0], record, RECORDS[1]], data=SKIP)
    assert [example.record for example in loaded.examples] == [0, 2]
    assert [bad.place for bad in loaded.bad] == ["records[1]"]


def test_an_answer_that_the_tokenizer_drops():
    """BERT's tokenizer drops control characters."""
    encoded = encode([("so", "\x01"), ("so", "no")], wordpiece())
    assert [example.record for example in encoded.examples] == [1]
    assert encoded.bad[0].reason == "the tokenizer writes the response with no token"
    assert len(encode([("so", "\x01")], wordpiece(), prompts_only=True).examples) == 1


def test_a_prompt_that_the_tokenizer_drops():
    """Nothing can be cut of it; the start token, where there is one, is all that a prompt needs."""
    texts = [("\x01", "no"), ("\x01", 9 * "no ")]
    encoded = encode(texts, wordpiece(), Data(max_length=8))
    [example] = encoded.examples
    assert wordpiece().decode(example.tokens) == "[CLS] no [SEP]" and example.response_start == 1
    assert "takes 11 tokens, more than max_length=8" in encoded.bad[0].reason


def test_a_field_that_no_record_has():
    with pytest.raises(InputError, match=r"no record has the field 'c'; the fields are 'a', 'b'"):
        load([{"a": "x", "b": "y"}])


def test_weight_and_identity():
    records = [{**RECORDS[0], "w": 0.25, "id": "q7"}, {**RECORDS[1], "w": -1, "id": "q8"}]
    data = Data(weight_field="w", id_field="id", on_bad_record="skip")
    loaded = load(records, data=data)
    [example] = loaded.examples
    assert example.weight == 0.25 and loaded.ids[0] == "q7"
    assert loaded.bad[0].reason.startswith("is negative")


GRID = ScoreGrid.integers(1, 5)
SCORED = Template("{a}\n", "{score}")


@pytest.mark.parametrize(
    ("template", "grid", "codec", "message"),
    [
        (TEMPLATE, GRID, None, r"has no \{score\}, but there is a grid"),
        (SCORED, None, None, "there is no grid"),
        (SCORED, GRID, None, "grid and its codec"),
        (TEMPLATE, None, SCORED.codec(GRID, byte_level_bpe()), "grid and its codec"),
    ],
)
def test_a_template_that_does_not_go_with_the_grid(template, grid, codec, message):
    records = [Record("r", {**RECORDS[0], "score": 1})]
    with pytest.raises(InputError, match=message):
        encode_records(records, Data(), template, byte_level_bpe(), grid, codec)
    with pytest.raises(InputError, match=message):
        load_examples(RECORDS, Data(), template, byte_level_bpe(), grid, codec)


@pytest.mark.parametrize("prompts_only", [False, True])
def test_free_text_needs_an_end_token(prompts_only):
    with pytest.raises(InputError, match="no end token"):
        load(RECORDS, tokenizer=word_level(eos=False), prompts_only=prompts_only)


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
LINES = st.lists(
    st.fixed_dictionaries(
        {"a": VALUES | st.just("fine")},
        optional={"c": VALUES | st.sampled_from(["yes", "<|endoftext|>", "\ud800"])},
    ).map(json.dumps)
    | st.text(max_size=10),
    max_size=6,
)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=LINES)
def test_any_lines_end_in_correct_examples_or_an_input_error(tmp_path, lines):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    tokenizer = byte_level_bpe()
    try:
        loaded = load(str(path), Template("Q: {a}\nA:", " {c}"), data=SKIP)
    except InputError as error:
        assert "fuzz.jsonl" in str(error)
        return
    assert len(loaded.examples) + len(loaded.bad) == len(loaded.records) == len(loaded.places)
    for example in loaded.examples:
        record = loaded.records[example.record]
        start = example.response_start
        prompt = tokenizer.decode(example.tokens[:start], clean_up_tokenization_spaces=False)
        answer = tokenizer.decode(example.tokens[start:-1], clean_up_tokenization_spaces=False)
        assert (prompt, answer) == (f"Q: {record['a']}\nA:", f" {record['c']}")
        assert example.tokens[-1] == tokenizer.eos_token_id
