"""Runs in processes of their own, to be killed, and all that they leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file

from regjax.log import read_log

ROOT = Path(__file__).resolve().parents[1]


def start(code, workdir):
    """A process that runs Python code, its argument the workdir."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
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


def arrays_of(workdir):
    """Every array that a run leaves: of the model folders and of the last checkpoints."""
    found = {}
    for path in sorted(workdir.glob("*/model/model.safetensors")):
        for name, array in load_file(path).items():
            found[f"{path.parent.parent.name} model {name}"] = array
    for folder in sorted(workdir.glob("*/checkpoints")):
        newest = max((path for path in folder.iterdir() if path.name.isdecimal()), key=step_of)
        for name, array in arrays_of_checkpoint(newest).items():
            found[f"{folder.parent.name} {newest.name} {name}"] = array
    return found


def log_of(workdir):
    """The log's lines as text, without times."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith("speed/")}
        for line in read_log(workdir / "log.jsonl")
    ]
    return json.dumps(lines)


def step_of(folder):
    return int(folder.name)


def arrays_of_checkpoint(folder):
    """The arrays of a checkpoint by path, on however many devices and processes they were."""
    here = SingleDeviceSharding(jax.devices()[0])
    handler = ocp.StandardCheckpointHandler()
    saved = handler.metadata(folder / "state").tree
    abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), saved)
    state = handler.restore(folder / "state", args=ocp.args.StandardRestore(abstract))
    return {
        keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in tree_leaves_with_path(state)
    }


FILES = ("*.json*", "tokenizer/*.json", "*/*.json*", "*/soft_prompt/**/*.*", "*/lora/*.*")


def assert_same_runs(workdir, undisturbed):
    """The same files with the same bits."""
    assert_same_bits(workdir, undisturbed)
    held = [{p.relative_to(w) for p in w.rglob("*")} for w in (workdir, undisturbed)]
    # Orbax names its data files by chance.
    assert not {path for path in held[0] - held[1] if "/d/" not in str(path)}


def assert_same_bits(workdir, undisturbed):
    """The same bits in every array and in every file of figures, answers and prompts."""
    expected, found = arrays_of(undisturbed), arrays_of(workdir)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    compared = {
        path.relative_to(undisturbed) for pattern in FILES for path in undisturbed.glob(pattern)
    }
    assert compared
    for path in compared:
        if path.name == "log.jsonl":
            assert log_of(workdir) == log_of(undisturbed)
        else:
            assert (workdir / path).read_bytes() == (undisturbed / path).read_bytes(), path
