"""A run that was killed, however often and whenever, ends with the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from regjax import checkpoint
from regjax.log import read_log

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import dataclasses, sys
from regjax.train import train
from tests.small_experiment import experiment
experiment = dataclasses.replace(
    experiment, steps=40, checkpoint_every=2, eval_every=14, log_every=5, reference_field="",
    stages=(experiment.stages[0], dataclasses.replace(experiment.stages[1], select="mean/rmse")),
)
train(experiment, sys.argv[1], quiet=True)
"""
KILLS = 10


def start(workdir):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(workdir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()


def is_writing_checkpoint(workdir):
    return any(workdir.glob("*/checkpoints/*tmp*"))


def wait_for(process, reached):
    """Polls until `reached()` or the process ends by itself."""
    while process.poll() is None and not reached():
        time.sleep(0.0005)


def kill_somewhere(process, workdir, moment, delay):
    """Kills at a moment of the run; returns whether a checkpoint was being written."""
    lines = len(read_log(workdir / "log.jsonl"))
    if moment == "checkpoint":
        before = set(workdir.glob("*/checkpoints/*"))
        wait_for(
            process,
            lambda: (
                is_writing_checkpoint(workdir) and set(workdir.glob("*/checkpoints/*")) - before
            ),
        )
    elif moment == "training":
        wait_for(process, lambda: len(read_log(workdir / "log.jsonl")) > lines)
    elif moment == "results":
        done = len(list(workdir.glob("*/predictions_validation.jsonl*")))
        wait_for(process, lambda: len(list(workdir.glob("*/predictions_validation.jsonl*"))) > done)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return is_writing_checkpoint(workdir)


def arrays_of(workdir):
    """Every array that a run leaves: of the model folders and of the last checkpoints."""
    found = {}
    for path in sorted(workdir.glob("*/model/model.safetensors")):
        for name, array in load_file(path).items():
            found[f"{path.parent.parent.name} model {name}"] = array
    import orbax.checkpoint as ocp

    for folder in sorted(workdir.glob("*/checkpoints")):
        with checkpoint.open_manager(folder) as manager:
            restored = manager.restore(
                manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
            )
        from jax.tree_util import keystr, tree_leaves_with_path

        for path, leaf in tree_leaves_with_path(restored["state"]):
            name = f"{folder.parent.name} {manager.latest_step()} {keystr(path)}"
            found[name] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(workdir))
    return workdir


def test_ten_kills_leave_no_trace(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    draw = random.Random(0)
    moments = ["start", *["checkpoint"] * 5, *["training"] * 3, "results"]
    draw.shuffle(moments)
    longest = {"start": 5.0, "checkpoint": 0.02, "training": 0.3, "results": 0.05}
    killed = inside = 0
    for moment in moments:
        process = start(workdir)
        inside += kill_somewhere(process, workdir, moment, draw.uniform(0, longest[moment]))
        killed += process.returncode == -signal.SIGKILL
    finish(start(workdir))
    assert killed == KILLS
    assert inside >= 2

    expected, found = arrays_of(undisturbed), arrays_of(workdir)
    assert expected.keys() == found.keys()
    assert sum("optimizer" in name for name in found) > 20
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    for name in ("log.jsonl", "results.json", "config.json", "tokenizer/tokenizer.json"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    predictions = sorted(p.relative_to(undisturbed) for p in undisturbed.glob("*/predictions*"))
    assert len(predictions) == 4
    for path in predictions:
        assert (workdir / path).read_bytes() == (undisturbed / path).read_bytes()
    everything = [
        {p.relative_to(w) for w in [r] for p in r.rglob("*")} for r in (workdir, undisturbed)
    ]
    left = {path for path in everything[0] - everything[1] if "/d/" not in str(path)}
    assert not left
