"""Objectives for classes of very different frequency."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from regjax import losses
from regjax.objectives.classification.objective import (
    Batch,
    Facts,
    Given,
    Sums,
    number,
    of_targets,
    sums,
    training_counts,
)

if TYPE_CHECKING:
    from regjax.models.vision import Outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitAdjusted:
    """Cross-entropy of `logits + tau log prior`, for the balanced error: `losses.logit_adjusted`.

    Predictions are those of the plain logits. Menon et al., ICLR 2021.
    """

    tau: float = 1.0
    """0 is cross-entropy."""

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        return {"counts": training_counts(facts, "LogitAdjusted")}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        return sums(
            of_targets(
                lambda labels: losses.logit_adjusted(
                    outputs.logits, labels, given["counts"], tau=self.tau
                ),
                batch,
            ),
            outputs,
            batch,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ldam:
    """Label-distribution-aware margins, on logits that are cosines: `losses.ldam`.

    Deferred re-weighting is a second stage that starts from the first, with `beta=0.9999`. Cao et
    al., NeurIPS 2019.
    """

    largest_margin: float = 0.5
    """Of the rarest class."""

    scale: float = 30.0
    """Of the logits. 1 where they are no cosines, with the margin in their units."""

    beta: float = 0.0
    """Of `losses.class_balanced_weights`, which the losses are multiplied by; 0: all ones."""

    def __post_init__(self) -> None:
        number(self.largest_margin, "Ldam.largest_margin", 0.0)
        number(self.scale, "Ldam.scale", 0.0, above=True)
        number(self.beta, "Ldam.beta", 0.0, 1.0)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        counts = training_counts(facts, "Ldam")
        weights = losses.class_balanced_weights(counts, beta=self.beta)
        return {"counts": counts, "weights": np.asarray(weights)}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        margin_losses = of_targets(
            lambda labels: losses.ldam(
                outputs.logits,
                labels,
                given["counts"],
                largest_margin=self.largest_margin,
                scale=self.scale,
            ),
            batch,
        )
        return sums(margin_losses, outputs, batch, weights=_weights(batch, given))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassBalanced:
    """Cross-entropy weighted by effective numbers of examples: `losses.class_balanced_weights`.

    Averaged over the batch's sum of weights, as PyTorch's weighted cross-entropy. Cui et al., CVPR
    2019.
    """

    beta: float = 0.9999
    """From equal weights at 0 to weights of 1 / n at 1."""

    def __post_init__(self) -> None:
        number(self.beta, "ClassBalanced.beta", 0.0, 1.0)

    def given(self, facts: Facts) -> dict[str, np.ndarray]:
        counts = training_counts(facts, "ClassBalanced")
        return {"weights": np.asarray(losses.class_balanced_weights(counts, beta=self.beta))}

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        cross_entropies = of_targets(
            lambda labels: losses.token_cross_entropy(outputs.logits, labels), batch
        )
        return sums(cross_entropies, outputs, batch, weights=_weights(batch, given))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Focal:
    """Focal loss of the softmax, less of what is already well classified: `losses.softmax_focal`."""

    gamma: float = 2.0
    """0 is cross-entropy."""

    def __post_init__(self) -> None:
        number(self.gamma, "Focal.gamma", 0.0)

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        return sums(
            of_targets(
                lambda labels: losses.softmax_focal(outputs.logits, labels, gamma=self.gamma),
                batch,
            ),
            outputs,
            batch,
        )


def _weights(batch: Batch, given: Given) -> jax.Array:
    """Weight `[B]` of every example: that of its class, or their mean under mixed targets."""
    return of_targets(lambda labels: jnp.take(jnp.asarray(given["weights"]), labels), batch)
