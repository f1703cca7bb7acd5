"""Grids of numbers, their texts, and their tokens in the context of four kinds of tokenizers."""

from __future__ import annotations

import itertools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regjax.errors import InputError
from regjax.scores import MAX_VALUES, ScoreGrid, TokenGrid
from tests.tokenizers import byte_level_bpe, chat, sentencepiece_style, word_level, wordpiece

TOKENIZERS = {
    "byte-level": lambda: byte_level_bpe(split_digits=False),
    "byte-level, digits": lambda: byte_level_bpe(split_digits=True),
    "chat": chat,
    "pieces": lambda: sentencepiece_style(split_digits=False, prefix_space=True),
    "pieces, digits": lambda: sentencepiece_style(split_digits=True, prefix_space=True),
    "pieces, no space": lambda: sentencepiece_style(split_digits=False, prefix_space=False),
    "pieces, digits, no space": lambda: sentencepiece_style(split_digits=True, prefix_space=False),
    "unigram": lambda: sentencepiece_style(False, False, "unigram"),
    "unigram, digits": lambda: sentencepiece_style(True, True, "unigram"),
    "wordpiece": wordpiece,
    "word-level": word_level,
}
LOSSLESS = [name for name in TOKENIZERS if name.startswith(("byte", "chat", "pieces", "unigram"))]

decimal_ends = st.tuples(st.integers(-10_000, 10_000), st.integers(0, 4))


def begins(short: list[int], long: list[int]) -> bool:
    return long[: len(short)] == short


def overlapping(sequences: list[list[int]]) -> bool:
    return any(begins(a, b) for a, b in itertools.permutations(sequences, 2))


# Numbers and their texts


def test_integers():
    grid = ScoreGrid.integers(-1, 2)
    assert grid.values == (-1.0, 0.0, 1.0, 2.0)
    assert grid.texts == ("-1", "0", "1", "2")
    assert len(grid) == 4
    assert grid.array.dtype == np.float32
    np.testing.assert_array_equal(grid.array, [-1, 0, 1, 2])


@pytest.mark.parametrize(
    ("low", "high", "count", "texts"),
    [
        (0, 5, 6, ["0", "1", "2", "3", "4", "5"]),
        (0, 1, 5, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (-0.5, 0.5, 3, ["-0.5", "0.0", "0.5"]),
        (0.1, 0.3, 3, ["0.1", "0.2", "0.3"]),
        (0, 300, 4, ["0", "100", "200", "300"]),
        (-0.05, 0.05, 2, ["-0.05", "0.05"]),
        (np.float32(0.1), np.float32(0.7), 3, ["0.1", "0.4", "0.7"]),
        (2.5, 2.5, 1, ["2.5"]),
    ],
)
def test_linspace_texts(low, high, count, texts):
    grid = ScoreGrid.linspace(low, high, count)
    assert list(grid.texts) == texts
    assert list(grid.values) == [float(text) for text in texts]


def test_linspace_tenths_against_numpy():
    grid = ScoreGrid.linspace(0, 5, 51)
    assert list(grid.texts) == [f"{value:.1f}" for value in np.linspace(0, 5, 51)]
    np.testing.assert_allclose(grid.values, np.linspace(0, 5, 51), rtol=0, atol=1e-15)


@given(decimal_ends, st.integers(1, 500), st.integers(2, 40))
@settings(deadline=None, max_examples=100)
def test_linspace_is_exact_and_uniform(end, step, count):
    low = Decimal(end[0]).scaleb(-end[1])
    stride = Decimal(step).scaleb(-end[1])
    grid = ScoreGrid.linspace(float(low), float(low + (count - 1) * stride), count)
    exact = [low + index * stride for index in range(count)]
    assert [Decimal(text) for text in grid.texts] == exact
    decimals = {-Decimal(text).as_tuple().exponent for text in grid.texts}
    fewest = max(-min(0, value.normalize().as_tuple().exponent) for value in exact)
    assert decimals == {fewest}
    assert [float(text) for text in grid.texts] == list(grid.values)


def test_of_writes_the_shortest_decimal():
    assert ScoreGrid.of([-0.0, 1e-7, 2.5, 10, 1e22]).texts == (
        "0",
        "0.0000001",
        "2.5",
        "10",
        "1" + 22 * "0",
    )
    single = ScoreGrid.of(np.array([0.1, 0.7], np.float32))
    assert single.texts == ("0.1", "0.7") and single.values == (0.1, 0.7)
    assert ScoreGrid.of(jnp.array([0.1, 0.7])) == single


def test_labels_count_from_zero():
    grid = ScoreGrid.labels("True", "False", "Neither", text=" {}")
    assert grid.values == (0.0, 1.0, 2.0)
    assert grid.texts == (" True", " False", " Neither")
    assert ScoreGrid.labels("b", "a") == ScoreGrid.of([0, 1], ["b", "a"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "0 values"),
        (("a", "a"), "the same text 'a'"),
        (("a", " "), "not only white space"),
        ((["a", "b"],), r"label \['a', 'b'\] is not text"),
        ((1, 2), "label 1 is not text"),
    ],
)
def test_labels_that_cannot_be(names, message):
    with pytest.raises(InputError, match=message):
        ScoreGrid.labels(*names)


def test_zero_has_no_sign():
    assert str(ScoreGrid((-0.0,), ("zero",)).values[0]) == "0.0"


def test_letters_and_the_pattern():
    grid = ScoreGrid.of(range(1, 6), "abcde", text="({})")
    assert grid.texts == ("(a)", "(b)", "(c)", "(d)", "(e)")
    assert ScoreGrid.integers(1, 2, text=" {}").texts == (" 1", " 2")
    assert ScoreGrid.linspace(0, 1, 3, text="{}!").texts == ("0.0!", "0.5!", "1.0!")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreGrid.of([]), "0 values"),
        (lambda: ScoreGrid.of([1, float("nan")]), "value nan is not a finite"),
        (lambda: ScoreGrid.of([1, 1e39]), "value 1e.39 is not a finite float32"),
        (lambda: ScoreGrid.of([2, 1]), "1 comes after 2"),
        (lambda: ScoreGrid.of([1, 1]), "1 comes after 1"),
        (lambda: ScoreGrid.of([2**24, 2**24 + 1]), "16777217 comes after 16777216"),
        (lambda: ScoreGrid.of([1, "2"]), "value '2' is not a number"),
        (lambda: ScoreGrid.of([True, 2]), "value True is not a number"),
        (lambda: ScoreGrid.of([None]), "value None is not a number"),
        (lambda: ScoreGrid.of([[1], [2]]), r"value \[1\] is not a number"),
        (lambda: ScoreGrid.of([1, 2], ["a"]), "2 values and 1 texts"),
        (lambda: ScoreGrid.of([1, 2], ["a", "a"]), "values 1 and 2 have the same text 'a'"),
        (lambda: ScoreGrid.of([1, 2], ["a", " "]), "text of value 2 is ' '"),
        (lambda: ScoreGrid.of([1, 2], text="score"), "pattern is 'score'"),
        (lambda: ScoreGrid.of([1, 2], text="{}{}"), "pattern is '{}{}'"),
        (lambda: ScoreGrid((1.0, 2.0), ("a", 2)), "text of value 2 is 2"),  # type: ignore[arg-type]
        (lambda: ScoreGrid((), ()), "0 values"),
        (lambda: ScoreGrid.integers(5, 1), "-3 values"),
        (lambda: ScoreGrid.integers(0, 10**12), "1000000000001 values; expected 1 to 100000"),
        (lambda: ScoreGrid.linspace(0, 1, 4), "0.333333333 apart"),
        (lambda: ScoreGrid.linspace(1, 0, 3), "3 values from 1 to 0"),
        (lambda: ScoreGrid.linspace(0, 1, 1), "1 values from 0 to 1"),
        (lambda: ScoreGrid.linspace(0, 1, 0), "0 values from 0 to 1"),
        (lambda: ScoreGrid.linspace(0, float("inf"), 3), "value inf is not a finite"),
        (lambda: ScoreGrid.linspace(0, 1e-6, 3), "5e-07 apart"),
    ],
)
def test_bad_grids(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_whole_numbers_are_whole():
    with pytest.raises(TypeError):
        ScoreGrid.integers(0, 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ScoreGrid.linspace(0, 5, 51.0)  # type: ignore[arg-type]


# The command line's spelling


@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        ("0:100", ScoreGrid.integers(0, 100)),
        (" 1 : 5 ", ScoreGrid.integers(1, 5)),
        ("-2:2", ScoreGrid.integers(-2, 2)),
        ("0:5:0.1", ScoreGrid.linspace(0, 5, 51)),
        ("-1:1:0.25", ScoreGrid.linspace(-1, 1, 9)),
        ("0:100:25", ScoreGrid.of([0, 25, 50, 75, 100])),
        ("1,2.5,10", ScoreGrid.of([1, 2.5, 10])),
        ("7", ScoreGrid.of([7])),
        ("1.0:3", ScoreGrid.of([1, 2, 3], ["1.0", "2.0", "3.0"])),
        ("1.0,3", ScoreGrid.of([1, 3], ["1.0", "3"])),
    ],
)
def test_parse(spec, grid):
    assert ScoreGrid.parse(spec) == grid


def test_parse_pattern():
    assert ScoreGrid.parse("1:2", text=" {}").texts == (" 1", " 2")
    assert ScoreGrid.parse("1,2", text=" {}").texts == (" 1", " 2")


@pytest.mark.parametrize(
    "spec",
    ["", ":", "1:", "5:1", "0:5:0.3", "0:5:0", "0:5:-1", "1:2:3:4", "1,,2", "2,1", "1,1.0", "a:b"]
    + ["nan", "inf", "1e3", "0x10", "1_0", "٣", "1;2", "0:999999999999999", "9" * 5000, "1:2,3"],
)
def test_parse_nonsense(spec):
    with pytest.raises(InputError, match="score grid"):
        ScoreGrid.parse(spec)


@given(st.text(max_size=30) | st.text("0123456789.,:- ", max_size=14))
@example("-0:0")
@example("-0,1")
@example("00.10:0.5:00.10")
@settings(deadline=None, max_examples=300)
def test_any_string_is_a_grid_or_an_input_error(spec):
    try:
        grid = ScoreGrid.parse(spec)
    except InputError:
        return
    assert 1 <= len(grid) <= MAX_VALUES
    assert [float(text) for text in grid.texts] == list(grid.values)
    assert np.all(np.diff(grid.array) > 0)


@given(decimal_ends, st.integers(1, 500), st.integers(2, 30))
@settings(deadline=None, max_examples=60)
def test_parse_reads_what_a_grid_writes(end, step, count):
    low, stride = Decimal(end[0]).scaleb(-end[1]), Decimal(step).scaleb(-end[1])
    grid = ScoreGrid.parse(f"{low:f}:{low + (count - 1) * stride:f}:{stride:f}")
    assert [Decimal(text) for text in grid.texts] == [low + k * stride for k in range(count)]
    assert ScoreGrid.parse(",".join(grid.texts)) == grid


# The nearest value


def test_nearest_goes_down_on_ties():
    grid = ScoreGrid.of([0, 1, 4])
    wanted = [[-9.0, 0.5, 0.51], [2.5, 2.6, 99.0]]
    np.testing.assert_array_equal(grid.nearest(wanted), [[0, 0, 1], [1, 2, 2]])
    assert grid.nearest(wanted).dtype == np.int32
    assert grid.texts[grid.nearest(3.9)] == "4"
    assert grid.nearest([]).shape == (0,)
    assert int(ScoreGrid.of([3]).nearest(-7.0)) == 0


@given(
    st.sets(st.integers(-50, 50), min_size=1, max_size=12),
    st.lists(st.integers(-240, 240), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=100)
def test_nearest_against_all_distances(values, quarters):
    grid = ScoreGrid.of(sorted(values))
    wanted = np.array(quarters) / 4
    distances = np.abs(wanted[:, None] - np.array(grid.values))
    np.testing.assert_array_equal(grid.nearest(wanted), distances.argmin(1))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), [1.0, float("nan")]])
def test_nearest_to_no_number(bad):
    with pytest.raises(InputError, match="not a finite number"):
        ScoreGrid.integers(1, 5).nearest(bad)


# Tokens in context


@pytest.mark.parametrize(
    ("name", "prefix", "text", "tokens"),
    [
        ("byte-level", "The score is", " 10", ["Ġ10"]),
        ("byte-level", "The score is:", "10", ["10"]),
        ("byte-level", "", "2.5", ["2", ".", "5"]),
        ("byte-level, digits", "The score is", " 10", ["Ġ", "1", "0"]),
        ("byte-level, digits", "The score is ", "10", ["1", "0"]),
        ("pieces", "The score is", " 10", ["▁10"]),
        ("pieces", "The score is", "10", ["1", "0"]),
        ("pieces", "", "10", ["▁10"]),
        ("pieces, digits", "The score is", " 10", ["▁", "1", "0"]),
        ("pieces, digits", "The score is ", "10", ["1", "0"]),
        ("pieces, digits", "", "10", ["▁", "1", "0"]),
        ("pieces, no space", "", "10", ["10"]),
        ("pieces, no space", "The score is", " 10", ["▁10"]),
        ("pieces, digits, no space", "", "10", ["1", "0"]),
        ("unigram", "The score is", " 10", ["▁10"]),
        ("unigram, digits", "The score is ", "10", ["1", "0"]),
        ("wordpiece", "The score is", " 10", ["10"]),
        ("wordpiece", "The score is ", "10", ["10"]),
        ("wordpiece", "The score is", "10", ["##1", "##0"]),
        ("wordpiece", "The score is ", "2.5", ["2", ".", "5"]),
        ("wordpiece", "The score is ", "É", ["e"]),
        ("word-level", "The score is ", "10", ["10"]),
    ],
)
def test_the_context_decides(name, prefix, text, tokens):
    tokenizer = TOKENIZERS[name]()
    codec = ScoreGrid.of([10], [text]).tokenize(tokenizer, prefix)
    [row] = codec.table(tokenizer)
    assert list(row.tokens) == tokens
    assert list(row.ids) == tokenizer.convert_tokens_to_ids(tokens)
    assert codec.terminator is None
    np.testing.assert_array_equal(codec.lengths, [len(tokens)])


def test_one_token_each():
    tokenizer = byte_level_bpe()
    grid = ScoreGrid.integers(0, 100, text=" {}")
    codec = grid.tokenize(tokenizer, "The score is", terminator=7)
    assert codec.single_token and codec.terminator is None
    assert codec.tokens.shape == (101, 1) and codec.tokens.dtype == np.int32
    assert codec.mask.dtype == bool and codec.mask.all()
    assert codec.values.dtype == np.float32
    names = tokenizer.convert_ids_to_tokens(codec.tokens[:, 0].tolist())
    assert names == [f"Ġ{value}" for value in range(101)]


@pytest.mark.parametrize("name", ["byte-level, digits", "chat", "pieces, digits"])
@pytest.mark.parametrize("terminator", [None, 7])
def test_digits_are_terminated(name, terminator):
    tokenizer = TOKENIZERS[name]()
    end = tokenizer.eos_token_id if terminator is None else terminator
    digit = {d: tokenizer.convert_tokens_to_ids(d) for d in "0123456789"}
    codec = ScoreGrid.integers(0, 100).tokenize(tokenizer, "score is ", terminator=terminator)
    assert codec.terminator == end
    assert codec.ids == [[*(digit[d] for d in str(value)), end] for value in range(101)]
    assert codec.tokens.shape == (101, 4) and not codec.single_token
    np.testing.assert_array_equal(codec.tokens[~codec.mask], 0)
    np.testing.assert_array_equal(codec.lengths, [len(str(value)) + 1 for value in range(101)])


def test_no_terminator_where_lengths_are_equal():
    grid = ScoreGrid.linspace(0, 5, 51)
    codec = grid.tokenize(byte_level_bpe(split_digits=True), "score is ", terminator=7)
    assert codec.terminator is None
    np.testing.assert_array_equal(codec.lengths, 51 * [3])


grids = st.one_of(
    st.builds(ScoreGrid.integers, st.integers(0, 9), st.integers(9, 20)),
    st.sampled_from(["0:5:0.1", "0:1:0.25", "-2:2", "1,2.5,10", "1,1.5,15", "0:100:10"]).map(
        ScoreGrid.parse
    ),
    st.sets(st.integers(0, 100), min_size=1, max_size=8).map(lambda v: ScoreGrid.of(sorted(v))),
    st.integers(1, 5).map(lambda k: ScoreGrid.of(range(k), "abcde"[:k])),
)


@given(
    st.sampled_from(sorted(TOKENIZERS)),
    grids,
    st.sampled_from(["", "The score is", "So the overall score is ", "Score:", "(", "1"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_sequences_are_disjoint_and_in_context(name, grid, prefix, spaced):
    tokenizer = TOKENIZERS[name]()
    if spaced:
        grid = ScoreGrid.of(grid.values, grid.texts, text=" {}")
    try:
        codec = grid.tokenize(tokenizer, prefix)
    except InputError as error:
        assert f"prefix {prefix!r}" in str(error) or "both written" in str(error)
        return
    sequences = codec.ids
    assert not overlapping(sequences)
    # Kraft: disjoint events of a uniform model over V tokens have probabilities that sum to <= 1.
    assert sum(float(len(tokenizer)) ** -len(ids) for ids in sequences) <= 1
    np.testing.assert_array_equal(codec.values, grid.array)
    np.testing.assert_array_equal(codec.mask, np.sort(codec.mask, axis=1)[:, ::-1])
    before = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    bare = sequences
    if codec.terminator is not None:
        assert all(ids[-1] == codec.terminator for ids in sequences)
        bare = [ids[:-1] for ids in sequences]
    assert overlapping(bare) == (codec.terminator is not None)
    for ids, text in zip(bare, grid.texts, strict=True):
        assert before + ids == tokenizer(prefix + text, add_special_tokens=False)["input_ids"]
        if name in LOSSLESS and prefix:
            assert tokenizer.decode(before + ids) == prefix + text


@pytest.mark.parametrize(
    ("name", "values", "texts", "prefix", "parts"),
    [
        # A space that ends the prefix goes with the digit; the cure is shown.
        ("byte-level", [5], ["5"], "is ", ["value 5", "['is', 'Ġ']", "['is', 'Ġ5']", "text=' {}'"]),
        ("pieces", [5], ["5"], "is ", ["value 5", "['▁is', '▁']", "['▁is', '▁5']", "text=' {}'"]),
        ("byte-level", [5], ["5"], "1", ["value 5", "['1']", "['15']", "text=' {}'"]),
        # Where the word before must be followed by a space, either way round.
        ("word-level", [5], ["5"], "is", ["value 5", "['is']", "['<unk>']", "text=' {}'"]),
        ("word-level", [5], ["½"], "score ", ["value 5", "'½'", "['<unk>']", "unknown token"]),
        ("pieces", [1, 5], ["1", "½"], "", ["value 5", "'½'", "'<unk>'", "unknown token"]),
        ("wordpiece", [1, 2], ["1", "№"], "", ["value 2", "'[UNK]'", "unknown token"]),
        ("wordpiece", [2, 3], ["A", "a"], "", ["values 2 and 3", "['a']", "tells apart"]),
        ("wordpiece", [1, 2], ["1", " 1"], "is ", ["values 1 and 2", "['1']", "tells apart"]),
        ("pieces", [3, 5], ["4", " 4"], "", ["values 3 and 5", "['▁4']", "tells apart"]),
        ("wordpiece", [1], ["\u0301"], "is ", ["value 1", "no token"]),
    ],
)
def test_values_that_cannot_be_told(name, values, texts, prefix, parts):
    with pytest.raises(InputError) as caught:
        ScoreGrid.of(values, texts).tokenize(TOKENIZERS[name](), prefix)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("prefix", ["is", "is ", "(", "score: "])
@pytest.mark.parametrize("text", ["{}", " {}"])
def test_the_cure_cures(name, prefix, text):
    tokenizer = TOKENIZERS[name]()
    try:
        ScoreGrid.integers(1, 9, text=text).tokenize(tokenizer, prefix)
    except InputError as error:
        message = str(error)
        assert "carry the space" in message
        advice = message[message.rindex("prefix=") :]
        found = dict(part.split("=") for part in advice.split(" and "))
        cured = {key: value.strip("'") for key, value in found.items()}
        ScoreGrid.integers(1, 9, text=cured["text"]).tokenize(tokenizer, cured["prefix"])


def test_a_space_that_belongs_to_the_word_before():
    pieces = ["i", "s", " ", "4", "5", "is", "is "]
    model = models.BPE({piece: k for k, piece in enumerate(pieces)}, [("i", "s"), ("is", " ")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    advice = r"\['is'\] alone and \['is ', '4'\] .* carry the space: prefix='is ' and text='{}'"
    with pytest.raises(InputError, match=advice):
        ScoreGrid.of([4, 5], text=" {}").tokenize(tokenizer, "is")
    assert ScoreGrid.of([4, 5]).tokenize(tokenizer, "is ").ids == [[3], [4]]


def test_characters_dropped_in_silence_are_found():
    tokenizer = Tokenizer(models.BPE({"4": 0, "2": 1, " ": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    lossy = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert lossy("4x")["input_ids"] == [0]
    with pytest.raises(InputError, match=r"value 4\.5, text '4x'.*\['4'\].*read back as '2 4'"):
        ScoreGrid.of([2, 4.5], ["2", "4x"]).tokenize(lossy, "2 ")


def test_a_terminator_is_needed():
    with pytest.raises(InputError, match=r"value 1 is written \['1'\], .* value 10, \['1', '0'\]"):
        digits = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_bpe(split_digits=True).backend_tokenizer
        )
        ScoreGrid.of([1, 2, 10]).tokenize(digits)
    assert word_level(eos=False).eos_token_id is None
    assert ScoreGrid.integers(1, 20).tokenize(word_level(eos=False), "is ").single_token


@pytest.mark.parametrize("terminator", [-1, 10**6])
def test_a_terminator_is_a_token(terminator):
    with pytest.raises(InputError, match=f"terminator is {terminator}; expected a token id"):
        ScoreGrid.integers(1, 10).tokenize(byte_level_bpe(), terminator=terminator)


def test_a_terminator_is_no_part_of_a_value():
    tokenizer = byte_level_bpe(split_digits=True)
    zero = tokenizer.convert_tokens_to_ids("0")
    with pytest.raises(InputError, match=r"value 10 is written \['1', '0'\].*terminator \['0'\]"):
        ScoreGrid.integers(1, 10).tokenize(tokenizer, terminator=zero)


def test_table_shows_the_terminator():
    tokenizer = chat()
    rows = ScoreGrid.of([1, 10]).tokenize(tokenizer, "score is ").table(tokenizer)
    assert [row.value for row in rows] == [1.0, 10.0]
    assert [row.tokens for row in rows] == [("1", "<|im_end|>"), ("1", "0", "<|im_end|>")]
    assert [row.text for row in rows] == ["1<|im_end|>", "10<|im_end|>"]
    assert list(rows[0].ids) == tokenizer.convert_tokens_to_ids(["1", "<|im_end|>"])


# Token grids made by hand, and as pytrees


def test_from_ids():
    codec = TokenGrid.from_ids([16, [17]], np.array([1.0, 2.0]), terminator=2)
    assert codec.single_token and codec.terminator is None
    assert codec.tokens.dtype == np.int32 and codec.values.dtype == np.float32
    np.testing.assert_array_equal(codec.tokens, [[16], [17]])
    codec = TokenGrid.from_ids([[5, 6, 7], [5], [8]], [-1, 0, 1], terminator=2)
    np.testing.assert_array_equal(codec.tokens, [[5, 6, 7, 2], [5, 2, 0, 0], [8, 2, 0, 0]])
    np.testing.assert_array_equal(codec.mask.sum(1), codec.lengths)
    np.testing.assert_array_equal(codec.lengths, [4, 2, 2])


@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=9, unique_by=tuple
    ),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_from_ids_is_prefix_free(sequences, terminator):
    values = list(range(len(sequences)))
    clash = overlapping(sequences)
    if clash and any(terminator in ids for ids in sequences):
        with pytest.raises(InputError, match="holds the terminator"):
            TokenGrid.from_ids(sequences, values, terminator)
        return
    codec = TokenGrid.from_ids(sequences, values, terminator)
    assert codec.ids == [ids + [terminator] if clash else ids for ids in sequences]
    assert not overlapping(codec.ids)
    assert codec.terminator == (terminator if clash else None)
    again = TokenGrid.from_ids(codec.ids, codec.values)
    assert again.ids == codec.ids and again.terminator is None


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ([[1], [2]], [1, 2, 3], "2 token sequences and 3 values"),
        ([[1], []], [1, 2], r"value 2 is \[\]"),
        ([[1], [-2]], [1, 2], r"value 2 is \[-2\]"),
        ([1, 2.0], [1, 2], r"value 2 is 2\.0"),
        ([1, "2"], [1, 2], "value 2 is '2'"),
        ([1, [[2], [3, 4]]], [1, 2], r"value 2 is \[\[2\], \[3, 4\]\]"),
        ([1, 2**31], [1, 2], "value 2 is 2147483648"),
        ([[7, 8], [7, 8]], [1, 2], r"values 1 and 2 are both written \[7, 8\]"),
        ([[1], [2]], [2, 1], "1 comes after 2"),
        ([[7], [7, 8]], [1, 2], r"value 1 is written \[7\], which begins value 2, \[7, 8\]"),
        ([], [], "0 values"),
    ],
)
def test_bad_ids(ids, values, message):
    with pytest.raises(InputError, match=message):
        TokenGrid.from_ids(ids, values)


def test_a_token_grid_is_a_pytree():
    codec = TokenGrid.from_ids([[5], [5, 6]], [1, 2], terminator=2)
    traced = jax.jit(lambda c: (jnp.where(c.mask, c.tokens, 0).sum(-1) * c.values, c.lengths))
    weighted, lengths = traced(codec)
    np.testing.assert_array_equal(weighted, [7.0, 26.0])
    np.testing.assert_array_equal(lengths, [2, 3])
    returned = jax.jit(lambda c: c)(codec)
    assert returned.terminator == 2 and returned.ids == codec.ids
    leaves, structure = jax.tree.flatten(codec)
    assert len(leaves) == 3
    assert structure != jax.tree.structure(TokenGrid.from_ids([5, 6], [1, 2]))
    placeholder = jax.tree.unflatten(structure, [None, None, None])
    assert placeholder.tokens is None and placeholder.terminator == 2
