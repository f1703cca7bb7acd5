"""Records in, batches out: sources, templates, encoding, rows and their order."""

from regjax.data.bad_records import BadRecord, write_bad_records
from regjax.data.batches import Batches, ordered_batches
from regjax.data.config import Data, Source
from regjax.data.encode import Example, Examples, encode_records, load_examples
from regjax.data.examples import bayes_rmse, diabetes_texts, rated_texts
from regjax.data.sources import Record, parse_line, read_records
from regjax.data.template import Template
from regjax.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "BadRecord",
    "Batches",
    "Data",
    "Example",
    "Examples",
    "Record",
    "Source",
    "Template",
    "bayes_rmse",
    "diabetes_texts",
    "encode_records",
    "load_examples",
    "load_tokenizer",
    "ordered_batches",
    "parse_line",
    "rated_texts",
    "read_records",
    "train_tokenizer",
    "write_bad_records",
]
