"""The metrics of a trained model on records whose scores are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from regjax import compilation
from regjax.data import Data, load_examples, ordered_batches
from regjax.errors import InputError
from regjax.evaluation import READ_OUTS, Evaluation, evaluate_batches
from regjax.log import progress
from regjax.reader import Reader


def evaluate(
    model: str | Path | Reader,
    source: Any,
    *,
    score_field: str = "score",
    columns: tuple[str, ...] = (),
    on_bad_record: Literal["stop", "skip"] = "stop",
    batch_size: int = 64,
    intervals: bool = True,
) -> Evaluation:
    """Scores the records of `source` and reports the metrics of every read-out.

    Args:
      model: a workdir, a stage's model folder, an exported one, or a `Reader`.
      source: a path or `tfds:` spec (see `regjax.data.read_records`), or a sequence of dicts.
      score_field: the field that holds the true score.
      columns: names of the columns of a CSV or TSV without a header.
      on_bad_record: stop, or skip records that cannot be used (`report["skipped"]` counts them).
      batch_size: rows scored at once, rounded up to what divides among the devices.
      intervals: bootstrap intervals at 95 % too.

    Raises:
      InputError: for a model or records that cannot be used.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected at least 1")
    compilation.enable_cache()
    reader = model if isinstance(model, Reader) else Reader.load(model)
    data = Data(
        max_length=reader.max_length,
        buckets=reader.buckets,
        columns=columns,
        score_field=score_field,
        on_bad_record=on_bad_record,
    )
    batch_size = reader.rows(batch_size)
    examples = load_examples(
        source, data, reader.template, reader.tokenizer, reader.grid, reader.codec
    )
    with progress("eval", total=-(-len(examples) // batch_size)) as advance:
        found = evaluate_batches(
            reader.score, reader.params, ordered_batches(examples, batch_size, data),
            reader.codec.values, tuple(READ_OUTS), intervals=intervals, advance=advance,
        )  # fmt: skip
    found.report["skipped"] = float(len(examples.bad))
    return found
