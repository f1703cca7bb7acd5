"""Twenty steps and an evaluation on every arrangement of 1, 2 and 8 devices: the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regjax.log import read_log

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 8)
MESHES = [
    f"{data}x{fsdp}x{count // data // fsdp}"
    for count in COUNTS
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if count % (data * fsdp) == 0
]

RUNS = [*MESHES, "pmap 2x1x1", "pmap 8x1x1"]

RUN = """
import dataclasses, pathlib, sys
import jax
from regjax import sharding
from regjax.train import train
from tests.mesh_experiment import experiment

for name in sys.argv[2:]:
    *parallelism, sizes = name.split(" ")
    if parallelism:
        experiment = dataclasses.replace(experiment, parallelism=parallelism[0])
    sizes = tuple(map(int, sizes.split("x")))
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    mesh = sharding.make_mesh(sharding.MeshShape(*sizes), devices)
    train(experiment, pathlib.Path(sys.argv[1]) / name, mesh=mesh, quiet=True)
"""


def numbers(workdir):
    """Every figure of the log and of the results, by place."""
    results = json.loads((workdir / "results.json").read_text())
    found = {}

    def collect(place, value):
        if isinstance(value, dict):
            for key, one in value.items():
                # A checksum of bits that are not the same on another mesh.
                if key != "params":
                    collect(f"{place} {key}", one)
        elif isinstance(value, list):
            for index, one in enumerate(value):
                collect(f"{place} {index}", one)
        elif isinstance(value, int | float):
            found[place] = value

    collect("results", results)
    for line in read_log(workdir / "log.jsonl"):
        collect(f"log {line['stage']} {line['step']}", line)
    return found


def assert_same_numbers(workdir, expected):
    """To 1e-5, trajectory, figures and predictions; correlations divide by a spread of some hundredths."""
    one, found = numbers(expected), numbers(workdir)
    assert found.keys() == one.keys()
    assert sum(place.endswith(" loss") for place in one) == 20
    for place, value in one.items():
        correlation = place.endswith(("pearson", "spearman", "kendall"))
        tolerance = {"rtol": 0, "atol": 1e-4} if correlation else {"rtol": 1e-5}
        np.testing.assert_allclose(found[place], value, **tolerance, err_msg=place)
    for line, other in zip(predictions(workdir), predictions(expected), strict=True):
        assert line["id"] == other["id"]
        np.testing.assert_allclose(line["mean"], other["mean"], rtol=1e-5)
        np.testing.assert_allclose(
            list(line["distribution"].values()), list(other["distribution"].values()), rtol=1e-5
        )


def predictions(workdir):
    return read_log(workdir / "raft" / "predictions_test.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("meshes")
    subprocess.run(
        [sys.executable, "-c", RUN, str(workdir), *RUNS],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        check=True,
    )
    return {name: workdir / name for name in RUNS}


def test_all_arrangements_are_tried():
    assert len(MESHES) == 1 + 3 + 10


@pytest.mark.parametrize("name", RUNS[1:])
def test_neither_mesh_nor_pmap_changes_a_number(runs, name):
    assert_same_numbers(runs[name], runs["1x1x1"])
