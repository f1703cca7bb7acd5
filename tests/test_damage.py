"""A full disk or a damaged checkpoint: a clear error or recovery, and nothing older is lost."""

import os
import shutil
import subprocess
import sys

import pytest

import regjax
from regjax import checkpoint
from regjax.experiment import load_config
from tests.kills import ROOT, assert_same_runs

CONFIG = """
import dataclasses
from tests.small_experiment import experiment as small
experiment = dataclasses.replace(
    small, stages=small.stages[:1], steps=15, eval_every=0, log_every=1
)
"""

# The limit on the size of files stands in for the disk's: writing beyond it fails in the same way.
RUN = """
import resource, sys
from regjax import checkpoint, cli

save, (config, workdir, full_at) = checkpoint.save, sys.argv[1:]

def save_with_less_room(manager, step, *rest):
    if step == int(full_at):
        checkpoint.wait(manager)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(manager, step, *rest)

checkpoint.save = save_with_less_room
sys.exit(cli.main(["train", config, "--workdir", workdir]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "config.py").write_text(CONFIG)
    regjax.train(load_config(folder / "config.py"), folder / "run", quiet=True)
    return folder


@pytest.mark.parametrize("full_at", [10, 15])
def test_a_full_disk_is_an_error_that_loses_nothing(undisturbed, tmp_path, full_at):
    """At step 10 the next save meets the error of the one in the background, at step 15 the end does."""
    config, workdir = undisturbed / "config.py", tmp_path / "run"
    folder = workdir / "first" / "checkpoints"
    failed = subprocess.run(
        [sys.executable, "-c", RUN, str(config), str(workdir), str(full_at)],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert failed.returncode == 1, failed.stderr
    # tensorstore's threads say, at any moment, that nobody waits for the rest of its files.
    lines = [line for line in failed.stderr.splitlines() if line.startswith("regjax:")]
    assert len(lines) == 1, failed.stderr
    (said,) = lines
    for part in (
        f"regjax: {folder}",
        f"step {full_at} ",
        "File too large",
        "make room",
        "same command",
    ):
        assert part in said
    with checkpoint.open_manager(folder) as manager:
        assert manager.all_steps() == [step for step in (5, 10) if step < full_at]
    regjax.train(load_config(config), workdir, quiet=True)
    assert_same_runs(workdir, undisturbed / "run")


def test_a_run_goes_on_from_the_newest_whole_checkpoint(undisturbed, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed / "run", workdir)
    for path in (workdir / "first").iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = workdir / "first" / "checkpoints" / "15"
    values = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    regjax.train(load_config(undisturbed / "config.py"), workdir, quiet=True)
    assert f"going on from step 10. It was moved to {newest}.damaged" in capsys.readouterr().err
    shutil.rmtree(f"{newest}.damaged")
    assert_same_runs(workdir, undisturbed / "run")
