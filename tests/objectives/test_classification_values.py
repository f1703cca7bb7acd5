"""Objectives of classification against their formulas in NumPy float64, and against each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from regjax import losses
from regjax.objectives.classification import (
    AdaptiveAlpha,
    AdaptiveMargin,
    ClassBalanced,
    CrossEntropy,
    Distillation,
    Facts,
    Focal,
    GroupDro,
    Ldam,
    LogitAdjusted,
    NoiseMatrixCorrection,
    NoiseRobust,
    Robust,
)
from regjax.objectives.classification.teachers import mean_teacher as mean_teacher_logits
from tests.objectives.classification_cases import (
    BATCH,
    CLASSES,
    COUNTS,
    FACTS,
    HELD_OUT_TEACHERS,
    LABELS,
    LOGITS,
    NOISE,
    SIZE,
    TEACHERS,
    given_of,
    log_softmax,
    loss_of,
    one_teacher,
    outputs,
    softmax,
)

LOG_P = log_softmax(LOGITS)
P = np.exp(LOG_P)
ROWS = np.arange(SIZE)
CE = -LOG_P[ROWS, LABELS]
P_Y = P[ROWS, LABELS]
A = np.log(1e-4)


def mean_teacher(temperature=1.0, teachers=TEACHERS[:, :SIZE]):
    return softmax(teachers / temperature).mean(axis=0)


def kl(q, p):
    return np.sum(q * (np.log(q) - np.log(p)), axis=-1)


def dkd(temperature, alpha, beta):
    q, p = mean_teacher(temperature), softmax(LOGITS / temperature)
    found = []
    for i, y in enumerate(LABELS):
        others = np.arange(CLASSES) != y
        pair = [np.array([r[i, y], 1 - r[i, y]]) for r in (q, p)]
        rest = [r[i, others] / r[i, others].sum() for r in (q, p)]
        found.append(temperature**2 * (alpha * kl(*pair) + beta * kl(*rest)))
    return np.array(found)


def dist(temperature, beta, gamma):
    q, p = mean_teacher(temperature), softmax(LOGITS / temperature)
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(SIZE)])
    intra = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(CLASSES)])
    return temperature**2 * (beta * inter + gamma * intra)


def class_margins(average=False, temperature=1.0):
    q = mean_teacher(temperature, HELD_OUT_TEACHERS)
    labels = FACTS.held_out_labels
    margins = np.empty(len(labels))
    for i, y in enumerate(labels):
        others = np.delete(q[i], y)
        margins[i] = q[i, y] - (others.mean() if average else others.max())
    return np.array([margins[labels == k].mean() for k in range(CLASSES)])


def mixed_by(weight, q):
    return (1 - weight) * CE - weight * np.sum(q * LOG_P, axis=-1)


def shifted(log_weights, q):
    return -np.sum(q * log_softmax(LOGITS + log_weights), axis=-1)


SMEARED = 0.9 * np.eye(CLASSES) + 0.1 / CLASSES
EYE = np.eye(CLASSES)[LABELS]
LDAM_MARGINS = 0.5 * (COUNTS / COUNTS.min()) ** -0.25
EFFECTIVE = (1 - 0.99) / (1 - 0.99**COUNTS)
PRIOR = COUNTS / COUNTS.sum()
TEACHER_PRIOR = softmax(TEACHERS / 2).mean(axis=(0, 1))

VALUES = {
    "cross-entropy": (CrossEntropy(), CE),
    "smoothing": (CrossEntropy(0.1), -np.sum(SMEARED[LABELS] * LOG_P, axis=1)),
    "negative smoothing": (CrossEntropy(-1.0), 2 * CE + LOG_P.mean(axis=1)),
    "backward": (
        CrossEntropy(0.1, "backward"),
        -np.sum(np.linalg.inv(SMEARED)[LABELS] * LOG_P, axis=1),
    ),
    "forward": (CrossEntropy(0.1, "forward"), -np.log((P @ SMEARED)[ROWS, LABELS])),
    "matrix forward": (NoiseMatrixCorrection(), -np.log((P @ NOISE)[ROWS, LABELS])),
    "matrix backward": (
        NoiseMatrixCorrection("backward"),
        -np.sum(np.linalg.inv(NOISE)[LABELS] * LOG_P, axis=1),
    ),
    "gce": (NoiseRobust("gce"), (1 - P_Y**0.7) / 0.7),
    "mae": (NoiseRobust("mae"), 1 - P_Y),
    "rce": (NoiseRobust("rce"), -A * (1 - P_Y)),
    "nce": (NoiseRobust("nce"), CE / -LOG_P.sum(axis=1)),
    "sce": (NoiseRobust("sce"), 0.1 * CE - A * (1 - P_Y)),
    "apl": (
        NoiseRobust("apl", active_weight=10.0, passive_weight=0.1),
        10 * CE / -LOG_P.sum(axis=1) - 0.1 * A * (1 - P_Y),
    ),
    "soft": (NoiseRobust("soft_bootstrapping"), 0.95 * CE - 0.05 * np.sum(P * LOG_P, axis=1)),
    "hard": (NoiseRobust("hard_bootstrapping"), 0.8 * CE - 0.2 * LOG_P.max(axis=1)),
    "ldr": (
        NoiseRobust("ldr", temperature=2.0, margin=0.5),
        2 * np.log(np.mean(np.exp((LOGITS - LOGITS[ROWS, LABELS][:, None] + 0.5 * (1 - EYE)) / 2), 1)),
    ),
    "kl": (
        Distillation(0.7, 4.0),
        0.3 * CE + 0.7 * 16 * kl(mean_teacher(4.0), softmax(LOGITS / 4)),
    ),
    "reverse": (
        Distillation(0.7, 2.0, "reverse", label_weight=0.1),
        0.1 * CE + 0.7 * 4 * kl(softmax(LOGITS / 2), mean_teacher(2.0)),
    ),
    "refinery": (
        Distillation(1.0, 1.0, "cross_entropy"),
        -np.sum(mean_teacher() * LOG_P, axis=1),
    ),
    "dkd": (Distillation(1.0, 4.0, "dkd", label_weight=1.0), CE + dkd(4.0, 1.0, 8.0)),
    "dist": (
        Distillation(1.0, 2.0, "dist", label_weight=1.0, intra_weight=3.0),
        CE + dist(2.0, 1.0, 3.0),
    ),
    "ada-alpha": (
        AdaptiveAlpha(),
        mixed_by(np.clip(class_margins(), 0, 1)[LABELS], mean_teacher()),
    ),
    "ada-alpha average": (
        AdaptiveAlpha(2.0, "average"),
        mixed_by(np.clip(class_margins(True, 2.0), 0, 1)[LABELS], mean_teacher(2.0)),
    ),
    "ada-margin": (
        AdaptiveMargin(2.0, smallest=0.1),
        shifted(np.log(np.maximum(class_margins(temperature=2.0), 0.1)), mean_teacher(2.0)),
    ),
    "logit-adjusted": (LogitAdjusted(0.5), shifted(0.5 * np.log(PRIOR), EYE)),
    "focal": (Focal(1.5), (1 - P_Y) ** 1.5 * CE),
    "robust start": (
        Robust(tradeoff=0.4, temperature=2.0),
        shifted(np.log(TEACHER_PRIOR), mean_teacher(2.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    objective, expected = VALUES[name]
    np.testing.assert_allclose(loss_of(objective), np.mean(expected), rtol=3e-6)


def test_weighted_values_are_over_the_sum_of_weights():
    margins = CE * 0
    for i, y in enumerate(LABELS):
        z = LOGITS[i].copy()
        z[y] -= LDAM_MARGINS[y]
        margins[i] = -log_softmax(30 * z)[y]
    weights = EFFECTIVE[LABELS]
    for objective, expected in [
        (ClassBalanced(0.99), np.sum(weights * CE) / weights.sum()),
        (Ldam(beta=0.99), np.sum(weights * margins) / weights.sum()),
        (Ldam(), margins.mean()),
    ]:
        np.testing.assert_allclose(loss_of(objective), expected, rtol=3e-6)


def test_group_dro_values():
    means = np.array([CE[k == LABELS].mean() for k in range(CLASSES)])
    objective = GroupDro(0.3, adjustment=0.5)
    given = given_of(objective)
    np.testing.assert_allclose(loss_of(objective), means.mean(), rtol=3e-6)
    extras = objective.adjust(objective.initial(given), outputs(LOGITS), BATCH, given)
    expected = np.exp(0.3 * (means + 0.5 / np.sqrt(COUNTS)))
    expected /= expected.sum()
    np.testing.assert_allclose(extras["multipliers"], expected, rtol=3e-6)
    found = loss_of(objective, extras=extras)
    np.testing.assert_allclose(found, expected @ means, rtol=3e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Distillation(0.0, 4.0), CrossEntropy()),
        (Distillation(0.0, 4.0, "dkd"), CrossEntropy()),
        (NoiseRobust("gce", q=0.0), CrossEntropy()),
        (NoiseRobust("gce", q=1.0), NoiseRobust("mae")),
        (NoiseRobust("apl", passive_weight=0.0), NoiseRobust("nce")),
        (NoiseRobust("apl", active_weight=0.0), NoiseRobust("rce")),
        (NoiseRobust("soft_bootstrapping", label_weight=1.0), CrossEntropy()),
        # The backward correction is smoothing by a negative rate.
        (CrossEntropy(0.2, "backward"), CrossEntropy(-0.25)),
        (LogitAdjusted(0.0), CrossEntropy()),
        (ClassBalanced(0.0), CrossEntropy()),
        (Focal(0.0), CrossEntropy()),
        (Ldam(0.0, 1.0), CrossEntropy()),
        (Robust("labels", "standard"), CrossEntropy()),
        (Robust("labels", "balanced"), LogitAdjusted()),
        (Robust("labels", "robust"), LogitAdjusted()),
        (Robust("teacher", "standard"), Distillation(1.0, 1.0, "cross_entropy")),
    ],
)
def test_identities(one, other):
    np.testing.assert_allclose(loss_of(one), loss_of(other), rtol=2e-6)


def test_a_matrix_of_symmetric_noise_is_its_rate():
    facts = FACTS._replace(noise_matrix=losses.smearing_matrix(0.2, CLASSES))
    for kind in ("forward", "backward"):
        objective = NoiseMatrixCorrection(kind)
        found = loss_of(objective, given=given_of(objective, facts))
        np.testing.assert_allclose(found, loss_of(CrossEntropy(0.2, kind)), rtol=3e-6)


def test_one_teacher_counts_as_it_is():
    """To the last bit: dividing by a temperature and multiplying by it again would not be."""
    found = mean_teacher_logits(one_teacher(), 3.0, "this")
    np.testing.assert_array_equal(found, BATCH["teacher_logits"][0])


def test_a_label_that_the_noise_never_gives_has_no_part():
    """Its loss is infinite, and no target has weight on it."""
    noise = np.delete(NOISE, 0, axis=1)
    noise = np.pad(noise / noise.sum(axis=1, keepdims=True), ((0, 0), (1, 0)))
    labels = 1 + LABELS % 3
    batch = {"labels": jnp.asarray(labels), "targets": jnp.eye(CLASSES)[labels]}
    objective = NoiseMatrixCorrection()
    given = given_of(objective, FACTS._replace(noise_matrix=noise))
    found = loss_of(objective, batch=batch, given=given)
    np.testing.assert_allclose(found, np.mean(-np.log((P @ noise)[ROWS, labels])), rtol=3e-6)


def test_twice_the_same_teacher_is_that_teacher():
    twice = {**BATCH, "teacher_logits": jnp.stack([BATCH["teacher_logits"][0]] * 2)}
    for objective in (Distillation(), Distillation(0.5, 2.0, "dkd"), AdaptiveMargin(), Robust()):
        found = [loss_of(objective, batch=batch) for batch in (twice, one_teacher())]
        np.testing.assert_allclose(found[0], found[1], rtol=2e-6)


# Five held-out rows of three classes, with margins that were computed by hand.
ROWS_OF_TEACHER = np.log(
    [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2]]
)
THREE = Facts(
    num_classes=3,
    counts=np.ones(3),
    noise_matrix=np.eye(3),
    labels=np.arange(3),
    held_out_labels=np.array([0, 0, 1, 1, 2]),
    held_out_teacher_logits=ROWS_OF_TEACHER[None],
)


def test_class_margins_of_the_teacher():
    close = lambda found, expected: np.testing.assert_allclose(found, expected, atol=1e-6)  # noqa: E731
    close(AdaptiveAlpha().given(THREE)["margins"], [0.35, 0.25, -0.3])
    close(AdaptiveAlpha(margin="average").given(THREE)["margins"], [0.4, 0.25, -0.2])
    close(AdaptiveMargin().given(THREE)["offsets"], -np.log([0.35, 0.25, 0.05]))
    # The loss is linear in the weights .35, .25 and 0 of the teacher.
    objective = AdaptiveAlpha()
    z, q = LOGITS[:3, :3], np.exp(ROWS_OF_TEACHER[:3])
    batch = {"labels": jnp.arange(3), "teacher_logits": jnp.asarray(ROWS_OF_TEACHER[None, :3])}
    hard = -np.diag(log_softmax(z))
    soft = -np.sum(q * log_softmax(z), axis=1)
    weight = np.array([0.35, 0.25, 0.0])
    found = loss_of(objective, batch=batch, of=outputs(z), given=given_of(objective, THREE))
    close(found, np.mean((1 - weight) * hard + weight * soft))


def test_estimated_noise_matrices():
    """From exact posteriors of the noisy labels of examples whose class is certain both are exact."""
    classes = np.repeat(np.arange(CLASSES), 50)
    noisy = np.concatenate(
        [np.repeat(np.arange(CLASSES), np.round(50 * row).astype(int)) for row in ROUNDED]
    )
    facts = FACTS._replace(
        labels=noisy,
        counts=np.bincount(noisy),
        noise_matrix=np.eye(CLASSES),
        teacher_logits=np.log(ROUNDED[classes])[None],
        held_out_teacher_logits=np.log(ROUNDED)[None],
    )
    for matrix in ("anchor", "confident"):
        found = NoiseMatrixCorrection(matrix=matrix).given(facts)["matrix"]
        np.testing.assert_allclose(found, ROUNDED, rtol=1e-6)
    inverse = NoiseMatrixCorrection("backward", "anchor").given(facts)["matrix"]
    np.testing.assert_allclose(inverse @ ROUNDED, np.eye(CLASSES), atol=1e-6)


ROUNDED = np.array(
    [[0.7, 0.1, 0.1, 0.1], [0.04, 0.8, 0.12, 0.04], [0.2, 0.1, 0.6, 0.1], [0.02, 0.02, 0.06, 0.9]]
)
