"""Records whose answers belong to other records: the format of a task without its meaning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regjax.data.sources import Record
from regjax.errors import InputError


def with_shuffled_answers(
    records: Sequence[Record], fields: Sequence[str], seed: int
) -> list[Record]:
    """The records in their order, where `fields` come, together, from a record that `seed` draws.

    One permutation of the records that have all these fields; the others, and all other fields,
    stay as they are. With the fields of the answer (`Task.answer_fields`) this is the "randomised"
    data whose gradient shows what of a task is format alone (Wang et al., 2024, section 3).

    Raises:
        InputError: no field is named, or no record has them all.

    >>> records = [Record("a", {"x": 1, "y": 1}), Record("b", {"x": 2, "y": 2})]
    >>> [record.fields for record in with_shuffled_answers(records, ["y"], seed=2)]
    [{'x': 1, 'y': 2}, {'x': 2, 'y': 1}]
    """
    if not fields:
        raise InputError("no field to shuffle: name the fields that hold the answer")
    having = [i for i, record in enumerate(records) if all(f in record.fields for f in fields)]
    if not having:
        raise InputError(
            f"no record has the field{'s' * (len(fields) > 1)} {', '.join(map(repr, fields))}: "
            "nothing to shuffle"
        )
    words = np.random.Philox(key=seed % 2**64).random_raw(len(having))
    shuffled = list(records)
    for index, donor in zip(having, np.argsort(words, kind="stable").tolist(), strict=True):
        answers = {field: records[having[donor]].fields[field] for field in fields}
        shuffled[index] = records[index]._replace(fields={**records[index].fields, **answers})
    return shuffled
