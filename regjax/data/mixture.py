"""Several tasks' examples as one sequence."""

from __future__ import annotations

from collections.abc import Sequence

from regjax.data.encode import Examples
from regjax.errors import InputError


def mix(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts, one part after the other; those of part t get `task` t.

    Their records are numbered through, so that `records`, `places` and `ids` stay theirs. Batches
    shuffle them together.

    Raises:
        InputError: no part.
    """
    if not parts:
        raise InputError("there is nothing to mix: give the examples of at least one task")
    examples = []
    start = 0
    for task, part in enumerate(parts):
        examples += [
            example._replace(task=task, record=start + example.record) for example in part.examples
        ]
        start += len(part.records)
    return Examples(
        examples=examples,
        records=[record for part in parts for record in part.records],
        places=[place for part in parts for place in part.places],
        ids=[identity for part in parts for identity in part.ids],
        bad=[record for part in parts for record in part.bad],
        truncated=sum(part.truncated for part in parts),
    )
