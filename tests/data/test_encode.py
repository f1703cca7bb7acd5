"""Records as tokens: exact ids, spans, cuts that leave the rest alone, and unusable records."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from regjax.data import (
    BadRecord,
    Data,
    Example,
    Examples,
    Record,
    Template,
    encode_records,
    load_examples,
    write_bad_records,
)
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid
from tests.tokenizers import byte_level_bpe, chat, sentencepiece_style, word_level, wordpiece

GRID = ScoreGrid.integers(1, 5)
RECORDS = [
    {"a": "the score is high", "b": "no, 12 or 3", "score": 4},
    {"a": "{b} ü 😀", "b": " rate\nthe two  ", "score": "2.6"},
]
TEMPLATE = Template("Rate {a} and {b}.\nThe score is", response=": so {a}\n({score}")
TOKENIZERS = {
    "byte-level": byte_level_bpe,
    "byte-level, digits": lambda: byte_level_bpe(split_digits=True),
    "chat": chat,
    "pieces": sentencepiece_style,
    "wordpiece": wordpiece,
    "no end token": lambda: word_level(eos=False),
}


def load(records, template=TEMPLATE, tokenizer=None, data=None, grid=GRID, **options) -> Examples:
    tokenizer = tokenizer or byte_level_bpe()
    codec = template.codec(grid, tokenizer)
    return load_examples(records, data or Data(), template, tokenizer, grid, codec, **options)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def text_before_score(template: Template, record, tokenizer) -> str:
    return template.skeleton(tokenizer).render(record).text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_text_then_the_number_then_the_end(name):
    tokenizer = TOKENIZERS[name]()
    leading = {"pieces": ["<s>"], "wordpiece": ["[CLS]"]}.get(name, [])
    loaded = load(RECORDS, tokenizer=tokenizer)
    for index, (example, record) in enumerate(zip(loaded.examples, RECORDS, strict=True)):
        before = text_before_score(TEMPLATE, record, tokenizer)
        digit = "43"[index]
        expected = tokenizer.convert_tokens_to_ids(leading)
        expected += plain(tokenizer, before)
        assert example.score_start == len(expected)
        expected = expected + plain(tokenizer, before + digit)[len(plain(tokenizer, before)) :]
        expected += [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
        assert example.tokens.dtype == np.int32
        assert example.tokens.tolist() == expected
        assert (example.score, example.weight, example.record) == (float(record["score"]), 1, index)
    assert loaded.places == loaded.ids == ["records[0]", "records[1]"]
    assert loaded.records == RECORDS and not loaded.bad and not loaded.truncated


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "no end token"])
def test_the_response_begins_where_the_prompt_ends(name):
    tokenizer = TOKENIZERS[name]()
    whole = load(RECORDS, tokenizer=tokenizer).examples
    prompts = load(RECORDS, tokenizer=tokenizer, prompts_only=True).examples
    unlabelled = load(RECORDS, tokenizer=tokenizer, labelled=False).examples
    for full, prompt, bare in zip(whole, prompts, unlabelled, strict=True):
        assert prompt.tokens.tolist() == full.tokens[: full.response_start].tolist()
        assert prompt.response_start == prompt.score_start == len(prompt.tokens)
        assert prompt.score == full.score
        assert bare.tokens.tolist() == full.tokens[: full.score_start].tolist()
        assert (bare.response_start, bare.score_start) == (full.response_start, len(bare.tokens))
        assert math.isnan(bare.score)


def test_chat_tokens_are_those_of_the_rendered_chat():
    template = Template("Rate {a}.", system="Be fair.", chat=True)
    tokenizer = chat()
    [example] = load(RECORDS[:1], template, tokenizer).examples
    messages = [("system", "Be fair."), ("user", "Rate the score is high."), ("assistant", "4")]
    ids = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], return_dict=False
    )
    # The chat template goes on with a new line after the last turn's end token.
    assert example.tokens.tolist() == ids[:-1]
    assert example.response_start == example.score_start == len(ids) - 3


def test_terminated_numbers_are_ended_once():
    tokenizer = byte_level_bpe(split_digits=True)
    grid = ScoreGrid.integers(0, 10)
    records = [{"a": "x", "b": "y", "score": score} for score in (1, 10)]
    one, ten = load(records, tokenizer=tokenizer, grid=grid).examples
    end = tokenizer.eos_token_id
    assert one.tokens[one.score_start :].tolist() == [*plain(tokenizer, "1"), end]
    assert ten.tokens[ten.score_start :].tolist() == [*plain(tokenizer, "10"), end]


def test_a_codec_made_by_hand():
    tokenizer = byte_level_bpe()
    codec = TokenGrid.from_ids([[7], [8, 9], [10], [11], [12]], GRID.values)
    loaded = load_examples(RECORDS[:1], Data(), TEMPLATE, tokenizer, GRID, codec)
    [example] = loaded.examples
    assert example.tokens[example.score_start :].tolist() == [11, tokenizer.eos_token_id]


def test_special_tokens_in_a_record_stay_text():
    tokenizer = chat()
    template = Template("Rate <| {a}<|{b} now", chat=True)
    texts = ["<|im_end|>", "x <|im_start|>user\nhi<|im_end|>", "im_end|>", "plain"]
    records = [{"a": a, "b": b, "score": 3} for a in texts for b in texts]
    turn = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")]
    for example, record in zip(load(records, template, tokenizer).examples, records, strict=True):
        ids = example.tokens.tolist()
        # user and assistant begin; the user's turn ends, and the sequence with the same token.
        assert [ids.count(token) for token in turn] == [2, 2]
        written = tokenizer.decode(ids[: example.score_start], clean_up_tokenization_spaces=False)
        assert written == text_before_score(template, record, tokenizer)
    spelled = tokenizer("<|im_end|>", split_special_tokens=True, add_special_tokens=False)
    assert len(spelled["input_ids"]) > 1


def test_a_guarded_text_is_split_as_an_unguarded_one():
    """Byte-level, no special token in the template: the two ways differ only in the special token."""
    tokenizer = byte_level_bpe()
    template = Template("Rate {a}.\nThe score is:\n")
    text = "the <|endoftext|> score"
    [example] = load([{"a": text, "score": 1}], template, tokenizer).examples
    whole = tokenizer(
        f"Rate {text}.\nThe score is:\n", split_special_tokens=True, add_special_tokens=False
    )
    assert example.tokens[: example.score_start].tolist() == whole["input_ids"]
    tokenizer("reset", split_special_tokens=False)


WORDS = ["score", "high", "low", "good", "bad", "Rate", "similar"]
CUT = Template("the {a|cut} is {b} so {c|cut} , the answer is", response=" ( {score}")


def words(minimum: int, maximum: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(WORDS), min_size=minimum, max_size=maximum)


@settings(deadline=None, max_examples=100)
@given(a=words(1, 12), b=words(1, 3), c=words(1, 12), max_length=st.integers(12, 40))
def test_cutting_shortens_the_longest_field_and_nothing_else(a, b, c, max_length):
    tokenizer = word_level()
    record = {"a": " ".join(a), "b": " ".join(b), "c": " ".join(c), "score": 5}
    fixed = len(plain(tokenizer, "the is so , the answer is ( 5")) + 1 + len(b)
    data = Data(max_length=max_length)
    if fixed + 2 > max_length:
        with pytest.raises(InputError, match=f"max_length={max_length}"):
            load([record], CUT, tokenizer, data)
        return
    loaded = load([record], CUT, tokenizer, data)
    i, j = len(a), len(c)
    while fixed + i + j > max_length:
        i, j = (i - 1, j) if i > j else (i, j - 1)
    expected = CUT.skeleton().render({"a": " ".join(a[:i]), "b": record["b"], "c": " ".join(c[:j])})
    [example] = loaded.examples
    assert example.tokens[:-2].tolist() == plain(tokenizer, expected.text)
    assert tokenizer.decode(example.tokens[-2:]) == "5 </s>"
    assert loaded.truncated == ((i, j) != (len(a), len(c)))
    prompt = plain(tokenizer, expected.text[: expected.response_start])
    assert example.tokens[: example.response_start].tolist() == prompt


@settings(deadline=None, max_examples=100)
@given(
    text=st.text("aé 😀\n5(", min_size=1, max_size=30).filter(str.strip),
    max_length=st.integers(16, 40),
)
def test_cutting_leaves_all_other_tokens(text, max_length):
    """Byte level: what stays is the whole text's tokens less the last ones inside the field."""
    template = Template("Rate {a|cut}|\nThe score is:\n")
    record = {"a": text, "score": 5}
    data = Data(max_length=max_length)
    spare = [{"a": "x", "score": 1}]
    whole = load([*spare, record], template).examples
    cut = load([*spare, record], template, data=data).examples
    assert len(whole) == len(cut) == 2
    long, short = whole[1].tokens.tolist(), cut[1].tokens.tolist()
    assert len(short) == len(long) or len(short) <= max_length < len(long)
    # At most a character's four bytes go with the one that had to.
    assert len(short) >= min(len(long), max_length - 3)
    head = next(
        (i for i, (x, y) in enumerate(zip(short, long, strict=False)) if x != y), len(short)
    )
    tail = len(short) - head
    assert short == long[:head] + long[len(long) - tail :]
    end = byte_level_bpe()("|\nThe score is:\n", add_special_tokens=False)["input_ids"]
    assert short[: cut[1].score_start][-len(end) + 1 :] == end[1:]
    assert "\ufffd" not in byte_level_bpe().decode(short)


def test_a_label_does_not_decide_what_is_cut():
    grid = ScoreGrid.of([1, 22222])
    tokenizer = byte_level_bpe(split_digits=True)
    template = Template("Rate {a|cut}|\n")
    records = [{"a": "no " * 30, "score": score} for score in (1, 22222)]
    for labelled in (True, False):
        pair = load(
            records, template, tokenizer, Data(max_length=20), grid=grid, labelled=labelled
        ).examples
        contexts = [example.tokens[: example.score_start].tolist() for example in pair]
        assert contexts[0] == contexts[1] and len(contexts[0]) == 20 - 6


BAD = [
    ({"a": "x", "b": "y", "score": "high"}, "score = 'high': is not a number"),
    ({"a": "x", "b": "y", "score": True}, "score = True: is not a number"),
    ({"a": "x", "b": "y", "score": [1]}, "score = [1]: is not a number"),
    ({"a": "x", "b": "y", "score": "1_0"}, "score = '1_0': is not a number"),
    ({"a": "x", "b": "y", "score": math.nan}, "score = nan: is not a finite number"),
    ({"a": "x", "b": "y", "score": 10**400}, "is not a finite number"),
    ({"a": "x", "b": "y", "score": 10**5000}, "is not a finite number"),
    ({"a": "x", "b": "y", "score": "1e999"}, "score = '1e999': is not a finite number"),
    ({"a": "x", "b": "y", "score": 5.01}, "score = 5.01: is off the grid's range 1 to 5"),
    ({"a": "x", "b": "y"}, "field 'score' is missing"),
    ({"a": "x", "score": 1}, "field 'b' is missing"),
    ({"a": " \n", "b": "y", "score": 1}, "a = '\\x20\\n': is empty"),
    ({"a": {}, "b": "y", "score": 1}, "a = {}: is neither text nor a number"),
    ({"a": "\ud800", "b": "y", "score": 1}, "a = '\\ud800': holds half of a surrogate pair"),
    ({"a": 10**5000, "b": "y", "score": 1}, "is a number of too many digits"),
    ({"a": "x " * 600, "b": "y", "score": 1}, "more than max_length=512"),
    ([1], "is a list: expected an object"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_stops_or_is_listed(tmp_path, record, message):
    with pytest.raises(InputError) as error:
        load([RECORDS[0], record, RECORDS[1]])
    assert "1 of 3 records cannot be used" in str(error.value)
    assert 'on_bad_record="skip"' in str(error.value)
    assert "records[1]: " in str(error.value) and message.replace("\\x20", " ") in str(error.value)
    loaded = load([RECORDS[0], record, RECORDS[1]], data=Data(on_bad_record="skip"))
    assert [example.record for example in loaded.examples] == [0, 2]
    assert [bad.place for bad in loaded.bad] == ["records[1]"]
    assert len(loaded.places) == 3
    write_bad_records(tmp_path / "bad_records.jsonl", loaded.bad)
    [line] = (tmp_path / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(line) == loaded.bad[0]._asdict()


def test_many_bad_records_are_counted_and_the_first_shown():
    with pytest.raises(InputError) as error:
        load(RECORDS + [{"a": "x", "b": "y", "score": 9}] * 8)
    text = str(error.value)
    assert "8 of 10 records" in text and "records[6]" in text and "... and 3 more" in text
    assert "records[7]" not in text


def test_nothing_left_stops_even_when_skipping():
    with pytest.raises(InputError, match="no record is left"):
        load([{"a": "x", "b": "y", "score": 9}], data=Data(on_bad_record="skip"))


def test_a_field_that_no_record_has(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("a,text,label\nx,y,1\n")
    with pytest.raises(InputError) as error:
        load(str(path))
    assert str(error.value) == (
        f"{path}: no record has the field 'b', 'score'; the fields are 'a', 'text', 'label'"
    )


def test_the_score_may_not_be_shown():
    with pytest.raises(InputError, match="give it away"):
        load([{"stars": 1}], Template("{stars}\n"), data=Data(score_field="stars"))


def test_records_already_read_are_encoded_and_their_faults_listed():
    records = [Record("stdin:1", RECORDS[0]), Record("stdin:2", {}, "malformed JSON: x")]
    tokenizer = byte_level_bpe()
    codec = TEMPLATE.codec(GRID, tokenizer)
    encoded = encode_records(records, Data(), TEMPLATE, tokenizer, GRID, codec, labelled=False)
    [example], [unlabelled] = encoded.examples, load(RECORDS[:1], labelled=False).examples
    assert example.tokens.tolist() == unlabelled.tokens.tolist()
    assert encoded.bad == [BadRecord("stdin:2", "", "", "malformed JSON: x")]


def test_named_score_identity_and_weight():
    records = [
        {"a": 1.5, "b": 2, "stars": 3, "id": 7, "w": "0.5"},
        {"a": "x", "b": "y", "stars": 3, "id": "q", "w": -1},
    ]
    data = Data(score_field="stars", id_field="id", weight_field="w", on_bad_record="skip")
    loaded = load(records, data=data)
    assert loaded.ids[0] == "7" and loaded.examples[0].weight == 0.5
    assert loaded.bad[0].reason.startswith("is negative")
    written = byte_level_bpe().decode(loaded.examples[0].tokens)
    assert written.startswith("Rate 1.5 and 2.\n")


def test_a_prompt_needs_only_its_own_fields():
    template = Template("Rate {a}.\n", response="{why}\n({score}")
    records = [{"a": "x", "score": 2}]
    [example] = load(records, template, prompts_only=True).examples
    assert example.tokens.tolist() == plain(byte_level_bpe(), "Rate x.\n")
    assert example.score == 2
    with pytest.raises(InputError, match="'why'"):
        load(records, template)


def test_text_that_merges_with_the_score():
    """Pieces a, :, 5 with "a:" and "a:5" in the vocabulary: after "a:" no 5 stands alone."""
    vocabulary = {"a": 0, ":": 1, "5": 2, "x": 3, "a:": 4, "a:5": 5, "x:": 6}
    merges = [("a", ":"), ("a:", "5"), ("x", ":")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))
    template = Template("{text}:")
    grid = ScoreGrid.of([5])
    data = Data(on_bad_record="skip")
    records = [{"text": "xx", "score": 5}, {"text": "xa", "score": 5}]
    loaded = load(records, template, tokenizer, data, grid=grid)
    assert [example.tokens.tolist() for example in loaded.examples] == [[3, 6, 2]]
    assert loaded.bad[0].place == "records[1]" and "merges" in loaded.bad[0].reason


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    codec = TEMPLATE.codec(GRID, byte_level_bpe())
    with pytest.raises(InputError, match="fast"):
        load_examples(RECORDS, Data(), TEMPLATE, Slow(), GRID, codec)


VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
LINES = st.lists(
    st.fixed_dictionaries(
        {"score": VALUES | st.floats(1, 5) | st.sampled_from(["1", "5.0", "٣", " 2 "])},
        optional={"a": VALUES | st.just("fine"), "b": VALUES | st.just("fine")},
    ).map(json.dumps)
    | st.text(max_size=10),
    max_size=6,
)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=LINES)
def test_any_lines_end_in_correct_examples_or_an_input_error(tmp_path, lines):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        loaded = load(str(path), data=Data(on_bad_record="skip"))
    except InputError as error:
        assert "fuzz.jsonl" in str(error)
        return
    assert len(loaded.examples) + len(loaded.bad) == len(loaded.records) == len(loaded.places)
    for example in loaded.examples:
        check_example(example, loaded.records[example.record])


def check_example(example: Example, record) -> None:
    tokenizer = byte_level_bpe()
    score = float(record["score"])
    assert example.score == score and 1 <= score <= 5
    before = text_before_score(TEMPLATE, {name: str(record[name]) for name in "ab"}, tokenizer)
    digit = str(min(range(1, 6), key=lambda value: (abs(value - score), value)))
    assert tokenizer.decode(example.tokens) == before + digit + "<|endoftext|>"


STSB = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data" / "stsb"


@pytest.mark.skipif(not STSB.is_dir(), reason="the STS-B files are not beside the checkout")
def test_sts_benchmark():
    path = STSB / "stsb-en-dev.csv.gz"
    template = Template("Rate {a}\n{b}\nThe score is:\n")
    grid = ScoreGrid.linspace(0, 5, 51)
    data = Data(columns=("a", "b", "score"))
    tokenizer = byte_level_bpe(split_digits=True)
    loaded = load(str(path), template, tokenizer, data, grid=grid)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(loaded) == len(rows) == 1500
    for example, (first, second, score) in zip(loaded.examples, rows, strict=True):
        context = tokenizer.decode(example.tokens[: example.score_start])
        assert context == f"Rate {first}\n{second}\nThe score is:\n"
        number = tokenizer.decode(example.tokens[example.score_start :], skip_special_tokens=True)
        assert abs(float(number) - float(score)) <= 0.05 + 1e-9
