"""Throughput: figures of times and counts made by hand, a clock that is told the time."""

import math
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import throughput
from regjax.log import read_log
from regjax.throughput import Step, StepClock, figures
from tests.small_experiment import experiment


def test_figures_of_ten_steps():
    """1, 2, ..., 10 seconds: percentiles 5.5, 9.1 and 9.91 by linear interpolation."""
    steps = [Step(float(n), 0.1 * n, 100, 4, 22.0) for n in range(1, 11)]
    found = figures(steps, peak=16.0)
    expected = {
        "tokens_per_second": 1000 / 55,
        "examples_per_second": 40 / 55,
        "step_seconds_p50": 5.5,
        "step_seconds_p90": 9.1,
        "step_seconds_p99": 9.91,
        "data_wait_share": 0.1,
        "model_flops_utilization": 220 / 55 / 16,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert figures([], peak=1.0) == {}
    unknown = figures([step._replace(flops=math.nan) for step in steps], peak=16.0)
    del expected["model_flops_utilization"]
    assert unknown == pytest.approx(expected, rel=1e-12)


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(times, batches, idle, clock):
    """What `done` says of steps whose `next`, dispatch and fetch take the given seconds."""
    time, found = clock._now, []

    def slow():
        for wait in batches:
            time.now += wait
            yield wait

    answers = iter(idle)
    for index, _ in enumerate(clock.waiting(slow(), lambda: next(answers))):
        time.now += sum(times[index])
        if index:  # the fetch is that of the step before
            found.append(clock.done())
    return found


def test_times_of_steps_add_up_and_waits_count_where_the_device_is_idle():
    clock = StepClock(Time())
    start = clock._now()
    times, batches, idle = [(1, 0), (1, 3), (1, 2)], [5.0, 0.5, 0.25], [True, False, True]
    first, second = run(times, batches, idle, clock)
    # Until the first step is done: its data (5, idle), dispatch, the second's data, dispatch, the fetch.
    assert first == (5 + 1 + 0.5 + 1 + 3, 5.0)
    assert second == (0.25 + 1 + 2, 0.25)
    clock._now.now += 7
    assert clock.done() == (7.0, 0.0)
    assert clock._now() - start == first[0] + second[0] + 7


def test_what_is_not_training_is_not_timed():
    clock = StepClock(Time())
    run([(1, 0), (1, 1)], [0.0, 0.0], [True] * 2, clock)
    clock.stop()
    clock._now.now += 1000  # an evaluation
    assert clock.done() == (0.0, 0.0)
    clock.stop()
    (after,) = run([(1, 0), (1, 1)], [0.0, 2.0], [False] * 2, clock)
    assert after == (1 + 2 + 1 + 1, 0.0)


def test_work_of_a_batch_leaves_padding_out():
    batch = {
        "segment_ids": np.array([[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        "record_ids": np.array([[7, 3], [0, -1], [-1, -1]]),
    }
    batch["tokens"] = np.zeros((3, 4))
    assert throughput.without_padding(batch, (1, 3, 4)) == (4, 3)
    assert throughput.without_padding(batch, (2, 3, 4)) == (
        2 * 4,
        2 * 3,
    )  # another process has as many rows


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_peaks_of_known_chips(monkeypatch, kind, peak):
    device = types.SimpleNamespace(device_kind=kind, platform="any")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert throughput.peak_flops.__wrapped__() == 4 * peak


def test_the_peak_of_a_processor_is_what_a_product_reaches(monkeypatch):
    """With a product that is told to take a second, 2 n^3 flops a second."""
    time = Time()

    class Compiled:
        def __call__(self, *_):
            time.now += 1
            return jnp.zeros(())

    made = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=Compiled))
    monkeypatch.setattr(jax, "jit", lambda _: made)
    monkeypatch.setattr(throughput.time, "perf_counter", time)
    assert throughput.measured_peak(1024, jnp.float32) == 2 * 1024**3


def test_memory_is_the_devices_where_they_say_it(monkeypatch):
    devices = [
        types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (3, 9, 4)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert throughput.peak_memory() == 9
    devices.append(types.SimpleNamespace(memory_stats=lambda: None))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resident <= throughput.peak_memory() / 1024 < 2 * resident


def test_a_run_logs_its_speed(trained):
    """Every line with a loss; the steps' median, tokens and examples go together."""
    lines = [line for line in read_log(trained / "log.jsonl") if "loss" in line]
    assert len(lines) == 2 * experiment.steps / experiment.log_every
    names = set(figures([Step(1.0, 0.0, 1, 1, 1.0)], 1.0)) | {"peak_memory_bytes"}
    for line in lines:
        found = {
            name.removeprefix("speed/"): value
            for name, value in line.items()
            if name.startswith("speed/")
        }
        assert found.keys() == names
        assert all(math.isfinite(value) and value >= 0 for value in found.values())
        p50, p90, p99 = (found[f"step_seconds_p{rank}"] for rank in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
        assert found["data_wait_share"] < 1 and found["model_flops_utilization"] < 1
        # Rows of at most 64 tokens.
        assert 1 <= found["tokens_per_second"] / found["examples_per_second"] <= 64


def test_the_last_line_is_for_people(tmp_path, capsys):
    import dataclasses

    few = dataclasses.replace(experiment, stages=experiment.stages[:1], steps=4, eval_every=0)
    regjax.train(few, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("first: ")]
    for part in ("tokens/s", "examples/s", "waiting for data", "MFU", "GB at most"):
        assert part in line
