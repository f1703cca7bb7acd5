"""The same run on 1, 2 and 4 processes that share a folder; and stopped and resumed on two."""

import numpy as np
import pytest

from regjax.log import read_log
from tests.kills import assert_same_runs
from tests.processes import ROOT, run_in_processes
from tests.test_meshes import assert_same_numbers

RUN = """
import dataclasses, pathlib, sys
import jax
import numpy as np
from regjax import models, paths, probes, recorder, sharding
from regjax.objectives import Raft
from regjax.train import train
from tests.mesh_experiment import experiment

workdir, golden, *names = sys.argv[1:]
for name in names:
    mesh = sharding.make_mesh(sharding.MeshShape(*map(int, name.split("x"))))
    train(experiment, pathlib.Path(workdir) / name, mesh=mesh, quiet=True)
    print(name, "rows", sharding.RowLayout(mesh, 16, 2).here.tolist())

loaded = models.load(golden, mesh=mesh, rules=sharding.rules_for(models.read_config(golden), mesh))
own = paths.flatten(models.split(models.load(golden))[1])
for path, leaf in paths.flatten(models.split(loaded)[1]).items():
    np.testing.assert_array_equal(sharding.fetch(leaf), own[path])

if jax.process_count() > 2:
    sys.exit()

(stage,) = experiment.stages
stage = dataclasses.replace(
    stage, objective=Raft(normalize=True), decisions=(), steps=0,
    probes=(probes.GradientAlignment(rows=24),),
)
alike = dataclasses.replace(experiment, stages=(stage,), eval_every=1)
whole = sharding.make_mesh(sharding.MeshShape(1, -1))
train(alike, pathlib.Path(workdir) / "alike", mesh=whole, quiet=True)

if jax.process_count() == 1:
    sys.exit()

Stop = type("Stop", (Exception,), {})

def add(self, step, *given, add=recorder.Recorder.add):
    if step == 12 and not stopped:
        stopped.append(step)
        raise Stop
    add(self, step, *given)

stopped = []
recorder.Recorder.add = add
try:
    train(experiment, pathlib.Path(workdir) / "stopped", mesh=mesh, quiet=True)
except Stop:
    train(experiment, pathlib.Path(workdir) / "stopped", mesh=mesh, quiet=True)
assert stopped
"""
GOLDEN = ROOT / "tests" / "models" / "golden" / "llama"
MESHES = {1: ["1x1x1"], 2: ["1x1x2", "1x2x1", "2x1x1"], 4: ["2x2x1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("processes")
    outputs = {
        count: run_in_processes(RUN, workdir / str(count), GOLDEN, *names, count=count)
        for count, names in MESHES.items()
    }
    return workdir, outputs


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count in (2, 4) for name in MESHES[count]]
)
def test_processes_change_no_number(runs, count, name):
    workdir, one = runs[0] / str(count) / name, runs[0] / "1" / "1x1x1"
    assert_same_numbers(workdir, one)
    assert len(read_log(workdir / "log.jsonl")) == len(read_log(one / "log.jsonl"))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(runs):
    assert_same_runs(runs[0] / "2" / "stopped", runs[0] / "2" / MESHES[2][-1])


def test_a_process_makes_only_its_rows(runs):
    """Of 16 rows in two micro-batches; over `tensor` two processes hold the same."""
    rows = {
        (name, index): line.partition(" rows ")[2]
        for outputs in runs[1].values()
        for index, output in enumerate(outputs)
        for line in output.splitlines()
        if " rows " in line
        for name in [line.partition(" ")[0]]
    }
    assert rows["1x1x1", 0] == rows["1x1x2", 0] == rows["1x1x2", 1] == str(list(range(16)))
    for name in ("2x1x1", "1x2x1"):
        assert rows[name, 0] == "[0, 1, 2, 3, 8, 9, 10, 11]"
        assert rows[name, 1] == "[4, 5, 6, 7, 12, 13, 14, 15]"
    assert rows["2x2x1", 3] == "[6, 7, 14, 15]"


def test_gradients_of_parameters_dealt_out_over_two_processes_are_as_alike(runs):
    one, two = (
        {name: value for name, value in read_log(log)[0].items() if "cosine_" in name}
        for log in (runs[0] / count / "alike" / "log.jsonl" for count in "12")
    )
    assert len(one) == 4 and two.keys() == one.keys()
    assert len(set(one.values())) == 4 and max(one.values()) < 0.96
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5, err_msg=name)
