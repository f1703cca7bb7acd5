"""The whole run on eight devices, and what is said when the rows do not divide; readers on eight."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import regjax
from regjax import models, paths
from regjax.log import read_log
from regjax.models import Lora
from regjax.reader import Reader, save_reader
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


READ = """
import sys
import jax
import numpy as np
from jax.sharding import PartitionSpec as P
import regjax
from regjax import reader as module
from regjax.reader import Reader
from tests.small_experiment import experiment

output, *folders = sys.argv[1:]
found = {}
own = jax.tree.leaves(regjax.load_model(folders[0]).params)
for number, folder in enumerate(folders):
    large = number % 2
    # Of a device that the model's own parameters just fill half of, and of one with a byte less.
    module._device_memory = lambda: 2 * sum(leaf.nbytes for leaf in own) - large
    reader = Reader.load(folder)
    params = reader.params
    spec = P(None, "fsdp") if large else P()
    assert params["embedding"]["table"].sharding.spec == spec
    assert params["layers"]["mlp"]["up"]["kernel"].sharding.spec == spec
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
    assert (reader.rows(1), reader.rows(8), reader.rows(13)) == (8, 8, 16)
    found[str(number)] = [one.probabilities for one in reader(experiment.data.test, 13)]
found["few"] = regjax.evaluate(
    folders[0], experiment.data.test, batch_size=3, intervals=False
).probabilities
np.savez(output, **found)
"""


def with_extras(trained, folder):
    """The trained model with adapters, and a soft prompt, that change what it says."""
    reader, draw = Reader.load(trained), np.random.default_rng(0)
    base, lora = trained.resolve() / "second" / "model", Lora(rank=2)
    shapes = models.lora.adapter_shapes(lora, reader.params)
    adapters = {path: draw.normal(size=leaf.shape, scale=0.3) for path, leaf in shapes.items()}
    models.save_lora(folder, paths.unflatten(adapters)["lora"], lora, models.read_config(base))
    models.save_prompt(folder.parent / "prompt", draw.normal(size=(3, 16)).astype("float32"))
    save_reader(
        folder, reader.template, reader.grid, "mean", reader.max_length,
        base_model=str(base), lora=".", soft_prompt="../prompt",
    )  # fmt: skip
    return folder


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
def test_a_reader_on_eight_devices_says_what_it_says_on_one(trained, tmp_path):
    folders = [trained, with_extras(trained, tmp_path / "lora")]
    subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "found.npz"), *map(str, folders)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[1],
        check=True,
    )
    found = np.load(tmp_path / "found.npz")
    plain, other = (
        regjax.evaluate(folder, experiment.data.test, batch_size=40, intervals=False).probabilities
        for folder in folders
    )
    np.testing.assert_allclose(found["0"], plain, rtol=1e-5)
    np.testing.assert_allclose(found["few"], plain, rtol=1e-5)
    np.testing.assert_allclose(found["1"], other, rtol=1e-5)
    assert np.abs(plain - other).max() > 0.1
