"""RAFT on STS-B: how alike two sentences are, 0 to 5.

From a published model (a folder, or a hub id), with STS-B read by TFDS:

    regjax train configs/raft_stsb.py --model PATH_OR_HUB_ID --workdir runs/stsb

or from CSV files without a header (sentence 1, sentence 2, score; plain or .gz):

    regjax train configs/raft_stsb.py --data.train stsb-en-train.csv.gz \
        --data.validation stsb-en-dev.csv.gz --data.test stsb-en-test.csv.gz --workdir runs/stsb

Without --model a small decoder is trained from scratch; `stsb_side_by_side.py` does that with a
language-model stage before it and compares objectives.
"""

from regjax import Experiment, ScoreGrid, Stage
from regjax.data import Data, Template
from regjax.models import DecoderConfig
from regjax.objectives import Raft
from regjax.optim import Optimizer

# The line to switch the objective: Raft(), Sft(), NumberToken(), Raft(normalize=True), ...
objective = Raft()

experiment = Experiment(
    name="raft_stsb",
    stages=(Stage("raft", objective, select="mean/rmse"),),
    data=Data(
        train="tfds:glue/stsb:train",
        validation="tfds:glue/stsb:validation",
        columns=("sentence1", "sentence2", "label"),
        score_field="label",
        max_length=160,
        buckets=(48, 80),
    ),
    template=Template(
        "Sentence 1: {sentence1|cut}\nSentence 2: {sentence2|cut}\nSimilarity (0-5):",
        response=" {score}",
    ),
    grid=ScoreGrid.integers(0, 5),
    architecture=DecoderConfig(
        layers=3, width=128, heads=4, key_value_heads=4, head_dim=32, mlp_width=384
    ),
    vocabulary_size=2048,
    batch_size=32,
    steps=600,
    eval_every=100,
    optimizer=Optimizer(learning_rate=1e-4, weight_decay=0.01),
)
