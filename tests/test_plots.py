"""Pictures: one of each kind for every run, whatever its figures are."""

import json

import numpy as np
import pytest

from regjax import InputError
from regjax.log import Log
from regjax.plots import plot_workdir, read_predictions

PNG = b"\x89PNG\r\n\x1a\n"


def write_predictions(folder, read_outs, target, values=(1, 2, 3, 4, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    share = {str(value): 1 / len(values) for value in values}
    with (folder / "predictions_test.jsonl").open("w") as file:
        for row, score in enumerate(target):
            named = {name: float(column[row]) for name, column in read_outs.items()}
            line = {"id": str(row), "target": float(score), **named, "distribution": share}
            file.write(json.dumps({**line, "grid_mass": 1.0}) + "\n")


def write_run(workdir, losses=(3.0, 2.0), table=()):
    workdir.mkdir(exist_ok=True)
    for step, loss in enumerate(losses, 1):
        Log(workdir).write("only", step, {"loss": loss})
    (workdir / "results.json").write_text(json.dumps({"table": list(table)}))


def check(written, names):
    assert [path.name for path in written] == names
    for path in written:
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert int.from_bytes(content[16:20]) > 500 and int.from_bytes(content[20:24]) > 400


def test_a_trained_run(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    panels = [f"{s}_{p}.png" for s in ("first", "second") for p in ("test", "validation")]
    check(plot_workdir(tmp_path / "run"), ["learning_curve.png", "comparison.png", *panels])


DRAW = np.random.default_rng(0)
TARGET = DRAW.integers(1, 6, 60).astype(float)
CASES = {
    "usual": ({"mean": TARGET + DRAW.normal(size=60), "mode": TARGET}, TARGET),
    "constant": ({"mean": np.full(60, 2.5)}, TARGET),
    "nearly constant": ({"mean": 2.5 + 1e-6 * DRAW.normal(size=60)}, TARGET),
    "not numbers": ({"mean": np.full(60, np.nan)}, TARGET),
    "some not numbers": ({"mean": np.where(TARGET > 3, np.nan, TARGET), "mode": TARGET}, TARGET),
    "one record": ({"mode": np.array([3.0])}, np.array([2.0])),
    "one true score": ({"mean": DRAW.normal(size=60)}, np.full(60, 4.0)),
    "real scores": ({"median": DRAW.normal(size=400)}, DRAW.normal(size=400)),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_of_any_kind(tmp_path, name):
    read_outs, target = CASES[name]
    write_run(tmp_path)
    write_predictions(tmp_path / "only", read_outs, target)
    check(plot_workdir(tmp_path), ["learning_curve.png", "only_test.png"])
    columns = read_predictions(tmp_path / "only" / "predictions_test.jsonl")
    np.testing.assert_array_equal(columns["target"], target)
    np.testing.assert_array_equal(columns[next(iter(read_outs))], next(iter(read_outs.values())))
    assert columns["probabilities"].shape == (len(target), 5)


@pytest.mark.parametrize("losses", [(1.0,), (-2.0, 0.0, 3.0), (float("nan"), 2.0), ()])
@pytest.mark.parametrize("rmse", [None, 0.0, 1.5])
def test_logs_and_tables_of_any_kind(tmp_path, losses, rmse):
    row = {"stage": "only", "read-out": "mean", "split": "test", "rmse": rmse}
    write_run(tmp_path, losses, [row, {**row, "stage": "reference", "read-out": "bound"}])
    Log(tmp_path).write("only", 4, {"validation/mean/rmse": float("nan")})
    check(plot_workdir(tmp_path), ["learning_curve.png", "comparison.png"])


def test_no_run_no_pictures(tmp_path):
    with pytest.raises(InputError, match=r"holds no log\.jsonl"):
        plot_workdir(tmp_path)
