"""Records -> examples: token ids, where the response and the score begin, what was cut."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regjax.data import bad_records
from regjax.data.bad_records import BadRecord, Unusable
from regjax.data.config import Data, Source
from regjax.data.sources import Record, read_records
from regjax.data.template import Field, Rendered, Skeleton, Template
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid

CHUNK = 1024  # texts tokenized in one call
TAIL = 32  # characters before the score that decide whether it stays apart from them


class Example(NamedTuple):
    """One tokenized record. `tokens[:response_start]` is the prompt."""

    tokens: np.ndarray  # [n] int32
    response_start: int  # index of the response's first token, n if the prompt is all there is
    score_start: int  # index of the score's first token, n if the tokens end before it
    score: float  # nan if unlabelled
    weight: float
    record: int  # index in the source
    task: int = 0  # which of the mixed tasks it is of


@dataclasses.dataclass(frozen=True)
class Examples:
    """The usable examples of a source, and by record index where each came from."""

    examples: list[Example]
    records: list[Mapping[str, Any]]
    places: list[str]
    ids: list[str]
    bad: list[BadRecord]
    truncated: int

    def __len__(self) -> int:
        return len(self.examples)


def load_examples(
    source: Source,
    data: Data,
    template: Template,
    tokenizer: Any,
    grid: ScoreGrid,
    codec: TokenGrid,
    *,
    labelled: bool = True,
    prompts_only: bool = False,
) -> Examples:
    """Reads `source` and writes every record as tokens: context, score, end of sequence.

    The context (all before the score) is tokenized as a whole, so it is what inference sees; the
    score's tokens are those of the grid value nearest to it, and the tokenizer's end token follows
    unless the codec's terminator did. Room for the grid's longest value is kept whatever the score
    is, so that a label never shows in what is cut. Too long: the last tokens wholly inside cuttable
    fields go, those of the longest field first, at least one stays; all other tokens are untouched.

    Special tokens spelled out in a record's text stay text.

    Args:
        labelled: False: scores are not read (nan) and the tokens end before the score.
        prompts_only: the tokens end before the response, for generation.

    Raises:
        InputError: the source cannot be read, no record has a field that is needed, records that
            cannot be used (with `on_bad_record="stop"`, or if no other is left), a slow tokenizer.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else "records"
    records = read_records(source, data.columns)
    needed = _needed_fields(data, template, tokenizer, labelled, prompts_only)
    _check_fields(name, records, needed)
    examples = encode_records(
        records,
        data,
        template,
        tokenizer,
        grid,
        codec,
        labelled=labelled,
        prompts_only=prompts_only,
    )
    bad_records.check_bad_records(name, examples.bad, len(records), data.on_bad_record)
    return examples


def encode_records(
    records: Sequence[Record],
    data: Data,
    template: Template,
    tokenizer: Any,
    grid: ScoreGrid,
    codec: TokenGrid,
    *,
    labelled: bool = True,
    prompts_only: bool = False,
) -> Examples:
    """As `load_examples`, of records that have been read; what cannot be used is listed in `bad`.

    Raises:
        InputError: a slow tokenizer, or a template that writes the score into the prompt.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the tokenizer is a slow one: a fast one (tokenizer.json) is needed")
    encoder = Encoder(template.skeleton(tokenizer), tokenizer, grid, codec, data.max_length)
    names = encoder.names(prompts_only)
    if labelled and data.score_field in names:
        raise InputError(f"template field {data.score_field!r} is the score: it would give it away")

    ids = [record.place for record in records]
    bad: dict[int, BadRecord] = {}
    drafts = []
    for index, record in enumerate(records):
        try:
            draft, ids[index] = _draft(index, record, names, data, grid, labelled)
            drafts.append(draft)
        except Unusable as error:
            bad[index] = error.at(record.place)
    examples = []
    truncated = 0
    for start in range(0, len(drafts), CHUNK):
        chunk = drafts[start : start + CHUNK]
        for draft, encoded in zip(chunk, encoder(chunk, prompts_only), strict=True):
            if isinstance(encoded, Unusable):
                bad[draft.record] = encoded.at(records[draft.record].place)
            else:
                example, cut = encoded
                examples.append(example)
                truncated += cut
    return Examples(
        examples=examples,
        records=[record.fields for record in records],
        places=[record.place for record in records],
        ids=ids,
        bad=[bad[index] for index in sorted(bad)],
        truncated=truncated,
    )


def _needed_fields(
    data: Data, template: Template, tokenizer: Any, labelled: bool, prompts_only: bool
) -> list[str]:
    skeleton = template.skeleton(tokenizer)
    pieces = skeleton.prompt if prompts_only else skeleton.pieces
    named = [piece.name for piece in pieces if isinstance(piece, Field)]
    return list(dict.fromkeys([*named, *_number_fields(data, labelled)]))


class _Draft(NamedTuple):
    fields: dict[str, str]
    score: float | None
    weight: float
    record: int


def _number_fields(data: Data, labelled: bool) -> list[str]:
    fields = [data.score_field if labelled else "", data.weight_field, data.id_field]
    return [field for field in fields if field]


def _check_fields(source: str, records: Sequence[Record], needed: Sequence[str]) -> None:
    """A field that no record has is a mistake in the config, not in the records."""
    parsed = [record.fields for record in records if not record.problem]
    present = dict.fromkeys(field for fields in parsed for field in fields)
    missing = [field for field in dict.fromkeys(needed) if field not in present]
    if parsed and missing:
        raise InputError(
            f"{source}: no record has the field {', '.join(map(repr, missing))}; the fields are "
            f"{', '.join(map(repr, present)) or 'none'}"
        )


def _draft(
    index: int,
    record: Record,
    names: Sequence[str],
    data: Data,
    grid: ScoreGrid,
    labelled: bool,
) -> tuple[_Draft, str]:
    if record.problem:
        raise Unusable("", None, record.problem)
    fields = {name: bad_records.text(name, record.fields.get(name)) for name in names}
    score = None
    if labelled:
        value = record.fields.get(data.score_field)
        score = bad_records.number(data.score_field, value)
        low, high = float(grid.values[0]), float(grid.values[-1])
        # A score at the grid's end may have been rounded to float32 by whoever stored it.
        slack = 1e-6 * max(abs(low), abs(high))
        if not low - slack <= score <= high + slack:
            raise Unusable(data.score_field, value, f"is off the grid's range {low:g} to {high:g}")
    weight = 1.0
    if data.weight_field:
        value = record.fields.get(data.weight_field)
        weight = bad_records.number(data.weight_field, value)
        if weight < 0:
            raise Unusable(data.weight_field, value, "is negative: expected a weight of 0 or more")
    identity = record.place
    if data.id_field:
        identity = bad_records.text(data.id_field, record.fields.get(data.id_field))
    return _Draft(fields, score, weight, index), identity


class Encoder:
    """Tokenizes drafts of records for one template, tokenizer and grid."""

    def __init__(
        self,
        skeleton: Skeleton,
        tokenizer: Any,
        grid: ScoreGrid,
        codec: TokenGrid,
        max_length: int,
    ):
        self.skeleton, self.tokenizer, self.grid = skeleton, tokenizer, grid
        self.max_length = max_length
        self.leading = _leading_ids(tokenizer) if skeleton.adds_special_tokens else []
        eos = tokenizer.eos_token_id
        self.end = [eos] if codec.terminator is None and eos is not None else []
        self.numbers = codec.ids
        self.room = max_length - len(self.leading) - max(map(len, self.numbers)) - len(self.end)
        specials = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        by_length = sorted(filter(None, specials), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        # Literal pieces hold special tokens on purpose; anything beyond their number is a record's.
        self.special_counts = {
            prompts_only: sum(
                len(self.special.findall(piece)) for piece in pieces if isinstance(piece, str)
            )
            for prompts_only, pieces in ((True, skeleton.prompt), (False, skeleton.pieces))
        }

    def names(self, prompts_only: bool) -> list[str]:
        """Fields that the text needs."""
        pieces = self.skeleton.prompt if prompts_only else self.skeleton.pieces
        return list(dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Field)))

    def __call__(
        self, drafts: Sequence[_Draft], prompts_only: bool = False
    ) -> list[tuple[Example, bool] | Unusable]:
        """For each draft its example and whether it was cut, or why there is none."""
        rendered = [self.skeleton.render(d.fields, response=not prompts_only) for d in drafts]
        contexts = self._tokenize(rendered, self.special_counts[prompts_only])
        apart = [True] * len(drafts) if prompts_only else self._apart(drafts, rendered)
        results: list[tuple[Example, bool] | Unusable] = []
        for draft, text, (ids, offsets), is_apart in zip(
            drafts, rendered, contexts, apart, strict=True
        ):
            try:
                if not is_apart:
                    reason = (
                        "the text before the score merges with it into one token: end it otherwise"
                    )
                    raise Unusable("", None, reason)
                results.append(self._example(draft, text, ids, offsets, prompts_only))
            except Unusable as error:
                results.append(error)
        return results

    def _example(
        self, draft: _Draft, text: Rendered, ids: list, offsets: list, prompts_only: bool
    ) -> tuple[Example, bool]:
        keep = np.ones(len(ids), bool)
        if len(ids) > self.room:
            keep = _cut(np.asarray(offsets), text, len(ids) - self.room)
            if keep.sum() > self.room:
                reason = (
                    f"takes {len(ids) + self.max_length - self.room} tokens, more than "
                    f"max_length={self.max_length}, and its cuttable fields cannot make up for it: "
                    "raise max_length or mark a field as {name|cut}"
                )
                raise Unusable("", None, reason)
        response = len(ids)
        if text.response_start < len(text.text):
            response = next(i for i, (_, end) in enumerate(offsets) if end > text.response_start)
        context = np.asarray(ids, np.int64)[keep]
        score_start = len(self.leading) + len(context)
        response_start = len(self.leading) + int(keep[:response].sum())
        if response_start == 0:
            raise Unusable("", None, "the prompt has no token of its own")
        number = []
        if draft.score is not None and not prompts_only:
            number = [*self.numbers[int(self.grid.nearest(draft.score))], *self.end]
        tokens = np.concatenate([self.leading, context, number]).astype(np.int32)
        score = math.nan if draft.score is None else draft.score
        example = Example(tokens, response_start, score_start, score, draft.weight, draft.record)
        return example, not keep.all()

    def _tokenize(self, rendered: Sequence[Rendered], specials: int) -> list[tuple[list, list]]:
        """Ids and offsets of each text, without leading special tokens."""
        texts = [item.text for item in rendered]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        for index, item in enumerate(rendered):
            if len(self.special.findall(item.text)) != specials:
                pairs[index] = self._tokenize_guarded(item)
        return pairs

    def _tokenize_guarded(self, rendered: Rendered) -> tuple[list, list]:
        """As `_tokenize`, where only the template's special tokens count as such."""
        ids, offsets, at, literal = [], [], 0, 0
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

    def _apart(self, drafts: Sequence[_Draft], rendered: Sequence[Rendered]) -> list[bool]:
        """Whether each score's tokens follow its text as they follow the template's score prefix.

        With a literal prefix as long as the tail they do, the codec was made so; a shorter one may
        merge with the end of a record's own text.
        """
        prefix = self.skeleton.score_prefix
        if len(prefix) >= TAIL:
            return [True] * len(drafts)
        words = [
            self.grid.texts[0 if d.score is None else int(self.grid.nearest(d.score))]
            for d in drafts
        ]
        tails = [item.text[-TAIL:] for item in rendered]
        pairs = dict.fromkeys(zip(tails, words, strict=True))
        before = self._plain([tail for tail, _ in pairs])
        joint = self._plain([tail + word for tail, word in pairs])
        known = len(self._plain([prefix])[0])
        numbers = {word: self._plain([prefix + word])[0][known:] for word in set(words)}
        result = {
            (tail, word): both == ids + numbers[word]
            for (tail, word), ids, both in zip(pairs, before, joint, strict=True)
        }
        return [result[pair] for pair in zip(tails, words, strict=True)]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _leading_ids(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text (bos, cls)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError("the tokenizer writes a text otherwise when it adds special tokens")


def _cut(offsets: np.ndarray, text: Rendered, excess: int) -> np.ndarray:
    """Mask of the tokens that stay when `excess` have to go, as many as the cuttable fields allow.

    The longest fields shrink to one common length; among equals the later one gives first.
    """
    keep = np.ones(len(offsets), bool)
    inside = [
        np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > start))
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
        while (
            1 < length < len(tokens) and offsets[tokens[length], 0] < offsets[tokens[length - 1], 1]
        ):
            length -= 1
        keep[tokens[length:]] = False
    return keep
