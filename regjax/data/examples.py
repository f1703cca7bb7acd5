"""Built-in data: reviews whose best possible score is known, and the diabetes table as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from regjax.errors import InputError

STARS = np.arange(1, 6)
PRODUCTS = ("camera", "kettle", "jacket", "lamp", "radio", "backpack")
ASPECTS = ("price", "finish", "delivery", "manual", "design", "packaging", "weight", "colour")
OPINIONS = {
    2.0: ("superb", "brilliant", "perfect"),
    1.0: ("good", "pleasant", "solid"),
    -1.0: ("dull", "clumsy", "flimsy"),
    -2.0: ("awful", "useless", "dreadful"),
}


def star_probabilities(quality: float | np.ndarray) -> np.ndarray:
    """Probabilities `[..., 5]` of 1 to 5 stars for a review of total `quality` q:

    `0.4 (s(q) [y = 5] + s(-q) [y = 1]) + 0.3 Binomial(y - 1; 4, s(0.4 q)) + 0.3 / 5`

    with `s` the logistic function: delight and anger pile up at the ends over a broad middle, the
    "J" of published ratings, so that mean, median and mode differ.

    >>> star_probabilities(1.0).round(3)
    array([0.175, 0.106, 0.164, 0.163, 0.391])
    """
    q = np.asarray(quality, np.float64)[..., None]
    delight = 1 / (1 + np.exp(-q))
    taste = 1 / (1 + np.exp(-0.4 * q))
    k = STARS - 1
    binomial = np.array([math.comb(4, i) for i in k]) * taste**k * (1 - taste) ** (4 - k)
    ends = delight * (STARS == 5) + (1 - delight) * (STARS == 1)
    return 0.4 * ends + 0.3 * binomial + 0.3 / 5


def rated_texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` short product reviews with 1 to 5 stars drawn from a known distribution.

    A review names three aspects of a product, each with an adjective worth -2, -1, 1 or 2; their
    sum is the quality q, and the stars follow `star_probabilities(q)`. Fields: `id`, `text`,
    `score` (the stars), and of that distribution `bayes_mean`, `bayes_median`, `bayes_mode`: the
    best a model can answer for squared error, absolute error and accuracy. The mode's RMSE is about
    1.35 times the mean's. The same seed gives the same reviews, a longer list begins with the
    shorter one.

    >>> record = rated_texts(1, seed=0)[0]
    >>> record["text"]
    'The camera: its finish is flimsy, the price is good, the packaging is awful.'
    >>> record["score"], record["bayes_mode"], round(record["bayes_mean"], 3)
    (3, 1, 2.163)
    """
    if count < 0:
        raise InputError(f"count is {count}: expected 0 or more texts")
    # Plain uniform numbers: their stream stays the same across NumPy versions.
    uniform = np.random.Generator(np.random.Philox(key=seed % 2**64)).random((count, 12))
    worths = tuple(OPINIONS)
    records = []
    for index, draws in enumerate(uniform.tolist()):
        product = PRODUCTS[int(draws[0] * len(PRODUCTS))]
        aspects = list(ASPECTS)
        quality, clauses = 0.0, []
        for which, worth, word in zip(draws[1:4], draws[4:7], draws[7:10], strict=True):
            value = worths[int(worth * len(worths))]
            quality += value
            adjective = OPINIONS[value][int(word * len(OPINIONS[value]))]
            clauses.append(f"{aspects.pop(int(which * len(aspects)))} is {adjective}")
        probabilities = star_probabilities(quality)
        cumulative = probabilities.cumsum()
        records.append(
            {
                "id": f"review-{index}",
                "text": f"The {product}: its {clauses[0]}, the {clauses[1]}, the {clauses[2]}.",
                "score": 1 + int((draws[10] * cumulative[-1] >= cumulative).sum()),
                "bayes_mean": float(probabilities @ STARS),
                "bayes_median": int(STARS[(cumulative >= 0.5 - 1e-12).argmax()]),
                "bayes_mode": int(STARS[probabilities.argmax()]),
            }
        )
    return records


def bayes_rmse(
    records: Sequence[Mapping[str, Any]], rule: Literal["mean", "median", "mode"] = "mean"
) -> float:
    """RMSE on these very records of who knows the distribution and answers with its `rule`.

    With the mean it is the bound that no model beats but by luck.
    """
    errors = [record["score"] - record[f"bayes_{rule}"] for record in records]
    return float(np.sqrt(np.mean(np.square(errors))))


def diabetes_texts(
    split: Literal["train", "validation", "test"], seed: int = 0
) -> list[dict[str, Any]]:
    """scikit-learn's diabetes table, a patient a line of text: 310, 66 and 66 of the 442 patients.

    `score` is the disease's progression a year later, 25 to 346; the text gives age, sex, body mass
    index, blood pressure and six blood values in their raw units (Efron et al., "Least Angle
    Regression", 2004). The split is a function of `seed`.

    >>> record = diabetes_texts("test")[0]
    >>> record["text"]
    'age 36, sex 2, bmi 22, bp 90, s1 160, s2 99.6, s3 50, s4 3, s5 3.9512, s6 82'
    >>> record["score"]
    138.0
    """
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    count = len(table.target)
    order = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(count), kind="stable")
    held_out = int(0.15 * count)
    parts = {
        "train": order[: count - 2 * held_out],
        "validation": order[count - 2 * held_out : count - held_out],
        "test": order[count - held_out :],
    }
    if split not in parts:
        raise InputError(f"split is {split!r}: expected one of {', '.join(parts)}")
    names = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    return [
        {
            "id": f"patient-{index}",
            "text": ", ".join(
                f"{name} {value:g}" for name, value in zip(names, table.data[index], strict=True)
            ),
            "score": float(table.target[index]),
        }
        for index in sorted(parts[split].tolist())
    ]
