"""What a record's values are read as: scores by number and by name, and answers that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data import Data, Record, Template, encode_records, load_examples
from regjax.data.bad_records import Unusable
from regjax.data.drafts import draft
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from tests.tokenizers import byte_level_bpe

LABELS = ScoreGrid.labels("True", "False", text=" {}")
NAMED = Data(score_names=("entailment", "not_entailment"))
TEMPLATE = Template("{a}:\n", "is {score}")


def score_of(value, grid=LABELS, data=Data()) -> float | None:
    return draft(0, Record("r", {"score": value}), [], data, grid)[0].score


@pytest.mark.parametrize(
    ("value", "expected"),
    [("entailment", 0), (" not_entailment\n", 1), (0, 0), ("1", 1), (1.0, 1), ("1e0", 1)],
)
def test_a_name_or_a_number(value, expected):
    assert score_of(value, data=NAMED) == expected


@pytest.mark.parametrize(("value", "expected"), [("True", 0), (" False ", 1), ("0", 0), (1, 1)])
def test_without_names_the_grids_texts_are_the_names(value, expected):
    assert score_of(value) == expected


def test_values_are_the_grids_not_the_index():
    grid = ScoreGrid.of([-2, 0.5, 10], ["bad", "fair", "good"])
    assert [score_of(text, grid) for text in ("good", "bad", "fair")] == [10, -2, 0.5]
    names = Data(score_names=("c", "b", "a"))
    assert [score_of(text, grid, names) for text in "abc"] == [10, 0.5, -2]


def test_what_reads_as_a_number_is_one():
    """The text "2" stands for 1 in this grid; a record's "2" is the number all the same."""
    grid = ScoreGrid.of([1, 2], ["2", "one"])
    assert score_of("2", grid) == score_of(" 2.0", grid) == score_of(2, grid) == 2
    assert score_of("one", grid) == 2
    with pytest.raises(Unusable, match="off the grid's range 1 to 2"):
        score_of("3", grid)


@pytest.mark.parametrize(
    ("value", "data", "message"),
    [
        ("neutral", NAMED, "score = 'neutral': is not a number, nor one of 'entailment', 'not_entailment'"),
        ("True", NAMED, "score = 'True': is not a number, nor one of 'entailment', 'not_entailment'"),
        ("true", Data(), "score = 'true': is not a number, nor one of 'True', 'False'"),
        ("", Data(), "is not a number, nor one of"),
        (True, Data(), "score = True: is not a number"),
        (None, NAMED, "field 'score' is missing"),
        (["entailment"], NAMED, "is not a number"),
        ("2", NAMED, "is off the grid's range 0 to 1"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_named_with_the_known_ones(value, data, message):
    with pytest.raises(Unusable) as error:
        score_of(value, data=data)
    assert message in str(error.value.at("x"))


def test_only_the_first_of_many_names_are_shown():
    with pytest.raises(Unusable) as error:
        score_of("x", ScoreGrid.linspace(0, 5, 51))
    assert error.value.reason == (
        "is not a number, nor one of '0.0', '0.1', '0.2', '0.3', '0.4', '0.5', '0.6', '0.7', "
        "... (51 in all)"
    )


def test_a_text_of_two_values_is_neither():
    grid = ScoreGrid.of([0, 1, 2], ["a", " a", "b"])
    assert score_of("b", grid) == 2
    with pytest.raises(Unusable, match="several values"):
        score_of("a", grid)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ab", "expected a tuple"),
        (("a", 1), "expected a tuple"),
        (("a", " "), "not empty and differ"),
        (("a", " a"), "not empty and differ"),
        (("0", "1"), "'0', but a number"),
        (("a", " 1.5 "), "'1.5', but a number"),
    ],
)
def test_names_that_cannot_be(names, message):
    with pytest.raises(InputError, match=message):
        Data(score_names=names)


@pytest.mark.parametrize("labelled", [True, False])
def test_one_name_per_value(labelled):
    tokenizer = byte_level_bpe()
    data = Data(score_names=("a", "b", "c"))
    codec = TEMPLATE.codec(LABELS, tokenizer)
    records = [{"a": "x", "score": "a"}]
    with pytest.raises(InputError, match="3 names and the grid 2 values"):
        load_examples(records, data, TEMPLATE, tokenizer, LABELS, codec, labelled=labelled)


def test_a_named_score_is_written_as_its_number_is():
    tokenizer = byte_level_bpe()
    codec = TEMPLATE.codec(LABELS, tokenizer)
    values = ["not_entailment", 1, "entailment", "0"]
    records = [Record(str(i), {"a": "x", "score": v}) for i, v in enumerate(values)]
    loaded = encode_records(records, NAMED, TEMPLATE, tokenizer, LABELS, codec)
    written = [tokenizer.decode(example.tokens) for example in loaded.examples]
    end = tokenizer.eos_token
    assert written == [f"x:\nis {word}{end}" for word in (" False", " False", " True", " True")]
    assert [example.score for example in loaded.examples] == [1, 1, 0, 0]


NAMES = st.lists(st.text("ab 1.", min_size=1, max_size=3), min_size=2, max_size=4)


@settings(deadline=None, max_examples=50)
@given(names=NAMES, value=st.text("ab 1.", max_size=3))
def test_any_text_is_the_name_it_equals_a_number_or_unusable(names, value):
    try:
        grid = ScoreGrid.labels(*names)
    except InputError:
        return
    equal = [i for i, name in enumerate(names) if name.strip() == value.strip()]
    try:
        number = float(value)
    except ValueError:
        number = None
    try:
        score = score_of(value, grid)
    except Unusable:
        allowed = number is not None and 0 <= number <= len(names) - 1
        assert not allowed and (number is not None or len(equal) != 1)
        return
    assert score == (equal[0] if number is None else number)
    assert np.isfinite(score)
