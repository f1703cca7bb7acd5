"""ProMoT where the answer is known: a tiny decoder forgets how to answer, or does not.

Pretraining teaches two formats about letters: `larger e m =` is answered by a letter (m), `compare e m =`
by yes or no. Then a question without such a word, `e m =`, answered by yes or no after a rule of its
own, is learnt in five ways: the whole model (standard fine-tuning), a soft prompt alone, ProMoT (that
prompt, then the model behind it), both at once (joint training), and the model behind a random prompt.
What each does to `larger`, asked without a prompt, is measured as the training goes on: the share of
right answers, and of answers that are a label (an answer is its first word).

    regjax train configs/promot_toy.py --workdir runs/promot_toy

One minute on two CPU cores. Labels among the answers to `larger`, seeds 0, 1, 2: fine-tuning 99.8 %, joint
training 62.3 %, random prompt 59.8 %, ProMoT 4.3 %; right on the new question 93.8 % and 93.8 %.
"""

import itertools
import random
import string

from regjax import Experiment, ScoreGrid, Stage
from regjax.data import Data, Task, Template
from regjax.methods import promot
from regjax.models import DecoderConfig, Execution
from regjax.models.prompt import SoftPrompt
from regjax.objectives import Sft
from regjax.optim import Optimizer
from regjax.probes import Answers

LETTERS = string.ascii_letters[:40]
LABELS = ("yes", "no")
RULES = {
    "larger": lambda x, y: LETTERS[max(x, y)],
    "compare": lambda x, y: LABELS[0 if x > y else 1],
    "": lambda x, y: LABELS[0 if x + y >= len(LETTERS) - 1 else 1],
}


def records(word: str, part: str) -> list[dict[str, str]]:
    """Of the pairs of letters, 1,000 to train, 200 to validate, 400 to test."""
    pairs = list(itertools.product(range(len(LETTERS)), repeat=2))
    random.Random(1).shuffle(pairs)
    parts = {"train": pairs[:1000], "validation": pairs[1000:1200], "test": pairs[1200:]}
    return [
        {"word": word, "x": LETTERS[x], "y": LETTERS[y], "answer": RULES[word](x, y)}
        for x, y in parts[part]
    ]


def data(word: str) -> Data:
    return Data(
        train=records(word, "train"),
        validation=records(word, "validation"),
        test=records(word, "test"),
        score_field="answer",
        max_length=16,
    )


def task(word: str) -> Task:
    return Task(word, data(word), Template("{word} {x} {y} =", response=" {answer}"))


larger = Answers(task("larger"), labels=LABELS, max_new_tokens=1)
recipe = promot.Recipe(
    probes=(larger,),
    alignment=True,
    prompt=SoftPrompt(length=16, init="uniform"),
    prompt_steps=800,
    prompt_eval_every=100,
    prompt_optimizer=Optimizer(learning_rate=0.05, schedule="linear", warmup=0.0),
    model_steps=240,
    model_eval_every=20,
    model_optimizer=Optimizer(learning_rate=1.5e-3, schedule="linear", warmup=0.25),
    model_objective=Sft(),
    select="",
    max_new_tokens=1,
    start="pretraining",
)

experiment = Experiment(
    name="promot_toy",
    stages=(
        Stage(
            "pretraining",
            Sft(),
            tasks=(task("larger"), task("compare")),
            probes=(larger,),
            eval_every=0,
            steps=1500,
            optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.01),
        ),
        *promot.fine_tuning(recipe),
        *promot.promot(recipe),
        *promot.joint_training(recipe),
        *promot.fixed_prompt(recipe),
    ),
    data=data(""),
    template=Template("{x} {y} =", response="{score}"),
    grid=ScoreGrid.labels(*LABELS, text=" {}"),
    architecture=DecoderConfig(
        layers=2, width=64, heads=4, key_value_heads=4, head_dim=16, mlp_width=192
    ),
    # In a loop, the default of a CPU, sums are rounded otherwise, and seeds end elsewhere: see PAPERS.md.
    execution=Execution(layers="scan"),
    vocabulary_size=340,
    batch_size=64,
    eval_batch_size=200,
    checkpoint_every=1000,
)
