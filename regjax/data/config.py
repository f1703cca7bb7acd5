"""What a run reads, and how records become rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from regjax.data.bad_records import is_numeral
from regjax.errors import InputError

Source: TypeAlias = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""A source spec (see `regjax.data.read_records`) or the records themselves."""

# A command line can only spell the string form; Python configs may pass records.
_SourceField = Annotated[Any, tyro.conf.arg(constructor=str, metavar="PATH|tfds:NAME:SPLIT")]


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources, the fields that carry numbers, and the shape of the rows.

    A source is a path ending in `.jsonl`, `.json`, `.csv` or `.tsv`, each plain or `.gz`, a TFDS
    data set as `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=PATH]`, or a sequence of dicts (Python
    only).

    Raises:
        InputError: a length that is not positive, buckets that do not ascend or exceed
            `max_length`, buckets together with packing, score names that are empty, equal or
            numbers.

    >>> Data(train="train.jsonl", max_length=256, buckets=(64, 128)).lengths
    (64, 128, 256)
    """

    train: _SourceField = ""
    """Training records."""
    validation: _SourceField = ""
    """Records evaluated during training."""
    test: _SourceField = ""
    """Records evaluated once, at the end."""
    columns: tuple[str, ...] = ()
    """Names, by position, for CSV/TSV files without a header line; extra columns are ignored."""
    score_field: str = "score"
    """Field that holds the target: a number, one of score_names, or without these a text of the grid."""
    score_names: tuple[str, ...] = ()
    """Texts that the score field may hold in place of the grid's values, one each."""
    id_field: str = ""
    """Field that identifies a record in predictions; empty: its place, such as train.jsonl:12."""
    weight_field: str = ""
    """Field that holds the record's weight in losses and metrics; empty: 1."""
    max_length: int = 512
    """Longest row in tokens, score and end token included."""
    buckets: tuple[int, ...] = ()
    """Row lengths below max_length; empty: one length, that of the longest example."""
    packing: bool = False
    """Put several examples into one row of max_length, kept apart by segment ids."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Records that cannot be used: stop before training, or skip, count and list them."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}: expected at least 2 tokens")
        if list(self.buckets) != sorted(set(self.buckets)) or min(self.buckets, default=1) < 1:
            raise InputError(f"buckets are {self.buckets}: expected positive, ascending lengths")
        if max(self.buckets, default=0) > self.max_length:
            raise InputError(
                f"buckets are {self.buckets}: none may exceed max_length={self.max_length}"
            )
        if self.packing and self.buckets:
            raise InputError(
                "packing fills rows of max_length: leave buckets empty, or packing off"
            )
        if not self.score_field:
            raise InputError("score_field is empty: name the field that holds the score")
        self._check_names()
        if self.on_bad_record not in ("stop", "skip"):
            raise InputError(f"on_bad_record is {self.on_bad_record!r}: expected 'stop' or 'skip'")

    def _check_names(self) -> None:
        names = self.score_names
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"score_names is {names!r}: expected a tuple of texts")
        bare = [name.strip() for name in names]
        if not all(bare) or len(set(bare)) != len(bare):
            raise InputError(
                f"score_names is {names!r}: expected texts that are not empty and differ"
            )
        for name in bare:
            if is_numeral(name):
                raise InputError(
                    f"score_names holds {name!r}, but a number in the score field is always the score "
                    "itself: give the grid these numbers as values"
                )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Row lengths in use when there are buckets: `max_length` is always the last one."""
        return tuple(sorted({*self.buckets, self.max_length}))
