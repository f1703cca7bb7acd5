"""One device a core."""

import os
import subprocess
import sys

import jax
import pytest

from regjax.cores import _devices, one_device_a_core

SHOW = "import jax; from regjax.cores import one_device_a_core as use; use(96); print(jax.device_count())"


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [(128, 2, 2), (128, 6, 4), (96, 7, 6), (128, 64, 8), (31, 4, 1), (1, 8, 1)],
)
def test_devices_are_the_most_that_divide_the_rows(rows, cores, expected):
    assert _devices(rows, cores) == expected


def devices(**environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_jax_sees_a_device_for_each_core_unless_it_was_told_how_many():
    assert devices() == _devices(96, len(os.sched_getaffinity(0)))
    assert devices(JAX_NUM_CPU_DEVICES="5") == 5
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=4") == 4


def test_once_jax_computes_nothing_changes():
    before = jax.device_count()
    one_device_a_core(128)
    assert jax.device_count() == before
