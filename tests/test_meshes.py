"""Twenty steps and an evaluation on every arrangement of 1, 2 and 8 devices: the same numbers;
adapters on one."""

import json
import os
import re
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
ADAPTED = ["lora 1x1x1", "lora 2x2x2"]

RUN = """
import dataclasses, importlib, pathlib, sys
import jax
from regjax import sharding
from regjax.models import Lora
from tests.mesh_experiment import experiment

module = importlib.import_module("regjax.train")

def init_state(trained, *given, make=module.init_state):
    for path, leaf in trained.items():
        if path.startswith("lora/"):
            print(name, path, tuple(leaf.sharding.spec), sep=": ")
    return make(trained, *given)

module.init_state = init_state
(stage,) = experiment.stages
variants = {
    "": experiment,
    "pmap": dataclasses.replace(experiment, parallelism="pmap"),
    "lora": dataclasses.replace(
        experiment, stages=(dataclasses.replace(stage, lora=Lora(rank=2)),)
    ),
}
for name in sys.argv[2:]:
    variant, _, sizes = name.rpartition(" ")
    sizes = tuple(map(int, sizes.split("x")))
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    mesh = sharding.make_mesh(sharding.MeshShape(*sizes), devices)
    workdir = pathlib.Path(sys.argv[1]) / name
    module.train(variants[variant], workdir, mesh=mesh, quiet=name != "lora 2x2x2")
"""


def numbers(workdir):
    """Every figure of the log and of the results, by place."""
    results = json.loads((workdir / "results.json").read_text())
    found = {}

    def collect(place, value):
        if isinstance(value, dict):
            for key, one in value.items():
                # Times, and a checksum of bits that are not the same on another mesh.
                if key != "params" and not key.startswith("speed/"):
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
    with (workdir / "output").open("w") as output:
        subprocess.run(
            [sys.executable, "-c", RUN, str(workdir), *RUNS, *ADAPTED],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=output,
            check=True,
        )
    return {name: workdir / name for name in (*RUNS, *ADAPTED, "output")}


def test_all_arrangements_are_tried():
    assert len(MESHES) == 1 + 3 + 10


@pytest.mark.parametrize("name", RUNS[1:])
def test_neither_mesh_nor_pmap_changes_a_number(runs, name):
    assert_same_numbers(runs[name], runs["1x1x1"])


def test_adapters_dealt_out_change_no_number(runs):
    assert_same_numbers(runs["lora 2x2x2"], runs["lora 1x1x1"])


def test_adapters_are_where_their_kernels_are(runs):
    """Kernels are `(None, fsdp, tensor)`, those of `output` and `down` the other way round."""
    output = runs["output"].read_text()
    for kernel in ("attention/query", "attention/value", "mlp/gate", "mlp/up"):
        place = f"lora 2x2x2: lora/layers/{kernel}"
        assert f"{place}/a: (None, 'fsdp')\n" in output
        assert f"{place}/b: (None, None, 'tensor')\n" in output
    for kernel in ("attention/output", "mlp/down"):
        place = f"lora 2x2x2: lora/layers/{kernel}"
        assert f"{place}/a: (None, 'tensor')\n" in output
        assert f"{place}/b: (None, None, 'fsdp')\n" in output
    # And so says the table that is printed at the start: 16 x 2 float32, half of them.
    row = re.search(r"lora/layers/mlp/up/a +│ (.*?) +│ (.*?) +│ +(\d+) ", output)
    assert row is not None and row.groups() == ("1 x 16 x 2", "-, fsdp, -", "64")
