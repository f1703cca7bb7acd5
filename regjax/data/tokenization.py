"""A template's texts as token ids: only its own special tokens count as such; and what is cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from regjax.data.template import Rendered, Skeleton
from regjax.errors import InputError

Ids = list[int]
Offsets = list[tuple[int, int]]  # of each token, in characters


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokenizer's special tokens where a text spells them out."""
    specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    by_length = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def leading_ids(tokenizer: Any) -> Ids:
    """Special tokens that the tokenizer puts before a text (bos, cls)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError("the tokenizer writes a text otherwise when it adds special tokens")


class Tokenization:
    """Tokenizes the texts of one template, without leading special tokens."""

    def __init__(self, skeleton: Skeleton, tokenizer: Any):
        self.tokenizer = tokenizer
        self.leading = leading_ids(tokenizer) if skeleton.adds_special_tokens else []
        self.special = special_tokens(tokenizer)
        # Literal pieces hold special tokens on purpose; anything beyond their number is a record's.
        self.special_counts = {
            prompts_only: sum(
                len(self.special.findall(piece)) for piece in pieces if isinstance(piece, str)
            )
            for prompts_only, pieces in ((True, skeleton.prompt), (False, skeleton.pieces))
        }

    def ids(self, rendered: Sequence[Rendered], prompts_only: bool) -> list[Ids]:
        """Ids of each text."""
        found = self.plain([item.text for item in rendered])
        for index in self._guarded(rendered, prompts_only):
            found[index] = self._tokenize_guarded(rendered[index])[0]
        return found

    def ids_and_offsets(
        self, rendered: Sequence[Rendered], prompts_only: bool
    ) -> list[tuple[Ids, Offsets]]:
        """Ids and offsets of each text, at more cost than the ids alone."""
        texts = [item.text for item in rendered]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        for index in self._guarded(rendered, prompts_only):
            pairs[index] = self._tokenize_guarded(rendered[index])
        return pairs

    def plain(self, texts: list[str]) -> list[Ids]:
        """Ids of texts where every special token counts as such."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _guarded(self, rendered: Sequence[Rendered], prompts_only: bool) -> list[int]:
        count = self.special_counts[prompts_only]
        return [
            i for i, item in enumerate(rendered) if len(self.special.findall(item.text)) != count
        ]

    def _tokenize_guarded(self, rendered: Rendered) -> tuple[Ids, Offsets]:
        """Ids and offsets, where only the template's special tokens count as such."""
        ids: Ids = []
        offsets: Offsets = []
        at, literal = 0, 0
        ends = [*((start, end) for _, start, end in rendered.fields), (len(rendered.text),) * 2]
        spans = []
        for start, end in ends:
            spans += [
                match.span() for match in self.special.finditer(rendered.text, literal, start)
            ]
            literal = end
        for start, end in [*spans, (len(rendered.text),) * 2]:
            if at < start:
                part = self.tokenizer(
                    rendered.text[at:start],
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                    verbose=False,
                )
                ids += part["input_ids"]
                offsets += [(at + low, at + high) for low, high in part["offset_mapping"]]
            if start < end:
                ids.append(self.tokenizer.convert_tokens_to_ids(rendered.text[start:end]))
                offsets.append((start, end))
            at = end
        return ids, offsets


def cut(offsets: Offsets, text: Rendered, excess: int) -> np.ndarray:
    """Mask of the tokens that stay when `excess` have to go, as many as the cuttable fields allow.

    The longest fields shrink to one common length; among equals the later one gives first.
    """
    spans = np.reshape(offsets, (-1, 2))
    keep = np.ones(len(spans), bool)
    inside = [
        np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > start))
        for field, start, end in text.fields
        if field.cut
    ]
    inside = [tokens for tokens in inside if len(tokens)]
    lengths = [len(tokens) for tokens in inside]
    for _ in range(min(excess, sum(lengths) - len(lengths))):
        longest = max(range(len(lengths)), key=lambda i: (lengths[i], i))
        lengths[longest] -= 1
    for tokens, length in zip(inside, lengths, strict=True):
        # A character may take several tokens of the same offsets: it is not cut in two.
        while 1 < length < len(tokens) and spans[tokens[length], 0] < spans[tokens[length - 1], 1]:
            length -= 1
        keep[tokens[length:]] = False
    return keep
