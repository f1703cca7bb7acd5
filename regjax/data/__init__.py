"""Records in, batches out: sources, templates, tasks, encoding, rows and their order."""

from regjax.data.bad_records import BadRecord, write_bad_records
from regjax.data.batches import Batches, ordered_batches
from regjax.data.config import Data, Source
from regjax.data.encode import Example, Examples, encode_records, load_examples
from regjax.data.examples import bayes_rmse, diabetes_texts, rated_texts
from regjax.data.mixture import mix
from regjax.data.shots import shots
from regjax.data.shuffled import with_shuffled_answers
from regjax.data.sources import Record, parse_line, read_records
from regjax.data.task import (
    SPLITS,
    Task,
    expected_answers,
    load_task,
    task_codec,
    task_template,
)
from regjax.data.template import Template
from regjax.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "SPLITS",
    "BadRecord",
    "Batches",
    "Data",
    "Example",
    "Examples",
    "Record",
    "Source",
    "Task",
    "Template",
    "bayes_rmse",
    "diabetes_texts",
    "encode_records",
    "expected_answers",
    "load_examples",
    "load_task",
    "load_tokenizer",
    "mix",
    "ordered_batches",
    "parse_line",
    "rated_texts",
    "read_records",
    "shots",
    "task_codec",
    "task_template",
    "train_tokenizer",
    "with_shuffled_answers",
    "write_bad_records",
]
