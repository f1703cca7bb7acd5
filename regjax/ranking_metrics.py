"""How well one ranking serves several binary labels; NumPy in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from regjax.errors import InputError
from regjax.metrics import Undefined


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
