"""Distillation for the worst class: objectives of the teacher by objectives of the student.

Wang, Narasimhan, Zhou, Hooker, Lukasik, Menon, *Robust distillation for worst-class performance*, UAI 2023
(arXiv 2206.06479), reconstructed: `regjax.objectives.classification.Robust` says how. Compared with group
DRO (Sagawa et al., ICLR 2020) and logit adjustment (Menon et al., ICLR 2021), and with post-shift of a
standard student's scores, `regjax.classification.post_shift_reports`. Set `data.held_out`: the multipliers
are taken from held-out risks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from regjax.classification import ImageStage
from regjax.objectives.classification import GroupDro, LogitAdjusted, Robust

OBJECTIVES = ("standard", "balanced", "robust")


def teacher_by_student(
    robust: Robust = Robust(),  # noqa: B008  (frozen)
    *,
    tradeoffs: Sequence[float] = (),
    teacher_model: Any = None,
    baselines: bool = True,
    **stage: Any,
) -> tuple[ImageStage, ...]:
    """A teacher by each objective on the labels, and a student of each teacher by each objective.

    Stages `teacher_T` and `T_S` for T, S of standard, balanced and robust; with `tradeoffs` a also `T_aA`,
    students for `(1 - a)` times the balanced and a times the worst class; and the baselines `group_dro`
    and `logit_adjusted`, which have no teacher.

    Args:
      robust: step size, steps between adjustments, held-out labels and the like of all robust stages.
      tradeoffs: between 0 and 1, both left out (these are `T_balanced` and `T_robust`).
      teacher_model: architecture of the teachers; None: the experiment's.
      baselines: whether to have the baselines.
      stage: other fields of every student's `ImageStage`.

    >>> [stage.name for stage in teacher_by_student(tradeoffs=[0.5], baselines=False)][:7]
    ['teacher_standard', 'teacher_balanced', 'teacher_robust', 'standard_standard', 'standard_balanced',
     'standard_robust', 'standard_a0_5']
    """

    def by(objective: str, **changes: Any) -> Robust:
        fields: dict[str, Any] = {"objective": objective, **changes}
        return dataclasses.replace(robust, **fields)

    # Teachers have only the true labels to be measured by.
    teachers = [
        ImageStage(
            f"teacher_{name}",
            by(name, target="labels", held_out_labels="true"),
            model=teacher_model,
        )
        for name in OBJECTIVES
    ]
    objectives = {name: by(name, target="teacher") for name in OBJECTIVES} | {
        f"a{share:g}".replace(".", "_"): by("robust", target="teacher", tradeoff=share)
        for share in tradeoffs
    }
    students = [
        ImageStage(f"{teacher}_{name}", objective, teachers=(f"teacher_{teacher}",), **stage)
        for teacher in OBJECTIVES
        for name, objective in objectives.items()
    ]
    others = [
        ImageStage(
            "group_dro",
            GroupDro(step_size=robust.step_size, adjust_every=robust.adjust_every),
            **stage,
        ),
        ImageStage("logit_adjusted", LogitAdjusted(), **stage),
    ]
    return (*teachers, *students, *(others if baselines else ()))
