"""Objectives of image classification: what a stage minimises, as sums and weights over a batch.

An objective is a frozen dataclass and a pytree, of which the floats are leaves: within a compiled step
they may differ from run to run. What it is called with, and what it may have besides, is said by
`Objective`.
"""

from regjax.objectives.classification.distillation import (
    AdaptiveAlpha,
    AdaptiveMargin,
    Distillation,
)
from regjax.objectives.classification.long_tail import ClassBalanced, Focal, Ldam, LogitAdjusted
from regjax.objectives.classification.noise import CrossEntropy, NoiseMatrixCorrection, NoiseRobust
from regjax.objectives.classification.objective import Facts, Objective, Sums
from regjax.objectives.classification.ranking import LabelAggregation, LossAggregation
from regjax.objectives.classification.worst_case import GroupDro, Robust

__all__ = [
    "AdaptiveAlpha",
    "AdaptiveMargin",
    "ClassBalanced",
    "CrossEntropy",
    "Distillation",
    "Facts",
    "Focal",
    "GroupDro",
    "LabelAggregation",
    "Ldam",
    "LogitAdjusted",
    "LossAggregation",
    "NoiseMatrixCorrection",
    "NoiseRobust",
    "Objective",
    "Robust",
    "Sums",
]
