"""Evaluation of a trained model: the figures of training time, from files of any kind."""

import csv
import json

import numpy as np
import pytest

import regjax
from regjax import InputError, Reader, metrics
from tests.small_experiment import experiment


@pytest.fixture(scope="module")
def reader(trained):
    return Reader.load(trained)


@pytest.fixture(scope="module")
def found(reader):
    # In the batches of training time: others are rounded otherwise.
    return regjax.evaluate(reader, experiment.data.test, batch_size=experiment.eval_batch_size)


def test_figures_are_those_of_training_time(trained, found):
    before = json.loads((trained / "second" / "results.json").read_text())["test"]
    shared = [name for name, value in before.items() if isinstance(value, float)]
    assert len(shared) > 12
    for name in shared:
        assert found.report[name] == pytest.approx(before[name], rel=1e-5), name
    assert found.report["count"] == 40 and found.report["skipped"] == 0


def test_figures_follow_from_the_distribution(found):
    values, targets = np.arange(1, 6), np.array([r["score"] for r in experiment.data.test])
    np.testing.assert_array_equal(found.targets, targets)
    np.testing.assert_array_equal(found.record_ids, np.arange(40))
    mean = found.probabilities @ values
    total = found.probabilities.sum(1)
    np.testing.assert_allclose(found.predictions["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(found.predictions["normalized_mean"], mean / total, rtol=1e-6)
    np.testing.assert_array_equal(found.predictions["mode"], values[found.probabilities.argmax(1)])
    rmse = np.sqrt(np.mean((mean - targets) ** 2))
    assert found.report["mean/rmse"] == pytest.approx(rmse, rel=1e-6)
    assert found.report["grid_mass"] == pytest.approx(total.mean(), rel=1e-9)
    low, high = (found.report[f"mean/rmse_{end}"] for end in ("low", "high"))
    interval = metrics.bootstrap(metrics.rmse, found.predictions["mean"], targets, seed=0)
    assert (low, high) == tuple(interval) and low < rmse < high


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batch_size_does_not_matter(reader, found, size):
    other = regjax.evaluate(reader, experiment.data.test, batch_size=size, intervals=False)
    np.testing.assert_allclose(other.probabilities, found.probabilities, rtol=1e-5)
    np.testing.assert_array_equal(other.targets, found.targets)
    assert not [name for name in other.report if name.endswith("_low")]


def test_files_with_other_names(reader, found, tmp_path):
    path = tmp_path / "in.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([r["text"], r["score"]] for r in experiment.data.test)
    other = regjax.evaluate(
        reader, path, columns=("text", "stars"), score_field="stars", intervals=False
    )
    np.testing.assert_allclose(other.probabilities, found.probabilities, rtol=1e-6)


def test_bad_records_stop_or_are_counted(reader):
    records = [*experiment.data.test[:3], {"text": "a", "score": 7}, {"text": "", "score": 3}]
    with pytest.raises(InputError, match=r"2 of 5 records cannot be used"):
        regjax.evaluate(reader, records)
    other = regjax.evaluate(reader, records, on_bad_record="skip", intervals=False)
    assert (other.report["count"], other.report["skipped"]) == (3, 2)
    np.testing.assert_array_equal(other.record_ids, [0, 1, 2])


def test_what_cannot_be_evaluated_is_named(reader, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        regjax.evaluate(reader, tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no record has the field 'stars'"):
        regjax.evaluate(reader, experiment.data.test, score_field="stars")
    with pytest.raises(InputError, match="is no model of ours"):
        regjax.evaluate(tmp_path, experiment.data.test)
    with pytest.raises(InputError, match="batch_size is 0"):
        regjax.evaluate(reader, experiment.data.test, batch_size=0)
