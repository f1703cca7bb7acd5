"""Worked examples for a prompt, drawn from records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regjax.data.bad_records import BadRecord, Unusable
from regjax.data.config import Data
from regjax.data.drafts import check_answers, draft
from regjax.data.sources import Record
from regjax.data.template import Template
from regjax.errors import InputError
from regjax.scores import ScoreGrid


def shots(
    records: Sequence[Record],
    template: Template,
    grid: ScoreGrid | None,
    data: Data,
    count: int,
    seed: int,
) -> list[tuple[str, str]]:
    """`count` records as (prompt, response) in full, for `Template.with_shots`.

    They are the first usable ones in an order that the seed decides, so a larger count begins with
    the same ones. A score is written as the text of the grid value nearest to it. Cuttable fields
    keep their text.

    Raises:
        InputError: fewer usable records than `count`, a chat template, or a template that does not
            go with the grid.
    """
    check_answers(data, template, grid)
    if template.chat:
        raise InputError("worked examples are plain text before the prompt: use chat=False")
    skeleton = template.skeleton()
    order = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(len(records)), kind="stable")
    found: list[tuple[str, str]] = []
    bad: list[BadRecord] = []
    for index in order.tolist():
        if len(found) == count:
            break
        try:
            drawn, _ = draft(index, records[index], template.fields, data, grid)
        except Unusable as error:
            bad.append(error.at(records[index].place))
            continue
        score = ""
        if grid is not None and drawn.score is not None:
            score = grid.texts[int(grid.nearest(drawn.score))]
        prompt = skeleton.render(drawn.fields, response=False).text
        found.append((prompt, template.render_response(drawn.fields, score)))
    if len(found) < count:
        first = f", for instance {bad[0]}" if bad else ""
        raise InputError(
            f"{count} worked examples are wanted, but {len(found)} of {len(records)} records can be "
            f"used{first}"
        )
    return found
