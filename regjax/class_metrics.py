"""What is reported of a classifier: accuracy by class and of the worst classes, calibration, and what it
took over from its teacher or from wrong labels.

Everything here is NumPy in float64 on arrays that fit the host. Labels and predictions are integers from 0
to C - 1. An accuracy of a class is the share of its examples that are predicted as it, its recall. What is
not defined on its input, as for a class without examples, is `metrics.Undefined`: a NaN that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from regjax.errors import InputError
from regjax.metrics import Undefined


class Agreement(NamedTuple):
    """What a student has in common with its teacher, in [0, 1]; overall and by true class `[C]`."""

    agreement: float
    """Share of the examples on which both predict one class."""

    repeated_errors: float
    """Share of the teacher's errors that the student repeats: with the same wrong class."""

    agreement_by_class: list[float]
    repeated_errors_by_class: list[float]


class Denoising(NamedTuple):
    """What a model made of wrong labels that it was trained on; accuracies against the true label."""

    all: float
    """Accuracy on all training examples."""

    clean: float
    """Accuracy on those whose label is true."""

    flipped: float
    """Accuracy on those whose label is wrong."""

    memorised: float
    """Share of those whose label is wrong on which that label is predicted."""

    flipped_share: float
    """Share of the examples whose label is wrong."""


class TradeOff(NamedTuple):
    """A model, or a shift of one, by what it is worth on average and for the worst class."""

    name: str
    overall: float
    worst: float
    overall_error: float = 0.0
    """Standard error, of several seeds."""

    worst_error: float = 0.0


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of examples with `prediction == label`, in [0, 1] (`sklearn.metrics.accuracy_score`)."""
    p, y = _classes(predictions, labels)
    return float(np.mean(p == y)) if len(y) else Undefined("there are no examples")


def class_accuracies(predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> list[float]:
    """The accuracy of every class, `C` numbers: the diagonal of `sklearn.metrics.confusion_matrix` over
    its rows' sums.

    `Undefined` for a class without examples.

    >>> class_accuracies([0, 0, 1, 0], [0, 0, 1, 1], 3)
    [1.0, 0.5, nan (class 2 has no examples)]
    """
    p, y = _classes(predictions, labels, num_classes)
    return _by_class(p == y, y, num_classes)


def balanced_accuracy(by_class: Sequence[float]) -> float:
    """The mean of the classes' accuracies (`sklearn.metrics.balanced_accuracy_score`, where every class
    has examples). `Undefined` where one of them is."""
    return _first_undefined(by_class) or float(np.mean(by_class))


def worst_class_accuracy(by_class: Sequence[float]) -> float:
    """The lowest of the classes' accuracies. `Undefined` where one of them is."""
    return worst_k_accuracy(by_class, 1)


def worst_k_accuracy(by_class: Sequence[float], k: int) -> float:
    """The mean accuracy of the `k` classes of lowest accuracy. `Undefined` where one accuracy is.

    >>> accuracies = [0.9, 0.1, 0.5, 0.7, 0.3]
    >>> [round(worst_k_accuracy(accuracies, k), 4) for k in (1, 2, 5)]
    [0.1, 0.2, 0.5]
    """
    if not 1 <= k <= len(by_class):
        raise InputError(f"worst_k_accuracy: k is {k}, expected 1 to {len(by_class)}, the classes")
    return _first_undefined(by_class) or float(np.mean(np.sort(by_class)[:k]))


def class_buckets(
    by_class: Sequence[float], by_class_of_other: Sequence[float], buckets: int = 10
) -> list[float]:
    """Mean accuracy over classes that are alike to another model, a teacher say.

    The classes are sorted by the accuracy of the other model, the worst first, and cut into `buckets`
    of equal size (the first ones one larger where that leaves a rest). `Undefined` where an accuracy
    of either model is.

    >>> [round(mean, 4) for mean in class_buckets([0.2, 0.9, 0.4, 0.7], [0.1, 0.9, 0.3, 0.8], 2)]
    [0.3, 0.8]
    """
    if len(by_class) != len(by_class_of_other):
        raise ValueError(f"class_buckets: {len(by_class)} and {len(by_class_of_other)} classes")
    if not 1 <= buckets <= len(by_class):
        raise InputError(
            f"class_buckets: buckets is {buckets}, expected 1 to {len(by_class)}, the classes"
        )
    undefined = _first_undefined(by_class) or _first_undefined(by_class_of_other)
    if undefined is not None:
        return [undefined] * buckets
    order = np.argsort(by_class_of_other, kind="stable")
    return [float(np.mean(part)) for part in np.array_split(np.asarray(by_class)[order], buckets)]


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Expected calibration error (ECE), in [0, 1]; lower is better.

        ECE = sum_b (n_b / N) |accuracy_b - confidence_b|

    over bins b of the confidence, the largest probability of an example: with `"width"` the intervals
    ((b - 1) / B, b / B], with `"mass"` cut at the confidences of ranks N b / B, so of equal counts
    but for equal confidences, which stay together. n_b is the count of a bin, accuracy_b the share of
    its examples whose most probable class is the label, confidence_b its mean confidence.

    Shapes: `probabilities [N, C]`, `labels [N]`. Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern
    Neural Networks*, ICML 2017, is with equal widths and 15 bins.

    >>> round(expected_calibration_error([[0.8, 0.2], [0.6, 0.4]], [0, 1]), 4)
    0.4
    """
    probs = np.asarray(probabilities, np.float64)
    if probs.ndim != 2:
        raise ValueError(f"probabilities {probs.shape} should be [N, C]")
    hits = (
        np.argmax(probs, axis=1) == _classes(np.zeros(len(probs), int), labels, probs.shape[1])[1]
    )
    if bins < 1:
        raise InputError(f"expected_calibration_error: bins is {bins}, expected at least 1")
    if not len(probs):
        return Undefined("there are no examples")
    if lost := int(np.sum(~np.isfinite(probs).all(axis=1))):
        return Undefined(f"{lost} of {len(probs)} examples have probabilities that are not finite")
    confidence = probs.max(axis=1)
    if binning == "width":
        edges = np.arange(1, bins) / bins
    elif binning == "mass":
        ranks = np.arange(1, bins) * len(confidence) // bins
        edges = np.sort(confidence)[np.maximum(ranks - 1, 0)]
    else:
        raise ValueError(f"binning must be 'width' or 'mass'; got {binning!r}")
    # Bin b holds what is above edge b - 1 and not above edge b.
    of_bin = np.searchsorted(edges, confidence, side="left")
    gaps = np.bincount(of_bin, weights=hits - confidence)
    return float(np.sum(np.abs(gaps)) / len(confidence))


def student_agreement(
    student: ArrayLike, teacher: ArrayLike, labels: ArrayLike, num_classes: int
) -> Agreement:
    """How far a student follows its teacher, right and wrong. Predictions and labels, `[N]` each.

    `Undefined` for a class without examples, or on which the teacher makes no errors.

    >>> student_agreement([0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], 2)._asdict()
    {'agreement': 0.75, 'repeated_errors': 0.5, 'agreement_by_class': [1.0, 0.5],
     'repeated_errors_by_class': [1.0, 0.0]}
    """
    s, y = _classes(student, labels, num_classes)
    t, _ = _classes(teacher, labels, num_classes)
    same, wrong = s == t, t != y
    repeated: list[float] = [
        float(np.mean(same[wrong & (y == k)]))
        if np.any(wrong & (y == k))
        else Undefined(f"the teacher makes no errors on class {k}")
        for k in range(num_classes)
    ]
    return Agreement(
        agreement=float(np.mean(same)) if len(y) else Undefined("there are no examples"),
        repeated_errors=float(np.mean(same[wrong]))
        if np.any(wrong)
        else Undefined("the teacher makes no errors"),
        agreement_by_class=_by_class(same, y, num_classes),
        repeated_errors_by_class=repeated,
    )


def denoising(predictions: ArrayLike, true_labels: ArrayLike, labels: ArrayLike) -> Denoising:
    """What a model predicts on the examples that it was trained on, of which some labels are wrong.

    Predictions, true labels and the labels trained on, `[N]` each. `Undefined` on an empty part.

    >>> denoising([0, 1, 1, 0], true_labels=[0, 1, 1, 1], labels=[0, 1, 0, 0])
    Denoising(all=0.75, clean=1.0, flipped=0.5, memorised=0.5, flipped_share=0.5)
    """
    p, true = _classes(predictions, true_labels)
    _, given = _classes(predictions, labels)
    flipped = given != true

    def share(hits: np.ndarray, part: str) -> float:
        return float(np.mean(hits)) if len(hits) else Undefined(f"there are no {part}")

    return Denoising(
        all=share(p == true, "examples"),
        clean=share((p == true)[~flipped], "examples of a true label"),
        flipped=share((p == true)[flipped], "examples of a wrong label"),
        memorised=share((p == given)[flipped], "examples of a wrong label"),
        flipped_share=share(flipped, "examples"),
    )


def post_shifted(
    held_out_scores: ArrayLike,
    held_out_labels: ArrayLike,
    scores: ArrayLike,
    *,
    tradeoff: float = 1.0,
    step_size: float = 0.1,
    steps: int = 200,
) -> np.ndarray:
    """Predictions `[N]` for the worst class of a model that was not trained for it.

    Weights of the classes are learned on the held-out examples, see `losses.post_shift`, and used
    on others: `argmax_k score_k + shift_k`.

    Args:
      held_out_scores: logits or log-probabilities `[M, C]`.
      held_out_labels: `[M]`, of every class at least one.
      scores: of the examples to predict, `[N, C]`.
      tradeoff: what the shift is to serve, from the mean of the classes at 0 to the worst at 1.
      step_size, steps: of `losses.post_shift`.

    Raises:
      InputError: a class without held-out examples.
    """
    from regjax import losses

    held_out = np.asarray(held_out_scores, np.float32)
    classes = held_out.shape[-1]
    labels = np.asarray(held_out_labels)
    counts = np.bincount(labels, minlength=classes)
    if not np.all(counts):
        raise InputError(
            f"post_shifted: class {int(np.argmin(counts))} has no held-out example, so its shift "
            "cannot be learned; hold out more"
        )
    shift = losses.post_shift(held_out, labels, tradeoff=tradeoff, step_size=step_size, steps=steps)
    return np.argmax(np.asarray(scores, np.float64) + np.asarray(shift, np.float64), axis=-1)


def pareto_front(points: Sequence[TradeOff]) -> list[bool]:
    """Which of the points are on the Pareto front: no other is better in one and no worse in the other.

    Equal points are on it together; a point that is not defined is not on it.

    >>> pareto_front([TradeOff("a", 0.9, 0.2), TradeOff("b", 0.8, 0.6), TradeOff("c", 0.7, 0.5)])
    [True, True, False]
    """
    overall, worst = (np.array([p[i] for p in points], np.float64) for i in (1, 2))
    at_least = (overall[:, None] >= overall) & (worst[:, None] >= worst)
    better = (overall[:, None] > overall) | (worst[:, None] > worst)
    defined = np.isfinite(overall) & np.isfinite(worst)
    dominated = np.any(at_least & better, axis=0)
    return [bool(on) for on in defined & ~dominated]


def classification_report(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    worst_k: int | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, float]:
    """The metrics of one evaluation by name, all floats; undefined ones are `Undefined`.

    `count`, `accuracy`, `balanced_accuracy`, `worst_class_accuracy`, `worst_k_accuracy` with the `k` it
    is of (by default a tenth of the classes), `ece`, and with `class_names` `accuracy/NAME` of each.

    Shapes: `probabilities [N, C]`, `labels [N]`.
    """
    probs = np.asarray(probabilities, np.float64)
    classes = probs.shape[-1]
    predictions = np.argmax(probs, axis=-1)
    by_class = class_accuracies(predictions, labels, classes)
    k = max(1, classes // 10) if worst_k is None else worst_k
    report = {
        "count": float(len(probs)),
        "accuracy": accuracy(predictions, labels),
        "balanced_accuracy": balanced_accuracy(by_class),
        "worst_class_accuracy": worst_class_accuracy(by_class),
        "worst_k_accuracy": worst_k_accuracy(by_class, k),
        "k": float(k),
        "ece": expected_calibration_error(probs, labels),
    }
    if class_names:
        report |= {f"accuracy/{n}": a for n, a in zip(class_names, by_class, strict=True)}
    return report


def _classes(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(predictions), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 1:
        raise ValueError(f"predictions {p.shape} and labels {y.shape} should both be [N]")
    for name, array in (("predictions", p), ("labels", y)):
        if len(array) and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} must be integers; got {array.dtype}")
        if num_classes is not None and np.any((array < 0) | (array >= num_classes)):
            wrong = array[(array < 0) | (array >= num_classes)][0]
            raise InputError(f"{name} hold {wrong}, expected 0 to {num_classes - 1}")
    return p, y


def _by_class(hits: np.ndarray, labels: np.ndarray, num_classes: int) -> list[float]:
    counts = np.bincount(labels.astype(int), minlength=num_classes)
    totals = np.bincount(labels.astype(int), weights=hits, minlength=num_classes)
    return [
        float(totals[k] / counts[k]) if counts[k] else Undefined(f"class {k} has no examples")
        for k in range(num_classes)
    ]


def _first_undefined(values: Sequence[float]) -> Undefined | None:
    for k, value in enumerate(values):
        if isinstance(value, Undefined):
            return value
        if not np.isfinite(value):
            return Undefined(f"the accuracy of class {k} is not finite")
    return None if len(values) else Undefined("there are no classes")
