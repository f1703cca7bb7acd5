"""Several teachers as one: the mean of their probabilities."""

from __future__ import annotations

import jax
import numpy as np
from scipy.special import softmax

from regjax.errors import InputError
from regjax.objectives.classification.objective import Batch, Facts


def mean_teacher(batch: Batch, temperature: jax.Array | float, name: str) -> jax.Array:
    """Logits `[B, C]` whose softmax at temperature T is the mean of the teachers' at T.

        T log sum_t softmax(z_t / T)

    Those of one teacher are its own. `InputError` for a batch without teachers.
    """
    if "teacher_logits" not in batch:
        raise InputError(f"{name} needs a teacher: name earlier stages as teachers of this one")
    logits = jax.lax.stop_gradient(batch["teacher_logits"])
    if len(logits) == 1:
        return logits[0]
    log_probs = jax.nn.log_softmax(logits / temperature)
    return temperature * jax.nn.logsumexp(log_probs, axis=0)


def mean_probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """`mean_t softmax(z_t / T)` `[N, C]`, NumPy float64, of logits `[T, N, C]`."""
    return np.mean([softmax(np.asarray(z, np.float64) / temperature, axis=-1) for z in logits], 0)


def held_out_probabilities(facts: Facts, temperature: float, name: str) -> np.ndarray:
    """`mean_probabilities` on the held-out examples; `InputError` where there are none."""
    if facts.held_out_teacher_logits is None:
        raise InputError(
            f"{name} reads its teacher on held-out examples: set held_out of the data, and teachers "
            "of the stage"
        )
    return mean_probabilities(facts.held_out_teacher_logits, temperature)
