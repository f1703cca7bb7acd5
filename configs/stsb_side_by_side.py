"""Objectives and read-outs side by side on STS-B, a small decoder trained from scratch.

Three stages of the same kind for all: a language model of the training sentences, pairs both ways and
every sentence beside itself; then pairs of training sentences scored by the share of words they have in
common, which teaches the model to compare; then, from that same model, cross-entropy, RAFT or the
number token loss on the true scores, each with its checkpoint chosen on the validation split by the
RMSE of its mean. STSB names the folder of `stsb-en-{train,dev,test}.csv.gz` (no header: sentence 1,
sentence 2, score).

    STSB=FOLDER regjax train configs/stsb_side_by_side.py --seed 0 --workdir runs/stsb_0

About 13 minutes on two busy CPU cores. Test RMSE over seeds 0, 1, 2: cross-entropy read by its mode
1.689, by its mean 1.466; RAFT 1.461; number token loss, mean, 1.470; the best constant 1.525.
"""

import dataclasses
import os
import pathlib
import random
import runpy

from regjax import Stage
from regjax.data import read_records
from regjax.models import DecoderConfig
from regjax.objectives import NumberToken, Raft, Sft
from regjax.optim import Optimizer

base = runpy.run_path(str(pathlib.Path(__file__).with_name("raft_stsb.py")))["experiment"]
folder = pathlib.Path(os.environ.get("STSB", "stsb"))


def pairs(split: str) -> list[dict]:
    records = read_records(str(folder / f"stsb-en-{split}.csv.gz"), base.data.columns)
    return [dict(record.fields) for record in records]


def swapped(records: list[dict]) -> list[dict]:
    return [{**r, "sentence1": r["sentence2"], "sentence2": r["sentence1"]} for r in records]


def beside_itself(records: list[dict]) -> list[dict]:
    sentences = dict.fromkeys(r[name] for r in records for name in ("sentence1", "sentence2"))
    return [{"sentence1": s, "sentence2": s, "label": 5} for s in sentences]


def word_overlap(records: list[dict], count: int, seed: int = 0) -> list[dict]:
    """Sentences of one pair, of neighbouring pairs or of any, scored 0 to 5 by common words."""
    rng = random.Random(seed)
    texts = [(r["sentence1"], r["sentence2"]) for r in records]
    found = []
    for _ in range(count):
        first = rng.randrange(len(texts))
        kind = rng.random()
        near = min(max(first + rng.randint(-20, 20), 0), len(texts) - 1)
        second = first if kind < 0.45 else near if kind < 0.8 else rng.randrange(len(texts))
        one, two = rng.choice(texts[first]), rng.choice(texts[second])
        a, b = ([word.strip('.,!?"') for word in t.lower().split()] for t in (one, two))
        common = sum(min(a.count(word), b.count(word)) for word in set(b))
        score = 5 * common / max(len(a), len(b))
        found.append({"sentence1": one, "sentence2": two, "label": score})
    return found


def tuned(name: str, objective) -> Stage:
    return Stage(name, objective, start="word_overlap", select="mean/rmse")


train = pairs("train")
both_ways = train + swapped(train)
data = dataclasses.replace(
    base.data, train=both_ways, validation=pairs("dev"), test=pairs("test"), buckets=(40, 56, 80)
)
experiment = dataclasses.replace(
    base,
    name="stsb_side_by_side",
    stages=(
        Stage(
            "language_model",
            Sft(tokens="all"),
            decisions=(),
            steps=800,
            data=dataclasses.replace(data, train=both_ways + beside_itself(train)),
            optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.01),
        ),
        Stage(
            "word_overlap",
            Sft(),
            decisions=(),
            steps=1500,
            data=dataclasses.replace(data, train=word_overlap(train, 40_000)),
            optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.01),
        ),
        tuned("cross_entropy", Sft()),
        tuned("raft", Raft()),
        tuned("number_token", NumberToken()),
    ),
    data=data,
    architecture=DecoderConfig(
        layers=2, width=96, heads=4, key_value_heads=4, head_dim=24, mlp_width=256
    ),
    steps=300,
    eval_every=50,
    optimizer=Optimizer(learning_rate=3e-4, weight_decay=0.01),
)
