"""ProMoT on RTE: does one text follow from another, True or False, with other tasks kept in mind.

From a published model (a folder, or a hub id), RTE read by TFDS:

    regjax train configs/promot_rte.py --model PATH_OR_HUB_ID --workdir runs/promot_rte

or from TSV with a header, or JSONL (sentence1, sentence2, label; plain or .gz):

    regjax train configs/promot_rte.py --model PATH_OR_HUB_ID --data.train train.tsv \
        --data.validation dev.tsv --workdir runs/promot_rte

Standard fine-tuning, prompt tuning and ProMoT after it, joint training and a fixed random prompt, each
with the checkpoint that answers the validation split best (Wang et al., 2024, choose and report on that
same split). OTHER_TASKS names JSONL files, joined by ":", each of another task with the fields prompt
and answer; they are asked without the soft prompt, with 1 and with 4 worked examples:

    OTHER_TASKS=qa.jsonl:translation.jsonl regjax train configs/promot_rte.py ...

The defaults are the paper's for mT5, which tunes 5,000 steps of prompt and 1,000 of model at a time.
No result: it was only tried for a few steps, on small models.
"""

import os
from pathlib import Path

from regjax import Experiment, ScoreGrid
from regjax.data import Data, Task, Template
from regjax.methods import promot
from regjax.models import DecoderConfig, SoftPrompt
from regjax.probes import Answers

LABELS = ("True", "False")


def other_task(path: str) -> Task:
    """The worked examples are drawn from the file, and all of it is asked."""
    return Task(
        Path(path).name.split(".")[0],
        Data(train=path, validation=path, score_field="answer", max_length=1024),
        Template("{prompt}", response=" {answer}"),
    )


def asked(task: Task, shots: int) -> Answers:
    return Answers(task, shots=shots, labels=LABELS, title=f"{task.name}_{shots}_shot", limit=500)


others = [other_task(path) for path in os.environ.get("OTHER_TASKS", "").split(":") if path]
recipe = promot.Recipe(
    prompt=SoftPrompt(length=100, init="vocabulary"),
    probes=tuple(asked(task, shots) for task in others for shots in (1, 4)),
    alignment=True,
    max_new_tokens=4,
)

experiment = Experiment(
    name="promot_rte",
    stages=(
        *promot.fine_tuning(recipe),
        *promot.promot(recipe),
        *promot.joint_training(recipe),
        *promot.fixed_prompt(recipe),
    ),
    data=Data(
        train="tfds:glue/rte:train",
        validation="tfds:glue/rte:validation",
        score_field="label",
        score_names=("entailment", "not_entailment"),
        max_length=320,
        buckets=(96, 160),
    ),
    template=Template(
        "{sentence1|cut} question: {sentence2} Is it true or false? answer:", response="{score}"
    ),
    grid=ScoreGrid.labels(*LABELS, text=" {}"),
    architecture=DecoderConfig(
        layers=2, width=64, heads=4, key_value_heads=4, head_dim=16, mlp_width=192
    ),
    vocabulary_size=2048,
    batch_size=64,
    eval_batch_size=64,
)
