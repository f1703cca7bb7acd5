"""Reports of classifiers against scikit-learn, and against their definitions example by example."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from regjax import losses
from regjax.class_metrics import (
    TradeOff,
    accuracy,
    balanced_accuracy,
    class_accuracies,
    class_buckets,
    classification_report,
    denoising,
    expected_calibration_error,
    pareto_front,
    post_shifted,
    student_agreement,
    worst_class_accuracy,
    worst_k_accuracy,
)
from regjax.errors import InputError
from regjax.metrics import Undefined

CLASSES = 5


def drawn(seed, count=200, classes=CLASSES):
    """Labels of every class, and predictions that are right half of the time."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(classes, size=count - classes)])
    predictions = np.where(random.random(count) < 0.5, labels, random.integers(classes, size=count))
    return predictions, labels


def probabilities(seed, count=200, classes=CLASSES):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), size=count)


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_of_scikit_learn(seed):
    predictions, labels = drawn(seed)
    by_class = class_accuracies(predictions, labels, CLASSES)
    np.testing.assert_allclose(by_class, sklearn.recall_score(labels, predictions, average=None))
    assert balanced_accuracy(by_class) == pytest.approx(
        sklearn.balanced_accuracy_score(labels, predictions), abs=1e-15
    )
    assert accuracy(predictions, labels) == sklearn.accuracy_score(labels, predictions)


def test_worst_classes():
    by_class = [0.9, 0.1, 0.5, 0.7, 0.3]
    assert worst_class_accuracy(by_class) == 0.1
    assert worst_k_accuracy(by_class, 2) == pytest.approx(0.2)
    assert balanced_accuracy(by_class) == pytest.approx(0.5)
    means = [worst_k_accuracy(by_class, k) for k in range(1, 6)]
    assert means == sorted(means) and means[-1] == balanced_accuracy(by_class)
    for k in (0, 6):
        with pytest.raises(InputError, match=f"k is {k}, expected 1 to 5"):
            worst_k_accuracy(by_class, k)


def test_a_class_without_examples_leaves_its_averages_undefined():
    predictions, labels = np.array([0, 1, 1]), np.array([0, 0, 1])
    by_class = class_accuracies(predictions, labels, 3)
    assert by_class[:2] == [0.5, 1.0]
    for value in (
        by_class[2],
        balanced_accuracy(by_class),
        worst_class_accuracy(by_class),
        worst_k_accuracy(by_class, 3),
        class_buckets(by_class, [0.1, 0.2, 0.3], 2)[0],
        class_buckets([0.1, 0.2, 0.3], by_class, 2)[1],
        student_agreement(predictions, predictions, labels, 3).agreement_by_class[2],
    ):
        assert isinstance(value, Undefined) and value.reason == "class 2 has no examples"


def test_no_examples_at_all():
    none = np.array([], int)
    assert isinstance(accuracy(none, none), Undefined)
    assert isinstance(expected_calibration_error(np.zeros((0, 3)), none), Undefined)
    assert all(isinstance(value, Undefined) for value in denoising(none, none, none))
    assert isinstance(student_agreement(none, none, none, 2).agreement, Undefined)


@pytest.mark.parametrize(
    ("predictions", "labels", "error", "message"),
    [
        ([0, 1], [0], ValueError, r"predictions \(2,\) and labels \(1,\)"),
        ([0.0, 1.0], [0, 1], TypeError, "predictions must be integers"),
        ([0, 3], [0, 1], InputError, "predictions hold 3, expected 0 to 2"),
        ([0, 1], [0, -1], InputError, "labels hold -1, expected 0 to 2"),
    ],
)
def test_what_are_no_classes_is_refused(predictions, labels, error, message):
    with pytest.raises(error, match=message):
        class_accuracies(predictions, labels, 3)


def test_buckets_are_of_classes_that_are_alike_to_the_other_model():
    student, teacher = [0.5, 0.1, 0.9, 0.3, 0.7], [0.2, 0.9, 0.1, 0.5, 0.4]
    # By the teacher: 2, 0, 4, 3, 1, of which the first bucket has three.
    np.testing.assert_allclose(class_buckets(student, teacher, 2), [2.1 / 3, 0.4 / 2])
    np.testing.assert_allclose(class_buckets(teacher, teacher, 5), np.sort(teacher))
    assert class_buckets(student, teacher, 1) == pytest.approx([balanced_accuracy(student)])


def brute_force_ece(probs, labels, in_bins):
    confidence, hits = probs.max(axis=1), probs.argmax(axis=1) == labels
    return sum(
        part.sum() / len(labels) * abs(hits[part].mean() - confidence[part].mean())
        for part in in_bins(confidence)
        if part.any()
    )


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_of_equal_widths(bins):
    probs, labels = probabilities(1), drawn(1)[1]
    edges = np.arange(bins + 1) / bins
    expected = brute_force_ece(
        probs,
        labels,
        lambda c: [(c > a) & (c <= b) for a, b in itertools.pairwise(edges)],
    )
    assert expected_calibration_error(probs, labels, bins=bins) == pytest.approx(
        expected, abs=1e-14
    )


def test_a_confidence_on_an_edge_is_below_it():
    """Of four bins, .5 is in the second with .3, and .75 in the third: there is no error to cancel."""
    probs = np.array([[0.3, 0.25, 0.25, 0.2], [0.5, 0.2, 0.2, 0.1], [0.75, 0.25, 0.0, 0.0]])
    found = expected_calibration_error(probs, [0, 1, 0], bins=4)
    assert found == pytest.approx((abs(1 - 0.3 - 0.5) + (1 - 0.75)) / 3)


@pytest.mark.parametrize("bins", [1, 3, 15, 200])
def test_calibration_error_of_equal_counts(bins):
    probs, labels = probabilities(2), drawn(2)[1]
    order = np.argsort(probs.max(axis=1))
    sizes = np.diff(np.arange(bins + 1) * len(labels) // bins)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    expected = brute_force_ece(
        probs, labels, lambda c: [np.isin(np.arange(len(c)), part) for part in parts]
    )
    found = expected_calibration_error(probs, labels, bins=bins, binning="mass")
    assert found == pytest.approx(expected, abs=1e-14)


def test_equal_confidences_stay_in_one_bin():
    probs = np.tile([0.7, 0.3], (10, 1))
    labels = np.array([0] * 7 + [1] * 3)
    for order in (labels, labels[::-1]):
        assert expected_calibration_error(probs, order, binning="mass") == pytest.approx(0.0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), binning=st.sampled_from(["width", "mass"]))
def test_calibration_error_depends_on_no_order(seed, binning):
    probs, labels = np.round(probabilities(seed, 60), 1), drawn(seed, 60)[1]
    order = np.random.default_rng(seed).permutation(60)
    found = [
        expected_calibration_error(probs[rows], labels[rows], bins=7, binning=binning)
        for rows in (np.arange(60), order)
    ]
    assert 0 <= found[0] <= 1 and found[0] == pytest.approx(found[1], abs=1e-14)


def test_drawn_from_the_probabilities_labels_are_calibrated():
    probs = probabilities(5, count=40_000)
    labels = (probs.cumsum(axis=1) > np.random.default_rng(6).random((len(probs), 1))).argmax(
        axis=1
    )
    # The mean of 15 gaps |N(0, s^2 / 2667)|, s at most .5: .0077 on average, with a spread of .0015.
    assert expected_calibration_error(probs, labels, binning="mass") < 0.0077 + 4 * 0.0015
    assert expected_calibration_error(probs**3 / (probs**3).sum(1, keepdims=True), labels) > 0.1


def test_probabilities_that_are_no_numbers():
    found = expected_calibration_error([[np.nan, 0.5], [0.5, 0.5]], [0, 1])
    assert isinstance(found, Undefined) and "1 of 2" in found.reason


def test_agreement_counts_example_by_example():
    (student, labels), (teacher, _) = drawn(3), drawn(30)
    teacher = np.where(np.arange(len(labels)) % 2 == 0, student, teacher)
    found = student_agreement(student, teacher, labels, CLASSES)
    errors = [i for i in range(len(labels)) if teacher[i] != labels[i]]
    assert found.agreement == sum(student == teacher) / len(labels)
    assert found.repeated_errors == sum(student[i] == teacher[i] for i in errors) / len(errors)
    for k in range(CLASSES):
        members = np.flatnonzero(labels == k)
        assert found.agreement_by_class[k] == np.mean(student[members] == teacher[members])
        wrong = [i for i in errors if labels[i] == k]
        assert found.repeated_errors_by_class[k] == np.mean(
            [student[i] == teacher[i] for i in wrong]
        )


def test_a_teacher_without_errors_has_none_that_are_repeated():
    labels = np.array([0, 0, 1, 1])
    found = student_agreement([0, 1, 0, 1], [0, 0, 1, 0], labels, 2)
    assert found.repeated_errors == 0.0 and found.repeated_errors_by_class[1] == 0.0
    assert found.repeated_errors_by_class[0].reason == "the teacher makes no errors on class 0"
    perfect = student_agreement([0, 1, 0, 1], labels, labels, 2)
    assert perfect.repeated_errors.reason == "the teacher makes no errors"
    assert perfect.agreement == accuracy([0, 1, 0, 1], labels)


def test_denoising_of_a_memorising_and_of_a_robust_model():
    true = np.tile(np.arange(5), 20)
    noisy = np.where(np.arange(100) < 30, (true + 1) % 5, true)
    assert denoising(noisy, true, noisy) == (0.7, 1.0, 0.0, 1.0, 0.3)
    assert denoising(true, true, noisy) == (1.0, 1.0, 1.0, 0.0, 0.3)
    other = np.where(np.arange(100) < 10, (true + 2) % 5, true)
    np.testing.assert_allclose(denoising(other, true, noisy), (0.9, 1.0, 2 / 3, 0.0, 0.3))
    clean = denoising(true, true, true)
    assert clean[:2] == (1.0, 1.0) and clean.flipped_share == 0.0
    for value in (clean.flipped, clean.memorised):
        assert (
            isinstance(value, Undefined)
            and value.reason == "there are no examples of a wrong label"
        )


@pytest.mark.parametrize("seed", range(3))
def test_denoising_is_made_of_its_parts(seed):
    predictions, true = drawn(seed)
    noisy = np.where(np.random.default_rng(seed).random(len(true)) < 0.4, drawn(seed + 9)[1], true)
    found = denoising(predictions, true, noisy)
    mixed = found.flipped_share * found.flipped + (1 - found.flipped_share) * found.clean
    assert found.all == pytest.approx(mixed) == pytest.approx(accuracy(predictions, true))
    assert found.flipped + found.memorised <= 1.0


def test_a_shift_serves_the_worst_class_of_other_examples():
    """Three classes of one dimension, of which the scores favour the first by far."""
    random = np.random.default_rng(0)
    centres = np.array([-1.0, 0.0, 1.0])

    def split(count):
        labels = np.tile(np.arange(3), count)
        x = centres[labels] + 0.5 * random.normal(size=len(labels))
        return -((x[:, None] - centres) ** 2) * 2 + np.log([0.9, 0.09, 0.01]), labels

    (held_out, held_out_labels), (scores, labels) = split(300), split(300)
    worst = []
    for predictions in (scores.argmax(axis=1), post_shifted(held_out, held_out_labels, scores)):
        worst.append(worst_class_accuracy(class_accuracies(predictions, labels, 3)))
    # As they are, the scores cut at .08 and 1.05, where the middle class is right in 42 of 100 cases. To
    # serve the worst, -.61 and .61 are best, with 78 of 100 for each. A share of 300 spreads by .03.
    assert abs(worst[0] - 0.42) < 0.09 and abs(worst[1] - 0.78) < 0.09
    shift = losses.post_shift(held_out.astype(np.float32), held_out_labels)
    np.testing.assert_array_equal(
        post_shifted(held_out, held_out_labels, scores), (scores + np.asarray(shift)).argmax(axis=1)
    )
    with pytest.raises(InputError, match="class 2 has no held-out example"):
        post_shifted(held_out, held_out_labels % 2, scores)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(pairs):
    points = [TradeOff(str(i), *pair) for i, pair in enumerate(pairs)]
    for point, on in zip(pairs, pareto_front(points), strict=True):
        dominated = any(q != point and q[0] >= point[0] and q[1] >= point[1] for q in pairs)
        assert on == (not dominated)


def test_a_point_that_is_not_defined_is_not_on_the_front_and_keeps_none_off():
    nan = Undefined("class 2 has no examples")
    points = [TradeOff("a", 0.9, nan), TradeOff("b", 0.5, 0.1), TradeOff("c", nan, 0.9)]
    assert pareto_front(points) == [False, True, False]


def test_the_report_holds_the_metrics_by_name():
    probs, labels = probabilities(7), drawn(7)[1]
    by_class = class_accuracies(probs.argmax(axis=1), labels, CLASSES)
    report = classification_report(probs, labels, worst_k=2, class_names="abcde")
    assert report == {
        "count": 200.0,
        "accuracy": sklearn.accuracy_score(labels, probs.argmax(axis=1)),
        "balanced_accuracy": balanced_accuracy(by_class),
        "worst_class_accuracy": min(by_class),
        "worst_k_accuracy": np.mean(sorted(by_class)[:2]),
        "k": 2.0,
        "ece": expected_calibration_error(probs, labels),
        **{f"accuracy/{name}": value for name, value in zip("abcde", by_class, strict=True)},
    }
    many = classification_report(probabilities(8, 400, 30), drawn(8, 400, 30)[1])
    assert many["k"] == 3.0
