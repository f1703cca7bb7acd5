"""Mixtures: every example of every part with its own record, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data import Batches, Data, Template, load_examples, mix
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from tests.tokenizers import byte_level_bpe

SKIP = Data(on_bad_record="skip")


def free_text(count: int, name: str, bad: int = -1):
    """`count` questions whose answers have 1 to 7 words; record `bad` has none."""
    records = [
        {
            "id": f"{name}{i}",
            "q": f"{name} {i} " + "high " * (i % 5),
            "a": "low " * (i % 7) + str(i),
        }
        for i in range(count)
    ]
    if bad >= 0:
        records[bad]["a"] = " "
    template = Template(f"{name}: {{q}}\nA:", " {a}")
    data = Data(id_field="id", on_bad_record="skip")
    return load_examples(records, data, template, byte_level_bpe(), None, None)


def scored(count: int):
    template, grid, tokenizer = Template("{q}:\n"), ScoreGrid.integers(0, 9), byte_level_bpe()
    records = [{"q": f"q{i}", "score": i % 10} for i in range(count)]
    codec = template.codec(grid, tokenizer)
    return load_examples(records, Data(), template, tokenizer, grid, codec)


PARTS = [free_text(9, "qa", bad=4), scored(5), free_text(12, "mt", bad=0)]


def test_one_part_after_the_other_each_with_its_own_records():
    mixed = mix(PARTS)
    assert len(mixed) == 8 + 5 + 11 and len(mixed.records) == 9 + 5 + 12
    assert [example.task for example in mixed.examples] == 8 * [0] + 5 * [1] + 11 * [2]
    own = [(part, example) for part in PARTS for example in part.examples]
    for example, (part, before) in zip(mixed.examples, own, strict=True):
        assert example.tokens is before.tokens
        assert example[1:3] == before[1:3] and example.weight == before.weight
        assert np.array_equal(example.score, before.score, equal_nan=True)
        for name in ("records", "places", "ids"):
            assert getattr(mixed, name)[example.record] is getattr(part, name)[before.record]
    assert [bad.place for bad in mixed.bad] == ["records[4]", "records[0]"]
    assert mixed.ids[9 + 5 + 3] == "mt3" and mixed.truncated == 0
    assert PARTS[2].examples[0].task == 0 and PARTS[2].examples[0].record == 1


def test_one_part_is_itself_and_counts_add_up():
    [one] = [mix(PARTS[:1])]
    assert one == PARTS[0]
    long = load_examples(
        [{"a": "no " * 50}], Data(max_length=20), Template("{a|cut}:\n", "x"), byte_level_bpe(),
        None, None,
    )  # fmt: skip
    assert mix([long, PARTS[1], long]).truncated == 2
    with pytest.raises(InputError, match="nothing to mix"):
        mix([])


@settings(deadline=None, max_examples=30)
@given(
    data=st.sampled_from([Data(), Data(buckets=(16, 24)), Data(max_length=64, packing=True)]),
    batch_size=st.integers(1, 6),
    seed=st.none() | st.integers(0, 5),
    side=st.sampled_from(["right", "left"]),
)
def test_batches_of_a_mixture(data, batch_size, seed, side):
    mixed = mix(PARTS)
    batches = Batches(mixed, batch_size, seed, data, side)
    by_record = {example.record: example for example in mixed.examples}
    seen = []
    for batch in batches.iterate(0, batches.steps_per_epoch, threads=0):
        assert batch["task_ids"].dtype == np.int32
        assert batch["task_ids"].shape == batch["record_ids"].shape
        weighted = batch["label_weights"] != 0
        at = np.where(weighted, batch["label_positions"] + 1, 0)
        labels = np.take_along_axis(batch["tokens"], at, axis=1)
        assert (labels == batch["labels"])[weighted].all()
        for row in range(batch_size):
            records = [record for record in batch["record_ids"][row].tolist() if record >= 0]
            examples = [by_record[record] for record in records]
            tasks = batch["task_ids"][row].tolist()
            assert tasks == [e.task for e in examples] + [0] * (len(tasks) - len(examples))
            answers = [t for e in examples for t in e.tokens[e.response_start :].tolist()]
            assert batch["labels"][row][weighted[row]].tolist() == answers
            for slot, example in enumerate(examples):
                last = batch["score_positions"][row, slot]
                assert batch["tokens"][row, last] == example.tokens[example.score_start - 1]
                assert np.isnan(batch["scores"][row, slot]) == (example.task != 1)
            seen += records
    assert sorted(seen) == sorted(by_record)
