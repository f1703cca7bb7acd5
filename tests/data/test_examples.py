"""The built-in data: its closed form, its bounds, and that words decide the score."""

from __future__ import annotations

import re
from math import comb

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

from regjax.data import bayes_rmse, diabetes_texts, rated_texts
from regjax.data.examples import OPINIONS, star_probabilities
from regjax.errors import InputError

WORTH = {word: worth for worth, adjectives in OPINIONS.items() for word in adjectives}


def quality(text: str) -> float:
    return sum(WORTH.get(word, 0) for word in re.findall(r"\w+", text))


def probabilities(q: float) -> list[float]:
    """The formula again, a star at a time."""

    def s(x: float) -> float:
        return float(1 / (1 + np.exp(-x)))

    return [
        0.4 * (s(q) * (y == 5) + s(-q) * (y == 1))
        + 0.3 * comb(4, y - 1) * s(0.4 * q) ** (y - 1) * s(-0.4 * q) ** (5 - y)
        + 0.06
        for y in range(1, 6)
    ]


def test_bayes_answers_follow_from_the_words():
    for record in rated_texts(300, seed=3):
        p = np.array(probabilities(quality(record["text"])))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert record["bayes_mean"] == pytest.approx(p @ [1, 2, 3, 4, 5], abs=1e-12)
        assert p[record["bayes_mode"] - 1] == pytest.approx(p.max(), abs=1e-12)
        below = p[: record["bayes_median"] - 1].sum()
        assert below < 0.5 <= below + p[record["bayes_median"] - 1] + 1e-9
        assert record["score"] in (1, 2, 3, 4, 5)


def test_stars_are_drawn_from_their_distribution():
    """Counts of each star, standardised by the exact mean and variance given the texts."""
    records = rated_texts(20_000, seed=1)
    p = star_probabilities(np.array([quality(record["text"]) for record in records]))
    stars = np.array([record["score"] for record in records])
    for star in range(1, 6):
        share = p[:, star - 1]
        z = ((stars == star).sum() - share.sum()) / np.sqrt((share * (1 - share)).sum())
        assert abs(z) < 4


def test_the_read_out_matters():
    records = rated_texts(20_000, seed=2)
    mean, median, mode = (bayes_rmse(records, rule) for rule in ("mean", "median", "mode"))
    assert 1.3 < mode / mean < 1.42
    assert 1.05 < median / mean < 1.12
    assert np.std([record["bayes_mean"] for record in records]) > 0.8
    q = np.array([quality(record["text"]) for record in records])
    p = star_probabilities(q)
    variance = p @ np.arange(1, 6) ** 2 - (p @ np.arange(1, 6)) ** 2
    assert mean == pytest.approx(np.sqrt(variance.mean()), rel=0.02)


def test_rated_texts_are_a_function_of_the_seed():
    assert rated_texts(50, seed=4) == rated_texts(80, seed=4)[:50]
    assert rated_texts(50, seed=4) != rated_texts(50, seed=5)
    assert rated_texts(0) == []
    with pytest.raises(InputError, match="count is -1"):
        rated_texts(-1)


def test_a_linear_model_of_words_nearly_reaches_the_bound():
    records = rated_texts(6000, seed=0)
    words = sorted({word for record in records for word in record["text"].split()})
    table = np.array([[record["text"].split().count(w) for w in words] for record in records])
    stars = np.array([record["score"] for record in records])
    fitted = Ridge(1.0).fit(table[:5000], stars[:5000]).predict(table[5000:])
    rmse = np.sqrt(np.mean((fitted - stars[5000:]) ** 2))
    bound = bayes_rmse(records[5000:])
    assert bound < rmse < 1.03 * bound


def test_diabetes_is_split_whole_and_written_exactly():
    parts = {name: diabetes_texts(name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 310,
        "validation": 66,
        "test": 66,
    }
    table = load_diabetes(scaled=False)
    records = {record["id"]: record for part in parts.values() for record in part}
    assert len(records) == 442
    scores = [record["score"] for record in records.values()]
    assert (min(scores), max(scores)) == (25, 346)
    for index in range(442):
        record = records[f"patient-{index}"]
        numbers = [float(number) for number in re.findall(r" ([\d.]+)", record["text"])]
        assert numbers == table.data[index].tolist()
        assert record["score"] == table.target[index]
    assert diabetes_texts("test", seed=1) != parts["test"] == diabetes_texts("test")
    with pytest.raises(InputError, match="expected one of train, validation, test"):
        diabetes_texts("dev")
