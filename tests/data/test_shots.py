"""Worked examples: which records, how they read, and which are passed over."""

from __future__ import annotations

import numpy as np
import pytest

from regjax.data import Data, Record, Template, shots
from regjax.errors import InputError
from regjax.scores import ScoreGrid

FREE = Template("Q: {q|cut}\nA:", " {a}")
RECORDS = [Record(f"r{i}", {"q": f"{{{i}}}", "a": 10 * i}) for i in range(9)]


def order(count: int, seed: int) -> list[int]:
    return np.argsort(np.random.Philox(key=seed % 2**64).random_raw(count)).tolist()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_the_first_records_of_the_seeds_order(seed):
    expected = [(f"Q: {{{i}}}\nA:", f" {10 * i}") for i in order(9, seed)]
    for count in (0, 1, 4, 9):
        assert shots(RECORDS, FREE, None, Data(), count, seed) == expected[:count]


def test_seeds_draw_others():
    drawn = {tuple(shots(RECORDS, FREE, None, Data(), 2, seed)) for seed in range(20)}
    assert len(drawn) > 10


def test_a_score_is_the_text_of_the_nearest_value():
    grid = ScoreGrid.labels("bad", "fair", "good", text="<{}>")
    template = Template("{q}: ", "so {a} = {score}")
    data = Data(score_field="s", score_names=("b", "f", "g"))
    values = {"u": 0.4, "v": "g", "w": "1", "x": 0.6}
    records = [Record(q, {"q": q, "a": q.upper(), "s": s}) for q, s in values.items()]
    drawn = dict(shots(records, template, grid, data, 4, 3))
    assert drawn == {
        "u: ": "so U = <bad>",
        "v: ": "so V = <good>",
        "w: ": "so W = <fair>",
        "x: ": "so X = <fair>",
    }


def test_unusable_records_are_passed_over():
    first, second, third, *_ = order(9, 5)
    records = list(RECORDS)
    records[first] = Record("broken", {}, "malformed JSON")
    records[second] = Record("empty", {"q": "x", "a": " "})
    [(prompt, response)] = shots(records, FREE, None, Data(), 1, 5)
    assert (prompt, response) == (f"Q: {{{third}}}\nA:", f" {10 * third}")
    assert len(shots(records, FREE, None, Data(), 7, 5)) == 7
    with pytest.raises(
        InputError, match="8 worked examples are wanted, but 7 of 9 records"
    ) as error:
        shots(records, FREE, None, Data(), 8, 5)
    assert "broken: malformed JSON" in str(error.value)


def test_no_records():
    assert shots([], FREE, None, Data(), 0, 0) == []
    with pytest.raises(InputError, match="0 of 0"):
        shots([], FREE, None, Data(), 1, 0)


def test_a_chat_or_another_kind_of_answer():
    with pytest.raises(InputError, match="chat=False"):
        shots(RECORDS, Template("{q}", "{a}", chat=True), None, Data(), 1, 0)
    with pytest.raises(InputError, match="there is no grid"):
        shots(RECORDS, Template("{q}: "), None, Data(), 1, 0)
