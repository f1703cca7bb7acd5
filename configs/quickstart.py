"""The built-in example: star ratings of short reviews, no download.

A generator writes reviews and draws their stars from a known, J-shaped distribution, so the best
possible read-out (the Bayes mean) is known. A small decoder is trained from scratch twice: with
cross-entropy and with RAFT.

    regjax train configs/quickstart.py --workdir runs/quickstart

75 s on two CPU cores. Test RMSE over seeds 0, 1, 2: cross-entropy read by its mode 1.876, by its mean
1.390; RAFT 1.394; the Bayes mean 1.383.
"""

from regjax import Experiment, ScoreGrid, Stage
from regjax.data import Data, Template, rated_texts
from regjax.models import DecoderConfig
from regjax.objectives import Raft, Sft
from regjax.optim import Optimizer

experiment = Experiment(
    name="quickstart",
    stages=(
        Stage("cross_entropy", Sft(), decisions=("mode", "median", "mean")),
        Stage("raft", Raft(), start="initial", decisions=("mean",)),
    ),
    data=Data(
        train=rated_texts(8000, seed=1),
        validation=rated_texts(1000, seed=2),
        test=rated_texts(4000, seed=3),
        id_field="id",
        max_length=48,
    ),
    template=Template("{text}\nStars:", response=" {score}"),
    grid=ScoreGrid.integers(1, 5),
    architecture=DecoderConfig(
        layers=2, width=96, heads=4, key_value_heads=4, head_dim=24, mlp_width=256
    ),
    vocabulary_size=512,
    reference_field="bayes_mean",
    batch_size=64,
    eval_batch_size=256,
    steps=400,
    eval_every=100,
    checkpoint_every=200,
    optimizer=Optimizer(learning_rate=2e-3, weight_decay=0.01),
)
