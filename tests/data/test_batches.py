"""Rows and batches: every token from its example, every row once an epoch, the same on all hosts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data import Batches, Data, Example, Examples, ordered_batches
from regjax.data.rows import epoch_order, pack, plan_rows
from regjax.errors import InputError

FLOATS = ("label_weights", "scores", "weights")


def examples_of(lengths, seed=0) -> Examples:
    """Examples of these lengths whose tokens, spans, scores and weights are all different."""
    random = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(lengths):
        response = int(random.integers(1, length))
        score_start = int(random.integers(response, length))
        tokens = random.integers(1, 10**6, length).astype(np.int32)
        weight = float(random.integers(1, 9))
        examples.append(Example(tokens, response, score_start, index + 0.5, weight, 3 * index + 1))
    count = 3 * len(examples) + 1
    names = [str(index) for index in range(count)]
    return Examples(
        examples=examples, records=[{}] * count, places=names, ids=names, bad=[], truncated=0
    )


def check_batch(batch, by_record, data, side="right") -> list[int]:
    """Every number of a batch against the examples; the records it holds."""
    size, length = batch["tokens"].shape
    for name, array in batch.items():
        assert array.dtype == (np.float32 if name in FLOATS else np.int32), name
        assert array.shape[0] == size
    seen = []
    for row in range(size):
        segments = batch["segment_ids"][row]
        records = batch["record_ids"][row]
        used = records[records >= 0]
        assert (records[len(used) :] == -1).all()
        assert (batch["weights"][row, len(used) :] == 0).all()
        assert (batch["scores"][row, len(used) :] == 0).all()
        filled = np.flatnonzero(segments)
        total = sum(len(by_record[record].tokens) for record in used)
        start = length - total if side == "left" else 0
        assert filled.tolist() == list(range(start, start + total))
        assert (batch["tokens"][row, segments == 0] == 0).all()
        labels = []
        for slot, record in enumerate(used):
            example = by_record[record]
            where = np.flatnonzero(segments == slot + 1)
            assert batch["tokens"][row, where].tolist() == example.tokens.tolist()
            assert batch["positions"][row, where].tolist() == list(range(len(where)))
            assert batch["scores"][row, slot] == example.score
            assert batch["weights"][row, slot] == example.weight
            position = batch["score_positions"][row, slot]
            assert position == where[0] + example.score_start - 1
            assert batch["tokens"][row, position + 1] == example.tokens[example.score_start]
            labels += [
                (token, where[0] + t - 1, example.weight)
                for t, token in enumerate(example.tokens)
                if t >= example.response_start
            ]
        real = len(labels)
        written = zip(
            batch["labels"][row],
            batch["label_positions"][row],
            batch["label_weights"][row],
            strict=True,
        )
        assert list(itertools.islice(written, real)) == labels
        assert (batch["label_weights"][row, real:] == 0).all()
        positions = batch["label_positions"][row, :real]
        assert (batch["labels"][row, :real] == batch["tokens"][row, positions + 1]).all()
        assert (segments[positions] == segments[positions + 1]).all()
        seen += used.tolist()
    return seen


DATAS = st.sampled_from(
    [Data(max_length=20), Data(max_length=20, buckets=(5, 11)), Data(max_length=20, packing=True)]
)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=25),
    data=DATAS,
    batch_size=st.integers(1, 7),
    seed=st.integers(-1, 2**70) | st.none(),
    side=st.sampled_from(["right", "left"]),
)
def test_every_example_once_an_epoch_and_every_number_right(lengths, data, batch_size, seed, side):
    examples = examples_of(lengths)
    by_record = {example.record: example for example in examples.examples}
    batches = Batches(examples, batch_size, seed, data, side)
    steps = batches.steps_per_epoch
    for epoch in (0, 3):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches.batch_at(step)
            assert batch["tokens"].shape[0] == batch_size
            seen += check_batch(batch, by_record, data, side)
        assert sorted(seen) == sorted(by_record)
    shapes = {
        (b["labels"].shape[1], b["scores"].shape[1]) for b in batches.iterate(0, steps, threads=0)
    }
    assert shapes == {(batches.labels, batches.slots)}
    assert batches.labels % 4 == 0
    if not data.packing:
        assert batches.slots == 1


def test_row_lengths():
    lengths = [3, 5, 6, 12, 13]
    plain = plan_rows(lengths, Data(max_length=40))
    assert [bucket.length for bucket in plain] == [16]
    assert [bucket.length for bucket in plan_rows(lengths, Data(max_length=13))] == [13]
    buckets = plan_rows(lengths, Data(max_length=14, buckets=(5, 8)))
    assert [(b.length, b.rows) for b in buckets] == [
        (5, ((0,), (1,))),
        (8, ((2,),)),
        (14, ((3,), (4,))),
    ]
    packed = plan_rows(lengths, Data(max_length=14, packing=True))
    assert [(b.length, b.rows) for b in packed] == [(14, ((0, 1, 2), (3,), (4,)))]


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_packing_puts_each_example_into_the_fullest_row_with_room(lengths):
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        free = [(30 - sum(lengths[i] for i in row), -r) for r, row in enumerate(rows)]
        fitting = [(left, r) for left, r in free if left >= length]
        if fitting:
            rows[-min(fitting)[1]].append(index)
        else:
            rows.append([index])
    assert pack(lengths, 30) == tuple(map(tuple, rows))


def test_packing_a_hundred_thousand_is_tight():
    lengths = np.random.default_rng(0).integers(5, 200, 100_000).tolist()
    rows = pack(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


MIXED = examples_of(np.random.default_rng(1).integers(2, 20, 53).tolist())
MIXED_DATA = Data(max_length=20, buckets=(6, 12))


def test_parts_of_the_same_batches():
    whole = Batches(MIXED, 8, 5, MIXED_DATA)
    for rows in ([0, 1, 2, 3], [6, 7], [0, 3, 5], list(range(8))):
        part = whole.only(rows)
        for step in range(2 * whole.steps_per_epoch):
            expected, found = whole.batch_at(step), part.batch_at(step)
            ids = expected.pop("record_ids")
            np.testing.assert_array_equal(found.pop("record_ids"), ids)
            assert equal(found, {name: array[rows] for name, array in expected.items()})
    with pytest.raises(ValueError, match="of a batch of 8"):
        whole.only([8])


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 16)])
def test_prefetching_and_resuming_change_nothing(threads, prefetch):
    batches = Batches(MIXED, 8, 5, MIXED_DATA)
    steps = 3 * batches.steps_per_epoch
    expected = [batches.batch_at(step) for step in range(steps)]
    again = Batches(MIXED, 8, 5, MIXED_DATA)
    for start in (0, 7, steps - 1):
        read = list(again.iterate(start, steps, threads=threads, prefetch=prefetch))
        assert len(read) == steps - start
        assert all(map(equal, read, expected[start:]))
    endless = again.iterate(2, threads=threads, prefetch=prefetch)
    assert all(map(equal, itertools.islice(endless, 3), expected[2:]))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return [
            (bucket, tuple(rows.tolist())) for bucket, rows in epoch_order((20, 9), 4, seed, epoch)
        ]

    orders = {tuple(order(seed, epoch)) for seed in (0, 1, 2**63) for epoch in range(4)}
    assert len(orders) == 12
    for bucket, size in enumerate((20, 9)):
        rows = [row for b, part in order(1, 2) if b == bucket for row in part]
        assert sorted(row for row in rows if row >= 0) == list(range(size))
    # Philox's raw words are the same everywhere, so this order is too.
    first = np.argsort(np.random.Philox(key=7 + (2 << 64)).random_raw(6)).tolist()
    assert [rows.tolist() for _, rows in epoch_order((6,), 6, 7, 2)] == [first]


def test_positions_of_a_row_are_uniform_over_epochs():
    """Each of 5 rows comes first in a fifth of 2000 epochs: 400 with a standard deviation of 18."""
    counts = np.zeros(5)
    for epoch in range(2000):
        counts[epoch_order((5,), 1, 3, epoch)[0][1][0]] += 1
    assert abs(counts - 400).max() < 4 * 18


def test_ordered_batches_are_the_source_in_order():
    seen = [
        record
        for batch in ordered_batches(MIXED, 8, Data(max_length=20))
        for record in batch["record_ids"].ravel().tolist()
        if record >= 0
    ]
    assert seen == [example.record for example in MIXED.examples]
    sizes = {batch["tokens"].shape for batch in ordered_batches(MIXED, 8, Data(max_length=20))}
    assert sizes == {(8, 20)}


def test_prompts_have_no_labels():
    tokens = np.arange(1, 6, dtype=np.int32)
    prompt = Example(tokens, 5, 5, float("nan"), 1.0, 0)
    examples = Examples([prompt], [{}], ["x"], ["x"], [], 0)
    batch = Batches(examples, 2, data=Data(max_length=8)).batch_at(0)
    assert sorted(batch["score_positions"].ravel().tolist()) == [0, 4]
    assert (batch["label_weights"] == 0).all() and batch["labels"].shape == (2, 4)
    assert np.isnan(batch["scores"]).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "padding_side": "both"}, "padding_side"),
        ({"batch_size": 2, "examples": examples_of([])}, "no examples"),
    ],
)
def test_batches_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Batches(**{"examples": MIXED, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"buckets": (4, 4)}, "ascending"),
        ({"buckets": (0, 4)}, "positive"),
        ({"buckets": (4, 600)}, "none may exceed"),
        ({"buckets": (4,), "packing": True}, "leave buckets empty"),
        ({"score_field": ""}, "score_field is empty"),
        ({"on_bad_record": "ignore"}, "expected 'stop' or 'skip'"),
    ],
)
def test_data_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Data(**options)
