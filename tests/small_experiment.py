"""A two-stage experiment that runs in seconds; also a config file for `regjax train`."""

from regjax import Experiment, ScoreGrid, Stage
from regjax.data import Data, Template, rated_texts
from regjax.models import DecoderConfig
from regjax.objectives import Raft, Sft
from regjax.optim import Optimizer

experiment = Experiment(
    name="small",
    stages=(
        Stage("first", Sft(), decisions=("mode", "mean")),
        Stage("second", Raft(), decisions=("mean", "median")),
    ),
    data=Data(
        train=rated_texts(96, seed=1),
        validation=rated_texts(24, seed=2),
        test=rated_texts(40, seed=3),
        id_field="id",
        max_length=64,
    ),
    template=Template("{text}\nStars:", response=" {score}"),
    grid=ScoreGrid.integers(1, 5),
    architecture=DecoderConfig(
        layers=1, width=16, heads=2, key_value_heads=1, head_dim=8, mlp_width=32
    ),
    vocabulary_size=300,
    reference_field="bayes_mean",
    batch_size=8,
    eval_batch_size=40,
    steps=20,
    eval_every=10,
    checkpoint_every=5,
    log_every=4,
    optimizer=Optimizer(learning_rate=1e-2),
)
