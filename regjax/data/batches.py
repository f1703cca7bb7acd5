"""Batches of static shape as a function of (seed, step), and a background reader of them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from regjax.data.config import Data
from regjax.data.encode import Example, Examples
from regjax.data.rows import Bucket, Row, epoch_order, plan_rows, round_up
from regjax.errors import InputError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of `examples`, by step; the same on every host and wherever a run starts.

    Each epoch visits every row once, in an order that (seed, epoch) alone decides; a bucket's last
    batch is filled up with empty rows of weight 0. Every batch holds rows of one length, the
    bucket's. `seed=None`: the source's order, bucket by bucket.

    A batch has `tokens`, `positions`, `segment_ids` `[B, L]` int32 (segment 0 is padding, packed
    examples count from 1, positions restart in each); `labels`, `label_positions` `[B, M]` int32
    and `label_weights` `[B, M]` float32, the response's tokens, with `labels ==
    tokens[label_positions + 1]` where the weight is not 0; `score_positions` `[B, S]` int32, the
    index of the last token before the score; `scores`, `weights` `[B, S]` float32; `record_ids`
    `[B, S]` int32, the index in the source, -1 for padding, of all rows also where `only` some
    are made; `task_ids` `[B, S]` int32, which of the
    mixed tasks. S is the most examples in a row, M the most response tokens in a row rounded up to a
    multiple of 4, both over all rows.

    Raises:
        InputError: a batch size that is not positive, or no example.
    """

    examples: Examples
    batch_size: int
    seed: int | None = 0
    data: Data = Data()  # noqa: RUF009  (frozen)
    padding_side: Literal["right", "left"] = "right"
    rows: tuple[int, ...] | None = None  # of each batch; None: all

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}: expected at least 1")
        if not len(self.examples):
            raise InputError("there are no examples to make batches of")
        if self.padding_side not in ("right", "left"):
            raise InputError(f"padding_side is {self.padding_side!r}: expected 'right' or 'left'")

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Rows by length; a row lists indices into `examples.examples`."""
        return plan_rows([len(e.tokens) for e in self.examples.examples], self.data)

    @functools.cached_property
    def slots(self) -> int:
        """S: the most examples in a row."""
        return max(len(row) for bucket in self.buckets for row in bucket.rows)

    @functools.cached_property
    def labels(self) -> int:
        """M: the most response tokens in a row, rounded up to a multiple of 4."""
        responses = [len(e.tokens) - e.response_start for e in self.examples.examples]
        rows = (row for bucket in self.buckets for row in bucket.rows)
        return max(round_up(max(sum(responses[i] for i in row) for row in rows), 4), 4)

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-len(bucket.rows) // self.batch_size) for bucket in self.buckets)

    def only(self, rows: Iterable[int]) -> Batches:
        """The same batches, of which these rows alone are made: those of one process.

        Raises:
            ValueError: rows that a batch does not have.
        """
        rows = tuple(map(int, rows))
        if not all(0 <= row < self.batch_size for row in rows):
            raise ValueError(
                f"rows {rows} of a batch of {self.batch_size}: expected 0 to count - 1"
            )
        return dataclasses.replace(self, rows=rows)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs: a pure function of (seed, step)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        sizes = tuple(len(bucket.rows) for bucket in self.buckets)
        order = epoch_order(sizes, self.batch_size, self.seed, epoch)
        bucket = self.buckets[order[index][0]]
        rows = [bucket.rows[row] if row >= 0 else () for row in order[index][1]]
        made = rows if self.rows is None else [rows[index] for index in self.rows]
        return {**self._assemble(made, bucket.length), "record_ids": self._record_ids(rows)}

    def iterate(
        self, start: int = 0, stop: int | None = None, *, threads: int = 2, prefetch: int = 8
    ) -> Iterator[Batch]:
        """`batch_at(start), batch_at(start + 1), ...` up to `stop`, made ahead in the background.

        `threads=0` makes them in the caller's thread; the batches are the same.
        """
        if threads == 0:
            steps = range(start, sys.maxsize if stop is None else stop)
            return map(self.batch_at, steps)
        import grain

        steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        return iter(steps.map(self.batch_at).to_iter_dataset(options))

    def _assemble(self, rows: list[Row], length: int) -> Batch:
        size, slots, labels = len(rows), self.slots, self.labels
        batch = {
            "tokens": np.zeros((size, length), np.int32),
            "positions": np.zeros((size, length), np.int32),
            "segment_ids": np.zeros((size, length), np.int32),
            "label_positions": np.zeros((size, labels), np.int32),
            "labels": np.zeros((size, labels), np.int32),
            "label_weights": np.zeros((size, labels), np.float32),
            "score_positions": np.zeros((size, slots), np.int32),
            "scores": np.zeros((size, slots), np.float32),
            "weights": np.zeros((size, slots), np.float32),
            "task_ids": np.zeros((size, slots), np.int32),
        }
        for index, row in enumerate(rows):
            examples = [self.examples.examples[i] for i in row]
            used = sum(len(example.tokens) for example in examples)
            start = length - used if self.padding_side == "left" else 0
            _write_row({name: array[index] for name, array in batch.items()}, examples, start)
        return batch

    def _record_ids(self, rows: list[Row]) -> np.ndarray:
        ids = np.full((len(rows), self.slots), -1, np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = [self.examples.examples[i].record for i in row]
        return ids


def _write_row(row: Batch, examples: list[Example], start: int) -> None:
    label = 0
    for slot, example in enumerate(examples):
        count = len(example.tokens)
        row["tokens"][start : start + count] = example.tokens
        row["positions"][start : start + count] = np.arange(count)
        row["segment_ids"][start : start + count] = slot + 1
        response = example.tokens[example.response_start :]
        end = label + len(response)
        row["labels"][label:end] = response
        row["label_positions"][label:end] = start + np.arange(example.response_start, count) - 1
        row["label_weights"][label:end] = example.weight
        row["score_positions"][slot] = start + example.score_start - 1
        row["scores"][slot] = example.score
        row["weights"][slot] = example.weight
        row["task_ids"][slot] = example.task
        start, label = start + count, end


def ordered_batches(
    examples: Examples,
    batch_size: int,
    data: Data = Data(),  # noqa: B008  (frozen)
    *,
    padding_side: Literal["right", "left"] = "right",
) -> Iterator[Batch]:
    """Every row once, in the source's order within each length; each length's last batch padded."""
    batches = Batches(examples, batch_size, None, data, padding_side)
    return batches.iterate(0, batches.steps_per_epoch)
