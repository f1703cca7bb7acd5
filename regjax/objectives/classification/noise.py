"""Objectives for labels with noise: smoothing, corrections, and losses that bend less to wrong labels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from regjax import losses
from regjax.errors import InputError
from regjax.losses.smoothing import Smearing
from regjax.objectives.classification.objective import (
    STATIC,
    Batch,
    Facts,
    Given,
    Sums,
    number,
    of_targets,
    sums,
    training_counts,
)
from regjax.objectives.classification.teachers import mean_probabilities

if TYPE_CHECKING:
    from regjax.models.vision import Outputs

Matrix = Literal["known", "anchor", "confident"]
Kind = Literal[
    "gce", "mae", "rce", "nce", "sce", "apl", "soft_bootstrapping", "hard_bootstrapping", "ldr"
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with labels smoothed, or corrected for symmetric noise: `losses.label_smearing`.

    Lukasik et al., *Does label smoothing mitigate label noise?*, ICML 2020.
    """

    rate: float = 0.0
    """Of smoothing, negative for negative smoothing, or of the noise: a of `(1 - a) I + (a / C) J`. A
    flip probability r to any other class is the rate `losses.smearing_rate(r, C)`."""

    kind: Smearing = dataclasses.field(default="smoothing", metadata=STATIC)
    """Smoothing, or the backward or the forward correction."""

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        highest = facts.num_classes / (facts.num_classes - 1)
        number(self.rate, "CrossEntropy.rate", 0.0 if self.kind == "forward" else -np.inf, highest)
        if self.kind == "backward" and self.rate == 1.0:
            raise InputError("CrossEntropy.rate is 1: labels that are all noise have no correction")
        return {}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        return sums(
            of_targets(
                lambda labels: losses.label_smearing(
                    outputs.logits, labels, self.rate, kind=self.kind
                ),
                batch,
            ),
            outputs,
            batch,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseMatrixCorrection:
    """Cross-entropy corrected for noise with a matrix T, known or estimated: `losses.label_smearing`.

    The estimates read a teacher of this stage, a model that was trained on the noisy labels: its
    mean probabilities, if there are several. Patrini et al., CVPR 2017.
    """

    kind: Literal["forward", "backward"] = dataclasses.field(default="forward", metadata=STATIC)
    """The correction."""

    matrix: Matrix = dataclasses.field(default="known", metadata=STATIC)
    """T: the noise that was put in; `losses.anchor_noise_matrix` of the teacher on the held-out
    examples, or without them on the training images; or `losses.confident_noise_matrix` of the
    teacher on the training images, which it should not have memorised, and their labels."""

    quantile: float = 1.0
    """Of the anchor points, see `losses.anchor_noise_matrix`."""

    def __post_init__(self) -> None:
        number(self.quantile, "NoiseMatrixCorrection.quantile", 0.0, 1.0)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        matrix = self.noise_matrix(facts)
        if self.kind == "backward":
            # Once and in float64, not in every step.
            if np.linalg.cond(matrix) > 1e6:
                raise InputError(
                    f"NoiseMatrixCorrection: the {self.matrix} noise matrix is nearly singular, which "
                    "leaves no backward correction; use kind='forward'"
                )
            matrix = np.linalg.inv(matrix)
        return {"matrix": matrix.astype(np.float32)}

    def noise_matrix(self, facts: Facts) -> np.ndarray:
        """T `[C, C]`, float64, rows that sum to one."""
        if self.matrix == "known":
            return np.asarray(facts.noise_matrix, np.float64)
        held_out = self.matrix == "anchor" and facts.held_out_teacher_logits is not None
        logits = facts.held_out_teacher_logits if held_out else facts.teacher_logits
        if logits is None:
            raise InputError(
                f"NoiseMatrixCorrection: matrix={self.matrix!r} is estimated from a teacher; give the "
                "stage one that was trained on the noisy labels, teacher='cached'"
            )
        probabilities = mean_probabilities(logits)
        if self.matrix == "anchor":
            return losses.anchor_noise_matrix(probabilities, quantile=self.quantile)
        training_counts(facts, "NoiseMatrixCorrection")
        return losses.confident_noise_matrix(probabilities, np.asarray(facts.labels))

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        # The backward correction is smoothing by the inverse.
        kind: Smearing = "forward" if self.kind == "forward" else "smoothing"
        matrix = jnp.asarray(given["matrix"])
        return sums(
            of_targets(
                lambda labels: losses.label_smearing(outputs.logits, labels, matrix, kind=kind),
                batch,
            ),
            outputs,
            batch,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseRobust:
    """A loss that bends less to wrong labels than cross-entropy does, averaged over examples.

        gce   losses.generalized_cross_entropy   mae   the same with q = 1
        rce   losses.reverse_cross_entropy       nce   losses.normalized_cross_entropy
        sce   losses.symmetric_cross_entropy     apl   losses.active_passive
        ldr   losses.label_distributionally_robust
        soft_bootstrapping, hard_bootstrapping   losses.bootstrapping

    The defaults are those of these functions.
    """

    kind: Kind = dataclasses.field(default="gce", metadata=STATIC)
    """The loss."""

    q: float = 0.7
    """Of gce: from cross-entropy at 0 to the absolute error at 1."""

    active_weight: float | None = None
    """Of the cross-entropy in sce (0.1 by default), of the normalised one in apl (1)."""

    passive_weight: float = 1.0
    """Of the reverse cross-entropy in sce and apl."""

    label_weight: float | None = None
    """Of the label in bootstrapping: by default 0.95 of the soft kind, 0.8 of the hard."""

    temperature: float = 1.0
    """Of ldr."""

    margin: float = 1.0
    """Of ldr, in units of the logits."""

    def __post_init__(self) -> None:
        number(self.q, "NoiseRobust.q", 0.0, 1.0)
        number(self.label_weight, "NoiseRobust.label_weight", 0.0, 1.0)
        number(self.temperature, "NoiseRobust.temperature", 0.0, above=True)

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        losses_of_batch = of_targets(lambda labels: self._losses(outputs.logits, labels), batch)
        return sums(losses_of_batch, outputs, batch)

    def _losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        if self.kind == "gce":
            return losses.generalized_cross_entropy(logits, labels, q=self.q)
        if self.kind == "mae":
            return losses.generalized_cross_entropy(logits, labels, q=1.0)
        if self.kind == "rce":
            return losses.reverse_cross_entropy(logits, labels)
        if self.kind == "nce":
            return losses.normalized_cross_entropy(logits, labels)
        if self.kind == "sce":
            active = 0.1 if self.active_weight is None else self.active_weight
            return losses.symmetric_cross_entropy(
                logits, labels, forward_weight=active, reverse_weight=self.passive_weight
            )
        if self.kind == "apl":
            active = 1.0 if self.active_weight is None else self.active_weight
            return losses.active_passive(
                logits, labels, active_weight=active, passive_weight=self.passive_weight
            )
        if self.kind == "ldr":
            return losses.label_distributionally_robust(
                logits, labels, temperature=self.temperature, margin=self.margin
            )
        kind: Literal["soft", "hard"] = "soft" if self.kind == "soft_bootstrapping" else "hard"
        return losses.bootstrapping(logits, labels, kind=kind, label_weight=self.label_weight)
