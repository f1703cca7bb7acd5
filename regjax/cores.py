"""Processors as devices."""

from __future__ import annotations

import contextlib
import os

import jax


def one_device_a_core(rows: int) -> None:
    """Makes jax see as many CPU devices as there are cores, at most as many as divide `rows`.

    For programs of many small operations, which two threads together compute hardly faster than one does.
    Without effect where jax has been told how many (`jax_num_cpu_devices`, `XLA_FLAGS`) or has begun to
    compute, and on programs for other platforms.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.values["jax_num_cpu_devices"] > 0:
        return
    with contextlib.suppress(RuntimeError):  # jax has begun to compute
        jax.config.update("jax_num_cpu_devices", _devices(rows, len(os.sched_getaffinity(0))))


def _devices(rows: int, cores: int) -> int:
    return max(count for count in range(1, cores + 1) if rows % count == 0)
