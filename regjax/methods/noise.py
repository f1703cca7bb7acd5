"""Learning from noisy labels: smoothing, corrections and robust losses, on their own and in a teacher.

Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML 2020 (arXiv
2003.02819); negative rates after Wei et al., *To smooth or not?*, ICML 2022. Every function gives stages for
`ImageExperiment(stages=...)`, whose `data.noise` says how the labels are wrong.
"""

from __future__ import annotations

from typing import Any

from regjax.classification import ImageStage
from regjax.objectives.classification import (
    CrossEntropy,
    Distillation,
    NoiseMatrixCorrection,
    NoiseRobust,
)


def corrections(
    *,
    smoothing: float = 0.1,
    negative: float = -0.5,
    q: float = 0.7,
    matrix: str = "known",
    **stage: Any,
) -> tuple[ImageStage, ...]:
    """Cross-entropy and what is put in its place, a stage each, all from new parameters.

    `ce`, `smoothing`, `forward` and `backward` correction, `negative` smoothing, `gce`; of the same seed
    all begin alike but for their stage's number.

    Args:
      smoothing: rate of label smoothing; the paper's is 0.1.
      negative: rate of negative label smoothing, below 0. The backward correction for symmetric noise of
        rate a is the one of rate `-a / (1 - a)`.
      q: of the generalised cross-entropy.
      matrix: of the corrections: the `known` noise matrix, or one that is estimated from a first model's
        scores, `anchor` or `confident`; that model is `ce`.
      stage: other fields of every `ImageStage`.

    >>> [stage.name for stage in corrections()]
    ['ce', 'smoothing', 'forward', 'backward', 'negative', 'gce']
    """
    teachers = () if matrix == "known" else ("ce",)
    corrected = {
        kind: NoiseMatrixCorrection(kind, matrix)  # type: ignore[arg-type]
        for kind in ("forward", "backward")
    }
    return (
        ImageStage("ce", CrossEntropy(), **stage),
        ImageStage("smoothing", CrossEntropy(rate=smoothing), **stage),
        *(ImageStage(kind, one, teachers=teachers, **stage) for kind, one in corrected.items()),
        ImageStage("negative", CrossEntropy(rate=negative), **stage),
        ImageStage("gce", NoiseRobust("gce", q=q), **stage),
    )


def smoothed_teachers(
    *,
    smoothing: float = 0.1,
    alpha: float = 1.0,
    temperature: float = 1.0,
    teacher_model: Any = None,
    **stage: Any,
) -> tuple[ImageStage, ...]:
    """Teachers trained on the noisy labels by cross-entropy, smoothing and the forward correction, and a
    student of each.

    The smoothing is the teacher's alone: its student distils with weight `alpha` and temperature
    `temperature`, both of which the paper does not say.

    >>> [(stage.name, stage.teachers) for stage in smoothed_teachers()][-1]
    ('student_of_forward', ('teacher_forward',))
    """
    objectives = {
        "ce": CrossEntropy(),
        "smoothing": CrossEntropy(rate=smoothing),
        "forward": NoiseMatrixCorrection("forward"),
    }
    teachers = [
        ImageStage(f"teacher_{name}", objective, model=teacher_model, **stage)
        for name, objective in objectives.items()
    ]
    student = Distillation(alpha=alpha, temperature=temperature)
    students = [
        ImageStage(f"student_of_{name}", student, teachers=(f"teacher_{name}",), **stage)
        for name in objectives
    ]
    return (*teachers, *students)
