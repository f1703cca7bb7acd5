"""Objectives of a student: distillation, and distillation that trusts the teacher by class."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from regjax import losses
from regjax.losses.divergence import Divergence
from regjax.objectives.classification.objective import (
    STATIC,
    Batch,
    Facts,
    Given,
    Sums,
    held_out_labels,
    number,
    of_targets,
    sums,
)
from regjax.objectives.classification.teachers import held_out_probabilities, mean_teacher

if TYPE_CHECKING:
    from regjax.models.vision import Outputs

Kind = Literal["kl", "reverse", "jensen_shannon", "cross_entropy", "dkd", "dist"]
Margin = Literal["max", "average"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distillation:
    """`w CE(labels) + alpha D(teacher, student)`, averaged over examples; w = 1 - alpha if not given.

        kl, reverse, jensen_shannon, cross_entropy   losses.distillation
        dkd                                          losses.decoupled_distillation
        dist                                         losses.correlation_distillation

    Several teachers are averaged by their probabilities at the temperature. `cross_entropy` with
    alpha = 1 and temperature 1 is label refinery. The authors of dkd and dist add the whole
    cross-entropy, `label_weight=1`; the warm-up of dkd over the first epochs is left out.
    """

    alpha: float = 0.9
    """Weight of the teacher."""

    temperature: float = 4.0
    """T of both softmaxes; the loss is multiplied by its square."""

    kind: Kind = dataclasses.field(default="kl", metadata=STATIC)
    """D."""

    label_weight: float | None = None
    """w, where it is not 1 - alpha."""

    target_weight: float = 1.0
    """Of dkd: alpha of the paper."""

    non_target_weight: float = 8.0
    """Of dkd: beta of the paper."""

    inter_weight: float = 1.0
    """Of dist: correlations over the classes."""

    intra_weight: float = 1.0
    """Of dist: correlations over the batch."""

    def __post_init__(self) -> None:
        number(self.alpha, "Distillation.alpha", 0.0, 1.0 if self.label_weight is None else np.inf)
        number(self.label_weight, "Distillation.label_weight", 0.0)
        number(self.temperature, "Distillation.temperature", 0.0, above=True)

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        logits = outputs.logits
        teacher = mean_teacher(batch, self.temperature, "Distillation")
        soft = self._divergence(logits, teacher, batch)
        hard = of_targets(lambda labels: losses.token_cross_entropy(logits, labels), batch)
        weight = 1.0 - self.alpha if self.label_weight is None else self.label_weight
        return sums(weight * hard + self.alpha * soft, outputs, batch)

    def _divergence(self, student: jax.Array, teacher: jax.Array, batch: Batch) -> jax.Array:
        if self.kind == "dkd":
            return of_targets(
                lambda labels: losses.decoupled_distillation(
                    student,
                    teacher,
                    labels,
                    target_weight=self.target_weight,
                    non_target_weight=self.non_target_weight,
                    temperature=self.temperature,
                ),
                batch,
            )
        if self.kind == "dist":
            return losses.correlation_distillation(
                student,
                teacher,
                inter_weight=self.inter_weight,
                intra_weight=self.intra_weight,
                temperature=self.temperature,
            )
        kind: Divergence | Literal["cross_entropy"] = "forward" if self.kind == "kl" else self.kind
        return losses.distillation(student, teacher, temperature=self.temperature, kind=kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveAlpha:
    """AdaAlpha, reconstructed: the weight of the teacher is its margin on the label's class.

    `losses.adaptive_mixing`, from Lukasik et al., *Teacher's pet*, TMLR 2022.
    """

    temperature: float = 1.0
    """T of the teacher's softmax."""

    margin: Margin = dataclasses.field(default="max", metadata=STATIC)
    """Of the label over the next class, or over the mean of the others."""

    by: Literal["class", "example"] = dataclasses.field(default="class", metadata=STATIC)
    """The mean margin of the label's class on held-out examples, or the margin on the training
    example."""

    def __post_init__(self) -> None:
        number(self.temperature, "AdaptiveAlpha.temperature", 0.0, above=True)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        if self.by == "example":
            return {}
        return {"margins": class_margins(facts, self.margin, self.temperature, "AdaptiveAlpha")}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        teacher = mean_teacher(batch, self.temperature, "AdaptiveAlpha")
        margins = None if self.by == "example" else given["margins"]
        return sums(
            of_targets(
                lambda labels: losses.adaptive_mixing(
                    outputs.logits,
                    teacher,
                    labels,
                    margins,
                    margin=self.margin,
                    teacher_temperature=self.temperature,
                ),
                batch,
            ),
            outputs,
            batch,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveMargin:
    """AdaMargin, reconstructed: the less the teacher separates a class, the more the student must.

    `losses.adaptive_margin` with `losses.margin_offsets` of the teacher's class margins on held-out
    examples, from Lukasik et al., *Teacher's pet*, TMLR 2022. Labels are not used in training.
    """

    temperature: float = 1.0
    """T of the teacher's softmax."""

    smallest: float = 0.05
    """Smaller class margins count as this one."""

    margin: Margin = dataclasses.field(default="max", metadata=STATIC)
    """Of the label over the next class, or over the mean of the others."""

    def __post_init__(self) -> None:
        number(self.temperature, "AdaptiveMargin.temperature", 0.0, above=True)
        number(self.smallest, "AdaptiveMargin.smallest", 0.0, above=True)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        margins = class_margins(facts, self.margin, self.temperature, "AdaptiveMargin")
        return {"offsets": np.asarray(losses.margin_offsets(margins, smallest=self.smallest))}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        teacher = mean_teacher(batch, self.temperature, "AdaptiveMargin")
        return sums(
            losses.adaptive_margin(
                outputs.logits, teacher, given["offsets"], teacher_temperature=self.temperature
            ),
            outputs,
            batch,
        )


def class_margins(facts: Facts, margin: Margin, temperature: float, name: str) -> np.ndarray:
    """The teachers' mean margin on the held-out examples of every class, float32 `[C]`."""
    labels = held_out_labels(facts, name)
    probabilities = held_out_probabilities(facts, temperature, name)
    with np.errstate(divide="ignore"):
        log_probs = jnp.asarray(np.log(probabilities), jnp.float32)
    margins = losses.teacher_margins(log_probs, labels, margin=margin)
    return np.asarray(losses.class_margins(margins, labels, facts.num_classes))
