"""Numbers as strings: grids of numeric targets and how a tokenizer writes them.

A language model gives a probability to a number only through the tokens of its text. `ScoreGrid`
holds the numbers and their texts; `ScoreGrid.tokenize` asks a tokenizer how it writes each text
*after a given prefix* and returns a `TokenGrid`, the arrays that losses and scorers take.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from regjax.errors import InputError
from regjax.token_grid import MAX_VALUES, TokenGrid, check_values, in_context

MAX_DECIMALS = 6

_NUMERAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


@dataclasses.dataclass(frozen=True)
class ScoreGrid:
    """K ascending, distinct, finite numbers, each with the text that stands for it.

    A text need not be the number's own digits: letters for ordered classes are legal. Values must
    stay distinct as float32, the type losses compute in.

    >>> grid = ScoreGrid.linspace(0, 5, 51)
    >>> len(grid), grid.texts[:3], grid.texts[-1]
    (51, ('0.0', '0.1', '0.2'), '5.0')
    >>> ScoreGrid.of([1, 2.5, 10], text=" {}").texts
    (' 1', ' 2.5', ' 10')

    Raises `InputError` on no values, more than `MAX_VALUES`, non-finite, equal or descending
    values, empty or repeated texts, and on lengths that differ.
    """

    values: tuple[float, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        values, texts = tuple(self.values), tuple(self.texts)
        check_values(values)
        if len(values) != len(texts):
            raise InputError(
                f"score grid: {len(values)} values and {len(texts)} texts; give one text per value"
            )
        first: dict[str, float] = {}
        for value, text in zip(values, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"score grid: the text of value {value:.9g} is {text!r}; expected a "
                    f"string that is not empty and not only white space"
                )
            if text in first:
                raise InputError(
                    f"score grid: values {first[text]:.9g} and {value:.9g} have the same text "
                    f"{text!r}; give each value its own"
                )
            first[text] = value
        # Adding 0.0 turns a negative zero into a plain one.
        object.__setattr__(self, "values", tuple(float(value) + 0.0 for value in values))
        object.__setattr__(self, "texts", texts)

    @classmethod
    def integers(cls, low: int, high: int, *, text: str = "{}") -> ScoreGrid:
        """`low, low + 1, ..., high`, both ends included; `text` is put around each number.

        >>> ScoreGrid.integers(1, 5).texts
        ('1', '2', '3', '4', '5')
        """
        first, last = operator.index(low), operator.index(high)
        return cls._decimals(first, 1, last - first + 1, decimals=0, pattern=text)

    @classmethod
    def linspace(cls, low: float, high: float, count: int, *, text: str = "{}") -> ScoreGrid:
        """`low + k (high - low) / (count - 1)` for k = 0 .. count - 1, as exact decimals.

        All texts have the same number of decimals, the fewest that write every value exactly. A
        step that would need more than `MAX_DECIMALS` of them (a third, say) is an `InputError`:
        rounded texts would stand for other numbers than the values. Pick another count, or give
        values and texts to `of`.

        >>> ScoreGrid.linspace(0, 1, 5).texts
        ('0.00', '0.25', '0.50', '0.75', '1.00')
        """
        start, stop, count = _exact(low), _exact(high), operator.index(count)
        if count < 1 or (count == 1) != (start == stop) or start > stop:
            raise InputError(
                f"linspace grid: {count} values from {low} to {high}; expected low < high and at "
                f"least 2 values (or 1 value and low = high)"
            )
        step = (stop - start) / (count - 1) if count > 1 else Fraction(0)
        for decimals in range(MAX_DECIMALS + 1):
            first, stride = start * 10**decimals, step * 10**decimals
            if first.denominator == stride.denominator == 1:
                return cls._decimals(int(first), int(stride), count, decimals, pattern=text)
        raise InputError(
            f"linspace grid: {count} values from {low} to {high} are {float(step):.9g} apart and "
            f"{MAX_DECIMALS} decimals do not write them exactly; choose a count whose step is a "
            f"short decimal, or give values and texts to ScoreGrid.of"
        )

    @classmethod
    def of(
        cls, values: Iterable[float], texts: Iterable[str] | None = None, *, text: str = "{}"
    ) -> ScoreGrid:
        """The given ascending values; `texts` default to each value's shortest decimal.

        `text` is put around the given texts as well.

        >>> ScoreGrid.of([1, 2, 3], ["a", "b", "c"], text=" {}").texts
        (' a', ' b', ' c')
        """
        numbers = list(values)
        check_values(numbers)
        written = [_shortest(number) for number in numbers] if texts is None else list(texts)
        return cls(
            tuple(float(_shortest(number)) for number in numbers),
            tuple(_around(text, word) for word in written),
        )

    @classmethod
    def labels(cls, *names: str, text: str = "{}") -> ScoreGrid:
        """Classes: the values 0, 1, ... with these texts; `text` is put around each of them.

        Their exact distribution ranks the labels. The mode is a class; the mean and the median take
        the values for a scale.

        >>> ScoreGrid.labels("True", "False", text=" {}")
        ScoreGrid(values=(0.0, 1.0), texts=(' True', ' False'))
        """
        for name in names:
            if not isinstance(name, str):
                raise InputError(
                    f"score grid: label {name!r} is not text; give each label by itself"
                )
        return cls.of(range(len(names)), names, text=text)

    @classmethod
    def parse(cls, spec: str, *, text: str = "{}") -> ScoreGrid:
        """The grid of a command line: `low:high`, `low:high:step` or `value,value,...`.

        Ends are included and the steps (1 by default) must land on the high one. Numbers are plain
        decimals, written as they are given: `1:5` gives "1" .. "5", `1.0:5` gives "1.0" .. "5.0".

        >>> ScoreGrid.parse("0:1:0.25").texts
        ('0.00', '0.25', '0.50', '0.75', '1.00')
        >>> ScoreGrid.parse("1,2.5,10").values
        (1.0, 2.5, 10.0)
        """
        ranged = ":" in spec
        words = [word.strip() for word in spec.split(":" if ranged else ",")]
        if (ranged and len(words) > 3) or not all(map(_NUMERAL.fullmatch, words)):
            raise InputError(
                f"score grid {spec!r}: expected low:high, low:high:step or value,value,... in "
                f"plain decimals, such as 1:5, 0:5:0.1 or 1,2.5,10"
            )
        if not ranged:
            return cls(
                tuple(float(word) for word in words), tuple(_around(text, word) for word in words)
            )
        decimals = max(len(word.partition(".")[2]) for word in words)
        low, high, *steps = (int(Fraction(word) * 10**decimals) for word in words)
        step = steps[0] if steps else 10**decimals
        if step <= 0 or low > high or (high - low) % step:
            raise InputError(
                f"score grid {spec!r}: expected low <= high, a positive step, and a high end that "
                f"the steps reach from the low one"
            )
        return cls._decimals(low, step, (high - low) // step + 1, decimals, pattern=text)

    @classmethod
    def _decimals(cls, first: int, step: int, count: int, decimals: int, pattern: str) -> ScoreGrid:
        """`(first + k step) / 10**decimals` for k = 0 .. count - 1, with that many decimals."""
        if not 1 <= count <= MAX_VALUES:
            raise InputError(f"score grid: {count} values; expected 1 to {MAX_VALUES}")
        numerals = [_decimal(first + index * step, decimals) for index in range(count)]
        return cls(tuple(map(float, numerals)), tuple(_around(pattern, word) for word in numerals))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def array(self) -> np.ndarray:
        """The values as float32 `[K]`."""
        return np.asarray(self.values, np.float32)

    def nearest(self, value: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """Index of the value nearest to each of `value[...]`: int32 `[...]`, the lower on a tie.

        >>> ScoreGrid.integers(1, 5).nearest([0.2, 2.5, 2.6, 9.0])
        array([0, 1, 2, 4], dtype=int32)

        Raises `InputError` if one is not finite.
        """
        wanted = np.asarray(value, np.float64)
        if not np.isfinite(wanted).all():
            bad = wanted[~np.isfinite(wanted)].flat[0]
            raise InputError(f"score {bad}: not a finite number, so no grid value is nearest to it")
        values = np.asarray(self.values, np.float64)
        above = np.clip(np.searchsorted(values, wanted), 1, max(len(values) - 1, 1))
        below = above - 1
        above = np.minimum(above, len(values) - 1)
        lower_wins = wanted - values[below] <= values[above] - wanted
        return np.where(lower_wins, below, above).astype(np.int32)

    def tokenize(
        self, tokenizer: Any, prefix: str = "", *, terminator: int | None = None
    ) -> TokenGrid:
        """How `tokenizer` writes each value after `prefix`: ids(prefix + text) less ids(prefix).

        The context matters: after "The score is" a tokenizer may write " 5" as one token, or as a
        space and a digit, or swallow a space that ends the prefix. Give the constant text that
        stands directly before the score, and let the grid's texts carry the space if the tokenizer
        wants it so. Without a prefix a text is tokenised as the beginning of everything.

        Where one value's tokens begin another's ("1" and "10"), "1" alone is no event of its own,
        so every sequence gets a terminator (the argument, or the tokenizer's end-of-text token).
        Otherwise none is added, and `TokenGrid.terminator` is None. Either way no sequence begins
        another: they are disjoint events, and their probabilities sum to at most 1.

        `tokenizer` is a `transformers` tokenizer, or anything that is called as one and has
        `convert_ids_to_tokens`, `decode`, `unk_token_id`, `eos_token_id` and a length.

        Raises `InputError`, naming the value and showing its tokens, when a text merges with the
        prefix, has no token, an unknown one, or tokens that do not read back as the text (without
        an unknown token, a tokenizer drops characters silently), when two values share their
        tokens, and when a terminator is needed and there is none or it occurs in a value.
        """
        return in_context(tokenizer, prefix, self.values, self.texts, terminator)


def _shortest(number: Any) -> str:
    """The shortest decimal that reads back as the number in its own precision, without exponent."""
    exact = np.asarray(number)
    if exact.dtype.kind != "f":
        exact = exact.astype(np.float64)
    return np.format_float_positional(exact + exact.dtype.type(0), trim="-")


def _exact(number: Any) -> Fraction:
    check_values([number])
    return Fraction(_shortest(number))


def _decimal(scaled: int, decimals: int) -> str:
    """`scaled / 10**decimals` written with exactly that many decimals."""
    digits = str(abs(scaled)).zfill(decimals + 1)
    whole, fraction = digits[: len(digits) - decimals], digits[len(digits) - decimals :]
    return "-" * (scaled < 0) + whole + "." * (decimals > 0) + fraction


def _around(pattern: str, word: str) -> str:
    if pattern.count("{}") != 1:
        raise InputError(
            f"score grid: the text pattern is {pattern!r}; expected {{}} exactly once, where the "
            f"number goes, as in ' {{}}'"
        )
    return pattern.replace("{}", word)
