"""What a stage measures beside its scores: answers to a task's questions, and how gradients align."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from regjax import alignment, generate, sharding, text_metrics
from regjax.data import (
    Data,
    Examples,
    Record,
    Task,
    expected_answers,
    load_task,
    ordered_batches,
    task_codec,
    task_template,
    with_shuffled_answers,
)
from regjax.errors import InputError
from regjax.evaluation import Score, make_score
from regjax.experiment import MAIN
from regjax.models import Apply
from regjax.models.prompt import without_prompts
from regjax.stages import ResolvedStage

Split = Literal["validation", "test"]
HELD_OUT: tuple[Split, ...] = ("validation", "test")


class Load(Protocol):
    """`load_task`, whose examples are kept: probes of several stages ask the same records."""

    def __call__(
        self, task: Task, split: str, *, prompts_only: bool = False
    ) -> Examples | None: ...


class Setting(NamedTuple):
    """What a stage's probes work with."""

    stage: ResolvedStage
    model: Callable[[Sequence[str]], Apply]
    """The model with the soft prompts of these names before its rows, or none."""
    tokenizer: Any
    main: Task
    """The experiment's own task."""
    batch_size: int
    """Rows at once, which divide among the devices."""
    load: Load
    mesh: Mesh
    """Where the parameters live."""


class Measured(NamedTuple):
    """What a probe found."""

    figures: dict[str, float]
    lines: Sequence[dict[str, Any]] = ()
    """A line a record, for a file."""


class PreparedProbe(NamedTuple):
    """A probe with its data."""

    figures: tuple[str, ...]
    """What it measures."""
    examples: Mapping[Split, Examples]
    """What it is measured on, by the splits that it has."""
    measure: Callable[[Any, Split], Measured]
    """`(params, split)`, of one of these splits."""


class Probe(Protocol):
    """A frozen dataclass of what to measure; `prepare` reads its data and compiles nothing yet."""

    @property
    def name(self) -> str:
        """What its figures are called: `NAME/FIGURE`."""
        ...

    @property
    def in_table(self) -> bool:
        """Whether its figures are results, or only tell how training went."""
        ...

    def prepare(self, setting: Setting) -> PreparedProbe: ...


@dataclasses.dataclass(frozen=True)
class Answers:
    """The questions of a task answered by greedy decoding, and by ranking where it has a grid.

    Figures: `exact_match`, the share of answers that are the expected text; `format_ratio`, the share of
    answers that are one of `labels` (Wang et al., 2024, section 3); `accuracy`, the share of records
    whose most likely grid value is the one nearest to their score.
    """

    task: Task | None = None
    """What is asked; None: the experiment's own task."""

    shots: int | None = None
    """Worked examples before every question; None: as the task says."""

    soft_prompt: str = ""
    """Name of the soft prompt before every question (`main` is that of the experiment's own task);
    empty: none."""

    labels: tuple[str, ...] = ()
    """The label set of `format_ratio`."""

    max_new_tokens: int = 16
    """Length at which an answer is cut."""

    stop: tuple[str, ...] = ("\n",)
    """Texts at whose first occurrence an answer ends."""

    limit: int = 0
    """Records asked, the first of each split; 0: all."""

    title: str = ""
    """Name of its figures; empty: the task's."""

    @property
    def name(self) -> str:
        return self.title or (self.task.name if self.task else MAIN)

    @property
    def in_table(self) -> bool:
        return True

    def prepare(self, setting: Setting) -> PreparedProbe:
        task = self.task or setting.main
        if self.shots is not None:
            task = dataclasses.replace(task, shots=self.shots)
        model = setting.model([self.soft_prompt] if self.soft_prompt else [])
        tokenizer, size = setting.tokenizer, setting.batch_size
        data = dataclasses.replace(task.data, packing=False)
        decode = generate.make_greedy(model, self.max_new_tokens, tokenizer.eos_token_id)

        def greedy(params, batch):
            with sharding.known_inside(setting.mesh):
                rows = sharding.RowLayout(setting.mesh, len(batch["tokens"])).put(batch)
                return sharding.fetch(decode(params, rows))

        asked = self._read(setting.load, task, prompts_only=True)
        if not asked:
            raise InputError(f"probe {self.name!r}: its task has no validation and no test records")
        grid, codec = task.grid, task_codec(task, tokenizer)
        scored = self._read(setting.load, task) if codec is not None else {}
        score = make_score(model, codec, setting.mesh) if codec is not None else None

        def measure(params, split: Split) -> Measured:
            questions = asked[split]
            if not self.soft_prompt:
                params = without_prompts(params)
            expected = expected_answers(questions, task)
            found = generate.answers(
                model, params, tokenizer, questions, batch_size=size,
                max_new_tokens=self.max_new_tokens, stop=self.stop, data=data, greedy=greedy,
            )  # fmt: skip
            figures = {"exact_match": text_metrics.exact_match(found, expected)}
            if self.labels:
                figures["format_ratio"] = text_metrics.format_ratio(found, self.labels)
            lines: list[dict[str, Any]] = [
                {"id": questions.ids[example.record], "expected": right, "answer": answer}
                for example, right, answer in zip(questions.examples, expected, found, strict=True)
            ]
            if score is not None and grid is not None:
                rows = scored[split]
                first = _most_likely(score, params, rows, size, data)
                right = [first[e.record] == grid.nearest(e.score) for e in rows.examples]
                figures["accuracy"] = float(np.mean(right))
                for line, example in zip(lines, questions.examples, strict=True):
                    if example.record in first:
                        line["ranked_first"] = grid.texts[first[example.record]].strip()
            return Measured(figures, lines)

        figures = ["exact_match"] + ["format_ratio"] * bool(self.labels) + ["accuracy"] * bool(grid)
        return PreparedProbe(tuple(figures), asked, measure)

    def _read(self, load: Load, task: Task, *, prompts_only: bool = False) -> dict[Split, Examples]:
        found: dict[Split, Examples] = {}
        for split in HELD_OUT:
            examples = load(task, split, prompts_only=prompts_only)
            if examples is not None:
                kept = examples.examples[: self.limit or None]
                found[split] = dataclasses.replace(examples, examples=kept)
        return found


def _most_likely(score: Score, params, examples: Examples, size: int, data: Data) -> dict[int, int]:
    """Index of the most likely grid value by record."""
    found: dict[int, int] = {}
    for batch in ordered_batches(examples, size, data):
        first = sharding.fetch(score(params, batch).log_probs).argmax(-1)
        found.update(zip(batch["record_ids"][:, 0].tolist(), first.tolist(), strict=True))
    return found


@dataclasses.dataclass(frozen=True)
class GradientAlignment:
    """Cosine between the gradients on true labels and on labels shuffled among the same inputs.

    Near 1 as long as what the labels have in common, their format, is what is learnt (Wang et al., 2024,
    section 3 and C.8). Of the stage's own objective and soft prompts, on the first records of the
    training split, as often as the validation data are looked at; figures `cosine_GROUP`, see
    `regjax.alignment`.
    """

    task: Task | None = None
    """Whose records; None: the experiment's own task."""

    soft_prompt: str = ""
    """Name of the soft prompt before every record; empty: none."""

    rows: int = 256
    """Records in a gradient."""

    seed: int = 0
    """Decides the shuffle."""

    title: str = "alignment"
    """Name of its figures."""

    @property
    def name(self) -> str:
        return self.title

    @property
    def in_table(self) -> bool:
        return False

    def prepare(self, setting: Setting) -> PreparedProbe:
        task = self.task or setting.main
        model = setting.model([self.soft_prompt] if self.soft_prompt else [])
        codec = task_codec(task, setting.tokenizer)
        examples = setting.load(task, "train")
        if examples is None:
            raise InputError(f"probe {self.name!r}: its task has no training records")
        examples = dataclasses.replace(examples, examples=examples.examples[: self.rows])
        records = [
            Record(examples.places[example.record], examples.records[example.record])
            for example in examples.examples
        ]
        shuffled = with_shuffled_answers(records, task.answer_fields, self.seed)
        batches = [self._batches(task, each, setting) for each in (records, shuffled)]
        compiled = alignment.make_gradients(model, setting.stage.objective, codec)
        layout = sharding.RowLayout(setting.mesh, setting.batch_size)

        def gradients(params, batch):
            with sharding.known_inside(setting.mesh):
                return compiled(params, layout.put(batch))

        def measure(params, split: Split) -> Measured:
            if not self.soft_prompt:
                params = without_prompts(params)
            true, shuffled = (
                functools.reduce(alignment.add, (gradients(params, batch) for batch in each))
                for each in batches
            )
            cosines = alignment.cosines(true, shuffled)
            return Measured({f"cosine_{group}": value for group, value in cosines.items()})

        figures = tuple(f"cosine_{group}" for group in alignment.LAST_LAYER_GROUPS)
        return PreparedProbe(figures, {"validation": examples}, measure)

    def _batches(
        self, task: Task, records: Sequence[Record], setting: Setting
    ) -> list[dict[str, Any]]:
        """The records in their order, in rows of one length, so that both labellings share them."""
        data = dataclasses.replace(
            task.data, train=[record.fields for record in records], packing=False, buckets=()
        )
        # The worked examples stay those of the true labels.
        written = dataclasses.replace(task, data=data, template=task_template(task), shots=0)
        examples = load_task(written, setting.tokenizer, "train")
        assert examples is not None
        return [
            {name: array for name, array in batch.items() if name != "record_ids"}
            for batch in ordered_batches(examples, setting.batch_size, data)
        ]
