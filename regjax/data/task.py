"""A task: records, how they are written, and what may be answered; its examples by split."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, Literal

from regjax.data import bad_records
from regjax.data.bad_records import Unusable
from regjax.data.config import Data
from regjax.data.drafts import check_answers
from regjax.data.encode import Examples, load_examples
from regjax.data.shots import shots
from regjax.data.sources import read_records
from regjax.data.template import Template
from regjax.data.tokenization import special_tokens
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of question: its records, how they are written, what may be answered.

    Raises:
        InputError: a name of other characters, a template that does not go with the grid, fewer
            than 0 worked examples, or some with a chat template or without training records.

    >>> Task("qa", Data(train="qa.jsonl"), Template("Q: {q}\\nA:", response=" {a}")).answer_fields
    ('a',)
    """

    name: str
    """Letters, digits, - and _: it names files, figures and soft prompts."""
    data: Data
    """Its records; a task that is only evaluated needs no training records."""
    template: Template
    """How a record is written as text."""
    grid: ScoreGrid | None = None
    """The scores or labels that may be answered; None: free text."""
    shots: int = 0
    """Worked examples before every record, drawn from the training records, where they also stay."""
    shots_seed: int = 0
    """Decides which."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"task name is {self.name!r}: expected letters, digits, - and _")
        try:
            check_answers(self.data, self.template, self.grid)
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from None
        if self.shots < 0:
            raise InputError(f"task {self.name!r}: shots is {self.shots}; expected 0 or more")
        if self.shots and self.template.chat:
            raise InputError(
                f"task {self.name!r}: shots are plain text before the prompt: use chat=False"
            )
        if self.shots and not self.data.train:
            raise InputError(
                f"task {self.name!r}: shots are drawn from training records: give data.train"
            )

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """Fields of a record that hold the answer."""
        score = () if self.grid is None else (self.data.score_field,)
        return self.template.response_fields + score

    @functools.cached_property
    def worked_examples(self) -> tuple[tuple[str, str], ...]:
        """The drawn (prompt, response) pairs; the training records are read for them once."""
        if not self.shots:
            return ()
        records = read_records(self.data.train, self.data.columns)
        try:
            drawn = shots(records, self.template, self.grid, self.data, self.shots, self.shots_seed)
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from None
        return tuple(drawn)


def task_template(task: Task) -> Template:
    """The task's template with its worked examples."""
    return task.template.with_shots(task.worked_examples) if task.shots else task.template


def task_codec(task: Task, tokenizer: Any) -> TokenGrid | None:
    """How the tokenizer writes the task's grid; None for free text."""
    return None if task.grid is None else task_template(task).codec(task.grid, tokenizer)


def load_task(
    task: Task,
    tokenizer: Any,
    split: Split,
    *,
    prompts_only: bool = False,
    labelled: bool = True,
) -> Examples | None:
    """The examples of one split, see `load_examples`; None if the task has no source for it.

    Raises:
        InputError: an unknown split, a worked example whose text spells out a special token, and as
            `load_examples`.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    source = getattr(task.data, split)
    if not source:
        return None
    _check_shots(task, tokenizer)
    return load_examples(
        source,
        task.data,
        task_template(task),
        tokenizer,
        task.grid,
        task_codec(task, tokenizer),
        labelled=labelled,
        prompts_only=prompts_only,
    )


def _check_shots(task: Task, tokenizer: Any) -> None:
    """As literal text, a special token in a record's field would count as one."""
    if not task.shots:
        return
    special = special_tokens(tokenizer)
    literal = [piece for piece in task.template.skeleton().pieces if isinstance(piece, str)]
    expected = sum(len(special.findall(piece)) for piece in literal)
    texts = () if task.grid is None else task.grid.texts
    for prompt, response in task.worked_examples:
        score = max((text for text in texts if response.endswith(text)), key=len, default="")
        if len(special.findall(prompt + response)) > expected + len(special.findall(score)):
            raise InputError(
                f"task {task.name!r}: the worked example {prompt!r} spells out a special token of the "
                "tokenizer: give another shots_seed, or mend the record"
            )


def expected_answers(examples: Examples, task: Task) -> list[str]:
    """The text of each example's right answer, stripped, for exact match.

    With a grid the text of the value nearest to its score, otherwise the response as the template
    writes it; of examples that `load_task` made, in their order.

    Raises:
        InputError: an example without a score, or a record without a field of the response.
    """
    answers = []
    for example in examples.examples:
        place = examples.places[example.record]
        if task.grid is not None:
            if math.isnan(example.score):
                raise InputError(f"{place}: has no score: load the examples with labelled=True")
            answers.append(task.grid.texts[int(task.grid.nearest(example.score))].strip())
            continue
        record = examples.records[example.record]
        try:
            fields = {
                name: bad_records.text(name, record.get(name))
                for name in task.template.response_fields
            }
        except Unusable as error:
            raise InputError(f"{error.at(place)}; it is the answer that is expected") from None
        answers.append(task.template.render_response(fields).strip())
    return answers
