"""RAIL on real sampled ratings: which number to report from 20 answers of one judge.

The data are 360 replies of dialogue systems, each rated by people (the mean of three ratings from 1
to 3) and 20 times by ChatGPT under several prompts (Chiang & Lee, 2023, "A Closer Look into
Automatic Evaluation Using Large Language Models"). For every prompt the script prints how well a
single answer and each decision rule agree with the people.

    python benchmarks/rail_topical_chat.py --data ../shared/data/judge_topical_chat

`--intervals` adds paired bootstrap intervals of the gains over a single answer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regjax import decisions, metrics

ATTRIBUTES = {"coh": "coherence", "eng": "engagingness", "nat": "naturalness"}
LOWEST, HIGHEST = 1.0, 3.0
HUNDREDTHS = np.linspace(LOWEST, HIGHEST, 201)
RULES = (
    "constant",
    "single",
    "mode",
    "median",
    "mean",
    "risk_absolute",
    "risk_squared_samples",
    "risk_power",
    "risk_half_point",
)

METRICS = ("pearson", "spearman", "rmse", "mae", "accuracy_within")

_NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d|\s*-\s*\d)"
_LEADING = re.compile(rf"[\s*-]*{_NUMBER}")
_LABELLED = re.compile(
    rf"\b(?:rating|score|response|answer|coherence|engagingness|naturalness)[\W_]*?{_NUMBER}",
    re.IGNORECASE,
)


class Ratings(NamedTuple):
    name: str  # attribute and prompt, as in the file's name
    human: np.ndarray  # [N]
    samples: np.ndarray  # [N, 20], NaN where an answer holds no rating


def parse_rating(answer: str) -> float:
    """The rating from 1 to 3 that an answer starts with or labels, NaN if there is none.

    A number in the running text ("the year 1994") is no rating, nor is one off the scale.
    """
    found = _LEADING.match(answer) or _LABELLED.search(answer)
    rating = float(found[1]) if found else np.nan
    return rating if LOWEST <= rating <= HIGHEST else np.nan


def read(folder: Path) -> list[Ratings]:
    """All rating files of a folder, by name."""
    loaded = []
    for path in sorted(folder.glob("gpt3.5_*.json.gz")):
        name = path.name.removeprefix("gpt3.5_").removesuffix(".json.gz")
        attribute = ATTRIBUTES[name.split("_")[0]]
        with gzip.open(path, "rt", encoding="utf-8") as file:
            items = json.load(file)
        human = [item["scores"][attribute] for item in items]
        samples = [[parse_rating(answer) for answer in item["all_responses"]] for item in items]
        loaded.append(Ratings(name, np.array(human), np.array(samples)))
    if not loaded:
        raise SystemExit(f"{folder}: no gpt3.5_*.json.gz files here; give their folder as --data")
    return loaded


def decide(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The predictions `[N]` of every rule from `samples [N, S]`, unparsable answers dropped.

    The four risks: absolute error, which is the median again; squared error over the samples alone,
    as minimum-Bayes-risk decoding does it; `|error|^1.5` and a miss by more than half a point,
    over hundredths.
    """

    def absolute(truth, prediction):
        return abs(truth - prediction)

    def squared(truth, prediction):
        return (truth - prediction) ** 2

    def power(truth, prediction):
        return abs(truth - prediction) ** 1.5

    def half_point(truth, prediction):
        # A band of predictions often covers the same samples: take the one nearest their mean.
        missed = abs(truth - prediction) > 0.5 + 1e-4
        return missed + 1e-3 * squared(truth, prediction)

    drawn = decisions.from_samples(samples)
    p, v = drawn.probabilities, drawn.values
    risk = decisions.minimum_bayes_risk
    rules = {
        "mode": decisions.mode(p, v),
        "median": decisions.median(p, v),
        "mean": decisions.mean(p, v, normalize=True),
        "risk_absolute": risk(p, v, absolute),
        "risk_squared_samples": risk(p, v, squared),
        "risk_power": risk(p, v, power, candidates=HUNDREDTHS),
        "risk_half_point": risk(p, v, half_point, candidates=HUNDREDTHS),
    }
    return {name: np.asarray(prediction, np.float64) for name, prediction in rules.items()}


def measure(samples: np.ndarray, human: np.ndarray) -> dict[str, dict[str, float]]:
    """The `METRICS` of every rule, of a single answer and of the best constant.

    `"single"` is the average over the 20 choices of one answer; where that one is unparsable there
    is no prediction, and the item is left out of that choice. `"constant"` is the one number that
    the people's ratings themselves would choose for each metric.
    """
    measured = {}
    for name, prediction in decide(samples).items():
        measured[name] = metrics.regression_report(prediction, human, not_finite="drop")
    choices = [metrics.regression_report(one, human, not_finite="drop") for one in samples.T]
    measured["single"] = {
        key: float(np.mean([choice[key] for choice in choices])) for key in METRICS
    }
    constants = [metrics.regression_report(np.full(len(human), c), human) for c in HUNDREDTHS]
    measured["constant"] = {
        "pearson": np.nan,
        "spearman": np.nan,
        "rmse": constants[0]["target_std"],
        "mae": min(constant["mae"] for constant in constants),
        "accuracy_within": max(constant["accuracy_within"] for constant in constants),
    }
    return measured


def gain(prediction: np.ndarray, others: np.ndarray, human: np.ndarray) -> float:
    """Pearson of `prediction [N]` minus the average Pearson of the columns of `others [N, M]`."""

    def pearson(column: np.ndarray) -> float:
        kept = np.isfinite(column)
        return metrics.pearson(column[kept], human[kept])

    return pearson(prediction) - float(np.mean([pearson(column) for column in others.T]))


def gains(files: list[Ratings]) -> str:
    """What the mean gains in Pearson on a single answer and on the median; 95% intervals."""
    lines = ["| gain of the mean in pearson | over single | over median |", "|---|---:|---:|"]
    for ratings in files:
        predictions = decide(ratings.samples)
        row = []
        for others in (ratings.samples, predictions["median"][:, None]):
            arrays = (predictions["mean"], others, ratings.human)
            low, high = metrics.bootstrap(gain, *arrays)
            row.append(f"{gain(*arrays):.4f} [{low:.4f}, {high:.4f}]")
        lines.append(f"| {ratings.name} | {row[0]} | {row[1]} |")
    return "\n".join(lines)


def table(files: list[Ratings], metric: str) -> str:
    head = f"| {metric} | items | unparsable | " + " | ".join(RULES) + " |"
    lines = [head, "|---|" + "---:|" * (len(RULES) + 2)]
    columns = []
    for ratings in files:
        measured = measure(ratings.samples, ratings.human)
        row = [measured[rule][metric] for rule in RULES]
        columns.append(row)
        lost = int(np.sum(np.isnan(ratings.samples)))
        shown = " | ".join(f"{value:.4f}" for value in row)
        lines.append(f"| {ratings.name} | {len(ratings.human)} | {lost} | {shown} |")
    average = " | ".join(f"{value:.4f}" for value in np.mean(columns, axis=0))
    return "\n".join([*lines, f"| average | | | {average} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gpt3.5_*.json.gz")
    parser.add_argument("--intervals", action="store_true", help="also print gains (minutes)")
    arguments = parser.parse_args()
    files = read(arguments.data)
    for metric in METRICS:
        print(table(files, metric), end="\n\n")
    if arguments.intervals:
        print(gains(files))


if __name__ == "__main__":
    main()
