"""Numbers as token sequences: how a tokenizer writes each value of a grid, as arrays."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from regjax.errors import InputError

MAX_VALUES = 100_000

_VERBATIM = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class TokenRow(NamedTuple):
    """One value of a `TokenGrid`, for a person to check."""

    value: float
    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGrid:
    """K numeric values and the token sequence of each: a pytree that passes through `jit`.

    Made by `ScoreGrid.tokenize`, or by hand with `TokenGrid.from_ids`, which check it; the bare
    constructor does not, since JAX calls it with whatever a transformation puts in the fields.

    `tokens` is `[K, T]` int32 padded with 0, `mask` `[K, T]` bool and True on real tokens, `values`
    `[K]` float32 and ascending. No sequence begins another; `terminator` is the id that ends all of
    them where that took one, and is then part of `tokens` and `mask`.
    """

    tokens: np.ndarray
    mask: np.ndarray
    values: np.ndarray
    terminator: int | None = None

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[int | Sequence[int]],
        values: Sequence[float] | np.ndarray,
        terminator: int | None = None,
    ) -> TokenGrid:
        """A grid from each value's token id or ids, without the terminator.

        `terminator` is appended only if one sequence begins another, as in `ScoreGrid.tokenize`.

        >>> codec = TokenGrid.from_ids([[16], [16, 15]], [1, 10], terminator=2)
        >>> codec.tokens
        array([[16, 2, 0],
               [16, 15, 2]], dtype=int32)
        >>> codec.lengths
        array([2, 3])

        Raises `InputError` on ids that are no non-negative integers, empty or equal sequences,
        values that are not ascending and finite, lengths that differ, and a missing terminator.
        """
        numbers = list(values)
        check_values(numbers)
        if len(ids) != len(numbers):
            raise InputError(
                f"token grid: {len(ids)} token sequences and {len(numbers)} values; give one each"
            )
        sequences = [
            _token_ids(entry, f"value {number:.9g}")
            for entry, number in zip(ids, numbers, strict=True)
        ]
        return _token_grid(sequences, numbers, terminator, lambda row: str(list(row)))

    @property
    def single_token(self) -> bool:
        """Whether every value is one token, so that one softmax holds all their probabilities."""
        return self.tokens.shape[1] == 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each value, the terminator included: `[K]`."""
        return self.mask.sum(-1)

    @property
    def ids(self) -> list[list[int]]:
        """The K sequences without padding, the terminator included (not inside `jit`)."""
        return [
            np.asarray(row)[np.asarray(keep)].tolist()
            for row, keep in zip(self.tokens, self.mask, strict=True)
        ]

    def table(self, tokenizer: Any) -> list[TokenRow]:
        """Each value with its decoded text, its token ids and the tokenizer's names of them."""
        return [
            TokenRow(
                value=float(value),
                text=tokenizer.decode(row, **_VERBATIM),
                ids=tuple(row),
                tokens=tuple(tokenizer.convert_ids_to_tokens(row)),
            )
            for value, row in zip(self.values, self.ids, strict=True)
        ]


jax.tree_util.register_dataclass(
    TokenGrid, data_fields=["tokens", "mask", "values"], meta_fields=["terminator"]
)


def in_context(
    tokenizer: Any,
    prefix: str,
    values: Sequence[float],
    texts: Sequence[str],
    terminator: int | None = None,
) -> TokenGrid:
    """The token grid of `texts` as `tokenizer` writes them after `prefix`: `ScoreGrid.tokenize`."""
    if terminator is None:
        terminator = tokenizer.eos_token_id
    elif not 0 <= terminator < len(tokenizer):
        raise InputError(
            f"score grid: the terminator is {terminator}; expected a token id of the tokenizer, 0 "
            f"to {len(tokenizer) - 1}"
        )
    before = _encode(tokenizer, prefix)
    sequences = [
        _continuation(tokenizer, prefix, before, value, text)
        for value, text in zip(values, texts, strict=True)
    ]
    return _token_grid(
        sequences, values, terminator, lambda ids: str(tokenizer.convert_ids_to_tokens(list(ids)))
    )


def check_values(values: Sequence[Any]) -> None:
    """Raises `InputError` unless the values are a few finite numbers, ascending as float32."""
    if not 1 <= len(values) <= MAX_VALUES:
        raise InputError(f"score grid: {len(values)} values; expected 1 to {MAX_VALUES}")
    for value in values:
        if np.ndim(value) or np.asarray(value).dtype.kind not in "iuf":
            raise InputError(f"score grid: value {value!r} is not a number")
    with np.errstate(over="ignore"):
        array = np.asarray(values, np.float64).astype(np.float32)
    if not np.isfinite(array).all():
        bad = values[int(np.argmin(np.isfinite(array)))]
        raise InputError(f"score grid: value {bad} is not a finite float32 number")
    descents = np.flatnonzero(array[1:] <= array[:-1])
    if descents.size:
        before, after = values[descents[0]], values[descents[0] + 1]
        raise InputError(
            f"score grid: {after} comes after {before}; values must be ascending and distinct (as "
            f"float32)"
        )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _continuation(
    tokenizer: Any, prefix: str, before: list[int], value: float, text: str
) -> list[int]:
    """The ids that `text` adds to the prefix's; an `InputError` says why it cannot be."""
    joint = _encode(tokenizer, prefix + text)
    ids = joint[len(before) :]
    names = tokenizer.convert_ids_to_tokens
    place = f"score grid: value {value:.9g}, text {text!r} after prefix {prefix!r}"
    if joint[: len(before)] != before:
        raise InputError(
            f"{place}: the text merges with the prefix, which is {names(before)} alone and "
            f"{names(joint)} with the text; {_cure(tokenizer, prefix, text)}"
        )
    if not ids:
        raise InputError(f"{place}: the tokenizer writes it with no token; use another text")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise InputError(
            f"{place}: the tokenizer writes it {names(ids)}, with its unknown token "
            f"{names([tokenizer.unk_token_id])[0]!r}; use a text that the tokenizer knows"
        )
    read_back = tokenizer.decode(joint, **_VERBATIM)
    if not _bare(read_back).endswith(_bare(text)):
        raise InputError(
            f"{place}: the tokenizer writes it {names(ids)}, and prefix and text read back as "
            f"{read_back!r}; use a text that the tokenizer keeps"
        )
    return ids


def _bare(text: str) -> str:
    """The text without what tokenizers normalise: case, accents, width and spaces."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in decomposed if not c.isspace() and not unicodedata.combining(c))


def _cure(tokenizer: Any, prefix: str, text: str) -> str:
    """The first way of moving the space between prefix and text that keeps the two apart."""
    bare_prefix, bare_text = prefix.rstrip(" "), text.lstrip(" ")
    for carrier, new_prefix, new_text in (
        ("text", bare_prefix, " " + bare_text),
        ("prefix", bare_prefix + " ", bare_text),
    ):
        before = _encode(tokenizer, new_prefix)
        if _encode(tokenizer, new_prefix + new_text)[: len(before)] == before:
            pattern = new_text[: len(new_text) - len(bare_text)] + "{}"
            return f"let the {carrier} carry the space: prefix={new_prefix!r} and text={pattern!r}"
    return "end the prefix where a token ends, with a new line for instance, or use another text"


def _token_ids(entry: Any, place: str) -> list[int]:
    """One hand-made sequence of token ids."""
    try:
        ids = [operator.index(entry)] if np.ndim(entry) == 0 else list(map(operator.index, entry))
    except (TypeError, ValueError):
        ids = []
    if not ids or min(ids) < 0 or max(ids) > np.iinfo(np.int32).max:
        raise InputError(f"token grid: {place} is {entry!r}; expected a token id or a list of them")
    return ids


def _token_grid(
    sequences: list[list[int]],
    values: Sequence[float],
    terminator: int | None,
    show: Callable[[Sequence[int]], str],
) -> TokenGrid:
    """The padded arrays of the sequences, terminated if one of them begins another."""
    overlapping = _overlap(sequences, values, show)
    if overlapping is None:
        return _padded(sequences, values, None)
    if terminator is None:
        short, long = overlapping
        raise InputError(
            f"score grid: value {values[short]:.9g} is written {show(sequences[short])}, which "
            f"begins value {values[long]:.9g}, {show(sequences[long])}, and nothing sets "
            f"them apart; give the id of a token that ends a number as terminator="
        )
    [end] = _token_ids(terminator, "the terminator")
    for value, ids in zip(values, sequences, strict=True):
        if end in ids:
            raise InputError(
                f"score grid: value {value:.9g} is written {show(ids)}, which holds the terminator "
                f"{show([end])}; give another one as terminator="
            )
    return _padded([[*ids, end] for ids in sequences], values, end)


def _overlap(
    sequences: list[list[int]], values: Sequence[float], show: Callable[[Sequence[int]], str]
) -> tuple[int, int] | None:
    """Indices of a sequence and of another that begins with it; equal ones are an `InputError`."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    overlapping = None
    # If a sequence begins another one, it begins its own successor in lexicographic order.
    for short, long in itertools.pairwise(order):
        if sequences[short] == sequences[long]:
            raise InputError(
                f"score grid: values {values[short]:.9g} and {values[long]:.9g} are both written "
                f"{show(sequences[short])}; use texts that the tokenizer tells apart"
            )
        if sequences[long][: len(sequences[short])] == sequences[short]:
            overlapping = overlapping or (short, long)
    return overlapping


def _padded(
    sequences: list[list[int]], values: Sequence[float], terminator: int | None
) -> TokenGrid:
    lengths = np.array([len(ids) for ids in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = list(itertools.chain.from_iterable(sequences))
    return TokenGrid(tokens, mask, np.asarray(values, np.float32), terminator)
