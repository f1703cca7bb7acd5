"""ProMoT after a pretraining stage, in seconds; also a config file for `regjax train`."""

import itertools

from regjax import Experiment, ScoreGrid, Stage
from regjax.data import Data, Task, Template
from regjax.methods import promot
from regjax.models import DecoderConfig
from regjax.models.prompt import SoftPrompt
from regjax.objectives import Sft
from regjax.optim import Optimizer
from regjax.probes import Answers, GradientAlignment

LETTERS = "abcdef"
LABELS = ("yes", "no")


def records(word: str, keep: int) -> list[dict[str, str]]:
    pairs = [p for i, p in enumerate(itertools.product(LETTERS, repeat=2)) if i % 3 == keep]
    answers = {
        "larger": lambda x, y: max(x, y),
        "judge": lambda x, y: LABELS[0 if x in "ace" else 1],
        "order": lambda x, y: LABELS[0 if x < y else 1],
    }
    return [{"word": word, "x": x, "y": y, "answer": answers[word](x, y)} for x, y in pairs]


def data(word: str) -> Data:
    splits = {
        "train": records(word, 0),
        "validation": records(word, 1)[:8],
        "test": records(word, 2)[:8],
    }
    return Data(**splits, score_field="answer", max_length=16)


TEMPLATE = Template("{word} {x} {y} =", response="{score}")
GRID = ScoreGrid.labels(*LABELS, text=" {}")

larger = Task("larger", data("larger"), Template("{word} {x} {y} =", response=" {answer}"))
judge = Task("judge", data("judge"), TEMPLATE, GRID)
order = Task("order", data("order"), TEMPLATE, GRID)

recipe = promot.Recipe(
    probes=(Answers(larger, labels=LABELS, max_new_tokens=3),),
    prompt=SoftPrompt(length=4),
    prompt_steps=20,
    prompt_eval_every=10,
    prompt_optimizer=Optimizer(learning_rate=0.05, weight_decay=0.1),
    model_steps=20,
    model_eval_every=10,
    model_optimizer=Optimizer(learning_rate=5e-3, weight_decay=0.1),
    model_objective=Sft(),
    max_new_tokens=3,
    start="pretraining",
)
pretraining = Stage(
    "pretraining", Sft(), tasks=(larger,), steps=20, optimizer=Optimizer(learning_rate=1e-2)
)
experiment = Experiment(
    name="small_promot",
    stages=(pretraining, *promot.promot(recipe)),
    data=data("judge"),
    template=TEMPLATE,
    grid=GRID,
    architecture=DecoderConfig(
        layers=1, width=16, heads=2, key_value_heads=1, head_dim=8, mlp_width=32
    ),
    vocabulary_size=300,
    batch_size=8,
    eval_batch_size=8,
    checkpoint_every=5,
    log_every=5,
)
alignment = GradientAlignment(soft_prompt="main", rows=8)
