"""Class counts of long tails: the published ones, and what holds for all."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regjax.data.images import LongTail, tail_counts
from regjax.errors import InputError


def test_the_published_counts():
    ten = tail_counts(LongTail("exponential", 100), 5000, 10)
    assert ten.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    hundred = tail_counts(LongTail("exponential", 100), 500, 100)
    assert (ten.sum(), hundred.sum()) == (12_406, 10_847)
    assert hundred[:5].tolist() == [500, 477, 455, 434, 415]
    assert hundred[-5:].tolist() == [6, 5, 5, 5, 5]
    assert tail_counts(LongTail("step", 100), 5000, 10).tolist() == [5000] * 5 + [50] * 5
    assert tail_counts(LongTail("step", 10), 500, 3).tolist() == [500, 50, 50]


@given(
    largest=st.integers(1, 10_000),
    classes=st.integers(2, 300),
    ratio=st.integers(1, 1000),
    kind=st.sampled_from(["exponential", "step"]),
)
def test_counts_fall_from_all_to_the_exact_share(largest, classes, ratio, kind):
    counts = tail_counts(LongTail(kind, ratio), largest, classes)
    assert counts[0] == largest and counts[-1] == largest // ratio
    assert (np.diff(counts) <= 0).all()
    if kind == "step":
        assert (counts == largest).sum() >= classes // 2
        assert set(counts.tolist()) <= {largest, largest // ratio}
        return
    # n_k <= n ratio^(-k / (C - 1)) < n_k + 1, in integers: both sides to the power C - 1. The margin
    # of 1e-12 is the one that keeps whole numbers whole.
    for k in {1, classes // 2, classes - 2}:
        power = Fraction(largest) ** (classes - 1) / Fraction(ratio) ** k
        slack = 1 + Fraction(classes, 10**11)
        assert Fraction(int(counts[k])) ** (classes - 1) <= power * slack
        assert Fraction(int(counts[k]) + 1) ** (classes - 1) * slack > power


@pytest.mark.parametrize("ratio", [0.5, 0.0, -3.0, float("nan"), float("inf")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(InputError, match="expected 1 or more"):
        LongTail("step", ratio)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="expected exponential or step"):
        LongTail("linear")
