"""A small batch with all that the objectives of classification read, and losses in NumPy float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax.objectives.classification import Facts

CLASSES, SIZE, TRAINING, HELD_OUT = 4, 12, 40, 30


class Outputs(NamedTuple):
    logits: jax.Array
    features: jax.Array


def outputs(logits):
    return Outputs(jnp.asarray(logits, jnp.float32), jnp.zeros((len(logits), 2)))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.normal(size=(SIZE, CLASSES)) * 2
LABELS = np.arange(SIZE) * 7 % CLASSES
PARTNERS = (LABELS + 1 + np.arange(SIZE) % 3) % CLASSES
TEACHERS = RANDOM.normal(size=(2, TRAINING, CLASSES)) * 2
HELD_OUT_TEACHERS = RANDOM.normal(size=(2, HELD_OUT, CLASSES)) * 2
NOISE = 0.6 * np.eye(CLASSES) + 0.4 * RANDOM.dirichlet(np.ones(CLASSES), CLASSES)
COUNTS = np.array([20, 11, 6, 3])

OUTPUTS = outputs(LOGITS)
BATCH = {
    "labels": jnp.asarray(LABELS, jnp.int32),
    "targets": jnp.asarray(np.eye(CLASSES)[LABELS], jnp.float32),
    "index": jnp.arange(SIZE),
    "teacher_logits": jnp.asarray(TEACHERS[:, :SIZE], jnp.float32),
}
FACTS = Facts(
    num_classes=CLASSES,
    counts=COUNTS,
    noise_matrix=NOISE,
    labels=np.repeat(np.arange(CLASSES), COUNTS),
    held_out_labels=np.arange(HELD_OUT) % CLASSES,
    teacher_logits=TEACHERS,
    held_out_teacher_logits=HELD_OUT_TEACHERS,
)


def one_teacher(batch=BATCH):
    return {**batch, "teacher_logits": batch["teacher_logits"][:1]}


def given_of(objective, facts=FACTS):
    """As the loop hands it over: arrays on the device."""
    found = objective.given(facts) if hasattr(objective, "given") else {}
    return jax.tree.map(jnp.asarray, found)


def sums_of(objective, batch=BATCH, of=OUTPUTS, given=None, extras=None):
    given = given_of(objective) if given is None else given
    if not hasattr(objective, "initial"):
        return objective(of, batch, given)
    extras = objective.initial(given) if extras is None else extras
    return objective(of, batch, given, extras)


def loss_of(objective, **options):
    total, weight = sums_of(objective, **options)["loss"]
    return total / weight
