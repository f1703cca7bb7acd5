"""Objectives for the worst class, with multipliers of the classes as their state."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from regjax import losses
from regjax.errors import InputError
from regjax.objectives.classification.objective import (
    STATIC,
    Batch,
    Extras,
    Facts,
    Given,
    Sums,
    held_out_labels,
    number,
    of_targets,
    sums,
    training_counts,
)
from regjax.objectives.classification.teachers import (
    held_out_probabilities,
    mean_probabilities,
    mean_teacher,
)

if TYPE_CHECKING:
    from regjax.models.vision import Outputs

Target = Literal["labels", "teacher"]
Minimised = Literal["standard", "balanced", "robust"]
HeldOutLabels = Literal["true", "teacher"]
Risk = Literal["cross_entropy", "zero_one"]
Iterate = Literal["last", "average"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupDro:
    """Group DRO with the classes as groups: `sum_k q_k (mean cross-entropy of class k in the batch)`.

    `losses.group_dro`. The multipliers q follow the held-out examples, where the authors' follow the
    training batch, whose losses tend to zero as it is fitted. Sagawa et al., ICLR 2020.
    """

    step_size: float = 0.1
    """Of the multipliers."""

    adjustment: float = 0.0
    """C of `C / sqrt(n_k)`, added to the risks: rarer classes generalise worse."""

    adjust_every: int = dataclasses.field(default=100, metadata=STATIC)
    """Steps of training between those of the multipliers."""

    def __post_init__(self) -> None:
        number(self.step_size, "GroupDro.step_size", 0.0)
        number(self.adjustment, "GroupDro.adjustment", 0.0)
        number(self.adjust_every, "GroupDro.adjust_every", 1)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        held_out_labels(facts, "GroupDro")
        return {"counts": training_counts(facts, "GroupDro")}

    def initial(self, given: Given) -> dict[str, jax.Array]:
        return _uniform(len(given["counts"]))

    def adjust(
        self, extras: Extras, outputs: Outputs, batch: Batch, given: Given
    ) -> dict[str, jax.Array]:
        _, multipliers = losses.group_dro(
            losses.token_cross_entropy(outputs.logits, batch["labels"]),
            batch["labels"],
            extras["multipliers"],
            step_size=self.step_size,
            adjustment=self.adjustment,
            group_counts=given["counts"],
        )
        return _after(extras, multipliers)

    def __call__(self, outputs: Outputs, batch: Batch, given: Given, extras: Extras) -> Sums:
        cross_entropies = of_targets(
            lambda labels: losses.token_cross_entropy(outputs.logits, labels), batch
        )
        weights, _ = losses.group_dro(
            cross_entropies, batch["labels"], extras["multipliers"], step_size=0.0
        )
        return sums(cross_entropies.size * weights * cross_entropies, outputs, batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Robust:
    """Training for the average, the balanced or the worst class, on labels or on a teacher.

        -sum_y q_y log softmax(z - log c)_y

        standard:  c_k = 1
        balanced:  c_k = 1 / (C pi_k)
        robust:    c_k = ((1 - tradeoff) / C + tradeoff lambda_k) / pi_k

    with z the logits, q the targets, pi their mean over the training set. The multipliers lambda
    follow the risks of the classes on held-out examples: `losses.class_risk_sums`,
    `losses.exponentiated_gradient`, `losses.robust_costs`, `losses.cost_weighted_distillation`,
    after Wang et al., *Robust Distillation for Worst-class Performance*, UAI 2023, reconstructed.

    State, of the robust objective: `multipliers [C]`, their `average [C]` over all adjustments and
    the start, and the number of `adjustments`.
    """

    target: Target = dataclasses.field(default="teacher", metadata=STATIC)
    """q: the labels, mixed ones too, or `softmax(teacher / temperature)`."""

    objective: Minimised = dataclasses.field(default="robust", metadata=STATIC)
    """What is minimised."""

    tradeoff: float = 1.0
    """Of the robust objective, from the balanced one at 0 to the worst class at 1."""

    step_size: float = 0.1
    """gamma of the multipliers; 0 is the balanced objective."""

    adjust_every: int = dataclasses.field(default=100, metadata=STATIC)
    """Steps of training between those of the multipliers; 0, never, unless the objective is robust."""

    held_out_labels: HeldOutLabels = dataclasses.field(default="true", metadata=STATIC)
    """Labels by which the held-out risks are taken."""

    risk: Risk = dataclasses.field(default="cross_entropy", metadata=STATIC)
    """Loss of which the held-out risks are the means."""

    iterate: Iterate = dataclasses.field(default="last", metadata=STATIC)
    """Multipliers that the costs are made of."""

    floor: float = 1e-6
    """The least multiplier, from 0 to 1 / C. At 0 one may vanish, and with it the cost of its class,
    whose logarithm is in the loss."""

    temperature: float = 1.0
    """T of the teacher's softmax."""

    def __post_init__(self) -> None:
        number(self.tradeoff, "Robust.tradeoff", 0.0, 1.0)
        number(self.step_size, "Robust.step_size", 0.0)
        number(self.floor, "Robust.floor", 0.0, 1.0)
        number(self.temperature, "Robust.temperature", 0.0, above=True)
        if self.objective == "robust":
            number(self.adjust_every, "Robust.adjust_every", 1)
        else:
            object.__setattr__(self, "adjust_every", 0)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        number(self.floor, "Robust.floor", 0.0, 1.0 / facts.num_classes)
        if self.objective == "robust" and self.held_out_labels == "true":
            held_out_labels(facts, "Robust")
        if self.objective == "robust" and self.held_out_labels == "teacher":
            held_out_probabilities(facts, self.temperature, "Robust")
        if self.target == "labels":
            counts = training_counts(facts, "Robust")
            return {"prior": counts / counts.sum()}
        if facts.teacher_logits is None:
            raise InputError(
                "Robust needs the teacher's mean probabilities on the training set: give the stage a "
                "teacher, teacher='cached'"
            )
        prior = mean_probabilities(facts.teacher_logits, self.temperature).mean(axis=0)
        prior = prior.astype(np.float32)
        if not np.all(prior > 0.0):
            raise InputError(
                f"Robust: the teacher finds class {int(np.argmin(prior))} impossible on all training "
                "images; raise the temperature"
            )
        return {"prior": prior}

    def initial(self, given: Given) -> dict[str, jax.Array]:
        return _uniform(len(given["prior"]))

    def adjust(
        self, extras: Extras, outputs: Outputs, batch: Batch, given: Given
    ) -> dict[str, jax.Array]:
        if self.objective != "robust":
            return dict(extras)
        if self.held_out_labels == "teacher":
            targets = self._of_teacher(batch)
        else:
            targets = jax.nn.one_hot(batch["labels"], outputs.logits.shape[-1])
        risks, weights = losses.class_risk_sums(outputs.logits, targets, loss=self.risk)
        present = weights > 0.0
        multipliers = losses.exponentiated_gradient(
            extras["multipliers"],
            risks / jnp.where(present, weights, 1.0),
            step_size=self.step_size,
            floor=self.floor,
            where=present,
        )
        return _after(extras, multipliers)

    def costs(self, given: Given, extras: Extras) -> jax.Array:
        """c `[C]`."""
        prior = jnp.asarray(given["prior"])
        if self.objective == "standard":
            return jnp.ones_like(prior)
        chosen = extras["multipliers" if self.iterate == "last" else "average"]
        tradeoff = self.tradeoff if self.objective == "robust" else 0.0
        return losses.robust_costs(chosen, prior, tradeoff=tradeoff)

    def __call__(self, outputs: Outputs, batch: Batch, given: Given, extras: Extras) -> Sums:
        if self.target == "teacher":
            targets = self._of_teacher(batch)
        elif "targets" in batch:
            targets = batch["targets"]
        else:
            targets = jax.nn.one_hot(batch["labels"], outputs.logits.shape[-1])
        costs = self.costs(given, extras)
        weighted = losses.cost_weighted_distillation(outputs.logits, targets, costs)
        return sums(weighted, outputs, batch)

    def _of_teacher(self, batch: Batch) -> jax.Array:
        teacher = mean_teacher(batch, self.temperature, "Robust")
        return jax.nn.softmax(teacher / self.temperature)


def _uniform(count: int) -> dict[str, jax.Array]:
    multipliers = jnp.full(count, 1.0 / count, jnp.float32)
    return {
        "multipliers": multipliers,
        "average": multipliers,
        "adjustments": jnp.zeros((), jnp.int32),
    }


def _after(extras: Extras, multipliers: jax.Array) -> dict[str, jax.Array]:
    """The state with new multipliers; the average is over these, those before and the first."""
    adjustments = extras["adjustments"] + 1
    average = extras["average"]
    return {
        "multipliers": multipliers,
        "average": average + (multipliers - average) / (adjustments + 1),
        "adjustments": adjustments,
    }
