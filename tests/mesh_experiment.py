"""An experiment of one stage that divides among eight devices along every axis of the mesh."""

import dataclasses

from regjax import Stage
from regjax.models import DecoderConfig
from regjax.objectives import Raft
from regjax.optim import Optimizer
from tests.small_experiment import experiment as small

experiment = dataclasses.replace(
    small,
    name="mesh",
    stages=(Stage("raft", Raft(cross_entropy=0.5)),),
    architecture=DecoderConfig(
        layers=1,
        width=16,
        heads=8,
        key_value_heads=4,
        head_dim=4,
        mlp_width=32,
        initializer_scale=0.2,
    ),
    accumulation=2,
    batch_size=16,
    reference_field="",
    eval_every=0,
    log_every=1,
    steps=20,
    optimizer=Optimizer(learning_rate=1e-2, epsilon=1e-3),
)
