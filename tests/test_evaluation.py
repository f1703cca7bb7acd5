import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from regjax import decisions, evaluation, metrics, models, scoring
from regjax.errors import InputError
from regjax.models import Apply
from tests import tiny

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
EXAMPLES = tiny.examples(10, seed=4)


@pytest.fixture(scope="module")
def scored():
    """Ten examples in batches of four, shuffled; the last batch has two padding rows."""
    order = np.random.default_rng(0).permutation(10)
    batches = []
    for start in (0, 4, 8):
        chosen = order[start : start + 4]
        rows = [[EXAMPLES[index]] for index in chosen] + [[]] * (4 - len(chosen))
        batch = tiny.batch(rows)
        batch["record_ids"][: len(chosen), 0] = chosen
        batches.append(batch)
    assert (batches[-1]["record_ids"][:, 0] == -1).sum() == 2
    apply, params = tiny.decoder()
    score = evaluation.make_score(apply, tiny.SINGLE)
    done = []
    found = evaluation.evaluate_batches(
        score,
        params,
        batches,
        tiny.SINGLE.values,
        tuple(evaluation.READ_OUTS),
        advance=lambda: done.append(1),
    )
    assert len(done) == 3
    return found


def expected_probabilities():
    apply, params = tiny.decoder()
    rows = [tiny.batch([[example]]) for example in EXAMPLES]
    batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    found = scoring.score_distribution(apply, params, batch, tiny.SINGLE)
    return np.exp(np.asarray(found.log_probs, np.float64))


def test_examples_come_back_in_the_order_of_the_source_without_padding(scored):
    np.testing.assert_array_equal(scored.record_ids, range(10))
    np.testing.assert_array_equal(scored.targets, [example.score for example in EXAMPLES])
    np.testing.assert_allclose(scored.probabilities, expected_probabilities(), rtol=1e-5)
    assert len(set(scored.probabilities[:, 0])) == 10


def test_read_outs_are_their_formulas(scored):
    p = expected_probabilities()
    np.testing.assert_allclose(scored.predictions["mean"], p @ VALUES, rtol=1e-5)
    normalized = p @ VALUES / p.sum(-1)
    np.testing.assert_allclose(scored.predictions["normalized_mean"], normalized, rtol=1e-5)
    assert (scored.predictions["normalized_mean"] > scored.predictions["mean"] + 0.1).all()
    np.testing.assert_array_equal(scored.predictions["mode"], VALUES[p.argmax(-1)])
    half = (np.cumsum(p, -1) >= p.sum(-1, keepdims=True) / 2).argmax(-1)
    np.testing.assert_array_equal(scored.predictions["median"], VALUES[half])


def test_the_report_has_every_read_outs_metrics_and_the_distributions_once(scored):
    figures = {"not_finite", "rmse", "mae", "pearson", "spearman", "kendall", "accuracy_within"}
    figures.add("quadratic_weighted_kappa")
    expected = {f"{name}/{figure}" for name in evaluation.READ_OUTS for figure in figures}
    shared = {"count", "target_std", "crps", "coverage_90", "grid_mass"}
    assert scored.report.keys() == expected | shared
    targets = scored.targets
    assert scored.report["count"] == 10
    for name, predicted in scored.predictions.items():
        rmse = math.sqrt(np.mean((predicted - targets) ** 2))
        np.testing.assert_allclose(scored.report[f"{name}/rmse"], rmse, rtol=1e-6)
    mass = expected_probabilities().sum(-1).mean()
    np.testing.assert_allclose(scored.report["grid_mass"], mass, rtol=1e-5)


def test_intervals_are_named_like_their_metric():
    p = np.array([[0.6, 0.4], [0.2, 0.7], [0.1, 0.8], [0.5, 0.5]])
    found = evaluation.evaluate_distribution(
        np.arange(4), np.array([0, 1, 1, 0]), p, np.array([0.0, 1.0]), ("mean",), intervals=True
    ).report
    assert found["mean/rmse_low"] <= found["mean/rmse"] <= found["mean/rmse_high"]
    assert {"crps_low", "crps_high", "grid_mass_low"} <= found.keys()
    assert not any(name.startswith("mean/crps") for name in found)


def test_a_constant_prediction_has_no_correlation_and_the_report_says_why():
    p = np.full((3, 2), 0.5)
    report = evaluation.evaluate_distribution(
        np.arange(3), np.array([0.0, 1.0, 1.0]), p, np.array([0.0, 1.0]), ("mean",)
    ).report
    found = evaluation.to_json(report)
    assert found["mean/rmse"] == 0.5
    assert found["mean/pearson"] is None
    assert found["mean/pearson/undefined"] == "the predictions are constant"
    assert "mean/rmse/undefined" not in found
    json.dumps(found, allow_nan=False)


def test_json_has_no_infinity():
    report = {"a": math.inf, "b": metrics.Undefined("why"), "c": np.float32(0.5)}
    assert evaluation.to_json(report) == {"a": None, "b": None, "b/undefined": "why", "c": 0.5}


def test_predictions_are_read_back_as_they_were_written(scored, tmp_path):
    path = tmp_path / "predictions.jsonl"
    ids = [f"record {index}" for index in range(10)]
    texts = ["one", "two", "three", "four", "five"]
    evaluation.write_predictions(path, scored, ids, texts)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert [line["target"] for line in lines] == scored.targets.tolist()
    for name in evaluation.READ_OUTS:
        assert [line[name] for line in lines] == [float(x) for x in scored.predictions[name]]
    assert all(list(line["distribution"]) == texts for line in lines)
    written = [list(line["distribution"].values()) for line in lines]
    np.testing.assert_array_equal(written, scored.probabilities)
    np.testing.assert_allclose([line["grid_mass"] for line in lines], np.sum(written, -1))
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_read_out_without_mass_is_written_as_null(tmp_path):
    found = evaluation.evaluate_distribution(
        np.array([0]), np.array([1.0]), np.zeros((1, 2)), np.array([0.0, 1.0]), ("mean", "mode")
    )
    assert math.isnan(decisions.mode(np.zeros(2), np.array([0.0, 1.0])))
    evaluation.write_predictions(tmp_path / "p.jsonl", found, ["a"], ["0", "1"])
    line = (tmp_path / "p.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["mode"] is None
    assert found.report["mode/not_finite"] == 1


def test_scoring_is_compiled_once_for_all_batches():
    apply, params = tiny.bigram(64)
    traces = []

    def hidden(params, tokens=None, **_):
        traces.append(1)
        return apply.hidden(params, tokens)

    score = evaluation.make_score(Apply(hidden, apply.head), tiny.SINGLE)
    for seed in range(3):
        rows = [[example] for example in tiny.examples(4, seed)]
        found = score(params, tiny.batch(rows))
        assert found.log_probs.shape == (4, 5)
    assert len(traces) == 1


def test_nothing_to_evaluate_is_refused():
    apply = models.from_function(lambda params, tokens: jnp.zeros((*tokens.shape, 64)))
    score = evaluation.make_score(apply, tiny.SINGLE)
    for batches in ([], [tiny.batch([[], []])]):
        with pytest.raises(InputError, match="no examples to evaluate"):
            evaluation.evaluate_batches(score, {}, batches, VALUES, ("mean",))
