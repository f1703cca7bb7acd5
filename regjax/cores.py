"""Processors as devices."""

from __future__ import annotations

import contextlib
import os

import jax

LEAST_ROWS = 16
"""Of a batch that each device has at least, where its rows are dealt out."""


def one_device_a_core(rows: int) -> None:
    """Makes jax see as many CPU devices as there are cores, at most as many as divide `rows`, the images of a
    batch, into parts of `LEAST_ROWS` or more.

    For programs of many small operations, which two threads together compute hardly faster than one does.
    Without effect where jax has been told how many (`jax_num_cpu_devices`, `XLA_FLAGS`) or has begun to
    compute, and on programs for other platforms.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.values["jax_num_cpu_devices"] > 0:
        return
    with contextlib.suppress(RuntimeError):  # jax has begun to compute
        jax.config.update("jax_num_cpu_devices", _devices(rows, _cores()))


def _devices(rows: int, cores: int) -> int:
    most = max(1, min(cores, rows // LEAST_ROWS))
    return max(count for count in range(1, most + 1) if rows % count == 0)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # of this process; Linux alone knows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
