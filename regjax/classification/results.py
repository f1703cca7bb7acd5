"""What a stage's runs are worth, and the table of an image experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from regjax import class_metrics, ranking_metrics
from regjax.classification.experiment import ImageExperiment
from regjax.errors import InputError

SCORES = "scores.npz"

Truth = tuple[np.ndarray, np.ndarray, np.ndarray]


def report(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    worst_k: int = 1,
    teacher: np.ndarray | None = None,
    train: Truth | None = None,
) -> dict[str, Any]:
    """The figures of one run on the test split; None where one is not defined.

    `accuracy`, `balanced`, `worst` (class) and `ece`; `teacher_agreement` and `repeated_errors`; of noisy
    training images `train_clean`, `train_flipped` (accuracy against the true class) and `memorised`; and
    by class `accuracies`, `agreement_by_class` and `repeated_errors_by_class`. See `regjax.class_metrics`.

    Args:
      logits: `[N, C]`.
      labels: `[N]`, true classes.
      worst_k: how many of the worst classes `worst_K` is the mean of; 1: left out.
      teacher: `[N, C]`, the teachers' mean logits, to compare with.
      train: `(logits [M, C], true labels [M], labels that were trained on [M])` of the training images.
    """
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    accuracies = class_metrics.class_accuracies(predicted, labels, classes)
    found: dict[str, Any] = {
        "accuracy": class_metrics.accuracy(predicted, labels),
        "balanced": class_metrics.balanced_accuracy(accuracies),
        "worst": class_metrics.worst_class_accuracy(accuracies),
        **(
            {f"worst_{worst_k}": class_metrics.worst_k_accuracy(accuracies, worst_k)}
            if worst_k > 1
            else {}
        ),
        "ece": class_metrics.expected_calibration_error(softmax(logits, axis=-1), labels),
    }
    by_class: dict[str, Any] = {"accuracies": accuracies}
    if teacher is not None:
        agreement = class_metrics.student_agreement(
            predicted, teacher.argmax(-1), labels, classes
        )._asdict()
        found["teacher_agreement"] = agreement["agreement"]
        for name in ("repeated_errors", "agreement_by_class", "repeated_errors_by_class"):
            (by_class if name.endswith("_by_class") else found)[name] = agreement[name]
    if train is not None:
        own, true, given = train
        parts = class_metrics.denoising(own.argmax(-1), true, given)
        found |= {
            "train_clean": parts.clean,
            "train_flipped": parts.flipped,
            "memorised": parts.memorised,
        }
    return _defined({**found, **by_class})


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _defined(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_defined(one) for one in value]
    return float(value) if np.isfinite(value) else None


def ranking(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The figures of one run that ranks: `scores [N, 1]` by `labels [N, K]`, see `ranking_metrics`."""
    return _defined(ranking_metrics.ranking_report(scores[:, 0], labels))


def held_out_figures(
    logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy and worst-class accuracy of runs `[R, M, C]`, or the mean area under the curve of runs that
    rank by `attributes [C, K]`: means, and of each run where there are many."""
    found: dict[str, float] = {}
    reports = [
        report(run, labels) if attributes is None else ranking(run, attributes[labels])
        for run in logits
    ]
    for name in ("accuracy", "worst") if attributes is None else ("auc_mean", "auc_min"):
        values = [one[name] for one in reports]
        values = [np.nan if value is None else value for value in values]
        found[f"held_out/{name}"] = float(np.mean(values))
        if len(values) > 1:
            found |= {f"held_out/{name}/{run}": float(value) for run, value in enumerate(values)}
    return found


def post_shift_reports(
    workdir: str | Path, stage: str, *, tradeoff: float = 1.0
) -> list[dict[str, Any]]:
    """The figures of a finished stage's runs after their scores were shifted by class.

    The shifts are learned on the held-out images, see `regjax.class_metrics.post_shifted`: from balanced
    accuracy (`tradeoff=0`) to that of the worst class (1).

    Raises:
      InputError: if nothing was held out, or the stage is not there.
    """
    path = Path(workdir) / stage / SCORES
    if not path.is_file():
        raise InputError(f"{path.parent} holds no finished stage of an image experiment")
    with np.load(path) as scores:
        if "held_out" not in scores:
            raise InputError("post_shift needs held-out images: set data.held_out, such as 0.1")
        found = []
        for held_out, test in zip(scores["held_out"], scores["test"], strict=True):
            predicted = class_metrics.post_shifted(
                log_softmax(held_out, axis=-1), scores["held_out_labels"],
                log_softmax(test, axis=-1), tradeoff=tradeoff,
            )  # fmt: skip
            classes = test.shape[-1]
            found.append(report(np.eye(classes)[predicted], scores["test_labels"]))
    for one in found:
        del one["ece"]  # of a decision, not of probabilities
    return found


def table(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage with the mean of its runs' figures."""
    rows = []
    for name, stage in stages.items():
        figures = {k: [run[k] for run in stage["runs"]] for k in stage["runs"][0]}
        means = {
            k: None if None in values else float(np.mean(values))
            for k, values in figures.items()
            if not isinstance(values[0], list)
        }
        rows.append({"stage": name, **means})
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def title(experiment: ImageExperiment, runs: int) -> str:
    return f"{experiment.name}: test images" + (f", means of {runs} runs" if runs > 1 else "")


def write_scores(folder: Path, scores: Mapping[str, np.ndarray]) -> None:
    """Writes `scores.npz`: logits `[R, N, C]` and labels `[N]` by split."""
    temporary = folder / f"tmp.{SCORES}"
    np.savez_compressed(temporary, **scores)  # type: ignore[arg-type]
    temporary.replace(folder / SCORES)
