"""Runs in processes of their own, to be killed, and all that they leave behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file

from regjax import checkpoint

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
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
        with checkpoint.open_manager(folder) as manager:
            saved = folder.resolve() / str(manager.latest_step()) / "state"
            # However many devices it was saved from.
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=HERE),
                ocp.StandardCheckpointHandler().metadata(saved).tree,
            )
            restored = manager.restore(
                manager.latest_step(),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
            )
        for path, leaf in tree_leaves_with_path(restored["state"]):
            name = f"{folder.parent.name} {manager.latest_step()} {keystr(path)}"
            found[name] = np.asarray(leaf)
    return found


FILES = ("*.json*", "tokenizer/*.json", "*/*.json*", "*/soft_prompt/**/*.*")


def assert_same_runs(workdir, undisturbed):
    """The same files, and the same bits in every array and in every file of figures, answers and prompts."""
    expected, found = arrays_of(undisturbed), arrays_of(workdir)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    compared = {
        path.relative_to(undisturbed) for pattern in FILES for path in undisturbed.glob(pattern)
    }
    assert compared
    for path in compared:
        assert (workdir / path).read_bytes() == (undisturbed / path).read_bytes(), path
    held = [{p.relative_to(w) for p in w.rglob("*")} for w in (workdir, undisturbed)]
    # Orbax names its data files by chance.
    assert not {path for path in held[0] - held[1] if "/d/" not in str(path)}
