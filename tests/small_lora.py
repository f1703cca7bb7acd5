"""Stages with adapters one after another, in seconds; also a config file for `regjax train`."""

import dataclasses

from regjax import Stage
from regjax.models import Lora, SoftPrompt
from regjax.objectives import NumberToken, Raft, Sft
from regjax.optim import Optimizer
from tests.small_experiment import experiment as small

LORA = Lora(rank=2, alpha=3.0)
OTHER = Lora(rank=1, patterns=("mlp/(up|down)/kernel$", "^head/kernel$"))
MEAN = ("mean",)

experiment = dataclasses.replace(
    small,
    name="small_lora",
    stages=(
        Stage("base", Sft(), decisions=MEAN),
        Stage("raft", Raft(), decisions=MEAN, lora=LORA),
        Stage("more", Sft(), decisions=MEAN, lora=LORA, select="mean/rmse"),
        Stage("other", NumberToken(), decisions=MEAN, lora=OTHER),
        Stage("norm", Sft(), decisions=MEAN, trainable=("^final_norm/",)),
        Stage(
            "both",
            Raft(),
            decisions=MEAN,
            start="base",
            lora=LORA,
            soft_prompt=SoftPrompt(length=3),
        ),
        Stage("scratch", Sft(), decisions=MEAN, start="initial", lora=LORA),
    ),
    architecture=dataclasses.replace(small.architecture, layers=2),
    steps=6,
    eval_every=4,
    checkpoint_every=3,
    log_every=2,
    reference_field="",
    optimizer=Optimizer(learning_rate=2e-2),
)
