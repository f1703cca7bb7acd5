"""Shuffled answers: one permutation of whole answers, everything else in its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data import Record, with_shuffled_answers
from regjax.errors import InputError


def numbered(count: int) -> list[Record]:
    return [Record(f"r{i}", {"x": i, "why": f"w{i}", "y": 10 * i}) for i in range(count)]


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), seed=st.integers(-3, 2**70))
def test_one_permutation_of_whole_answers(count, seed):
    records = numbered(count)
    shuffled = with_shuffled_answers(records, ["why", "y"], seed)
    drawn = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(count)).tolist()
    assert shuffled == [
        Record(f"r{i}", {"x": i, "why": f"w{j}", "y": 10 * j}) for i, j in enumerate(drawn)
    ]
    assert records == numbered(count)
    if drawn == list(range(count)):
        assert shuffled == records


def test_the_identity_gives_the_same_records():
    two = numbered(2)
    results = [with_shuffled_answers(two, ["y"], seed) for seed in range(10)]
    assert two in results
    assert [two[0]._replace(fields={**two[0].fields, "y": 10}),
            two[1]._replace(fields={**two[1].fields, "y": 0})] in results  # fmt: skip
    assert with_shuffled_answers(two[:1], ["why", "y"], 3) == two[:1]


def test_records_without_an_answer_take_no_part():
    records = numbered(12)
    records[3] = Record("bad", {}, "malformed JSON")
    records[7] = Record("r7", {"x": 7, "y": 70})
    shuffled = with_shuffled_answers(records, ["why", "y"], 0)
    assert shuffled[3] == records[3] and shuffled[7] == records[7]
    moved = [record.fields["y"] for i, record in enumerate(shuffled) if i not in (3, 7)]
    assert sorted(moved) == [10 * i for i in range(12) if i not in (3, 7)]
    assert moved != sorted(moved)


def test_every_answer_goes_everywhere():
    """Over 2000 seeds each of 4 answers comes first 500 times, with a standard deviation of 19."""
    first = [with_shuffled_answers(numbered(4), ["y"], seed)[0].fields["y"] for seed in range(2000)]
    assert abs(np.bincount(np.array(first) // 10, minlength=4) - 500).max() < 4 * 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [([], "no field to shuffle"), (["z"], "field 'z'"), (["y", "z"], "fields 'y', 'z'")],
)
def test_nothing_to_shuffle(fields, message):
    with pytest.raises(InputError, match=message):
        with_shuffled_answers(numbered(3), fields, 0)
