"""Which images the steps of an epoch are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from regjax import sharding, throughput
from regjax.classification.prepare import Prepared
from regjax.classification.program import are_dealt_out
from regjax.recorder import Chunk

LEAST_STEPS = 64
"""Steps that a compiled chunk has at least, where an epoch has fewer."""


def chunks_of(run: Prepared, steps: int, per_epoch: int, seed: int, step: int) -> Iterator[Chunk]:
    """Whole epochs of at least `LEAST_STEPS` steps from `step` to the last one."""
    size, total = run.experiment.batch_size, len(run.splits.train.images)
    length = per_epoch * max(1, math.ceil(LEAST_STEPS / per_epoch))
    dealt = are_dealt_out(len(run.experiments), run.mesh)
    place = sharding.replicated(run.mesh) if dealt else sharding.by_row(run.mesh, axis=1)
    index = run.splits.train.index
    while step < steps:
        count = min(length - step % length, steps - step)
        epochs = range(step // per_epoch, -(-(step + count) // per_epoch))
        order = np.concatenate(
            [epoch_order(seed, epoch, total)[: per_epoch * size] for epoch in epochs]
        ).reshape(-1, size)
        first = step - epochs[0] * per_epoch
        rows = order[first : first + count].astype(np.int32)
        yield Chunk(
            placed=sharding.put(rows, place),
            kind=rows.shape,
            work=throughput.Work(tokens=0, examples=size * len(run.experiments), flops=math.nan),
            record_ids=functools.partial(_ids, index, rows),
            steps=count,
        )
        step += count


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of `count` images, a function of (seed, epoch).

    >>> epoch_order(0, 0, 5).tolist() == epoch_order(0, 0, 5).tolist() != epoch_order(0, 1, 5).tolist()
    True
    """
    return np.random.default_rng([seed, epoch]).permutation(count)


def _ids(index: np.ndarray, rows: np.ndarray, step: int) -> list[str]:
    return [f"image {number}" for number in np.sort(index[rows[step]])]
