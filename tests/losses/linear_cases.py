"""Every loss of hidden states and a head, its plain form of logits, and its float64 formula.

Rows `[3, 7]`, hidden states of width 5 and a vocabulary of 40: a loss is `linear(hidden, head,
where=..., **layout)`, its plain form `plain(logits, where)`, its formula `formula(logits)` of
float64 logits `[3, 7, 40]`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from regjax.losses import linear, linear_teachers
from regjax.losses.distillation import distillation
from regjax.losses.grid import expected_score, grid_log_probs
from regjax.losses.tokens import token_cross_entropy
from regjax.losses.top_k_teacher import teacher_top_k, top_k_distillation
from regjax.token_grid import TokenGrid
from tests.losses.distillation_cases import divergence, log_softmax

SHAPE, D, E, V = (3, 7), 5, 4, 40
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.normal(size=(*SHAPE, D)).astype(np.float32)
HEAD = RANDOM.normal(size=(D, V)).astype(np.float32)
TEACHER_HIDDEN = RANDOM.normal(size=(*SHAPE, E)).astype(np.float32)
TEACHER_HEAD = RANDOM.normal(size=(E, V)).astype(np.float32)
TEACHER = (TEACHER_HIDDEN.astype(np.float64) @ TEACHER_HEAD).astype(np.float32)
LABELS = RANDOM.integers(0, V, SHAPE)
# Both ends of the vocabulary, and both sides of the last chunk of 16.
LABELS[0] = [0, V - 1, 31, 32, 24, 23, 15]
# Ten rows, which do not fill blocks of four.
WHERE = np.array([[1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 1, 0]], bool)
WEIGHTS = RANDOM.normal(size=SHAPE).astype(np.float32)
CODEC = TokenGrid.from_ids([39, 3, 31, 32], [1.0, 2.0, 4.0, 8.0])
CAP, TEACHER_CAP, T = 1.5, 2.0, 2.0
TOP = teacher_top_k(TEACHER, 3, temperature=T)
PADDED = np.where(np.arange(3) < LABELS[..., None] % 4, TOP.tokens, -1)


class Case(NamedTuple):
    linear: Callable
    plain: Callable
    formula: Callable


def cap(logits, bound):
    xp = np if isinstance(logits, np.ndarray) else jnp
    return bound * xp.tanh(logits / bound)


def plain_cross_entropy(logits, where, z_loss=0.0, soft_cap=None, **options):
    logits = logits if soft_cap is None else cap(logits, soft_cap)
    losses = token_cross_entropy(logits, LABELS, where=where, **options)
    squared = jnp.square(jax.nn.logsumexp(jnp.where(where[..., None], logits, 0.0), axis=-1))
    return losses + jnp.where(where, z_loss * squared, 0.0)


def cross_entropy(logits, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    logits = logits if soft_cap is None else cap(logits, soft_cap)
    log_p = log_softmax(logits)
    of_label = np.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]
    smooth = (1 - label_smoothing) * of_label + label_smoothing * log_p.mean(-1)
    return z_loss * special.logsumexp(logits, axis=-1) ** 2 - smooth


def plain_score(logits, where, normalize):
    logits = jnp.where(where[..., None], logits, 0.0)
    return jnp.where(where, expected_score(logits, CODEC, normalize=normalize), 0.0)


def score(logits, normalize):
    probs = np.exp(log_softmax(logits))[..., CODEC.tokens[:, 0]]
    return probs @ CODEC.values / (probs.sum(-1) if normalize else 1.0)


def linear_spread(hidden, head, *, where, **layout):
    """A loss of all log-probabilities of a grid."""
    log_probs = linear.linear_grid_log_probs(hidden, head, CODEC, where=where, **layout)
    return jnp.where(where, jnp.var(log_probs, axis=-1), 0.0)


def plain_spread(logits, where):
    logits = jnp.where(where[..., None], logits, 0.0)
    return jnp.where(where, jnp.var(grid_log_probs(logits, CODEC), axis=-1), 0.0)


def spread(logits):
    return np.var(log_softmax(logits)[..., CODEC.tokens[:, 0]], axis=-1)


def linear_divergence(hidden, head, **options):
    teacher_hidden = options.pop("teacher_hidden", TEACHER_HIDDEN)
    return linear_teachers.linear_distillation(
        hidden, head, teacher_hidden, TEACHER_HEAD, **options
    )


def plain_divergence(logits, where, soft_cap=None, teacher_soft_cap=None, **options):
    logits = logits if soft_cap is None else cap(logits, soft_cap)
    teacher = TEACHER if teacher_soft_cap is None else cap(TEACHER, teacher_soft_cap)
    return distillation(logits, teacher, where=where, **options)


def of_teacher(
    logits, temperature=1.0, kind="forward", beta=0.5, soft_cap=None, teacher_soft_cap=None
):
    logits = logits if soft_cap is None else cap(logits, soft_cap)
    teacher = TEACHER_HIDDEN.astype(np.float64) @ TEACHER_HEAD.astype(np.float64)
    teacher = teacher if teacher_soft_cap is None else cap(teacher, teacher_soft_cap)
    log_p, log_q = log_softmax(logits / temperature), log_softmax(teacher / temperature)
    return temperature**2 * divergence(log_q, log_p, kind, beta)


def linear_top_k(hidden, head, ids=TOP.tokens, **options):
    return linear_teachers.linear_top_k_distillation(
        hidden, head, ids, TOP.log_probs, temperature=T, **options
    )


def plain_top_k(logits, where, ids=TOP.tokens, **options):
    return top_k_distillation(logits, ids, TOP.log_probs, temperature=T, where=where, **options)


def top_k(logits, ids=TOP.tokens, tail="bucket", kind="forward", beta=0.5):
    ids, log_q = np.asarray(ids), np.asarray(TOP.log_probs, np.float64)
    log_p = log_softmax(logits / T)
    losses = np.zeros(SHAPE)
    for row in np.ndindex(SHAPE):
        known = ids[row] >= 0
        q, p = np.exp(log_q[row][known]), np.exp(log_p[row][ids[row][known]])
        if tail == "renormalize":
            q, p = q / max(q.sum(), 1e-300), p / max(p.sum(), 1e-300)
        else:
            q, p = np.append(q, 1 - q.sum()), np.append(p, 1 - p.sum())
        losses[row] = T**2 * divergence(np.log(q), np.log(p), kind, beta)
    return losses


def _case(functions, **options):
    return Case(*[functools.partial(function, **options) for function in functions])


_ENTROPY = (
    functools.partial(linear.linear_cross_entropy, labels=LABELS),
    plain_cross_entropy,
    cross_entropy,
)
_SCORE = (
    functools.partial(linear.linear_expected_score, codec=CODEC),
    plain_score,
    score,
)
_DIVERGENCE = (linear_divergence, plain_divergence, of_teacher)
_TOP = (linear_top_k, plain_top_k, top_k)

CASES = {
    "cross-entropy": _case(_ENTROPY),
    "smoothed": _case(_ENTROPY, label_smoothing=0.2, z_loss=0.1, soft_cap=CAP),
    "score": _case(_SCORE, normalize=False),
    "normalised": _case(_SCORE, normalize=True),
    "grid": Case(linear_spread, plain_spread, spread),
    "forward": _case(_DIVERGENCE, temperature=T),
    "reverse": _case(_DIVERGENCE, kind="reverse", soft_cap=CAP, temperature=T),
    "jensen_shannon": _case(
        _DIVERGENCE, kind="jensen_shannon", beta=0.3, teacher_soft_cap=TEACHER_CAP
    ),
    "top k": _case(_TOP),
    "top k padded": _case(_TOP, ids=PADDED, kind="jensen_shannon", beta=0.3),
    "renormalised": _case(_TOP, tail="renormalize", kind="reverse"),
}
