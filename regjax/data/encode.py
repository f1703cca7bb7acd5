"""Records -> examples: token ids, where the response and the score begin, what was cut."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regjax.data import bad_records, drafts
from regjax.data.bad_records import BadRecord, Unusable
from regjax.data.config import Data, Source
from regjax.data.encoders import GridEncoder, TextEncoder
from regjax.data.sources import Record, read_records
from regjax.data.template import Template
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid

CHUNK = 1024  # texts tokenized in one call


class Example(NamedTuple):
    """One tokenized record. `tokens[:response_start]` is the prompt."""

    tokens: np.ndarray  # [n] int32
    response_start: int  # index of the response's first token, n if the prompt is all there is
    score_start: int  # index of the score's first token, n if the tokens end before it; of free
    # text, the response's
    score: float  # nan if unlabelled, or if the answer is free text
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
    grid: ScoreGrid | None,
    codec: TokenGrid | None,
    *,
    labelled: bool = True,
    prompts_only: bool = False,
) -> Examples:
    """Reads `source` and writes every record as tokens: context, answer, end of sequence.

    With a grid the context is all before the score. It is tokenized as a whole, so it is what
    inference sees; the score's tokens are those of the grid value nearest to it, and the
    tokenizer's end token follows unless the codec's terminator did. Room for the grid's longest
    value is kept whatever the score is, so that a label never shows in what is cut.

    Without one (`grid` and `codec` None) the answer is the response, free text: prompt and response
    are tokenized as a whole and the end token follows. The prompt's tokens have to be those that it
    has alone, which inference sees, so a record where prompt and response merge cannot be used. No
    score is read: it is nan, and its start is the response's. The response is never cut, so the
    longer it is, the more of a long prompt is.

    Too long: the last tokens wholly inside cuttable fields go, those of the longest field first, at
    least one stays; all other tokens are untouched. Special tokens spelled out in a record's text
    stay text.

    Args:
        labelled: False: scores are not read (nan) and the tokens end before the score; of free
            text, before the response, as with `prompts_only`.
        prompts_only: the tokens end before the response, for generation.

    Raises:
        InputError: the source cannot be read, no record has a field that is needed, records that
            cannot be used (with `on_bad_record="stop"`, or if no other is left), and as
            `encode_records`.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else "records"
    records = read_records(source, data.columns)
    encoder = _encoder(data, template, tokenizer, grid, codec, labelled, prompts_only)
    read = grid if labelled else None
    _check_fields(name, records, [*encoder.names, *drafts.number_fields(data, read)])
    examples = _encode(records, data, encoder, read)
    bad_records.check_bad_records(name, examples.bad, len(records), data.on_bad_record)
    return examples


def encode_records(
    records: Sequence[Record],
    data: Data,
    template: Template,
    tokenizer: Any,
    grid: ScoreGrid | None,
    codec: TokenGrid | None,
    *,
    labelled: bool = True,
    prompts_only: bool = False,
) -> Examples:
    """As `load_examples`, of records that have been read; what cannot be used is listed in `bad`.

    Raises:
        InputError: a slow tokenizer, a template that writes the score into the prompt, a template
            with `{score}` without a grid or the other way round, score names that are not as many
            as the grid's values; for free text, a tokenizer without an end token.
    """
    encoder = _encoder(data, template, tokenizer, grid, codec, labelled, prompts_only)
    return _encode(records, data, encoder, grid if labelled else None)


def _encode(
    records: Sequence[Record],
    data: Data,
    encoder: GridEncoder | TextEncoder,
    grid: ScoreGrid | None,
) -> Examples:
    """`grid`: of the scores that are read, None for none."""
    ids = [record.place for record in records]
    bad: dict[int, BadRecord] = {}
    usable = []
    for index, record in enumerate(records):
        try:
            draft, ids[index] = drafts.draft(index, record, encoder.names, data, grid)
            usable.append(draft)
        except Unusable as error:
            bad[index] = error.at(record.place)
    examples = []
    truncated = 0
    for start in range(0, len(usable), CHUNK):
        chunk = usable[start : start + CHUNK]
        for draft, encoded in zip(chunk, encoder(chunk), strict=True):
            if isinstance(encoded, Unusable):
                bad[draft.record] = encoded.at(records[draft.record].place)
                continue
            tokens, response_start, score_start, was_cut = encoded
            score = math.nan if draft.score is None else draft.score
            examples.append(
                Example(tokens, response_start, score_start, score, draft.weight, draft.record)
            )
            truncated += was_cut
    return Examples(
        examples=examples,
        records=[record.fields for record in records],
        places=[record.place for record in records],
        ids=ids,
        bad=[bad[index] for index in sorted(bad)],
        truncated=truncated,
    )


def _encoder(
    data: Data,
    template: Template,
    tokenizer: Any,
    grid: ScoreGrid | None,
    codec: TokenGrid | None,
    labelled: bool,
    prompts_only: bool,
) -> GridEncoder | TextEncoder:
    drafts.check_answers(data, template, grid)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the tokenizer is a slow one: a fast one (tokenizer.json) is needed")
    skeleton = template.skeleton(tokenizer)
    if grid is None and codec is None:
        return TextEncoder(skeleton, tokenizer, data.max_length, prompts_only or not labelled)
    if grid is None or codec is None:
        raise InputError("give the grid and its codec (template.codec), or neither for free text")
    encoder = GridEncoder(skeleton, tokenizer, grid, codec, data.max_length, prompts_only)
    if labelled and data.score_field in encoder.names:
        raise InputError(f"template field {data.score_field!r} is the score: it would give it away")
    return encoder


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
