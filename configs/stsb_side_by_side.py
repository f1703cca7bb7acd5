"""Objectives and read-outs side by side on STS-B, a small decoder trained from scratch.

First a language model of the training pairs, each also the other way round, and of every sentence
beside itself, which teaches attention to find the same word in the other sentence. Then from that same
model cross-entropy, RAFT and the number token loss, each with its checkpoint chosen on the validation
split by the RMSE of its mean. STSB names the folder of `stsb-en-{train,dev,test}.csv.gz` (no header:
sentence 1, sentence 2, score).

    STSB=FOLDER regjax train configs/stsb_side_by_side.py --seed 0 --workdir runs/stsb_0
"""

import dataclasses
import os
import pathlib
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


def tuned(name: str, objective) -> Stage:
    return Stage(name, objective, start="language_model", select="mean/rmse")


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
            steps=1500,
            data=dataclasses.replace(data, train=both_ways + beside_itself(train)),
            optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.01),
        ),
        tuned("cross_entropy", Sft()),
        tuned("raft", Raft()),
        tuned("number_token", NumberToken()),
    ),
    data=data,
    architecture=DecoderConfig(
        layers=2, width=96, heads=4, key_value_heads=4, head_dim=24, mlp_width=256
    ),
    optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.01),
)
