"""Label noise: its rates and matrices, and human labels that have to fit their images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from regjax import losses
from regjax.data.images import CIFAR10_PAIRS, LabelNoise, Split, noisy_labels, read_human_labels
from regjax.data.images.noise import _uniform
from regjax.errors import InputError


def split_of(classes: int, count: int, seed: int = 0, images: np.ndarray | None = None) -> Split:
    labels = np.random.default_rng(seed).integers(0, classes, count).astype(np.int32)
    labels[:classes] = np.arange(classes)
    if images is None:
        images = np.zeros((count, 1, 1, 1), np.uint8)
    return Split(images, labels, labels, np.arange(count, dtype=np.int32))


def drawn(split: Split, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts [C, C] by a loop."""
    counts = np.zeros((classes, classes))
    for true, label in zip(split.true_labels, labels, strict=True):
        counts[true, label] += 1
    return counts


def check_drawn_from(counts: np.ndarray, matrix: np.ndarray) -> None:
    """Each count is binomial with the probability that the matrix says."""
    totals = counts.sum(axis=1, keepdims=True)
    assert (stats.binom.cdf(counts, totals, matrix) > 1e-11).all()
    assert (stats.binom.sf(counts - 1, totals, matrix) > 1e-11).all()


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(2, 12),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**64),
    kind=st.sampled_from(["symmetric", "asymmetric"]),
)
def test_labels_are_drawn_from_the_matrix(classes, rate, seed, kind):
    split = split_of(classes, 3000)
    labels, matrix = noisy_labels(split, LabelNoise(kind, rate), classes, seed)
    assert labels.dtype == np.int32 and matrix.shape == (classes, classes)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.diagonal(matrix), 1 - rate, atol=1e-12)
    check_drawn_from(drawn(split, labels, classes), matrix)
    again, _ = noisy_labels(split, LabelNoise(kind, rate), classes, np.uint64(seed % 2**64))
    np.testing.assert_array_equal(again, labels)


def test_symmetric_noise_is_smearing_with_the_rate_converted():
    _, matrix = noisy_labels(split_of(10, 20), LabelNoise("symmetric", 0.2), 10, 0)
    a = losses.smearing_rate(0.2, 10)
    np.testing.assert_allclose(matrix, (1 - a) * np.eye(10) + a / 10, rtol=1e-12)
    # A flip is to another class: at rate 1 no label is left, and the others are equally likely.
    split = split_of(10, 20_000)
    labels, matrix = noisy_labels(split, LabelNoise("symmetric", 1.0), 10, 0)
    assert (labels != split.true_labels).all()
    assert stats.chisquare(np.bincount((labels - split.true_labels) % 10)[1:]).pvalue > 1e-4


def test_asymmetric_noise_follows_the_pairs_or_goes_to_the_next_class():
    split = split_of(10, 4000)
    labels, matrix = noisy_labels(split, LabelNoise("asymmetric", 1.0), 10, 3)
    np.testing.assert_array_equal(labels, (split.true_labels + 1) % 10)
    noise = LabelNoise("asymmetric", 0.4, pairs=CIFAR10_PAIRS)
    labels, matrix = noisy_labels(split, noise, 10, 3)
    expected = np.eye(10)
    for source, target in [(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)]:
        expected[source, source], expected[source, target] = 0.6, 0.4
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)
    check_drawn_from(drawn(split, labels, 10), matrix)


@pytest.mark.parametrize("pairs", [((0, 4),), ((4, 0),), ((-1, 0),), ((1, 1),)])
def test_pairs_have_to_be_two_classes(pairs):
    with pytest.raises(InputError, match="two different classes from 0 to 3"):
        noisy_labels(split_of(4, 9), LabelNoise("asymmetric", 0.1, pairs=pairs), 4, 0)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_an_image_has_its_noise_in_every_subset(kind):
    split = split_of(5, 500)
    noise = LabelNoise(kind, 0.5)
    labels, _ = noisy_labels(split, noise, 5, 7)
    rows = np.array([3, 17, 401])
    part = Split(split.images[rows], split.labels[rows], split.true_labels[rows], split.index[rows])
    np.testing.assert_array_equal(noisy_labels(part, noise, 5, 7)[0], labels[rows])
    assert (noisy_labels(split, noise, 5, 8)[0] != labels).any()


def test_noise_has_words_of_its_own():
    """The same seed orders the epochs: which labels are wrong says nothing about when they come."""
    for seed in (0, 1, 2**64 - 1):
        words = np.random.Philox(key=seed).random_raw(4000) >> np.uint64(11)
        assert not np.isin(_uniform(seed, 4000), words * 2.0**-53).any()
        assert not np.isin(_uniform(seed, 4000), _uniform(seed, 4000, stream=1)).any()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "instance"])
def test_no_noise_is_the_true_labels(kind):
    split = split_of(3, 50)
    for noise in (None, LabelNoise(kind, 0.0)):
        labels, matrix = noisy_labels(split, noise, 3, 0)
        np.testing.assert_array_equal(labels, split.true_labels)
        np.testing.assert_array_equal(matrix, np.eye(3))


def instances(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45])
def test_instance_noise_has_the_mean_of_the_cut_normal(rate):
    split = split_of(4, 20_000, images=instances(20_000))
    labels, matrix = noisy_labels(split, LabelNoise("instance", rate), 4, 0)
    counts = drawn(split, labels, 4)
    np.testing.assert_allclose(matrix, counts / counts.sum(axis=1, keepdims=True), rtol=1e-12)
    expected = stats.truncnorm(-rate / 0.1, (1 - rate) / 0.1, rate, 0.1).mean()
    spread = np.sqrt(expected * (1 - expected) / 20_000)
    assert abs((labels != split.true_labels).mean() - expected) < 4.5 * spread


def test_instance_noise_is_its_formula():
    """One image after another, given the same uniform numbers."""
    split = split_of(3, 60, images=instances(60))
    labels, _ = noisy_labels(split, LabelNoise("instance", 0.3), 3, 5)
    assert 5 < (labels != split.true_labels).sum() < 40
    x = split.images.reshape(60, -1).astype(np.float64)
    x -= x.mean(axis=0)
    x /= x.std()
    uniform = _uniform(5, 60, 2)
    for i, y in enumerate(split.true_labels):
        q = stats.truncnorm(-3, 7, 0.3, 0.1).ppf(uniform[i, 0])
        scores = x[i] @ stats.norm.ppf(_uniform(5, 48, 3, stream=1 + int(y)))
        shares = np.exp(scores - scores.max())
        shares[y] = 0.0
        shares *= q / shares.sum()
        shares[y] = 1 - q
        assert labels[i] == np.searchsorted(np.cumsum(shares), uniform[i, 1], side="right")


def test_instance_noise_is_decided_by_the_image():
    """Equal images flip to one class where they flip; images as such differ in it."""
    images = np.repeat(instances(8)[:, None], 500, axis=1).reshape(4000, 4, 4, 3)
    true = np.zeros(4000, np.int32)
    true[:2000] = 1
    split = Split(images, true, true, np.arange(4000, dtype=np.int32))
    labels, _ = noisy_labels(split, LabelNoise("instance", 0.5), 6, 0)
    favourites = []
    for image in range(8):
        part = slice(500 * image, 500 * (image + 1))
        wrong = labels[part][labels[part] != true[part]]
        counts = np.bincount(wrong, minlength=6)
        assert counts.max() > 0.5 * len(wrong) and 180 < len(wrong) < 320
        favourites.append(int(counts.argmax()))
    assert len(set(favourites)) > 2
    # Scale and brightness of all images cancel.
    darker = split._replace(images=images // 2 + 50)
    found, _ = noisy_labels(darker, LabelNoise("instance", 0.5), 6, 0)
    assert (found == labels).mean() > 0.97


def test_instance_noise_of_images_that_are_all_alike():
    split = split_of(3, 300)
    labels, matrix = noisy_labels(split, LabelNoise("instance", 0.3), 3, 0)
    assert np.isfinite(matrix).all() and 0.2 < (labels != split.true_labels).mean() < 0.4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "random"}, "expected symmetric, asymmetric, instance or human"),
        ({"rate": -0.1}, "rate is -0.1: expected 0 to 1"),
        ({"rate": 1.1}, "expected 0 to 1"),
        ({"rate": float("nan")}, "expected 0 to 1"),
        ({"kind": "human"}, "expected a file and a column"),
        ({"kind": "human", "file": "a.npz", "column": "x", "rate": 0.1}, "a rate of their own"),
        ({"file": "a.npz"}, "are for human noise, not for symmetric"),
        ({"pairs": ((0, 1),)}, "pairs are for asymmetric noise"),
        ({"kind": "asymmetric", "pairs": ((0, 1), (0, 2))}, "one class only"),
    ],
)
def test_fields_of_noise_are_checked(fields, match):
    with pytest.raises(InputError, match=match):
        LabelNoise(**fields)


# Human labels

TRUE = np.array([0, 1, 2, 2, 1], np.int32)


def human(tmp_path, **arrays) -> str:
    path = tmp_path / "human.npz"
    np.savez(path, **arrays)
    return str(path)


def test_human_labels_of_all_rows_or_some(tmp_path):
    worse = np.array([0, 1, 1, 2, 0], np.uint8)
    file = human(tmp_path, clean_label=TRUE, worse_label=worse)
    np.testing.assert_array_equal(read_human_labels(file, "worse_label", TRUE), worse)
    rows = np.array([4, 2])
    found = read_human_labels(file, "worse_label", TRUE[rows], rows)
    assert found.dtype == np.int32 and found.tolist() == [0, 1]
    split = Split(np.zeros((5, 1, 1, 1), np.uint8), TRUE, TRUE, np.arange(5, dtype=np.int32))
    labels, matrix = noisy_labels(split, LabelNoise("human", file=file, column="worse_label"), 4, 0)
    assert labels.tolist() == worse.tolist()
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)


def test_coarse_labels_are_compared_with_coarse_ones(tmp_path):
    fine = np.array([9, 8, 7, 6, 5])
    file = human(tmp_path, clean_label=fine, clean_coarse_label=TRUE, noisy_coarse_label=TRUE[::-1])
    found = read_human_labels(file, "noisy_coarse_label", TRUE)
    assert found.tolist() == TRUE[::-1].tolist()


def test_human_labels_that_do_not_fit_are_refused(tmp_path):
    good = TRUE[::-1].copy()
    for arrays, match in [
        ({"other": good}, "no array 'worse_label': expected one of other"),
        ({"worse_label": good, "clean_label": good}, r"disagrees with the source on 4 of 5 images"),
        ({"worse_label": good[:4]}, "4 labels for 5 images"),
        (
            {"worse_label": good, "clean_label": TRUE[:4]},
            "4 labels in clean_label, 5 in worse_label",
        ),
        ({"worse_label": good + 1}, "holds 3 at row 1: expected classes from 0 to 2"),
        ({"worse_label": good - 1}, "holds -1 at row 4"),
        ({"worse_label": good.astype(float)}, "worse_label is float64"),
        ({"worse_label": good[None]}, r"shape \(1, 5\): expected integers"),
    ]:
        file = human(tmp_path, **arrays)
        with pytest.raises(InputError, match=match) as caught:
            read_human_labels(file, "worse_label", TRUE)
        assert "human.npz" in str(caught.value)
    file = human(tmp_path, worse_label=good)
    with pytest.raises(InputError, match="5 labels, but the source has a row 5"):
        read_human_labels(file, "worse_label", TRUE[:1], np.array([5]), num_classes=3)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, 500), value=st.binary(max_size=40))
def test_a_damaged_file_of_human_labels_is_refused(tmp_path, cut, value):
    path = tmp_path / "human.npz"
    with pytest.raises(InputError, match="no such file"):
        read_human_labels(str(tmp_path / "none.npz"), "worse_label", TRUE)
    human(tmp_path, worse_label=TRUE)
    path.write_bytes(path.read_bytes()[: -1 - cut] + value)
    try:
        found = read_human_labels(str(path), "worse_label", TRUE)
    except InputError as error:
        assert "human.npz" in str(error)
    else:
        assert found.tolist() == TRUE.tolist()
