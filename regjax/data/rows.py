"""Which examples share a row, and in which order rows are visited: both plain functions."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from regjax.data.config import Data

Row = tuple[int, ...]  # indices of examples


class Bucket(NamedTuple):
    """Rows of one length."""

    length: int
    rows: tuple[Row, ...]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def plan_rows(lengths: Sequence[int], data: Data) -> tuple[Bucket, ...]:
    """Buckets of rows that hold every example once.

    One example a row, in the smallest length of `data.lengths` that fits; without buckets the one
    length is that of the longest example, rounded up to a multiple of 8. With packing, rows of
    `max_length` (see `pack`).

    >>> plan_rows([3, 9, 4], Data(max_length=16, buckets=(4,)))
    (Bucket(length=4, rows=((0,), (2,))), Bucket(length=16, rows=((1,),)))
    """
    if data.packing:
        return (Bucket(data.max_length, pack(lengths, data.max_length)),)
    if not data.buckets:
        longest = min(round_up(max(lengths, default=1), 8), data.max_length)
        return (Bucket(longest, tuple((index,) for index in range(len(lengths)))),)
    rows: dict[int, list[Row]] = {length: [] for length in data.lengths}
    for index, length in enumerate(lengths):
        rows[data.lengths[bisect.bisect_left(data.lengths, length)]].append((index,))
    return tuple(Bucket(length, tuple(rows[length])) for length in data.lengths if rows[length])


def pack(lengths: Sequence[int], row_length: int) -> tuple[Row, ...]:
    """Best fit: each example, in order, goes into the fullest row that has room for it.

    >>> pack([5, 4, 3, 6], 9)
    ((0, 1), (2, 3))
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, -row), ascending
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(free, (length, -len(rows)))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = row_length, -len(rows)
            rows.append([])
        rows[-row].append(index)
        if left > length:
            bisect.insort(free, (left - length, row))
    return tuple(map(tuple, rows))


@functools.lru_cache(maxsize=4)
def epoch_order(
    sizes: tuple[int, ...], batch_size: int, seed: int | None, epoch: int
) -> tuple[tuple[int, np.ndarray], ...]:
    """The batches of one epoch, each (bucket, row indices `[batch_size]`, -1 for no row).

    A function of its arguments alone: rows are permuted within their bucket, cut into batches, and
    the batches are permuted. `seed=None`: buckets and rows in their own order. The permutation
    sorts words of the Philox generator, whose stream NumPy guarantees across versions and machines.
    """
    key = 0 if seed is None else (seed % 2**64) + (epoch << 64)
    random = np.random.Philox(key=key)

    def permutation(count: int) -> np.ndarray:
        if seed is None:
            return np.arange(count)
        return np.argsort(random.random_raw(count), kind="stable")

    batches = []
    for bucket, size in enumerate(sizes):
        rows = np.full(round_up(size, batch_size), -1)
        rows[:size] = permutation(size)
        batches += [(bucket, batch) for batch in rows.reshape(-1, batch_size)]
    return tuple(batches[index] for index in permutation(len(batches)))
