"""Tasks: their checks, their splits with worked examples, and the answers they expect."""

from __future__ import annotations

import json

import pytest

from regjax.data import (
    SPLITS,
    Data,
    Record,
    Task,
    Template,
    expected_answers,
    load_examples,
    load_task,
    shots,
    task_codec,
    task_template,
    with_shuffled_answers,
)
from regjax.data import task as task_module
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from tests.tokenizers import byte_level_bpe, chat

TOKENIZER = byte_level_bpe()
FREE = Template("Q: {q}\nA:", " {a}")
RTE = Template("{p} question: {h} Is it true or false?\nanswer:", "{score}")
LABELS = ScoreGrid.labels("True", "False", text=" {}")
QA = [{"q": f"{{{i}}} low?", "a": f" high {i}\n"} for i in range(6)]
PAIRS = [{"p": f"p{i}", "h": "so", "label": ("no", 0, "yes", 1)[i % 4]} for i in range(8)]
NAMES = Data(train=PAIRS, validation=PAIRS[:3], score_field="label", score_names=("yes", "no"))


def qa(**options) -> Task:
    return Task("qa", Data(train=QA, test=QA[:2]), FREE, **options)


def rte(**options) -> Task:
    return Task("rte", NAMES, RTE, LABELS, **options)


def same(first, second) -> bool:
    rows = [[(e.tokens.tolist(), *e[1:3], e.record) for e in x.examples] for x in (first, second)]
    return rows[0] == rows[1] and first.records == second.records


@pytest.mark.parametrize("make", [qa, rte])
@pytest.mark.parametrize("options", [{}, {"prompts_only": True}, {"labelled": False}])
def test_a_split_is_its_source_in_the_tasks_template(make, options):
    task = make()
    codec = task_codec(task, TOKENIZER)
    assert (codec is None) == (task.grid is None) and task_template(task) == task.template
    for split in SPLITS:
        source = getattr(task.data, split)
        loaded = load_task(task, TOKENIZER, split, **options)
        if not source:
            assert loaded is None
            continue
        expected = load_examples(
            source, task.data, task.template, TOKENIZER, task.grid, codec, **options
        )
        assert same(loaded, expected)
    assert codec is None or codec.ids == RTE.codec(LABELS, TOKENIZER).ids


@pytest.mark.parametrize("make", [qa, rte])
def test_shots_come_from_the_training_records_before_every_record(make):
    task = make(shots=2, shots_seed=7)
    records = [Record(str(i), fields) for i, fields in enumerate(task.data.train)]
    drawn = shots(records, task.template, task.grid, task.data, 2, 7)
    assert list(task.worked_examples) == drawn
    worked = "".join(prompt + response + "\n\n" for prompt, response in drawn)
    plain = make()
    for split in SPLITS:
        loaded, bare = (load_task(t, TOKENIZER, split) for t in (task, plain))
        if loaded is None:
            continue
        for example, short in zip(loaded.examples, bare.examples, strict=True):
            written, own = (
                TOKENIZER.decode(e.tokens, clean_up_tokenization_spaces=False)
                for e in (example, short)
            )
            assert written == worked + own
            response = example.tokens[example.response_start :].tolist()
            assert response == short.tokens[short.response_start :].tolist()
    assert make(shots=2, shots_seed=8).worked_examples != task.worked_examples


def test_training_records_are_read_once_for_the_shots(monkeypatch):
    read = []
    real = task_module.read_records
    monkeypatch.setattr(task_module, "read_records", lambda *a: read.append(a) or real(*a))
    task = qa(shots=1)
    for split in SPLITS:
        load_task(task, TOKENIZER, split)
    assert len(read) == 1


def test_a_task_that_is_only_evaluated(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in QA))
    task = Task("web-questions_1", Data(test=str(path)), FREE)
    assert load_task(task, TOKENIZER, "train") is None
    assert load_task(task, TOKENIZER, "validation") is None
    assert len(load_task(task, TOKENIZER, "test")) == 6
    # Without answers there are still prompts.
    path.write_text(json.dumps({"q": "high?"}))
    [example] = load_task(task, TOKENIZER, "test", prompts_only=True).examples
    assert TOKENIZER.decode(example.tokens) == "Q: high?\nA:"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "task name is ''"),
        ({"name": "a b"}, "task name is 'a b'"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": "a\n"}, "letters, digits"),
        ({"name": 3}, "task name is 3"),
        ({"grid": LABELS}, r"task 'qa': template response ' \{a\}' has no \{score\}"),
        ({"template": RTE}, "task 'qa': .* there is no grid"),
        ({"template": RTE, "grid": LABELS, "data": Data(train=QA, score_names=("a",))}, "1 names"),
        ({"shots": -1}, "shots is -1"),
        ({"shots": 1, "data": Data(test=QA)}, "give data.train"),
        ({"shots": 1, "template": Template("{q}", "{a}", chat=True)}, "chat=False"),
    ],
)
def test_a_task_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Task(**{"name": "qa", "data": Data(train=QA), "template": FREE, **options})


def test_more_shots_than_records_and_an_unknown_split():
    with pytest.raises(InputError, match="task 'qa': 7 worked examples are wanted, but 6 of 6"):
        load_task(qa(shots=7), TOKENIZER, "test")
    with pytest.raises(InputError, match="'dev': expected one of train, validation, test"):
        load_task(qa(), TOKENIZER, "dev")


def test_a_shot_may_not_spell_a_special_token_of_its_own():
    spelled = [{"q": "so <|endoftext|>", "a": "no"}]
    task = Task("qa", Data(train=spelled), FREE)
    assert len(load_task(task, TOKENIZER, "train")) == 1
    shot = Task("qa", Data(train=spelled), FREE, shots=1)
    with pytest.raises(InputError, match="spells out a special token"):
        load_task(shot, TOKENIZER, "train")
    # The template's own, and those of the grid's texts, are meant.
    marked = Template("<|bos|>{q}:\n", "{score}")
    grid = ScoreGrid.labels("<|bos|>", "no")
    data = Data(train=[{"q": "x", "score": 0}])
    [example] = load_task(Task("m", data, marked, grid, shots=1), TOKENIZER, "train").examples
    assert example.tokens.tolist().count(TOKENIZER.bos_token_id) == 4


def test_a_chat_task():
    task = Task("chat", Data(train=QA), Template("{q}", "{a}", chat=True))
    loaded = load_task(task, chat(), "train")
    answers = [chat().decode(e.tokens[e.response_start : -1]) for e in loaded.examples]
    assert answers == [f" high {i}\n" for i in range(6)]


def test_expected_answers():
    assert expected_answers(load_task(qa(), TOKENIZER, "test"), qa()) == ["high 0", "high 1"]
    why = Task("why", Data(train=QA), Template("Q: {q}\n", "so: {a} since {q} "))
    assert expected_answers(load_task(why, TOKENIZER, "train"), why)[1] == (
        "so:  high 1\n since {1} low?"
    )
    loaded = load_task(rte(shots=1), TOKENIZER, "train")
    assert expected_answers(loaded, rte()) == 2 * ["False", "True", "True", "False"]
    rounded = Task("r", Data(train=[{"p": "x", "score": 2.6}]), Template("{p}:\n"),
                   ScoreGrid.integers(1, 5, text="({})"))  # fmt: skip
    assert expected_answers(load_task(rounded, TOKENIZER, "train"), rounded) == ["(3)"]


def test_expected_answers_follow_the_usable_examples():
    data = Data(train=[QA[0], {"q": "x", "a": " "}, QA[2]], on_bad_record="skip")
    task = Task("qa", data, FREE)
    loaded = load_task(task, TOKENIZER, "train")
    assert expected_answers(loaded, task) == ["high 0", "high 2"]
    prompts = load_task(task, TOKENIZER, "train", prompts_only=True)
    with pytest.raises(InputError, match=r"records\[1\]: a = ' ': is empty"):
        expected_answers(prompts, task)
    with pytest.raises(InputError, match=r"records\[0\]: has no score"):
        expected_answers(load_task(rte(), TOKENIZER, "train", labelled=False), rte())


def test_answer_fields():
    assert qa().answer_fields == ("a",) and rte().answer_fields == ("label",)
    reasons = Task("r", Data(), Template("{q}:", "{why} so {score}"), LABELS)
    assert reasons.answer_fields == ("why", "score")
    records = [Record(str(i), fields) for i, fields in enumerate(PAIRS)]
    shuffled = with_shuffled_answers(records, rte().answer_fields, 1)
    labels = [record.fields["label"] for record in shuffled]
    assert sorted(map(str, labels)) == sorted(str(pair["label"]) for pair in PAIRS)
    assert [record.fields["p"] for record in shuffled] == [pair["p"] for pair in PAIRS]
