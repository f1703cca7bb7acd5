"""Numbers as sequences of a fixed number of digit tokens, for a decoder that writes them.

Where a `ScoreGrid` names the few values that a number can take, these write any number, to a known
error. A tokenization is a plain value with a `vocabulary` of token texts, whose positions are the
ids; NumPy arrays `[...]` of numbers become ids `[..., length]` and come back. `allowed`, `[length,
V]`, says which tokens may stand where: with all others masked out, whatever a decoder samples is a
number, and the probabilities of all numbers sum to one.

=====================  ==============================================  =========================
tokenization           123.4                                           error
=====================  ==============================================  =========================
`DecimalTokens`        ``+ 1 2 3 4 E-1``                               relative, rounded
`FloatTokens`          ``+ + 2 1 2 3 4``                               relative, cut off
`NormalizedTokens`     only from 0 to 1: 0.523 is ``5 2 3``            absolute, cut off
=====================  ==============================================  =========================

Many numbers are floats nearest to one that can be written exactly (0.29 is not 29/100): those are
written as that one, in every tokenization.

After Song, Bahri, *Decoding-based Regression*, 2025, https://arxiv.org/abs/2501.19383, and the
tokenizers of `google-deepmind/regress-lm`, from which they differ where said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from regjax.errors import InputError

_SIGNS = ("+", "-")


@dataclasses.dataclass(frozen=True)
class DecimalTokens:
    """P10: a sign, the digits of a whole number, and one token for the power of ten.

        y ~ s m 10^e,    m of `digits` digits,    -exponent_range <= e <= exponent_range

    Numbers are rounded to `digits` significant digits, ties to even. Larger ones than the largest
    become it; of those below the smallest in magnitude, the upper half becomes it, the others zero.

    References:
        Charton, *Linear algebra with transformers*, 2021, https://arxiv.org/abs/2112.01898.

    >>> decimal = DecimalTokens()
    >>> ids = decimal.encode(1.2345)
    >>> [decimal.vocabulary[i] for i in ids], decimal.decode(ids).item()
    (['+', '1', '2', '3', '4', 'E-3'], 1.234)
    """

    digits: int = 4
    exponent_range: int = 10

    def __post_init__(self) -> None:
        _check_whole("digits", self.digits, 1, 15)
        _check_whole("exponent_range", self.exponent_range, 0, 250)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        reach = range(-self.exponent_range, self.exponent_range + 1)
        return (*_SIGNS, *map(str, range(10)), *(f"E{exponent}" for exponent in reach))

    @property
    def length(self) -> int:
        return self.digits + 2

    @property
    def largest(self) -> float:
        return float((10**self.digits - 1) * 10**self.exponent_range)

    @property
    def smallest(self) -> float:
        """The smallest positive number that keeps all its digits."""
        return float(Fraction(10) ** (self.digits - 1 - self.exponent_range))

    @property
    def allowed(self) -> np.ndarray:
        first_exponent = 2 + 10
        ranges = [(0, 2), *[(2, first_exponent)] * self.digits]
        return _allowed([*ranges, (first_exponent, len(self.vocabulary))], len(self.vocabulary))

    def encode(self, numbers: ArrayLike) -> np.ndarray:
        """Ids int32 `[..., length]` of finite numbers `[...]`; others raise `InputError`."""
        return _encode(numbers, self._encode_one, self.length)

    def decode(self, ids: ArrayLike) -> np.ndarray:
        """Float64 `[...]` of ids `[..., length]`; a token in a wrong place raises `InputError`."""
        ids = _checked(ids, self.allowed, self.vocabulary)
        whole = _whole_number(ids[..., 1:-1] - 2, 10)
        exponents = ids[..., -1] - 12 - self.exponent_range
        return np.where(ids[..., 0] == 1, -1.0, 1.0) * _scaled(whole, 10, exponents)

    def error_bound(self, numbers: ArrayLike) -> np.ndarray:
        """The largest |decoded - y| of numbers y in range: half of the last digit at y's magnitude.

        |y| 10^(1 - digits) / 2, or `smallest` / 2 below it.
        """
        magnitudes = np.abs(np.asarray(numbers, np.float64))
        return 0.5 * np.maximum(magnitudes * 10.0 ** (1 - self.digits), self.smallest)

    def _encode_one(self, number: float) -> list[int]:
        magnitude = min(abs(number), self.largest)
        if magnitude < self.smallest:
            magnitude = self.smallest if magnitude > 0.5 * self.smallest else 0.0
        text, exponent = f"{magnitude:.{self.digits - 1}e}".split("e")
        power = int(exponent) - self.digits + 1 if magnitude > 0.0 else 0
        digits = [int(digit) for digit in text.replace(".", "")]
        negative = number < 0.0 and magnitude > 0.0
        return [int(negative), *(2 + digit for digit in digits), 12 + self.exponent_range + power]


@dataclasses.dataclass(frozen=True)
class FloatTokens:
    """Like IEEE 754 in a base: a sign, the exponent with its sign, the digits of the mantissa.

        y ~ s B^(+-e) m,    1 <= m < B, cut off after `mantissa_digits` digits

    Larger numbers than the largest become it; smaller ones than the smallest become zero. Exponents
    that float64 does not hold are read as the last that it does, about +-300 for ten. Differs from
    regress-lm, which finds the exponent by a quotient of floating logarithms, and so may be
    one off next to a power of the base.

    >>> floats = FloatTokens()
    >>> ids = floats.encode(123.4)
    >>> [floats.vocabulary[i] for i in ids], floats.decode(ids).item()
    (['+', '+', '2', '1', '2', '3', '4'], 123.4)
    """

    base: int = 10
    exponent_digits: int = 1
    mantissa_digits: int = 4

    def __post_init__(self) -> None:
        _check_whole("base", self.base, 2, 36)
        _check_whole("exponent_digits", self.exponent_digits, 1, 10)
        _check_whole("mantissa_digits", self.mantissa_digits, 1, 52)
        if self.base**self.mantissa_digits > 2**53:
            raise InputError(
                f"mantissa_digits: {self.mantissa_digits} of base {self.base} are more than float64 "
                "holds; give fewer"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*_SIGNS, *map(str, range(self.base)))

    @property
    def length(self) -> int:
        return 2 + self.exponent_digits + self.mantissa_digits

    @property
    def largest(self) -> float:
        mantissa = Fraction(self.base**self.mantissa_digits - 1)
        return float(
            mantissa * Fraction(self.base) ** (self._top_exponent + 1 - self.mantissa_digits)
        )

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return float(Fraction(self.base) ** -self._top_exponent)

    @property
    def allowed(self) -> np.ndarray:
        digits = self.exponent_digits + self.mantissa_digits
        size = 2 + self.base
        return _allowed([(0, 2), (0, 2), *[(2, size)] * digits], size)

    def encode(self, numbers: ArrayLike) -> np.ndarray:
        """Ids int32 `[..., length]` of finite numbers `[...]`; others raise `InputError`."""
        return _encode(numbers, self._encode_one, self.length)

    def decode(self, ids: ArrayLike) -> np.ndarray:
        """Float64 `[...]` of ids `[..., length]`; a token in a wrong place raises `InputError`."""
        ids = _checked(ids, self.allowed, self.vocabulary)
        split = 2 + self.exponent_digits
        exponents = _whole_number(ids[..., 2:split] - 2, self.base)
        exponents = np.minimum(exponents, self._top_exponent)
        exponents = np.where(ids[..., 1] == 1, -exponents, exponents) + 1 - self.mantissa_digits
        mantissas = _whole_number(ids[..., split:] - 2, self.base)
        return np.where(ids[..., 0] == 1, -1.0, 1.0) * _scaled(mantissas, self.base, exponents)

    def error_bound(self, numbers: ArrayLike) -> np.ndarray:
        """What |decoded - y| stays below, for numbers y in range: the last digit at y's magnitude.

        |y| B^(1 - mantissa_digits), or `smallest` below it. The decoded magnitude is never above
        the true one.
        """
        magnitudes = np.abs(np.asarray(numbers, np.float64))
        return np.maximum(
            magnitudes * float(self.base) ** (1 - self.mantissa_digits), self.smallest
        )

    @property
    def _top_exponent(self) -> int:
        held = int(1000 / np.log2(self.base)) - self.mantissa_digits
        return min(self.base**self.exponent_digits - 1, held)

    def _encode_one(self, number: float) -> list[int]:
        magnitude = Fraction(min(abs(number), self.largest))
        if magnitude < Fraction(self.smallest):
            return [0, 0] + [2] * (self.length - 2)
        exponent = round(np.log2(float(magnitude)) / np.log2(self.base))
        while Fraction(self.base) ** exponent > magnitude:
            exponent -= 1
        while Fraction(self.base) ** (exponent + 1) <= magnitude:
            exponent += 1
        mantissa = _cut(magnitude, Fraction(self.base) ** (self.mantissa_digits - 1 - exponent))
        if mantissa == self.base**self.mantissa_digits:
            mantissa, exponent = mantissa // self.base, exponent + 1
        return [
            int(number < 0.0),
            int(exponent < 0),
            *(2 + digit for digit in _digits(abs(exponent), self.base, self.exponent_digits)),
            *(2 + digit for digit in _digits(mantissa, self.base, self.mantissa_digits)),
        ]


@dataclasses.dataclass(frozen=True)
class NormalizedTokens:
    """The leading digits of a number from 0 to 1, in a base.

        y ~ sum_{i=1}^{length} d_i B^-i

    One becomes the largest, 1 - B^-length. Cutting off puts the decoded numbers B^-length / 2 too
    low on average; `centered` adds that back when decoding.

    >>> normalized = NormalizedTokens()
    >>> normalized.encode([0.523, 1.0]).tolist()
    [[5, 2, 3], [9, 9, 9]]
    >>> normalized.decode([5, 2, 3]).item(), NormalizedTokens(centered=True).decode([5, 2, 3]).item()
    (0.523, 0.5235)
    """

    base: int = 10
    length: int = 3
    centered: bool = False

    def __post_init__(self) -> None:
        _check_whole("base", self.base, 2, 1 << 16)
        _check_whole("length", self.length, 1, 53)
        if self.base**self.length > 2**53:
            raise InputError(
                f"length: {self.length} digits of base {self.base} are more than float64 holds; give fewer"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.base)))

    @property
    def allowed(self) -> np.ndarray:
        return np.ones((self.length, self.base), bool)

    def encode(self, numbers: ArrayLike) -> np.ndarray:
        """Ids int32 `[..., length]` of numbers `[...]` from 0 to 1; others raise `InputError`."""
        return _encode(numbers, self._encode_one, self.length)

    def decode(self, ids: ArrayLike) -> np.ndarray:
        """Float64 `[...]` of ids `[..., length]`; ids that are no digits raise `InputError`."""
        whole = _whole_number(_checked(ids, self.allowed, self.vocabulary), self.base)
        return (whole + 0.5 * self.centered) / float(self.base**self.length)

    def error_bound(self, numbers: ArrayLike) -> np.ndarray:
        """The largest |decoded - y|: B^-length, and half of that if centered."""
        bound = (0.5 if self.centered else 1.0) * float(self.base) ** -self.length
        return np.full(np.shape(numbers), bound)

    def _encode_one(self, number: float) -> list[int]:
        if not 0.0 <= number <= 1.0:
            raise InputError(f"normalized tokens: got {number}; expected a number from 0 to 1")
        count = self.base**self.length
        return _digits(
            min(_cut(Fraction(number), Fraction(count)), count - 1), self.base, self.length
        )


def _encode(numbers: ArrayLike, one: Callable[[float], list[int]], length: int) -> np.ndarray:
    array = np.asarray(numbers, np.float64)
    finite = np.isfinite(array)
    if not finite.all():
        raise InputError(
            f"number tokens: got {array[~finite][0]}; expected finite numbers, leave out what has none"
        )
    ids = np.array([one(float(number)) for number in array.ravel()], np.int32)
    return ids.reshape(*array.shape, length)


def _checked(ids: ArrayLike, allowed: np.ndarray, vocabulary: tuple[str, ...]) -> np.ndarray:
    """Ids `[..., length]` as integers, every one allowed at its place."""
    array = np.asarray(ids)
    length, size = allowed.shape
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"ids must be integers; got {array.dtype} of shape {array.shape}")
    if array.ndim < 1 or array.shape[-1] != length:
        raise ValueError(f"ids have shape {array.shape}; expected [..., {length}]")
    array = array.astype(np.int64)
    known = (array >= 0) & (array < size)
    fits = known & allowed[np.arange(length), np.where(known, array, 0)]
    if not fits.all():
        place = tuple(np.argwhere(~fits)[0])
        found = int(array[place])
        name = repr(vocabulary[found]) if 0 <= found < size else "no token"
        raise InputError(
            f"number tokens: id {found} ({name}) at position {place[-1]} of {length}; expected one of "
            f"{[vocabulary[i] for i in np.flatnonzero(allowed[place[-1]])]}"
        )
    return array


def _allowed(ranges: list[tuple[int, int]], size: int) -> np.ndarray:
    """Bool `[length, size]`, true from each start to before each stop."""
    ids = np.arange(size)
    return np.stack([(ids >= start) & (ids < stop) for start, stop in ranges])


def _cut(magnitude: Fraction, scale: Fraction) -> int:
    """floor(magnitude * scale), or the whole number next to it that is this float, scaled back."""
    scaled = magnitude * scale
    nearest = round(scaled)
    return nearest if float(nearest / scale) == float(magnitude) else int(scaled)


def _digits(number: int, base: int, count: int) -> list[int]:
    return [number // base**place % base for place in reversed(range(count))]


def _whole_number(digits: np.ndarray, base: int) -> np.ndarray:
    """int64 `[...]` of digits `[..., T]`."""
    places = np.array([base**place for place in reversed(range(digits.shape[-1]))], np.int64)
    return digits @ places


def _scaled(whole: np.ndarray, base: int, exponents: np.ndarray) -> np.ndarray:
    """whole base^exponents, rounded once: Python divides whole numbers of any size exactly so."""

    def one(number: int, exponent: int) -> float:
        number, exponent = int(number), int(exponent)
        return number / base**-exponent if exponent < 0 else float(number * base**exponent)

    return np.vectorize(one, otypes=[np.float64])(whole, exponents)


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{name}: got {value}; expected a whole number from {low} to {high}")
