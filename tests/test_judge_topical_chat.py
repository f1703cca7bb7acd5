"""RAIL on real sampled ratings, read by the benchmark's own reader."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from regjax import metrics

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT.parent / "shared" / "data" / "judge_topical_chat"


def load(name):
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


rail = load("rail_topical_chat")


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("2", 2),
        ("- 3", 3),
        ("2.5 (somewhat)", 2.5),
        ("1. It changes the topic, and names 3 films.", 1),
        ("Rating: 3\nRationale: the year 1994", 3),
        ("Analysis: it cites 2 facts of 1999.\n\nRating:\n- Engagingness: 1", 1),
        ("Analysis: a fact about the 3 lines.\nRating: 2", 2),
        ("Score: 2", 2),
        ("Rating: 4", np.nan),
        ("21", np.nan),
        ("2-3", np.nan),
        ("Yes", np.nan),
        ("The 3 lines are a menu.", np.nan),
        ("", np.nan),
    ],
)
def test_ratings_are_read_where_they_are_stated(answer, rating):
    np.testing.assert_equal(rail.parse_rating(answer), rating)


@pytest.fixture(scope="module")
def files():
    if not FOLDER.is_dir():
        pytest.skip("the judge_topical_chat data are not beside the checkout")
    return {ratings.name: ratings for ratings in rail.read(FOLDER)}


@pytest.fixture(scope="module")
def measured(files):
    return {name: rail.measure(file.samples, file.human) for name, file in files.items()}


def test_files_are_whole(files):
    assert len(files) >= 14
    for ratings in files.values():
        assert 353 <= len(ratings.human) <= 360 and ratings.samples.shape[1] == 20
        # A handful of answers hold no rating, and every item keeps at least half of its twenty.
        assert np.isnan(ratings.samples).mean() < 0.006
        assert np.isfinite(ratings.samples).sum(axis=1).min() >= 10


def test_mean_of_twenty_beats_one_sample_in_every_file(measured):
    for name, rules in measured.items():
        assert rules["mean"]["pearson"] > rules["single"]["pearson"] + 0.05, name
        assert rules["mean"]["spearman"] > rules["single"]["spearman"], name
        assert rules["mean"]["rmse"] < rules["single"]["rmse"], name


def test_mean_beats_median_and_mode_in_pearson_and_rmse_in_every_file(measured):
    for name, rules in measured.items():
        for other in ("median", "mode"):
            assert rules["mean"]["pearson"] > rules[other]["pearson"], (name, other)
            assert rules["mean"]["rmse"] < rules[other]["rmse"], (name, other)


def test_half_point_risk_wins_at_its_own_metric_in_every_file(measured):
    for name, rules in measured.items():
        others = set(rules) - {"risk_half_point", "constant"}
        best = max(rules[other]["accuracy_within"] for other in others)
        assert rules["risk_half_point"]["accuracy_within"] > best, name


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("coh_geval", 0.468),
        ("eng_geval", 0.549),
        ("coh_llm_eval_no_cot", 0.524),
        ("eng_llm_eval_no_cot", 0.611),
    ],
)
def test_published_correlations_are_those_of_the_mean(measured, name, published):
    assert measured[name]["mean"]["pearson"] == pytest.approx(published, abs=0.001)


def test_absolute_risk_is_the_median(files):
    for ratings in files.values():
        predictions = rail.decide(ratings.samples)
        np.testing.assert_array_equal(predictions["risk_absolute"], predictions["median"])


def test_paired_gain_is_the_difference_of_the_reported_correlations(files, measured):
    ratings, rules = files["coh_geval"], measured["coh_geval"]
    predictions = rail.decide(ratings.samples)
    gain = rail.gain(predictions["mean"], ratings.samples, ratings.human)
    assert gain == pytest.approx(rules["mean"]["pearson"] - rules["single"]["pearson"], abs=1e-12)
    arrays = (predictions["mean"], ratings.samples, ratings.human)
    assert metrics.bootstrap(rail.gain, *arrays, resamples=50).low > 0
