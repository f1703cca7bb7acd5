"""Objectives of one scorer for several binary labels: aggregated losses, aggregated labels.

They read `outputs.logits [B, 1]`, the score, and `batch["labels"] [B, K]`, zeros and ones in place of
classes. The batch is one list, all pairs of which are compared, so it is to be large enough to hold both
values of every label. Nothing is `given`; there are no teachers and no mixed targets.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp

from regjax import losses
from regjax.errors import InputError
from regjax.losses.ranking import Surrogate
from regjax.objectives.classification.objective import STATIC, Batch, Given, Sums

if TYPE_CHECKING:
    from regjax.models.vision import Outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossAggregation:
    """`sum_k a_k (1 - AUC_k)` through a surrogate: `losses.loss_aggregation` of the batch."""

    outputs: ClassVar[int] = 1
    """Of the model: the score."""

    weights: tuple[float, ...] = ()
    """a `[K]`; empty: ones. A single one that is not zero trains for that label alone."""

    surrogate: Surrogate = dataclasses.field(default="logistic", metadata=STATIC)
    """Loss of a pair."""

    margin: float = 1.0
    """Of the hinges, in units of the score."""

    normalize: bool = dataclasses.field(default=True, metadata=STATIC)
    """Each label's mean over its own pairs. If not, all labels' over all pairs, whose best ranking is
    that of label aggregation."""

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        scores, labels = scores_and_labels(outputs, batch)
        loss = losses.loss_aggregation(
            scores,
            labels,
            weights=_weights(self.weights, labels.shape[-1]),
            surrogate=self.surrogate,
            margin=self.margin,
            normalize=self.normalize,
        )
        return {"loss": (loss, jnp.ones((), jnp.float32))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelAggregation:
    """Ranking by `sum_k a_k y_k` through a surrogate: `losses.label_aggregation` of the batch."""

    outputs: ClassVar[int] = 1
    """Of the model: the score."""

    weights: tuple[float, ...] = ()
    """a `[K]`; empty: ones."""

    surrogate: Surrogate = dataclasses.field(default="logistic", metadata=STATIC)
    """Loss of a pair."""

    margin: float = 1.0
    """Of the hinges, in units of the score."""

    cost: Literal["difference", "uniform"] = dataclasses.field(
        default="difference", metadata=STATIC
    )
    """Of a pair: the difference of its sums, for which the best ranking is known, or one."""

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums:
        scores, labels = scores_and_labels(outputs, batch)
        loss = losses.label_aggregation(
            scores,
            labels,
            weights=_weights(self.weights, labels.shape[-1]),
            surrogate=self.surrogate,
            margin=self.margin,
            cost=self.cost,
        )
        return {"loss": (loss, jnp.ones((), jnp.float32))}


def scores_and_labels(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Scores `[B]` and labels `[B, K]`; `InputError` where they are not of these shapes."""
    logits, labels = outputs.logits, batch["labels"]
    if logits.ndim != 2 or logits.shape[1] != 1:
        raise InputError(
            f"a scorer has one output, [B, 1]; got {logits.shape}: build the model with one class"
        )
    if labels.ndim != 2 or len(labels) != len(logits):
        raise InputError(
            f"ranking from several labels needs labels [B, K] of zeros and ones, B {len(logits)}; got "
            f"{labels.shape}"
        )
    return logits[:, 0], labels


def _weights(weights: tuple[float, ...], count: int) -> jax.Array:
    if weights and len(weights) != count:
        raise InputError(f"weights has {len(weights)} numbers, but the items have {count} labels")
    return jnp.asarray(weights, jnp.float32) if weights else jnp.ones(count)
