"""One compilation cache and one user cache for the whole run, subprocesses included; a trained run."""

import os
import shutil
import tempfile

import pytest

CACHE = tempfile.mkdtemp(prefix="regjax-tests-")
OWNER = os.getpid()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(CACHE, "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["XDG_CACHE_HOME"] = CACHE


def pytest_unconfigure():
    if os.getpid() == OWNER:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of `small_experiment`, trained to its end; not to be written to."""
    import regjax
    from tests.small_experiment import experiment

    workdir = tmp_path_factory.mktemp("trained") / "run"
    regjax.train(experiment, workdir, quiet=True)
    return workdir
