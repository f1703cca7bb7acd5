"""Bipartite ranking from several binary labels: one scorer, by aggregated losses or aggregated labels.

Lukasik, Chen, Narasimhan, Menon, Jitkrittum, Yu, Reddi, Fu, Bateni, Kumar, *Bipartite ranking from multiple
labels: on loss versus label aggregation*, ICML 2025 (arXiv 2504.11284). Every item has K binary labels; a
scorer is to rank the items well by all of them. With eta_k(x) = P(y_k = 1 | x), of mean pi_k, the best
rankings are those by

    loss aggregation     sum_k a_k eta_k(x) / (pi_k (1 - pi_k))
    label aggregation    sum_k a_k eta_k(x)

so that with the first a rare label may decide alone. The labels are those of an image's class,
`ImageExperiment.attributes`; a stage's report has the area under the curve of every label, see
`regjax.ranking_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from regjax.classification import ImageStage
from regjax.errors import InputError
from regjax.objectives.classification import LabelAggregation, LossAggregation


def aggregations(labels: int, **stage: Any) -> tuple[ImageStage, ...]:
    """Scorers by loss and by label aggregation, and one for each of the `labels` alone.

    >>> [stage.name for stage in aggregations(2)]
    ['loss_aggregation', 'label_aggregation', 'label_0', 'label_1']
    """
    alone = np.eye(labels).tolist()
    return (
        ImageStage("loss_aggregation", LossAggregation((1.0,) * labels), **stage),
        ImageStage("label_aggregation", LabelAggregation((1.0,) * labels), **stage),
        *(
            ImageStage(f"label_{k}", LossAggregation(tuple(weights)), **stage)
            for k, weights in enumerate(alone)
        ),
    )


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
