"""A checkpoint of four devices, restored onto other numbers of devices and processes."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import regjax
from regjax.log import read_log
from regjax.optim import Optimizer
from tests.processes import ROOT, run_in_processes
from tests.small_experiment import experiment

STATE = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from regjax import checkpoint, sharding

def parts(array):
    random = np.random.default_rng(array)
    return {
        "params": {
            "a/kernel": random.standard_normal((8, 16)).astype(np.float32),
            "b/kernel": random.standard_normal((3, 16, 8)).astype(jax.numpy.bfloat16),
            "c/scale": np.ones(5, np.float32),
        },
        "step": np.int32(array),
    }

SPECS = {
    "params": {"a/kernel": P("fsdp", "tensor"), "b/kernel": P(None, "tensor", "fsdp"), "c/scale": P()},
    "step": P(),
}
folder = Path(sys.argv[1])

def places(*shape):
    mesh = sharding.make_mesh(sharding.MeshShape(*shape))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
"""

SAVE = """
with checkpoint.open_manager(folder) as manager:
    for step in (3, 7):
        state = jax.device_put(parts(step), places(1, 2, 2))
        checkpoint.save(manager, step, state, {"step": step, "sums": [0.1 + 0.2]})
"""

RESTORE = """
shape = [int(n) for n in sys.argv[2].split(",")]
shapes = jax.tree.map(
    lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
    parts(0), places(*shape),
)
with checkpoint.open_manager(folder) as manager:
    state, data = checkpoint.restore(manager, shapes)
    step = manager.latest_step()
    assert step == int(sys.argv[3]) and data == {"step": step, "sums": [0.1 + 0.2]}

    def check(state):
        for array, expected in zip(jax.tree.leaves(state), jax.tree.leaves(parts(step)), strict=True):
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == np.asarray(expected[shard.index]).tobytes()

    check(state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places(*shape)
    checkpoint.save(manager, 9, state, data)
    checkpoint.wait(manager)
    check(checkpoint.restore(manager, shapes)[0])
"""


def run(code, *arguments, devices):
    """In one process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run(STATE + SAVE, folder, devices=4)
    return folder


@pytest.mark.parametrize(
    ("devices", "shape"), [(1, "1,1,1"), (2, "1,2,1"), (8, "2,2,2"), (8, "1,8,1")]
)
def test_restored_onto_other_devices_bit_for_bit(saved, tmp_path, devices, shape):
    shutil.copytree(saved, tmp_path / "run")
    run(STATE + RESTORE, tmp_path / "run", shape, 7, devices=devices)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("shape", ["1,4,1", "2,1,2"])
def test_restored_onto_two_processes_of_two_devices(saved, tmp_path, shape, damaged):
    """Where the newest is damaged both go back to the one before, and one of them says so."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    if damaged:
        values = max((folder / "7" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(values.read_bytes())
        content[len(content) // 2] ^= 4
        values.write_bytes(content)
    step = 3 if damaged else 7
    said = run_in_processes(STATE + RESTORE, folder, shape, step, count=2, devices=2)
    assert ["is damaged" in text for text in said] == [damaged, False]


FEW = dataclasses.replace(
    experiment,
    stages=experiment.stages[:1],
    optimizer=Optimizer(learning_rate=1e-2, schedule="constant", warmup=0.0),
    log_every=1,
    eval_every=0,
)


TRAIN = """
import dataclasses, sys
from regjax import sharding, train
from tests.test_layouts import FEW
shape = sharding.MeshShape(*map(int, sys.argv[3].split(",")))
train(dataclasses.replace(FEW, steps=int(sys.argv[2]), mesh=shape), sys.argv[1], quiet=True)
"""


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """`(stopped after 5 steps, after 10)`, on four devices."""
    folder = tmp_path_factory.mktemp("half_way")
    run(TRAIN, folder / "half", 5, "1,2,2", devices=4)
    shutil.copytree(folder / "half", folder / "whole")
    run(TRAIN, folder / "whole", 10, "1,2,2", devices=4)
    return folder / "half", folder / "whole"


def losses(workdir):
    return {
        line["step"]: line["loss"] for line in read_log(workdir / "log.jsonl") if "loss" in line
    }


@pytest.mark.parametrize(
    ("processes", "devices", "shape"),
    [(1, 1, "1,1,1"), (1, 2, "2,1,1"), (1, 8, "1,4,2"), (2, 2, "2,2,1")],
)
def test_a_run_goes_on_on_other_devices(half_way, tmp_path, processes, devices, shape):
    """The losses of the steps that follow are those of the run that stayed: the same rows, in order."""
    half, whole = half_way
    shutil.copytree(half, tmp_path / "run")
    arguments = (tmp_path / "run", 10, shape)
    if processes > 1:
        run_in_processes(TRAIN, *arguments, count=processes, devices=devices)
    else:
        run(TRAIN, *arguments, devices=devices)
    before, expected, found = losses(half), losses(whole), losses(tmp_path / "run")
    assert list(found) == list(expected) == list(range(1, 11))
    assert all(found[step] == before[step] for step in before)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    model = "first/model/model.safetensors"
    weights, others = load_file(whole / model), load_file(tmp_path / "run" / model)
    for name, array in weights.items():
        np.testing.assert_allclose(others[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_ends_on_one_device_with_the_bits_of_four(half_way, tmp_path):
    """Nothing is left to train: what is restored is what is written."""
    half, _ = half_way
    (tmp_path / "run" / "first").mkdir(parents=True)
    for name in ("tokenizer", "first/checkpoints"):
        shutil.copytree(half / name, tmp_path / "run" / name)
    regjax.train(dataclasses.replace(FEW, steps=5), tmp_path / "run", quiet=True)
    model = "first/model/model.safetensors"
    expected, found = load_file(half / model), load_file(tmp_path / "run" / model)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
