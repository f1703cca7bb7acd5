"""Numbers as digit tokens: regress-lm's documented examples, error bounds, round trips, the grammar."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from regjax.errors import InputError
from regjax.number_tokens import DecimalTokens, FloatTokens, NormalizedTokens

ALL = [
    DecimalTokens(),
    DecimalTokens(digits=1, exponent_range=2),
    DecimalTokens(digits=15, exponent_range=30),
    FloatTokens(),
    FloatTokens(base=2, exponent_digits=4, mantissa_digits=8),
    FloatTokens(base=3, exponent_digits=2, mantissa_digits=5),
    FloatTokens(exponent_digits=3),
    NormalizedTokens(),
    NormalizedTokens(base=2, length=7),
    NormalizedTokens(base=3, length=4, centered=True),
    NormalizedTokens(base=16, length=2),
]
each = pytest.mark.parametrize("tokens", ALL, ids=str)


def text(tokens, number):
    return " ".join(tokens.vocabulary[i] for i in tokens.encode(number))


def in_range(tokens):
    """Finite floats that the tokenization reaches."""
    if isinstance(tokens, NormalizedTokens):
        return st.floats(0.0, 1.0)
    return st.floats(-tokens.largest, tokens.largest)


@pytest.mark.parametrize(
    ("number", "written", "read"),
    [
        (1.2345, "+ 1 2 3 4 E-3", 1.234),
        (123.4, "+ 1 2 3 4 E-1", 123.4),
        (12345, "+ 1 2 3 4 E1", 12340),
        (-0.1234, "- 1 2 3 4 E-4", -0.1234),
        (0.0, "+ 0 0 0 0 E0", 0.0),
        (9.9996, "+ 1 0 0 0 E-2", 10.0),
        (1e300, "+ 9 9 9 9 E10", 9.999e13),
        (-1e300, "- 9 9 9 9 E10", -9.999e13),
        (1e-7, "+ 1 0 0 0 E-10", 1e-7),
        (0.51e-7, "+ 1 0 0 0 E-10", 1e-7),
        (-0.5e-7, "+ 0 0 0 0 E0", 0.0),
        (1e-300, "+ 0 0 0 0 E0", 0.0),
    ],
)
def test_decimal_tokens_round(number, written, read):
    tokens = DecimalTokens()
    assert text(tokens, number) == written
    assert tokens.decode(tokens.encode(number)) == read


@pytest.mark.parametrize(
    ("number", "written", "read"),
    [
        (123.4, "+ + 2 1 2 3 4", 123.4),
        (-0.1234, "- - 1 1 2 3 4", -0.1234),
        (1.23499, "+ + 0 1 2 3 4", 1.234),
        (1000.0, "+ + 3 1 0 0 0", 1000.0),
        (999.9999999999999, "+ + 2 9 9 9 9", 999.9),
        (1e-7, "+ - 7 1 0 0 0", 1e-7),
        (1e-9, "+ - 9 1 0 0 0", 1e-9),
        (9.99e-10, "+ + 0 0 0 0 0", 0.0),
        (1.234e10, "+ + 9 9 9 9 9", 9.999e9),
        (-1.234e10, "- + 9 9 9 9 9", -9.999e9),
        (0.0, "+ + 0 0 0 0 0", 0.0),
    ],
)
def test_float_tokens_cut_off_and_saturate(number, written, read):
    tokens = FloatTokens()
    assert text(tokens, number) == written
    assert tokens.decode(tokens.encode(number)) == read


@pytest.mark.parametrize(
    ("number", "base", "length", "ids", "read"),
    [
        (0.523, 10, 3, [5, 2, 3], 0.523),
        (0.29, 10, 2, [2, 9], 0.29),
        (1.0, 10, 3, [9, 9, 9], 0.999),
        (0.0, 10, 3, [0, 0, 0], 0.0),
        (0.12345, 10, 4, [1, 2, 3, 4], 0.1234),
        (0.25, 2, 3, [0, 1, 0], 0.25),
        (1.0, 16, 2, [15, 15], 15 / 16 + 15 / 256),
        (1 / 3, 3, 2, [1, 0], 1 / 3),
    ],
)
def test_normalized_tokens_are_the_leading_digits(number, base, length, ids, read):
    tokens = NormalizedTokens(base=base, length=length)
    assert tokens.encode(number).tolist() == ids
    assert tokens.decode(ids) == pytest.approx(read, rel=1e-15)


def test_cutting_off_is_half_a_digit_too_low_on_average_and_centering_mends_it():
    numbers = (np.arange(4000) + 0.5) / 4000
    for centered, bias in ((False, -0.005), (True, 0.0)):
        tokens = NormalizedTokens(length=2, centered=centered)
        found = tokens.decode(tokens.encode(numbers)) - numbers
        assert found.mean() == pytest.approx(bias, abs=1e-9)


def test_decimal_tokens_agree_with_the_scientific_notation_of_numpy():
    numbers = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-6, 14).repeat(10)
    tokens = DecimalTokens(digits=6, exponent_range=12)
    expected = [float(np.format_float_scientific(number, precision=5)) for number in numbers]
    np.testing.assert_array_equal(tokens.decode(tokens.encode(numbers)), expected)


@each
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(data=st.data())
def test_the_error_is_within_its_bound_and_numbers_that_can_be_written_come_back(tokens, data):
    shape = data.draw(arrays.array_shapes(max_dims=2, max_side=4))
    numbers = data.draw(arrays.arrays(np.float64, shape, elements=in_range(tokens)))
    ids = tokens.encode(numbers)
    assert ids.dtype == np.int32 and ids.shape == (*shape, tokens.length)
    assert tokens.allowed[np.arange(tokens.length), ids].all()
    read = tokens.decode(ids)
    # The number read and the bound are each rounded once.
    slack = np.finfo(float).eps * np.abs(numbers)
    assert (np.abs(read - numbers) <= tokens.error_bound(numbers) + slack).all()
    if isinstance(tokens, FloatTokens):
        assert (np.abs(read) <= np.abs(numbers)).all()
    np.testing.assert_array_equal(
        tokens.encode(read), np.where(read[..., None] == 0.0, tokens.encode(0.0), ids)
    )
    np.testing.assert_array_equal(tokens.decode(tokens.encode(read)), read)


@each
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31))
def test_whatever_may_be_sampled_is_a_finite_number_in_reach(tokens, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(np.flatnonzero(row), size=20) for row in tokens.allowed], axis=-1)
    numbers = tokens.decode(ids)
    assert np.isfinite(numbers).all()
    if not isinstance(tokens, NormalizedTokens):
        assert (np.abs(numbers) <= tokens.largest).all()
    else:
        assert ((numbers >= 0) & (numbers < 1)).all()


def test_the_probabilities_of_all_numbers_sum_to_one():
    tokens = FloatTokens(base=2, exponent_digits=1, mantissa_digits=2)
    scores = np.random.default_rng(1).normal(size=(tokens.length, len(tokens.vocabulary)))
    scores = np.where(tokens.allowed, scores, -np.inf)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    strings = np.array(list(itertools.product(range(len(tokens.vocabulary)), repeat=tokens.length)))
    legal = tokens.allowed[np.arange(tokens.length), strings].all(-1)
    assert legal.sum() == 2**5
    total = probabilities[np.arange(tokens.length), strings[legal]].prod(-1).sum()
    assert total == pytest.approx(1.0, abs=1e-12)
    numbers = tokens.decode(strings[legal])
    assert set(np.abs(numbers)) == {0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0}
    with pytest.raises(InputError):
        tokens.decode(strings[~legal][0])


def test_the_ends_of_the_range_can_be_written():
    for tokens in ALL:
        if isinstance(tokens, NormalizedTokens):
            continue
        ends = np.array([tokens.largest, -tokens.largest, tokens.smallest, -tokens.smallest])
        np.testing.assert_allclose(tokens.decode(tokens.encode(ends)), ends, rtol=1e-15)
        beyond = np.minimum(ends[:1] * 8, np.finfo(float).max)
        np.testing.assert_array_equal(tokens.encode(beyond), tokens.encode(ends[:1]))
    assert DecimalTokens(digits=3).largest == 9.99e12
    assert DecimalTokens(digits=3).smallest == 1e-8
    assert FloatTokens().largest == 9.999e9
    assert FloatTokens().smallest == 1e-9


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@each
def test_numbers_that_are_not_finite_raise(tokens, number):
    with pytest.raises(InputError, match=f"got {number}; expected finite numbers"):
        tokens.encode([0.5, number])


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(InputError, match=r"got 1.1; expected a number from 0 to 1"):
        NormalizedTokens().encode(1.1)
    with pytest.raises(InputError, match=r"got -0.1; expected a number from 0 to 1"):
        NormalizedTokens().encode([0.2, -0.1])
    with pytest.raises(
        InputError, match=r"id 2 \('0'\) at position 0 of 6; expected one of \['\+', '-'\]"
    ):
        DecimalTokens().decode([2, 2, 2, 2, 2, 20])
    with pytest.raises(InputError, match=r"id 99 \(no token\) at position 2 of 3"):
        NormalizedTokens().decode([1, 2, 99])
    with pytest.raises(InputError, match=r"id -1 \(no token\) at position 0"):
        NormalizedTokens().decode([-1, 2, 9])
    with pytest.raises(ValueError, match=r"ids have shape \(2,\); expected \[..., 3\]"):
        NormalizedTokens().decode([1, 2])
    with pytest.raises(TypeError, match="ids must be integers; got float64"):
        NormalizedTokens().decode([1.0, 2.0, 3.0])
    for make, message in [
        (lambda: DecimalTokens(digits=0), "digits: got 0"),
        (lambda: DecimalTokens(exponent_range=-1), "exponent_range: got -1"),
        (lambda: FloatTokens(base=1), "base: got 1"),
        (lambda: FloatTokens(mantissa_digits=16), "mantissa_digits: 16 of base 10"),
        (lambda: NormalizedTokens(length=0), "length: got 0"),
        (lambda: NormalizedTokens(base=1000, length=6), "length: 6 digits of base 1000"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
