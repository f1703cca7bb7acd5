"""What holds for every objective of classification: one value however it is called, finite slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.errors import InputError
from regjax.objectives.classification import (
    AdaptiveAlpha,
    AdaptiveMargin,
    ClassBalanced,
    CrossEntropy,
    Distillation,
    Focal,
    GroupDro,
    Ldam,
    LogitAdjusted,
    NoiseMatrixCorrection,
    NoiseRobust,
    Robust,
)
from regjax.objectives.classification.objective import of_targets
from tests.objectives.classification_cases import (
    BATCH,
    CLASSES,
    FACTS,
    LABELS,
    LOGITS,
    OUTPUTS,
    PARTNERS,
    SIZE,
    given_of,
    loss_of,
    outputs,
    sums_of,
)

# Two of each, with other numbers, the first at its limits where it has some.
PAIRS = [
    (CrossEntropy(0.0), CrossEntropy(-0.4)),
    (CrossEntropy(0.0, "backward"), CrossEntropy(0.2, "backward")),
    (CrossEntropy(0.0, "forward"), CrossEntropy(0.2, "forward")),
    (NoiseMatrixCorrection("forward"), NoiseMatrixCorrection("forward")),
    (NoiseMatrixCorrection("backward", "anchor", 1.0), NoiseMatrixCorrection("backward", "anchor", 0.9)),
    (NoiseRobust("gce", q=0.0), NoiseRobust("gce", q=0.7)),
    (NoiseRobust("mae"), NoiseRobust("mae", q=0.1)),
    (NoiseRobust("rce"), NoiseRobust("rce")),
    (NoiseRobust("nce"), NoiseRobust("nce")),
    (NoiseRobust("sce", active_weight=0.5), NoiseRobust("sce", active_weight=6.0)),
    (NoiseRobust("apl", passive_weight=0.0), NoiseRobust("apl", passive_weight=0.1)),
    (
        NoiseRobust("soft_bootstrapping", label_weight=1.0),
        NoiseRobust("soft_bootstrapping", label_weight=0.8),
    ),
    (NoiseRobust("hard_bootstrapping"), NoiseRobust("hard_bootstrapping")),
    (NoiseRobust("ldr", temperature=0.1), NoiseRobust("ldr", temperature=2.0, margin=0.5)),
    (Distillation(0.0, 1.0), Distillation(0.9, 4.0)),
    (Distillation(0.3, 1.0, "reverse"), Distillation(1.0, 2.0, "reverse")),
    (Distillation(0.3, 1.0, "jensen_shannon"), Distillation(1.0, 2.0, "jensen_shannon")),
    (Distillation(1.0, 1.0, "cross_entropy"), Distillation(0.5, 3.0, "cross_entropy")),
    (
        Distillation(1.0, 4.0, "dkd", label_weight=1.0, non_target_weight=0.0),
        Distillation(0.5, 2.0, "dkd", label_weight=0.1, non_target_weight=8.0),
    ),
    (Distillation(0.5, 1.0, "dist"), Distillation(0.2, 4.0, "dist", intra_weight=2.0)),
    (AdaptiveAlpha(1.0), AdaptiveAlpha(3.0)),
    (AdaptiveAlpha(1.0, by="example"), AdaptiveAlpha(3.0, by="example")),
    (AdaptiveMargin(1.0), AdaptiveMargin(2.0, smallest=0.3)),
    (LogitAdjusted(0.0), LogitAdjusted(1.0)),
    (Ldam(0.0, 1.0), Ldam(0.5, 30.0, beta=0.99)),
    (ClassBalanced(0.0), ClassBalanced(0.99)),
    (Focal(0.0), Focal(2.0)),
    (GroupDro(0.0), GroupDro(1.0, adjustment=0.5)),
    (Robust("labels", "standard"), Robust("labels", "standard")),
    (Robust("teacher", "balanced", temperature=1.0), Robust("teacher", "balanced", temperature=3.0)),
    (Robust("labels", tradeoff=0.0), Robust("labels", tradeoff=0.7, floor=0.05)),
    (
        Robust(held_out_labels="teacher", step_size=0.0),
        Robust(held_out_labels="teacher", step_size=1.0, temperature=2.0),
    ),
    (Robust(risk="zero_one", iterate="average"), Robust(risk="zero_one", iterate="average")),
]  # fmt: skip
EACH = pytest.mark.parametrize(
    "pair", PAIRS, ids=[f"{type(a).__name__}-{i}" for i, (a, _) in enumerate(PAIRS)]
)
OF_LABELS = [
    pair
    for pair in PAIRS
    # Their losses are no sums over labels: of the batch as a whole, or of the teacher alone.
    if not isinstance(pair[0], AdaptiveMargin | GroupDro | Ldam | ClassBalanced)
    and getattr(pair[0], "target", "labels") == "labels"
]


@jax.jit
def run(objective, given, of):
    """A value, its slope and, where there is a state, the states after two adjustments."""

    def loss(logits):
        now = of._replace(logits=logits)
        state = [objective.initial(given)] if hasattr(objective, "initial") else []
        for _ in 2 * state:
            state.append(objective.adjust(state[-1], now, BATCH, given))
        total, weight = objective(now, BATCH, given, *state[-1:])["loss"]
        return total / weight, state

    return jax.value_and_grad(loss, has_aux=True)(of.logits)


@EACH
def test_runs_side_by_side_are_runs_one_after_another(pair):
    runs = [
        (objective, given_of(objective), outputs(logits))
        for objective, logits in zip(pair, (LOGITS, LOGITS[::-1] * 2), strict=True)
    ]
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])  # noqa: E731
    together = jax.vmap(run)(*jax.tree.map(stack, *runs))
    for i, alone in enumerate(runs):
        jax.tree.map(
            lambda found, expected, i=i: np.testing.assert_allclose(
                found[i], expected, rtol=2e-6, atol=2e-6
            ),
            together,
            run(*alone),
        )


@EACH
def test_slopes_are_finite_and_sum_to_zero(pair):
    """The level of the logits does not matter; a network that is certain, or says nothing, can learn."""
    for objective in pair:
        for scale in (0.0, 1.0, 60.0):
            of = outputs(scale * LOGITS)
            (value, _), slope = run(objective, given_of(objective), of)
            assert np.isfinite(value) and np.isfinite(slope).all()
            # A log-softmax of large logits is rounded as they are.
            rounding = 2e-7 * (1 + np.abs(of.logits).max()) * (1 + np.abs(slope).max())
            np.testing.assert_allclose(slope.sum(axis=-1), 0.0, atol=rounding)


@EACH
def test_the_loss_is_averaged_and_hits_are_counted(pair):
    sums = sums_of(pair[1])
    assert set(sums) == {"loss", "accuracy"}
    assert all(leaf.dtype == jnp.float32 and leaf.shape == () for leaf in jax.tree.leaves(sums))
    assert sums["accuracy"] == (np.sum(LOGITS.argmax(1) == LABELS), SIZE)


@pytest.mark.parametrize(
    "objective", [b for _, b in OF_LABELS], ids=[type(b).__name__ for _, b in OF_LABELS]
)
def test_mixed_targets_mix_the_losses(objective):
    given = given_of(objective)
    ends = [
        loss_of(objective, batch=with_targets(labels, np.eye(CLASSES)[labels]), given=given)
        for labels in (LABELS, PARTNERS)
    ]
    mixed = 0.3 * np.eye(CLASSES)[LABELS] + 0.7 * np.eye(CLASSES)[PARTNERS]
    found = loss_of(objective, batch=with_targets(LABELS, mixed), given=given)
    np.testing.assert_allclose(found, 0.3 * ends[0] + 0.7 * ends[1], rtol=2e-6)


def test_every_example_has_its_own_mixture():
    """Also with itself, with its own class, or of nothing of its own label."""
    shares = np.linspace(0.0, 1.0, SIZE)[:, None]
    partners = np.where(np.arange(SIZE) % 4 == 1, LABELS, PARTNERS)
    mixed = shares * np.eye(CLASSES)[LABELS] + (1 - shares) * np.eye(CLASSES)[partners]
    table = jnp.asarray(LOGITS, jnp.float32)
    of_label = lambda labels: jnp.take_along_axis(table, labels[:, None], axis=1)[:, 0]  # noqa: E731
    found = of_targets(of_label, with_targets(LABELS, mixed))
    np.testing.assert_allclose(found, np.sum(mixed * LOGITS, axis=1), rtol=1e-5, atol=1e-6)


def with_targets(labels, targets):
    changed = {
        "labels": jnp.asarray(labels, jnp.int32),
        "targets": jnp.asarray(targets, jnp.float32),
    }
    return {**BATCH, **changed}


@EACH
def test_a_batch_without_targets_has_those_of_its_labels(pair):
    bare = {key: value for key, value in BATCH.items() if key != "targets"}
    assert sums_of(pair[1], batch=bare) == sums_of(pair[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseRobust(q=1.5), "NoiseRobust.q is 1.5"),
        (lambda: NoiseRobust(label_weight=-0.1), "NoiseRobust.label_weight"),
        (lambda: Distillation(temperature=0.0), "Distillation.temperature is 0.0"),
        (lambda: Distillation(alpha=1.5), "Distillation.alpha is 1.5"),
        (lambda: Robust(tradeoff=2.0), "Robust.tradeoff"),
        (lambda: Robust(adjust_every=0), "Robust.adjust_every is 0"),
        (lambda: Ldam(beta=1.1), "Ldam.beta"),
        (lambda: CrossEntropy(1.5).given(FACTS), "CrossEntropy.rate is 1.5"),
        (lambda: CrossEntropy(-0.1, "forward").given(FACTS), "CrossEntropy.rate is -0.1"),
        (lambda: CrossEntropy(1.0, "backward").given(FACTS), "CrossEntropy.rate is 1"),
        (lambda: Robust(floor=0.3).given(FACTS), "Robust.floor is 0.3"),
        (
            lambda: LogitAdjusted().given(FACTS._replace(counts=np.array([3, 0, 1, 1]))),
            "LogitAdjusted: class 1 has no training example",
        ),
        (
            lambda: AdaptiveAlpha().given(FACTS._replace(held_out_labels=np.array([0, 1, 3]))),
            "AdaptiveAlpha: class 2 has no held-out example",
        ),
        (lambda: Robust().given(FACTS._replace(held_out_labels=None)), "Robust needs held-out"),
        (lambda: GroupDro().given(FACTS._replace(held_out_labels=None)), "GroupDro needs held-out"),
        (
            lambda: AdaptiveMargin().given(FACTS._replace(held_out_teacher_logits=None)),
            "AdaptiveMargin reads its teacher on held-out",
        ),
        (lambda: Robust().given(FACTS._replace(teacher_logits=None)), "teacher='cached'"),
        (
            lambda: NoiseMatrixCorrection(matrix="confident").given(
                FACTS._replace(teacher_logits=None)
            ),
            "matrix='confident' is estimated from a teacher",
        ),
        (
            lambda: NoiseMatrixCorrection("backward").given(
                FACTS._replace(noise_matrix=np.full((CLASSES, CLASSES), 1 / CLASSES))
            ),
            "nearly singular",
        ),
        (
            lambda: Distillation()(OUTPUTS, {"labels": BATCH["labels"]}, {}),
            "Distillation needs a teacher",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_numbers_are_leaves_and_choices_are_not():
    assert jax.tree.leaves(Distillation(0.5, 2.0, "dkd")) == [0.5, 2.0, 1.0, 8.0, 1.0, 1.0]
    assert jax.tree.leaves(CrossEntropy(0.1, "forward")) == [0.1]
    assert jax.tree.structure(Robust("labels")) != jax.tree.structure(Robust("teacher"))
    assert jax.tree.map(lambda x: x, Robust("labels", "balanced")) == Robust("labels", "balanced")
