"""Losses and predictions of a score grid, and their formulas in float64 NumPy."""

import numpy as np

from regjax.losses.example_weights import cvar_dual
from regjax.losses.grid import expected_score, grid_log_probs, grid_mass
from regjax.losses.numeric import pinball
from regjax.losses.policy import real
from regjax.losses.regression import expected_risk, number_token, raft
from regjax.losses.soft_labels import soft_label_loss
from tests.losses.number_cases import (
    GRID,
    NUMBERS,
    SOFT,
    TOKENS,
    VALUES,
    Case,
    log_softmax,
    single,
    soft,
)


def probs(z, normalize=False):
    p = np.exp(log_softmax(z)[TOKENS])
    return p / p.sum() if normalize else p


def huber(e, delta=0.7):
    return np.where(np.abs(e) <= delta, e**2 / 2, delta * (np.abs(e) - delta / 2))


def squashed(d, factor=2.5):
    """The gaps of the grid are from 0.5 to 3, its range is 6."""
    return np.minimum(d / 0.5, 1) + (factor - 1) * np.maximum(d - 0.5, 0) / 5.5


def squashed_and_reweighed(z, y):
    mass = probs(z).sum()
    loss = probs(z, True) @ squashed(np.abs(VALUES - y))
    return mass * loss + 1.01 * 2.5 * (1 - mass)


def grid_case(function, formula, **options):
    def loss(x, y, where):
        return function(x, y, GRID, where=where, **options)

    return single(f"{function.__name__} {options}", loss, formula, 7, NUMBERS)


def of_prediction(function, formula):
    """Half the absolute error of a prediction of the logits."""

    def loss(x, y, where):
        predictions = function(x, GRID, where=where)
        return pinball(predictions[..., None], y, [0.5], where=where)

    return single(function.__name__, loss, lambda z, y: np.abs(formula(z) - y) / 2, 7, NUMBERS)


def of_log_probs(x, y, where):
    log_probs = grid_log_probs(x, GRID, where=where)
    return soft_label_loss(log_probs, y, VALUES, where=where)


REAL_TARGETS = np.repeat([[7.0], [3.5], [1.0]], 4, axis=1)


def real_loss(x, y, where):
    return real(x[..., :7], y, GRID, x[..., 7], label_weight=0.4, reward_weight=0.3, where=where)


def real_formula(x, y, where):
    losses = np.zeros(where.shape)
    for group in np.ndindex(where.shape[:-1]):
        kept = where[group]
        if not kept.any():
            continue
        z, targets = x[group][kept], y[group][kept]
        log_p = np.array([log_softmax(row[:7])[TOKENS] for row in z])
        errors = np.exp(log_p) @ VALUES - targets
        rewards = -(errors**2) + 0.4 * log_p[np.arange(len(z)), np.searchsorted(VALUES, targets)]
        centred = rewards - rewards.mean()
        deviation = rewards.std() or 1.0
        losses[group][kept] = -np.clip(centred / deviation, -1, 1) * z[:, 7] - 0.3 * rewards
    return losses


CASES = [
    grid_case(raft, lambda z, y: (probs(z) @ VALUES - y) ** 2),
    grid_case(
        raft,
        lambda z, y: huber(probs(z, True) @ VALUES - y),
        normalize=True,
        loss="huber",
        delta=0.7,
    ),
    grid_case(expected_risk, lambda z, y: probs(z, True) @ (VALUES - y) ** 2),
    grid_case(
        expected_risk,
        lambda z, y: probs(z) @ huber(VALUES - y),
        normalize=False,
        loss="huber",
        delta=0.7,
    ),
    grid_case(number_token, lambda z, y: probs(z, True) @ np.abs(VALUES - y)),
    grid_case(number_token, squashed_and_reweighed, squash=2.5, reweigh=True),
    grid_case(number_token, lambda z, y: (probs(z, True) @ VALUES - y) ** 2, kind="mse"),
    of_prediction(expected_score, lambda z: probs(z) @ VALUES),
    of_prediction(grid_mass, lambda z: probs(z).sum()),
    single("grid_log_probs", of_log_probs, soft(), 7, SOFT),
    Case("real", real_loss, real_formula, (3, 4, 8), REAL_TARGETS, (3, 4), surrogate=True),
    single(
        "cvar_dual",
        lambda x, y, where: cvar_dual(x, y, fraction=0.4, where=where),
        lambda v, t: t + max(v - t, 0) / 0.4,
        None,
        np.array([0.5, -2.0, -1.0, 3.0]),
        "losses",
    ),
]
