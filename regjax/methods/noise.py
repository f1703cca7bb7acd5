"""Learning from noisy labels: smoothing, corrections and robust losses, on their own and in a teacher.

Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML 2020 (arXiv
2003.02819); negative rates after Wei et al., *To smooth or not?*, ICML 2022. Every function gives stages for
`ImageExperiment(stages=...)`, whose `data.noise` says how the labels are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def students_of(
    teachers: Sequence[str] = ("ce", "smoothing", "forward"),
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    **stage: Any,
) -> tuple[ImageStage, ...]:
    """A student of each teacher, an earlier stage such as those of `corrections`: distilling from noisy
    labels.

    What is done about the noise is done in the teacher; the student distils with weight `alpha` and
    temperature `temperature`, both of which the paper does not say.

    >>> [(stage.name, stage.teachers) for stage in students_of()][-1]
    ('student_of_forward', ('forward',))
    """
    student = Distillation(alpha=alpha, temperature=temperature)
    return tuple(
        ImageStage(f"student_of_{name}", student, teachers=(name,), **stage) for name in teachers
    )
