"""Sweeps: points, values by name, means and standard errors, side by side or in parts, and resuming."""

import dataclasses
import json
import math

import numpy as np
import pytest

from regjax import InputError, sweep
from regjax import sweep as sweep_function
from regjax.classification import ImageStage, memory
from regjax.cli import main
from regjax.data.images import LabelNoise
from regjax.models.vision import Mlp
from regjax.objectives.classification import CrossEntropy, Distillation
from tests.classification.small import experiment

import importlib  # isort: skip

sweeping = importlib.import_module("regjax.sweep")  # the function has taken its name
points, summary, with_value = sweeping.points, sweeping.summary, sweeping.with_value

TWO = (
    ImageStage("teacher", CrossEntropy()),
    ImageStage("student", Distillation(alpha=0.5), teachers=("teacher",)),
)
NOISE = {"noise": LabelNoise("symmetric", 0.2)}


def test_points_are_the_product_of_the_axes_and_seeds():
    base = experiment(*TWO, seed=3)
    found = points(base, {"student.alpha": ["0", "1"], "epochs": ["2", "3"]}, 2)
    assert [point.values for point in found][:3] == [
        {"student.alpha": "0", "epochs": "2", "seed": 3},
        {"student.alpha": "0", "epochs": "2", "seed": 4},
        {"student.alpha": "0", "epochs": "3", "seed": 3},
    ]
    assert len(found) == 8
    last = found[-1].experiment
    assert (last.stages[1].objective.alpha, last.epochs, last.seed) == (1.0, 3, 4)
    assert last.stages[0] == base.stages[0]


def test_values_reach_fields_stages_and_objectives():
    base = experiment(*TWO, data=NOISE)
    assert with_value(base, "data.noise.rate", "0.4").data.noise.rate == 0.4
    assert with_value(base, "optimizer.learning-rate", "0.5").optimizer.learning_rate == 0.5
    assert with_value(base, "student.epochs", "7").stages[1].epochs == 7
    assert with_value(base, "student.temperature", "2").stages[1].objective.temperature == 2.0
    assert with_value(base, "optimizer.nesterov", "false").optimizer.nesterov is False
    assert with_value(base, "optimizer.schedule", "linear").optimizer.schedule == "linear"
    assert with_value(base, "model", Mlp((3,))).model == Mlp((3,))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch", "3", "ImageExperiment has no field 'epoch'; it has: stages, data"),
        ("student.beta", "3", "Distillation has no field 'beta'; it has: alpha"),
        ("nobody.alpha", "3", "has no field 'nobody'"),
        ("epochs", "0.5", "epochs is '0.5'; the field holds 4"),
        ("epochs", "0", "epochs = 0: epochs is 0; it has to be 1 or more"),
        ("student.alpha", "2", "student.alpha = 2: Distillation.alpha is 2"),
        ("optimizer.nesterov", "maybe", "optimizer.nesterov is 'maybe'; the field holds True"),
    ],
)
def test_names_and_values_that_cannot_be_are_refused(name, value, message):
    with pytest.raises(InputError, match=message):
        with_value(experiment(*TWO), name, value)


def test_means_and_standard_errors_are_the_formula():
    values = {0: [0.5, 0.7, 0.9], 1: [0.2, 0.2, 0.5]}
    rows = [
        {
            "rate": rate,
            "seed": seed,
            "stage": "only",
            "accuracy": value,
            "worst": None,
            "diverged": False,
        }
        for rate, column in values.items()
        for seed, value in enumerate(column)
    ]
    rows.append(
        {"rate": 1, "seed": 3, "stage": "only", "accuracy": 0.0, "worst": None, "diverged": True}
    )
    table = summary(rows)
    assert [(row["rate"], row["runs"], row["diverged"]) for row in table] == [(0, 3, 0), (1, 4, 1)]
    for row in table:
        column = values[row["rate"]]
        assert row["accuracy"] == pytest.approx(np.mean(column))
        assert row["accuracy_se"] == pytest.approx(np.std(column, ddof=1) / math.sqrt(3))
        assert row["worst"] is None and row["worst_se"] is None


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("swept")
    axes = {"student.alpha": [0.0, 1.0], "data.noise.rate": [0.0, 0.4]}
    return workdir, sweep(experiment(*TWO, data=NOISE), workdir, axes=axes, seeds=2, quiet=True)


def test_what_differs_in_numbers_is_trained_side_by_side(swept):
    workdir, found = swept
    assert len(found["points"]) == 8 and len(found["rows"]) == 16 and len(found["table"]) == 8
    assert [path.name for path in (workdir / "runs").iterdir()] == ["000"]
    by_row = {
        (row["stage"], row["student.alpha"], row["data.noise.rate"], row["seed"]): row["accuracy"]
        for row in found["rows"]
    }
    # alpha 0 is training on the labels; its student has the seed of another stage than the teacher.
    assert by_row["student", 0.0, 0.0, 0] != by_row["student", 0.0, 0.4, 0]
    for key, value in by_row.items():
        if key[0] == "teacher":  # alpha is of no effect there
            assert value == by_row["teacher", 0.0, key[2], key[3]]


def assert_same(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], abs=1e-6), name


def test_runs_that_do_not_fit_are_trained_in_parts_with_the_same_table(
    swept, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweeping, "runs_that_fit", lambda experiment: 3)
    axes = {"student.alpha": [0.0, 1.0], "data.noise.rate": [0.0, 0.4]}
    found = sweep(experiment(*TWO, data=NOISE), tmp_path, axes=axes, seeds=2, quiet=True)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["000", "001", "002"]
    assert_same(found["rows"], swept[1]["rows"])
    assert_same(found["table"], swept[1]["table"])


class Stop(Exception):
    pass


def test_a_killed_sweep_goes_on_and_gives_the_same_table(swept, tmp_path, monkeypatch):
    """Killed at the start of the third part of three, then in the middle of its second stage."""
    from regjax import loop

    monkeypatch.setattr(sweeping, "runs_that_fit", lambda experiment: 3)
    axes = {"student.alpha": [0.0, 1.0], "data.noise.rate": [0.0, 0.4]}
    base = experiment(*TWO, data=NOISE)
    done, train_runs = [], sweeping.train_runs

    def stops(experiments, folder, **options):
        if folder.name == "002" and not done:
            done.append(folder)
            raise Stop
        return train_runs(experiments, folder, **options)

    monkeypatch.setattr(sweeping, "train_runs", stops)
    with pytest.raises(Stop):
        sweep(base, tmp_path, axes=axes, seeds=2, quiet=True)
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("00[01]/*/checkpoints/*")
    }
    assert before

    class Killed(loop.Recorder):
        def add(self, step, metrics, chunk):
            if self._stage == "student":
                raise Stop
            super().add(step, metrics, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Recorder", Killed)
        with pytest.raises(Stop):
            sweep(base, tmp_path, axes=axes, seeds=2, quiet=True)
    found = sweep(base, tmp_path, axes=axes, seeds=2, quiet=True)
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time  # what was done is not done again
    assert_same(found["rows"], swept[1]["rows"])
    assert_same(found["table"], swept[1]["table"])


def test_another_sweep_is_not_mixed_with_what_is_there(swept):
    with pytest.raises(InputError, match="holds a sweep over other values"):
        sweep(experiment(*TWO, data=NOISE), swept[0], seeds=3, quiet=True)


def test_the_command_writes_a_table_and_a_plot(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.classification.small import experiment as made\nexperiment = made()\n"
    )
    status = main(
        ["sweep", str(config), "--seeds", "2", "--grid", "only.rate", "0", "0.2", "--epochs", "2",
         "--workdir", str(tmp_path / "runs")]
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    assert "experiment: 4 runs" in shown and "±" in shown and "sweep.png" in shown
    assert (tmp_path / "runs" / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [row["only.rate"] for row in found["table"]] == ["0", "0.2"]
    for arguments, message in [
        (["--seeds", "x"], "--seeds is 'x'"),
        (["--grid", "only.rate"], "give the field and its values"),
        (["--grid", "only.nothing", "1"], "CrossEntropy has no field 'nothing'"),
    ]:
        assert main(["sweep", str(config), *arguments, "--workdir", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err


def test_how_many_runs_fit_follows_the_memory(monkeypatch):
    one = experiment(model=Mlp((64, 64)), runs="vmap")
    monkeypatch.setattr(memory, "_memory", lambda: 10**9)
    many = memory.runs_that_fit(one)
    monkeypatch.setattr(memory, "_memory", lambda: 10**8)
    fewer = memory.runs_that_fit(one)
    assert many == pytest.approx(10 * fewer, rel=0.01) and fewer > 10
    monkeypatch.setattr(memory, "_memory", lambda: 0)
    assert memory.runs_that_fit(one) == 1
    # In turns only the states add up.
    monkeypatch.setattr(memory, "_memory", lambda: 10**9)
    assert memory.runs_that_fit(dataclasses.replace(one, runs="map")) > many


def test_text_experiments_are_run_one_after_another(tmp_path):
    from tests.small_experiment import experiment as text

    short = dataclasses.replace(text, steps=2, stages=text.stages[:1], eval_every=0)
    found = sweep_function(short, tmp_path, seeds=2, quiet=True)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["000", "001"]
    by_seed = [row["rmse"] for row in found["rows"] if row["read-out"] == "mean"]
    (row,) = [row for row in found["table"] if row["read-out"] == "mean"]
    assert len(by_seed) == 2 and by_seed[0] != by_seed[1]
    assert row["rmse"] == pytest.approx(np.mean(by_seed)) and row["runs"] == 2
