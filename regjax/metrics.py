"""What is reported of predicted numbers: errors, agreement, calibration, and their uncertainty.

Everything here is NumPy in float64 on arrays that fit the host, one float out. A metric that is not
defined on its input (constant predictions have no correlation) is `Undefined`: a NaN that says why.
Distributions are given as in `regjax.decisions`, `probabilities [N, K]` with `values [K]` or
`[N, K]`, and are normalised over the grid, except where their mass is itself the metric.

Correlations say whether items are ordered and spaced right, errors whether the numbers themselves
are right; a model may be good at one only, so a report holds both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from regjax.errors import InputError

# Predictions come in float32: differences this small are rounding.
_ROUNDING = 1e-6


class Undefined(float):
    """A NaN with a `reason`. It is a float like any other: it can be stored, averaged, written.

    >>> pearson([3, 3, 3], [1, 2, 3])
    nan (the predictions are constant)
    """

    reason: str

    def __new__(cls, reason: str) -> Undefined:
        self = super().__new__(cls, "nan")
        self.reason = reason
        return self

    def __repr__(self) -> str:
        return f"nan ({self.reason})"

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.reason,)


class Interval(NamedTuple):
    low: float
    high: float


def rmse(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Root mean squared error `sqrt(mean (prediction - target)^2)`, in the units of the target."""
    p, t = _pairs(predictions, targets)
    return _unusable(predictions=p, targets=t) or float(np.sqrt(np.mean((p - t) ** 2)))


def mae(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Mean absolute error `mean |prediction - target|`, in the units of the target."""
    p, t = _pairs(predictions, targets)
    return _unusable(predictions=p, targets=t) or float(np.mean(np.abs(p - t)))


def pearson(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Pearson's linear correlation, in [-1, 1] (`scipy.stats.pearsonr`).

    `Undefined` for fewer than two items, and where either side is constant up to rounding.
    """
    from scipy.stats import pearsonr

    p, t = _pairs(predictions, targets)
    undefined = _unusable(predictions=p, targets=t) or _constant(p, t, relative=1e-12)
    return undefined or float(pearsonr(p, t).statistic)


def spearman(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Spearman's rank correlation, in [-1, 1]: Pearson's on ranks, ties at their mean rank.

    `Undefined` for fewer than two items, and where either side is constant.
    """
    from scipy.stats import rankdata

    p, t = _pairs(predictions, targets)
    return (
        _unusable(predictions=p, targets=t) or _constant(p, t) or pearson(rankdata(p), rankdata(t))
    )


def kendall(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Kendall's tau-b, in [-1, 1]: concordant less discordant pairs, corrected for ties
    (`scipy.stats.kendalltau`).

    `Undefined` for fewer than two items, and where either side is constant.
    """
    from scipy.stats import kendalltau

    p, t = _pairs(predictions, targets)
    return (
        _unusable(predictions=p, targets=t) or _constant(p, t) or float(kendalltau(p, t).statistic)
    )


def accuracy_within(predictions: ArrayLike, targets: ArrayLike, tolerance: float = 0.5) -> float:
    """The share of items with `|prediction - target| <= tolerance`, in [0, 1].

    An error above the tolerance by float32 rounding is within it.

    >>> accuracy_within([1.0, 2.4, 4.0], [1.0, 2.0, 3.0], tolerance=0.5)
    0.6666666666666666
    """
    p, t = _pairs(predictions, targets)
    slack = _ROUNDING * np.maximum(1.0, np.abs(t))
    return _unusable(predictions=p, targets=t) or float(np.mean(np.abs(p - t) <= tolerance + slack))


def quadratic_weighted_kappa(
    predictions: ArrayLike, targets: ArrayLike, values: ArrayLike
) -> float:
    """Cohen's kappa with quadratic weights after rounding both sides to the grid `values [K]`.

    With `a` and `b` the rounded predictions and targets,
    `1 - mean (a - b)^2 / (Var a + Var b + (mean a - mean b)^2)`; the denominator is the squared
    difference to expect if the two were independent. 1 is agreement, 0 chance. A number halfway
    between two values goes to the higher one. On an equally spaced grid this is scikit-learn's
    `cohen_kappa_score(weights="quadratic")`, which counts places instead of distances.

    `Undefined` where all predictions and targets round to one value.
    """
    p, t = _pairs(predictions, targets)
    if undefined := _unusable(predictions=p, targets=t):
        return undefined
    grid = np.sort(_numbers(values))
    middles = (grid[1:] + grid[:-1]) / 2
    a, b = (grid[np.searchsorted(middles, side, side="right")] for side in (p, t))
    chance = np.var(a) + np.var(b) + (np.mean(a) - np.mean(b)) ** 2
    if np.ptp(np.concatenate([a, b])) == 0:
        return Undefined("the predictions and targets all round to one value")
    return float(1 - np.mean((a - b) ** 2) / chance)


def coverage(
    probabilities: ArrayLike, values: ArrayLike, targets: ArrayLike, level: float = 0.9
) -> float:
    """The share of targets inside the predicted central interval that holds `level` of the mass.

    The interval runs from the first value with at least `(1 - level) / 2` of the mass at or below
    it to the first with at least `(1 + level) / 2`, ends included. A calibrated distribution covers
    at least `level` (more on a coarse grid, whose intervals cannot be any tighter).
    """
    if not 0 < level < 1:
        raise InputError(f"coverage: level is {level}, expected a share between 0 and 1")
    cdf, v, t = _distributions(probabilities, values, targets)
    if undefined := _massless(cdf) or _unusable(targets=t):
        return undefined
    low = _quantile(cdf, v, (1 - level) / 2)
    high = _quantile(cdf, v, (1 + level) / 2)
    return float(np.mean((low - _ROUNDING <= t) & (t <= high + _ROUNDING)))


def crps(probabilities: ArrayLike, values: ArrayLike, targets: ArrayLike) -> float:
    """Mean continuous ranked probability score, in the units of the target; lower is better.

    `mean integral (F(x) - [target <= x])^2 dx`, with `F` the predicted distribution function,
    summed exactly over the gaps between the values; a target off the grid, or beyond its ends, is
    as good as any. Equals `E|X - target| - E|X - X'| / 2`, and the absolute error for a
    distribution on one value (Gneiting & Raftery, 2007).

    >>> round(crps([[0.0, 0.5, 0.5]], [1, 2, 3], [2.0]), 4)
    0.25
    """
    cdf, v, t = _distributions(probabilities, values, targets)
    if undefined := _massless(cdf) or _unusable(targets=t):
        return undefined
    gaps, f = np.diff(v), cdf[:, :-1]
    below = np.clip(t[:, None] - v[:, :-1], 0.0, gaps)
    inside = np.sum(below * f**2 + (gaps - below) * (1 - f) ** 2, axis=1)
    outside = np.maximum(v[:, 0] - t, 0.0) + np.maximum(t - v[:, -1], 0.0)
    return float(np.mean(inside + outside))


def mean_grid_mass(probabilities: ArrayLike) -> float:
    """Mean of `sum_k p_k`, in [0, 1]: what the model puts on the grid's strings, `[N, K]` in.

    Near 0 it means that the score's tokens, or the place they are read at, are wrong.
    """
    mass = np.sum(_numbers(probabilities), axis=-1).ravel()
    return _unusable(masses=mass) or float(np.mean(mass))


def bootstrap(
    metric: Callable[..., float],
    *arrays: ArrayLike,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `metric(*arrays)`, items drawn with replacement.

    All arrays are resampled along their first axis together: `bootstrap(rmse, predictions,
    targets)`; for two predictors on the same items, `bootstrap(lambda a, b, y: pearson(a, y) -
    pearson(b, y), a, b, targets)`. Resamples on which the metric is not defined are left out;
    `Undefined` ends where they are more than half, or where there are no items.

    >>> bootstrap(mae, [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5])
    Interval(low=0.5, high=0.5)
    """
    if not 0 < level < 1:
        raise InputError(f"bootstrap: level is {level}, expected a share between 0 and 1")
    rows = [np.asarray(array) for array in arrays]
    count = len(rows[0])
    if any(len(row) != count for row in rows):
        raise ValueError(f"bootstrap: arrays of {[len(row) for row in rows]} items")
    if not count:
        reason = Undefined("there are no items")
        return Interval(reason, reason)
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        chosen = generator.integers(count, size=count)
        drawn[i] = metric(*(row[chosen] for row in rows))
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) < resamples or not len(defined):
        lost = resamples - len(defined)
        reason = Undefined(f"the metric is not defined on {lost} of {resamples} resamples")
        return Interval(reason, reason)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def regression_report(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    probabilities: ArrayLike | None = None,
    values: ArrayLike | None = None,
    tolerance: float = 0.5,
    not_finite: Literal["keep", "drop"] = "keep",
    intervals: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """The metrics of one evaluation by name, all floats; undefined ones are `Undefined`.

    Always `count`, `not_finite` (predictions that are no number: with `"drop"` the other metrics
    are of the rest, with `"keep"` they are `Undefined`), `rmse`, `mae`, `pearson`, `spearman`,
    `kendall`, `accuracy_within` the tolerance, and `target_std`, the RMSE of the best constant,
    which an `rmse` is to be read against. With `values` also `quadratic_weighted_kappa`; with
    `probabilities [N, K]` besides `crps`, `coverage_90` and `grid_mass`. With `intervals`, each but
    the counts and `target_std` also as `<name>_low` and `<name>_high` at 95%.

    Shapes: `predictions [N]`, `targets [N]`, `values [K]` or `[N, K]` (then no kappa).
    """
    p, t = _pairs(predictions, targets)
    if probabilities is not None and values is None:
        raise ValueError("regression_report: probabilities need their values")
    grid = None if values is None else _numbers(values)
    mass = None if probabilities is None else _numbers(probabilities)
    lost = int(np.sum(~np.isfinite(p)))
    if not_finite == "drop":
        kept = np.isfinite(p)
        p, t = p[kept], t[kept]
        mass = None if mass is None else mass[kept]
        grid = grid[kept] if grid is not None and grid.ndim > 1 else grid

    measured: dict[str, tuple[Callable[..., float], tuple[np.ndarray, ...]]] = {
        "rmse": (rmse, (p, t)),
        "mae": (mae, (p, t)),
        "pearson": (pearson, (p, t)),
        "spearman": (spearman, (p, t)),
        "kendall": (kendall, (p, t)),
        "accuracy_within": (lambda p, t: accuracy_within(p, t, tolerance), (p, t)),
    }
    if grid is not None and grid.ndim == 1:
        measured["quadratic_weighted_kappa"] = (
            lambda p, t: quadratic_weighted_kappa(p, t, grid),
            (p, t),
        )
    if grid is not None and mass is not None:
        per_item = np.broadcast_to(grid, mass.shape)
        measured["crps"] = (crps, (mass, per_item, t))
        measured["coverage_90"] = (coverage, (mass, per_item, t))
        measured["grid_mass"] = (mean_grid_mass, (mass,))

    report: dict[str, float] = {"count": float(len(p)), "not_finite": float(lost)}
    report["target_std"] = _unusable(targets=t) or float(np.std(t))
    for name, (metric, arrays) in measured.items():
        report[name] = metric(*arrays)
        if intervals:
            interval = bootstrap(metric, *arrays, seed=seed)
            report[f"{name}_low"], report[f"{name}_high"] = interval
    return report


def _numbers(array: ArrayLike) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def _pairs(predictions: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, t = _numbers(predictions), _numbers(targets)
    if p.shape != t.shape:
        raise ValueError(f"predictions {p.shape} and targets {t.shape} have different shapes")
    return p.ravel(), t.ravel()


def _unusable(**arrays: np.ndarray) -> Undefined | None:
    for name, array in arrays.items():
        if not array.size:
            return Undefined("there are no items")
        if lost := int(np.sum(~np.isfinite(array))):
            return Undefined(f"{lost} of {array.size} {name} are not finite")
    return None


def _constant(
    predictions: np.ndarray, targets: np.ndarray, relative: float = 0.0
) -> Undefined | None:
    if len(targets) < 2:
        return Undefined("a correlation needs at least two items")
    for name, array in (("predictions", predictions), ("targets", targets)):
        if np.ptp(array) <= relative * np.max(np.abs(array)):
            return Undefined(f"the {name} are constant")
    return None


def _distributions(
    probabilities: ArrayLike, values: ArrayLike, targets: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distribution functions `[N, K]` at ascending values `[N, K]`, and the targets `[N]`."""
    p, v, t = _numbers(probabilities), _numbers(values), _numbers(targets)
    if p.ndim != 2 or t.shape != p.shape[:1] or v.shape not in (p.shape, p.shape[1:]):
        raise ValueError(
            f"probabilities {p.shape}, values {v.shape} and targets {t.shape} should be "
            "[N, K], [K] or [N, K], and [N]"
        )
    v = np.broadcast_to(v, p.shape)
    order = np.argsort(v, axis=1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)
    total = cumulative[:, -1:]
    cdf = np.divide(cumulative, total, out=np.full_like(cumulative, np.nan), where=total > 0)
    return cdf, np.take_along_axis(v, order, axis=1), t


def _massless(cdf: np.ndarray) -> Undefined | None:
    lost = int(np.sum(~np.isfinite(cdf[:, -1])))
    return Undefined(f"{lost} of {len(cdf)} distributions have no mass") if lost else None


def _quantile(cdf: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    first = np.argmax(cdf >= level - _ROUNDING, axis=1)
    return np.take_along_axis(values, first[:, None], axis=1)[:, 0]
