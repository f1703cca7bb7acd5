"""Teachers and students: distillation, what protects classes that the teacher is bad at, and refinery.

Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in distillation*,
TMLR 2022 (arXiv 2106.10494), for AdaAlpha and AdaMargin, both reconstructed; Hinton et al., 2015; Zhao et
al., CVPR 2022 (DKD); Huang et al., NeurIPS 2022 (DIST); Bagherinezhad et al., 2018 (label refinery); Menon
et al., ICLR 2021 (logit adjustment). Every function gives stages for `ImageExperiment(stages=...)`.
"""

from __future__ import annotations

from typing import Any

from regjax.classification import ImageStage
from regjax.objectives.classification import (
    AdaptiveAlpha,
    AdaptiveMargin,
    CrossEntropy,
    Distillation,
    LogitAdjusted,
)

TEACHER = "teacher"


def students(
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
    adaptive_temperature: float = 1.0,
    teacher_model: Any = None,
    teacher_epochs: int | None = None,
    **stage: Any,
) -> tuple[ImageStage, ...]:
    """A teacher by cross-entropy, and students of it by several objectives beside students without one.

    `ce` and `logit_adjusted` have no teacher; `kd`, `dkd`, `dist`, `ada_alpha` and `ada_margin` have. The
    adaptive ones take the teacher's margins on held-out images: set `data.held_out`.

    Args:
      alpha: weight of the teacher in `kd`.
      temperature: of `kd` and `dkd`.
      adaptive_temperature: of the teacher in `ada_alpha` and `ada_margin`.
      teacher_model: the teacher's architecture; None: the experiment's.
      teacher_epochs: its passes over the images; None: the experiment's.
      stage: other fields of every student's `ImageStage`.

    >>> [stage.name for stage in students()]
    ['teacher', 'ce', 'logit_adjusted', 'kd', 'dkd', 'dist', 'ada_alpha', 'ada_margin']
    """
    taught = {
        "kd": Distillation(alpha=alpha, temperature=temperature),
        "dkd": Distillation(alpha=1.0, temperature=temperature, kind="dkd", label_weight=1.0),
        "dist": Distillation(alpha=1.0, temperature=1.0, kind="dist", label_weight=1.0),
        "ada_alpha": AdaptiveAlpha(temperature=adaptive_temperature),
        "ada_margin": AdaptiveMargin(temperature=adaptive_temperature),
    }
    return (
        ImageStage(TEACHER, CrossEntropy(), model=teacher_model, epochs=teacher_epochs),
        ImageStage("ce", CrossEntropy(), **stage),
        ImageStage("logit_adjusted", LogitAdjusted(), **stage),
        *(ImageStage(name, one, teachers=(TEACHER,), **stage) for name, one in taught.items()),
    )


def refinery(generations: int = 3, **stage: Any) -> tuple[ImageStage, ...]:
    """A model on the labels, then each generation on the scores of the one before, on the same crops.

    The labels are ignored from the second generation on.

    >>> [(stage.name, stage.teachers) for stage in refinery(2)]
    [('generation_0', ()), ('generation_1', ('generation_0',)), ('generation_2', ('generation_1',))]
    """
    refined = Distillation(alpha=1.0, temperature=1.0, kind="cross_entropy")
    return (
        ImageStage("generation_0", CrossEntropy(), **stage),
        *(
            ImageStage(
                f"generation_{number}", refined, teachers=(f"generation_{number - 1}",),
                teacher="on_the_fly", **stage,
            )
            for number in range(1, generations + 1)
        ),
    )  # fmt: skip
