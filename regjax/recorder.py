"""The metrics and times of each step, fetched without making the device wait, and the guard against bad
steps."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from regjax import throughput
from regjax.data import Examples
from regjax.experiment import Experiment
from regjax.log import Log

Batch = Mapping[str, np.ndarray]
LONGEST_HISTORY = 10_000


class TrainingStopped(RuntimeError):
    """The loss or a gradient was not finite for too many steps in a row."""


class _Step(NamedTuple):
    step: int
    metrics: Mapping[str, jax.Array]
    record_ids: np.ndarray
    work: tuple[int, int, float]
    timed: bool


class Recorder:
    """Fetches a step's metrics after the next step has been dispatched, and logs their averages.

    How fast the steps were is logged with them, see `regjax.throughput`; `flops` gives the model flops of
    a step on such a batch. Steps that are compiled, on the first batch of a shape, are not timed.
    """

    def __init__(
        self,
        log: Log,
        stage: str,
        experiment: Experiment,
        steps: int,
        examples: Examples,
        advance: Callable[..., None],
        flops: Callable[[Mapping[str, jax.Array]], float],
    ) -> None:
        self._log, self._stage, self._experiment = log, stage, experiment
        self._steps, self._examples, self._advance = steps, examples, advance
        self._pending: _Step | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._bad_in_a_row = 0
        self._flops, self._known_flops = flops, dict[Any, float]()
        self._peak = throughput.peak_flops()
        self._clock = throughput.StepClock()
        self._timed: list[throughput.Step] = []
        self._history = collections.deque[throughput.Step](maxlen=LONGEST_HISTORY)
        self._speed = ""

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same averages, as JSON; complete after `flush`."""
        sums = {name: value.tolist() for name, value in self._sums.items()}
        return {"sums": sums, "bad_in_a_row": self._bad_in_a_row}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a run that was stopped."""
        self._sums = {name: np.array(value, np.float64) for name, value in state["sums"].items()}
        self._bad_in_a_row = state["bad_in_a_row"]

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, timed: an iterator to train from."""
        return self._clock.waiting(batches, self._device_is_idle)

    def add(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        batch: Batch,
        placed: Mapping[str, jax.Array],
    ) -> None:
        """Takes the metrics `{name: [sum, weight]}` of `step`, and handles those of the one before.

        `batch` is what this process read, `placed` what the step was given.
        """
        shapes = tuple((name, array.shape) for name, array in placed.items())
        known = shapes in self._known_flops
        if not known:
            self._known_flops[shapes] = self._flops(placed)
        self._handle(timed=known)
        work = (*throughput.work(batch, placed["tokens"].shape), self._known_flops[shapes])
        self._pending = _Step(step, metrics, batch["record_ids"], work, known)

    def flush(self) -> None:
        """Handles the metrics that were taken last; what follows until the next batch is not timed.

        Raises:
          TrainingStopped: after `max_bad_steps` steps in a row that were not finite.
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
        step, pending, record_ids, work, timeable = self._pending
        self._pending = None
        metrics = {name: np.asarray(value, np.float64) for name, value in pending.items()}
        seconds, waited = self._clock.done()
        if timed and timeable:
            self._timed.append(throughput.Step(seconds, waited, *work))
            self._history.append(self._timed[-1])
        if metrics["bad"][0] > 0:
            self._advance(note="loss or gradient not finite")
            self._count_bad(step, record_ids)
        else:
            self._bad_in_a_row = 0
            self._advance(note=f"loss {_average(metrics['loss']):.4g}{self._speed}")
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, np.zeros(2)) + value
        due = step % self._experiment.log_every == 0 or step == self._steps
        if due and self._sums:
            averages = {name: _average(v) for name, v in self._sums.items() if name != "bad"}
            self._log.write(self._stage, step, {**averages, **self._take_speed()})
            self._sums = {}

    def _take_speed(self) -> dict[str, float]:
        found = throughput.figures(self._timed, self._peak)
        self._timed = []
        if not found:
            return {}
        self._speed = f", {found['tokens_per_second']:,.0f} tokens/s"
        found["peak_memory_bytes"] = throughput.peak_memory()
        return {f"{throughput.PREFIX}{name}": value for name, value in found.items()}

    def _count_bad(self, step: int, record_ids: np.ndarray) -> None:
        ids = [self._examples.ids[index] for index in np.unique(record_ids[record_ids >= 0])]
        self._log.write(self._stage, step, {"not_finite": True, "record_ids": ids})
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._experiment.max_bad_steps:
            raise TrainingStopped(
                f"stage {self._stage!r}: loss or gradient not finite in {self._bad_in_a_row} steps in "
                f"a row, up to step {step}. None of these updates was applied, and the last "
                f"checkpoint is intact; {self._log.path} lists the records. Lower the learning rate "
                "or look at the records, then run the same command again."
            )


def _average(value: np.ndarray) -> float:
    return float(value[0] / value[1]) if value[1] > 0 else math.nan
