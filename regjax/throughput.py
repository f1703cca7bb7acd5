"""How fast a run trains: times of steps, taken without making the device wait, and what follows of them.

Metrics of a step are fetched once the next step has been dispatched. A step's time runs from when the
metrics of the step before were there to when its own are, so times of steps add up to the time of the
loop, evaluations, checkpoints and compilation left out.
"""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from regjax import chips

PREFIX = "speed/"


class Work(NamedTuple):
    """What one step does."""

    tokens: int
    """Without padding; 0 where there are no tokens."""
    examples: int
    flops: float
    """Model flops, see `regjax.model_flops`; of all rows, padding too. NaN where they are not known."""


class Step(NamedTuple):
    """What one step did, in how many seconds."""

    seconds: float
    waited: float
    """Of them, seconds in which the device had nothing to do and the data were not there."""
    tokens: int
    examples: int
    flops: float
    """These three as in `Work`."""


def figures(steps: Iterable[Step], peak: float) -> dict[str, float]:
    """What is reported of steps, on devices of `peak` flops a second together.

    `tokens_per_second` (where there are any), `examples_per_second`: sums over all steps by the sum of
    their seconds;
    `step_seconds_p50`, `_p90`, `_p99`: percentiles; `data_wait_share`: of the time, in 0..1;
    `model_flops_utilization`: flops by seconds and `peak`, in 0..1, where the flops are known.

    >>> found = figures([Step(2.0, 0.5, 100, 4, 3e9), Step(2.0, 0.0, 60, 4, 3e9)], peak=6e9)
    >>> found["tokens_per_second"], found["data_wait_share"], found["model_flops_utilization"]
    (40.0, 0.125, 0.25)
    """
    columns = np.array(list(steps), np.float64).reshape(-1, len(Step._fields))
    if not len(columns):
        return {}
    seconds, waited, tokens, examples, flops = columns.sum(0)
    p50, p90, p99 = np.percentile(columns[:, 0], [50, 90, 99])
    found = {
        **({"tokens_per_second": float(tokens / seconds)} if tokens else {}),
        "examples_per_second": float(examples / seconds),
        "step_seconds_p50": float(p50),
        "step_seconds_p90": float(p90),
        "step_seconds_p99": float(p99),
        "data_wait_share": float(waited / seconds),
    }
    if not math.isnan(flops):
        found["model_flops_utilization"] = float(flops / seconds / peak)
    return found


Batch = TypeVar("Batch")


class StepClock:
    """Times steps that are dispatched one ahead.

    For each step: `next` of `waiting`, the dispatch, and later `done` when its metrics are there. `stop`
    where something else than training follows; the clock goes on when the next batch is asked for.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._since: float | None = None
        self._waited = 0.0

    def waiting(self, batches: Iterable[Batch], idle: Callable[[], bool]) -> Iterator[Batch]:
        """The batches; what is waited for them counts where `idle()` is true once they are there."""
        iterator = iter(batches)
        while True:
            start = self._now()
            if self._since is None:
                self._since = start
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if idle():
                self._waited += self._now() - start
            yield batch

    def done(self) -> tuple[float, float]:
        """`(seconds, waited)` since the step before was done, or since the clock went on."""
        now = self._now()
        seconds, waited = now - (now if self._since is None else self._since), self._waited
        self._since, self._waited = now, 0.0
        return seconds, waited

    def stop(self) -> None:
        self._since, self._waited = None, 0.0


def without_padding(batch: Mapping[str, np.ndarray], shape: Sequence[int]) -> tuple[int, int]:
    """`(tokens, examples)` without padding of a step whose tokens are `shape`, `[A, B / A, L]`.

    Of the B rows `batch` holds those that this process read; all parts are taken to be as full.
    """
    parts = shape[0] * shape[1] // len(batch["tokens"])
    tokens = int((batch["segment_ids"] > 0).sum())
    examples = int((batch["record_ids"] >= 0).sum())
    return tokens * parts, examples * parts


@functools.cache
def peak_flops() -> float:
    """Flops a second that all devices of the run could do at most.

    Known chips by their data sheet, in bfloat16; of others, and of processors, what a product of
    matrices reaches when it is measured for 0.3 seconds (float32 on processors), once in a process.
    """
    device = jax.local_devices()[0]
    chip = chips.find(device.device_kind)
    if chip is not None:
        return chip.flops * jax.device_count()
    if device.platform == "cpu":  # all devices of a process share its cores
        return measured_peak(1024, jnp.float32) * jax.process_count()
    return measured_peak(8192, jnp.bfloat16) * jax.device_count()


def measured_peak(size: int, dtype: jnp.dtype, seconds: float = 0.3) -> float:
    """Flops a second of the best of the products of two `[size, size]` that fit into `seconds`."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(product(matrix, matrix))
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        jax.block_until_ready(product(matrix, matrix))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory() -> int:
    """Bytes: the most that any device of this process held, or, where it does not say, the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in each for each in stats):
        return max(each["peak_bytes_in_use"] for each in stats)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def sentence(found: Mapping[str, float], memory: int) -> str:
    """The figures for people.

    >>> found = figures([Step(0.5, 0.01, 1000, 8, 1e9)], peak=4e9)
    >>> print(sentence(found, memory=3_200_000_000))
    2,000 tokens/s, 16.0 examples/s, steps of 0.5 s (90 %: 0.5, 99 %: 0.5), waiting for data 2.0 %,
    MFU 50.0 %, 3.2 GB at most
    """
    p50, p90, p99 = (found[f"step_seconds_p{rank}"] for rank in (50, 90, 99))
    mfu = found.get("model_flops_utilization")
    tokens = f"{rate(found)}, " if "tokens_per_second" in found else ""
    return (
        f"{tokens}{found['examples_per_second']:,.1f} examples/s, "
        f"steps of {p50:.3g} s (90 %: {p90:.3g}, 99 %: {p99:.3g}), waiting for data "
        f"{100 * found['data_wait_share']:.1f} %, "
        f"{'' if mfu is None else f'MFU {100 * mfu:.1f} %, '}{memory / 1e9:.1f} GB at most"
    )


def rate(found: Mapping[str, float]) -> str:
    """Tokens a second of `figures`, or examples a second where there are no tokens."""
    unit = "tokens" if "tokens_per_second" in found else "examples"
    return f"{found[f'{unit}_per_second']:,.0f} {unit}/s"
