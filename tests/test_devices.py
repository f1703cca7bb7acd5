"""The whole run on eight devices, and what is said when the rows do not divide among them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from regjax.log import read_log
from regjax.train import train
from tests.small_experiment import experiment

CONFIG = Path(__file__).with_name("small_experiment.py")


def on_eight_devices(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "regjax", "train", str(CONFIG), "--workdir", str(workdir)]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
def test_eight_devices_give_the_same_run_as_one(tmp_path):
    few = dataclasses.replace(experiment, steps=6, eval_every=3, log_every=1)
    train(few, tmp_path / "one", quiet=True)
    done = on_eight_devices(tmp_path / "eight", "--steps=6", "--eval-every=3", "--log-every=1")
    assert done.returncode == 0, done.stderr
    one, eight = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "eight"))
    assert [line["step"] for line in one] == [line["step"] for line in eight]
    for first, second in zip(one, eight, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name.endswith(("loss", "mean/rmse", "grid_mass")):
                np.testing.assert_allclose(second[name], value, rtol=1e-5, err_msg=name)


def test_rows_that_do_not_divide_among_the_devices_are_refused(tmp_path):
    done = on_eight_devices(tmp_path / "run", "--batch-size=12")
    assert done.returncode == 2
    assert "12 rows each, which do not divide among 8 devices" in done.stderr
    assert "Traceback" not in done.stderr
