"""Bipartite ranking from several binary labels: one scorer, by aggregated losses or aggregated labels.

Lukasik, Chen, Narasimhan, Menon, Jitkrittum, Yu, Reddi, Fu, Bateni, Kumar, *Bipartite ranking from multiple
labels: on loss versus label aggregation*, ICML 2025 (arXiv 2504.11284). Every item has K binary labels; a
scorer is to rank the items well by all of them. With eta_k(x) = P(y_k = 1 | x), of mean pi_k, the best
rankings are those by

    loss aggregation     sum_k a_k eta_k(x) / (pi_k (1 - pi_k))
    label aggregation    sum_k a_k eta_k(x)

so that with the first a rare label may decide alone.

What an objective here reads: `outputs.logits [B, 1]`, the score, of a model with one output, and
`batch["labels"] [B, K]` of zeros and ones in place of classes; the batch is one list, all pairs of which are
compared, so it is to be large enough to hold both values of every label. There are no `targets`, so no
mixup, and no teacher; nothing is `given`. Scores are evaluated by `ranking_report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from regjax import losses
from regjax.errors import InputError
from regjax.losses.ranking import Surrogate
from regjax.metrics import Undefined
from regjax.objectives.classification.objective import STATIC, Batch, Given, Sums

if TYPE_CHECKING:
    from regjax.models.vision import Outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossAggregation:
    """`sum_k a_k (1 - AUC_k)` through a surrogate: `losses.loss_aggregation` of the batch."""

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


def aucs(scores: ArrayLike, labels: ArrayLike) -> list[float]:
    """Area under the ROC curve for each label, `K` numbers in [0, 1] (`sklearn.metrics.roc_auc_score`).

        AUC_k = P(f(x) > f(x') | y_k = 1, y'_k = 0), ties half

    Shapes: `scores [N]`, `labels [N, K]` of zeros and ones. `Undefined` for a label of one value.

    >>> aucs([0.1, 0.4, 0.3, 0.9], [[0, 0], [0, 1], [1, 1], [1, 1]])
    [0.75, 1.0]
    """
    from sklearn.metrics import roc_auc_score

    f, y = np.asarray(scores, np.float64), np.asarray(labels)
    if f.ndim != 1 or y.ndim != 2 or len(y) != len(f):
        raise ValueError(f"scores {f.shape} and labels {y.shape} should be [N] and [N, K]")
    if not np.isin(y, (0, 1)).all():
        raise InputError("aucs: labels must be zeros and ones")
    found: list[float] = []
    for k in range(y.shape[1]):
        if lost := int(np.sum(~np.isfinite(f))):
            found.append(Undefined(f"{lost} of {len(f)} scores are not finite"))
        elif y[:, k].all() or not y[:, k].any():
            found.append(Undefined(f"label {k} has items of one value only"))
        else:
            found.append(float(roc_auc_score(y[:, k], f)))
    return found


def ranking_report(
    scores: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()
) -> dict[str, float]:
    """How well one ranking serves every label: `auc/NAME` of each, their mean, minimum and `auc_gap`,
    the largest less the smallest. `Undefined` where one of them is.

    Shapes: `scores [N]`, `labels [N, K]`; `names` of the labels, otherwise numbers.
    """
    found = aucs(scores, labels)
    named = dict(zip(names or map(str, range(len(found))), found, strict=True))
    lost = next((auc for auc in found if isinstance(auc, Undefined)), None)
    summary: Mapping[str, float] = {
        "auc_mean": float(np.mean(found)),
        "auc_min": min(found),
        "auc_gap": max(found) - min(found),
    }
    report = {f"auc/{name}": auc for name, auc in named.items()}
    return report | {name: value if lost is None else lost for name, value in summary.items()}


def best_scores(
    probabilities: ArrayLike,
    aggregation: Literal["loss", "label"],
    *,
    weights: Sequence[float] = (),
    priors: ArrayLike | None = None,
) -> np.ndarray:
    """Scores `[N]` of the best ranking where every label's probability is known.

    See the module; propositions 5.2 and 5.4 of the paper.

    Args:
      probabilities: eta `[N, K]`.
      aggregation: of what.
      weights: a `[K]`; empty: ones.
      priors: pi `[K]`, above 0 and below 1; by default the mean of eta, of items as probable as each other.

    >>> eta = [[0, 0], [1, 0], [0, 1], [1, 1]]
    >>> best_scores(eta, "loss", priors=[0.5, 0.1]).round(2).tolist()
    [0.0, 4.0, 11.11, 15.11]
    >>> best_scores(eta, "label").tolist()
    [0.0, 1.0, 1.0, 2.0]
    """
    eta = np.asarray(probabilities, np.float64)
    a = np.asarray(weights or np.ones(eta.shape[1]), np.float64)
    if aggregation == "label":
        return eta @ a
    if aggregation != "loss":
        raise ValueError(f"aggregation must be 'loss' or 'label'; got {aggregation!r}")
    pi = eta.mean(axis=0) if priors is None else np.asarray(priors, np.float64)
    if not np.all((pi > 0.0) & (pi < 1.0)):
        raise InputError(
            f"best_scores: priors are {pi.tolist()}, expected each above 0 and below 1"
        )
    return eta @ (a / (pi * (1.0 - pi)))


def _weights(weights: tuple[float, ...], count: int) -> jax.Array:
    if weights and len(weights) != count:
        raise InputError(f"weights has {len(weights)} numbers, but the items have {count} labels")
    return jnp.asarray(weights, jnp.float32) if weights else jnp.ones(count)
