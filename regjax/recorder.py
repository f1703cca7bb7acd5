"""The metrics and times of each step, fetched without making the device wait, and the guard against bad
steps."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from regjax import throughput
from regjax.log import Log

LONGEST_HISTORY = 10_000


class TrainingStopped(RuntimeError):
    """The loss or a gradient was not finite for too many steps in a row."""


class Chunk(NamedTuple):
    """What one compiled call is given: a step, or several that it does by itself."""

    placed: Any
    """Its arrays, on the devices."""

    kind: Hashable
    """Chunks of one kind are compiled once; the first of each is not timed."""

    work: throughput.Work
    """What each of its steps does."""

    record_ids: Callable[[int], list[str]]
    """The ids of the records that its step 0, 1, ... was made of."""

    steps: int = 1


class _Pending(NamedTuple):
    step: int
    metrics: Mapping[str, jax.Array]
    chunk: Chunk
    timed: bool


class Recorder:
    """Fetches a chunk's metrics after the next one has been dispatched, and logs their averages.

    How fast the steps were is logged with them, see `regjax.throughput`. A chunk that is compiled, the
    first of its kind, is not timed.

    Metrics are `{name: [..., 2]}`, sum and weight; of chunks of several steps `[steps, runs, 2]`. Of
    several runs that are trained side by side the log has the averages of each, `NAME/RUN`.
    """

    def __init__(
        self,
        log: Log,
        stage: str,
        steps: int,
        advance: Callable[..., None],
        *,
        log_every: int,
        max_bad_steps: int,
    ) -> None:
        self._log, self._stage = log, stage
        self._log_every, self._max_bad_steps = log_every, max_bad_steps
        self._steps, self._advance = steps, advance
        self._pending: _Pending | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._bad_in_a_row = np.zeros(1, int)
        self._kinds = set[Hashable]()
        self._peak = throughput.peak_flops()
        self._clock = throughput.StepClock()
        self._timed: list[throughput.Step] = []
        self._history = collections.deque[throughput.Step](maxlen=LONGEST_HISTORY)
        self._speed = ""

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same averages, as JSON; complete after `flush`."""
        sums = {name: value.tolist() for name, value in self._sums.items()}
        return {"sums": sums, "bad_in_a_row": self._bad_in_a_row.tolist()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a run that was stopped."""
        self._sums = {name: np.array(value, np.float64) for name, value in state["sums"].items()}
        self._bad_in_a_row = np.array(state["bad_in_a_row"], int)

    @property
    def given_up(self) -> list[int]:
        """Of several runs side by side, those whose last `max_bad_steps` steps were not finite."""
        return np.flatnonzero(self._bad_in_a_row >= self._max_bad_steps).tolist()

    def waiting(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks, timed: an iterator to train from."""
        return self._clock.waiting(chunks, self._device_is_idle)

    def add(self, step: int, metrics: Mapping[str, jax.Array], chunk: Chunk) -> None:
        """Takes the metrics of `chunk`, which ended with `step`, and handles those of the one before."""
        known = chunk.kind in self._kinds
        self._kinds.add(chunk.kind)
        self._handle(timed=known)
        self._pending = _Pending(step, metrics, chunk, known)

    def flush(self) -> None:
        """Handles the metrics that were taken last; what follows until the next chunk is not timed.

        Raises:
          TrainingStopped: after `max_bad_steps` steps in a row that were not finite, in every run.
        """
        self._handle(timed=True)
        self._clock.stop()

    @property
    def summary(self) -> str:
        """How fast the steps were of which this process knows, in one sentence; empty: none was timed."""
        found = throughput.figures(self._history, self._peak)
        return throughput.sentence(found, throughput.peak_memory()) if found else ""

    def _device_is_idle(self) -> bool:
        if self._pending is None:
            return True
        loss: Any = self._pending.metrics["loss"]
        return loss.is_ready()  # whether the last step that was dispatched is done, without waiting

    def _handle(self, timed: bool) -> None:
        if self._pending is None:
            self._clock.done()
            return
        step, pending, chunk, timeable = self._pending
        self._pending = None
        metrics = {
            name: np.asarray(value, np.float64).reshape(chunk.steps, -1, 2)
            for name, value in pending.items()
        }
        seconds, waited = self._clock.done()
        if timed and timeable:
            one = throughput.Step(seconds / chunk.steps, waited / chunk.steps, *chunk.work)
            self._timed += [one] * chunk.steps
            self._history.extend([one] * chunk.steps)
        bad = metrics["bad"][:, :, 0] > 0
        finite = ~bad[..., None]
        for name, value in metrics.items() if finite.any() else ():
            self._sums[name] = self._sums.get(name, 0.0) + np.where(finite, value, 0.0).sum(0)
        self._advance(chunk.steps, note=self._note(metrics["loss"][-1], bad[-1]))
        self._count_bad(step - chunk.steps, bad, chunk)
        due = is_due(step - chunk.steps, step, self._log_every)
        if (due or step == self._steps) and self._sums:
            self._log.write(self._stage, step, {**self._averages(), **self._take_speed()})
            self._sums = {}

    def _note(self, loss: np.ndarray, bad: np.ndarray) -> str:
        if bad.all():
            return "loss or gradient not finite"
        return f"loss {_average(loss[~bad].sum(0)):.4g}{self._speed}"

    def _averages(self) -> dict[str, float]:
        found = {}
        for name, value in self._sums.items():
            if name == "bad":
                continue
            found[name] = _average(value.sum(0))
            if len(value) > 1:
                found |= {f"{name}/{run}": _average(each) for run, each in enumerate(value)}
        return found

    def _take_speed(self) -> dict[str, float]:
        found = throughput.figures(self._timed, self._peak)
        self._timed = []
        if not found:
            return {}
        self._speed = f", {throughput.rate(found)}"
        found["peak_memory_bytes"] = throughput.peak_memory()
        return {f"{throughput.PREFIX}{name}": value for name, value in found.items()}

    def _count_bad(self, before: int, bad: np.ndarray, chunk: Chunk) -> None:
        """Counts steps in a row by run, and lists the records of bad ones, until a run is given up."""
        limit = self._max_bad_steps
        self._bad_in_a_row = np.broadcast_to(self._bad_in_a_row, bad.shape[1:]).copy()
        for index, now in enumerate(bad):
            known = now & (self._bad_in_a_row < limit)
            # A run that was given up stays so.
            self._bad_in_a_row = np.where(
                now | (self._bad_in_a_row >= limit), self._bad_in_a_row + now, 0
            )
            if not known.any():
                continue
            entries: dict[str, Any] = {"not_finite": True, "record_ids": chunk.record_ids(index)}
            if len(now) > 1:
                entries["runs"] = np.flatnonzero(known).tolist()
            self._log.write(self._stage, before + index + 1, entries)
            if (self._bad_in_a_row >= limit).all():
                raise TrainingStopped(
                    f"stage {self._stage!r}: loss or gradient not finite in {limit} steps in "
                    f"a row, up to step {before + index + 1}. None of these updates was applied, and "
                    f"the last checkpoint is intact; {self._log.path} lists the records. Lower the "
                    "learning rate or look at the records, then run the same command again."
                )


def _average(value: np.ndarray) -> float:
    return float(value[0] / value[1]) if value[1] > 0 else math.nan


def is_due(before: int, step: int, every: int) -> bool:
    """Whether one of the steps after `before` up to `step` is a multiple of `every`; 0: never.

    >>> is_due(9, 10, 5), is_due(10, 14, 5), is_due(7, 12, 5), is_due(0, 3, 0)
    (True, False, True, False)
    """
    return every > 0 and step // every > before // every
