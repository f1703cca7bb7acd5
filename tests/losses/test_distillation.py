"""Divergences from a teacher: published values, limits, identities, and torch's.

Values printed with ten digits were computed in float64 from the formulas.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import spatial, special

from regjax.losses import token_cross_entropy
from regjax.losses.distillation import (
    decoupled_distillation,
    distillation,
    hard_distillation,
    labelled_distillation,
)

F = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
T = np.array([3.0, 0.5, 0.2, -0.7], np.float32)
DIVERGENCES = ("forward", "reverse", "jensen_shannon", "skew")
KINDS = (*DIVERGENCES, "cross_entropy")

# What the logits of the fixtures lose in float32, 0.1 and -0.7 among them, and their sums.
close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=2e-7)


@functools.partial(jax.jit, static_argnames=("kinds", "beta", "squared_temperature"))
def all_of(kinds, student, teacher, temperature=1.0, beta=0.5, squared_temperature=True):
    """Losses [kinds, ...], and the gradient of each kind's sum."""

    def loss(kind, z):
        losses = distillation(
            z,
            teacher,
            temperature=temperature,
            kind=kind,
            beta=beta,
            squared_temperature=squared_temperature,
        )
        return losses.sum(), losses

    gradients, losses = zip(
        *(jax.grad(functools.partial(loss, kind), has_aux=True)(student) for kind in kinds),
        strict=True,
    )
    return jnp.stack(losses), jnp.stack(gradients)


def pairs(size=5, bound=12.0):
    logits = hnp.arrays(np.float32, (4, size), elements=st.floats(-bound, bound, width=32))
    return st.tuples(logits, logits)


def entropy(logits):
    return special.entr(special.softmax(np.asarray(logits, np.float64), axis=-1)).sum(-1)


@pytest.mark.parametrize(
    ("temperature", "plain", "scaled", "cross_entropy", "teacher_entropy"),
    [
        (1.0, 0.1272005119, 0.1272005119, 0.6820899553, 0.5548894434),
        (2.0, 0.0456282986, 0.1825131943, 1.1587562594, 1.1131279608),
        (4.0, 0.0109074774, 0.1745196389, 1.3300817952, 1.3191743177),
    ],
)
def test_temperatures(temperature, plain, scaled, cross_entropy, teacher_entropy):
    options = {"temperature": temperature, "squared_temperature": False}
    close(distillation(F, T, **options), plain)
    close(distillation(F, T, temperature=temperature), scaled)
    close(distillation(F, T, kind="cross_entropy", **options), cross_entropy)
    close(entropy(T / temperature), teacher_entropy)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.1272005119),
        (1e-4, 0.0000127190),
        (0.1, 0.0116428223),
        (0.25, 0.0249444240),
        (0.5, 0.0351535041),
        (0.75, 0.0282885892),
        (0.9, 0.0143169377),
        (1 - 1e-4, 0.0000165855),
        (1.0, 0.1658789661),
    ],
)
def test_generalized_jensen_shannon(beta, expected):
    close(distillation(F, T, kind="jensen_shannon", beta=beta), expected, atol=6e-11)


def test_reverse_and_the_ends_of_the_mixtures():
    close(distillation(F, T, kind="reverse"), 0.1658789661)
    for kind in ("jensen_shannon", "skew"):
        close(distillation(F, T, kind=kind, beta=0.0), distillation(F, T))
        close(distillation(F, T, kind=kind, beta=1.0), distillation(F, T, kind="reverse"))
    tiny = 1e-4
    first = distillation(F, T, kind="jensen_shannon", beta=tiny)
    last = distillation(F, T, kind="jensen_shannon", beta=1 - tiny)
    np.testing.assert_allclose(first / tiny, 0.12719, atol=6e-6)
    np.testing.assert_allclose(last / tiny, 0.16585, rtol=1e-4)


def test_skew_is_continuous_at_its_ends():
    near, far = 1e-6, 1 - 1e-6
    np.testing.assert_allclose(
        distillation(F, T, kind="skew", beta=near), distillation(F, T), rtol=1e-5
    )
    np.testing.assert_allclose(
        distillation(F, T, kind="skew", beta=far), distillation(F, T, kind="reverse"), rtol=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(pairs(), st.sampled_from([1.0, 4.0]))
def test_forward_and_the_teachers_entropy_are_cross_entropy(case, temperature):
    student, teacher = case
    losses, gradients = all_of(
        ("forward", "cross_entropy"), student, teacher, temperature, squared_temperature=False
    )
    np.testing.assert_allclose(
        losses[0] + entropy(teacher / temperature), losses[1], rtol=2e-6, atol=1e-5
    )
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(pairs(bound=40.0))
def test_divergences_are_not_negative_and_vanish_on_themselves(case):
    student, teacher = case
    losses, _ = all_of(DIVERGENCES, student, teacher)
    exchanged, _ = all_of(DIVERGENCES, teacher, student)
    own, gradients = all_of(DIVERGENCES, student, student)
    assert np.all(losses >= 0.0)
    np.testing.assert_array_equal(own, np.zeros_like(own))
    np.testing.assert_array_equal(gradients, np.zeros_like(gradients))
    _, _, symmetric, skew = losses
    np.testing.assert_allclose(symmetric, skew, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(symmetric, exchanged[2], rtol=1e-5, atol=1e-7)
    assert np.all(symmetric <= np.log(2) * (1 + 1e-6))
    # scipy gives the square root, and loses a small one.
    expected = spatial.distance.jensenshannon(
        special.softmax(student.astype(np.float64), axis=-1),
        special.softmax(teacher.astype(np.float64), axis=-1),
        axis=-1,
    )
    np.testing.assert_allclose(symmetric, np.square(np.nan_to_num(expected)), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(pairs(), st.sampled_from([0.2, 0.9]))
def test_exchanging_the_models_exchanges_the_shares(case, beta):
    student, teacher = case
    found, _ = all_of(DIVERGENCES[2:], student, teacher, beta=beta)
    exchanged, _ = all_of(DIVERGENCES[2:], teacher, student, beta=1 - beta)
    np.testing.assert_allclose(found, exchanged, rtol=1e-5, atol=1e-7)


def test_high_temperatures_tend_to_the_squared_distance_of_centred_logits():
    centred = (F - F.mean()) - (T - T.mean())
    limit = np.mean(np.square(centred)) / 2
    close(limit, 0.1434375)
    temperatures = [10.0, 100.0, 1000.0]
    found = [distillation(F, T, temperature=temperature) for temperature in temperatures]
    # The logits over T are known to 1e-7 of 1, their differences of 1e-3 to 1e-4.
    np.testing.assert_allclose(found, [0.1575565, 0.1449032, 0.1435844], rtol=2e-4)
    np.testing.assert_allclose(found[-1], limit, rtol=2e-3)
    gradient = jax.grad(lambda z: distillation(z, T, temperature=1000.0))(F)
    # The next order in 1 / T.
    np.testing.assert_allclose(gradient, centred / 4, rtol=0.0, atol=3e-4)
    reverse = distillation(F, T, temperature=1000.0, kind="reverse")
    np.testing.assert_allclose(reverse, limit, rtol=2e-3)


def test_where_optax_keeps_no_digit():
    options = {"temperature": 3000.0, "squared_temperature": False}
    exact = [z.astype(np.float64) / 3000.0 for z in (F, T)]
    expected = special.rel_entr(special.softmax(exact[1]), special.softmax(exact[0])).sum()
    found = distillation(F, T, **options)
    plain = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(F / 3000.0), jax.nn.log_softmax(T / 3000.0)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert abs(plain - expected) > 0.1 * expected


def test_a_one_hot_teacher_gives_cross_entropy_and_a_uniform_one_label_smoothing():
    one_hot = np.where(np.arange(4) == 1, 0.0, -np.inf).astype(np.float32)
    for kind in ("forward", "cross_entropy"):
        close(distillation(F, one_hot, kind=kind), token_cross_entropy(F, 1))
    smoothed = np.log(np.array([0.925, 0.025, 0.025, 0.025], np.float32))
    close(
        distillation(F, smoothed, kind="cross_entropy"),
        token_cross_entropy(F, 0, label_smoothing=0.1),
    )
    close(distillation(F, smoothed, kind="cross_entropy"), 0.5968130024)
    close(
        labelled_distillation(F, np.zeros(4), 0, teacher_weight=0.1, kind="cross_entropy"),
        0.5968130024,
    )


def test_impossible_classes_count_as_probability_zero():
    student, teacher = np.append(F, np.float32(-np.inf)), np.append(T, np.float32(-np.inf))
    losses, gradients = all_of(KINDS, student, teacher, beta=0.3)
    expected, four = all_of(KINDS, F, T, beta=0.3)
    close(losses, expected)
    np.testing.assert_allclose(gradients[:, :4], four, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradients[:, 4], 0.0)
    assert distillation(np.append(F, 0.0), teacher, kind="reverse") == np.inf
    assert distillation(student, np.append(T, 0.0)) == np.inf
    disjoint = np.array([0.0, -np.inf]), np.array([-np.inf, 0.0])
    close(distillation(*disjoint, kind="jensen_shannon"), np.log(2))


def test_disjoint_certainties_have_the_largest_jensen_shannon_divergence():
    student, teacher = np.array([1e4, -1e4]), np.array([-1e4, 1e4])
    for beta in (0.2, 0.5):
        close(
            distillation(student, teacher, kind="jensen_shannon", beta=beta),
            special.entr([beta, 1 - beta]).sum(),
        )


def test_torch_has_the_same_divergences():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 9)).astype(np.float32) * 3
    for temperature in (1.0, 4.0):
        z = torch.tensor(student, requires_grad=True)
        log_p = torch.log_softmax(z / temperature, -1)
        log_q = torch.log_softmax(torch.tensor(teacher) / temperature, -1)
        expected = torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        expected = expected * temperature**2
        expected.backward()
        value, gradient = jax.value_and_grad(
            lambda z, temperature=temperature: distillation(
                z, teacher, temperature=temperature
            ).mean()
        )(student)
        np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
        np.testing.assert_allclose(gradient, z.grad, rtol=1e-5, atol=1e-6)
        reverse = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        found = distillation(student, teacher, temperature=temperature, kind="reverse").mean()
        np.testing.assert_allclose(found, reverse.item() * temperature**2, rtol=1e-5)
    log_m = torch.logaddexp(log_q + np.log(0.3), log_p + np.log(0.7))
    expected = 0.3 * torch.nn.functional.kl_div(log_m, log_q, reduction="none", log_target=True)
    expected += 0.7 * torch.nn.functional.kl_div(log_m, log_p, reduction="none", log_target=True)
    found = distillation(
        student,
        teacher,
        temperature=4.0,
        kind="jensen_shannon",
        beta=0.3,
        squared_temperature=False,
    )
    np.testing.assert_allclose(found, expected.sum(-1).detach(), rtol=2e-5)
    soft = torch.nn.functional.cross_entropy(
        torch.tensor(student), torch.softmax(torch.tensor(teacher), -1), reduction="none"
    )
    np.testing.assert_allclose(distillation(student, teacher, kind="cross_entropy"), soft, 1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_memory_is_that_of_the_distributions(kind):
    """Of both, shifted logits and probabilities; a gradient of each part of a term takes more."""
    array = jax.ShapeDtypeStruct((256, 8192), jnp.float32)
    graded = jax.jit(jax.value_and_grad(lambda s, t: distillation(s, t, kind=kind).mean()))
    found = graded.lower(array, array).compile().memory_analysis().temp_size_in_bytes
    assert found < 4.1 * 256 * 8192 * 4


def test_the_temperature_may_be_a_schedule_of_the_step():
    found = jax.jit(lambda t: distillation(F, T, temperature=t))(jnp.float32(4.0))
    close(found, 0.1745196389)


def test_weights_of_teacher_and_labels():
    labels = np.array([1, 3])
    student, teacher = np.stack([F, T]), np.stack([T, F])
    hard = token_cross_entropy(student, labels)
    soft = distillation(student, teacher, temperature=2.0)
    for weight in (0.3, np.array([0.2, 0.9], np.float32)):
        found = labelled_distillation(
            student, teacher, labels, teacher_weight=weight, temperature=2.0
        )
        close(found, (1 - weight) * hard + weight * soft)


def test_hard_labels_are_the_teachers_first_largest():
    close(hard_distillation(F, T), 0.4493130024)
    close(hard_distillation(F, -T), 3.4493130024)
    close(hard_distillation(F, np.zeros(4)), 0.4493130024)
    # A rate of .1 over the other classes is one of .1 K / (K - 1) over all.
    close(hard_distillation(F, T, label_smoothing=0.1 * 4 / 3), 0.6459796690)


@pytest.mark.parametrize(
    ("temperature", "target", "non_target", "rest"),
    [
        (1.0, 0.1193401388, 0.0547547731, 0.1435559433),
        (4.0, 0.0087310237, 0.0037001774, 0.5882025213),
    ],
)
def test_decoupled_parts(temperature, target, non_target, rest):
    def parts(alpha, beta):
        losses = decoupled_distillation(
            F, T, 0, target_weight=alpha, non_target_weight=beta, temperature=temperature
        )
        return losses / temperature**2

    close(parts(1.0, 0.0), target)
    close(parts(0.0, 1.0), non_target)
    close(1 - special.softmax(T / temperature)[0], rest)
    close(parts(1.0, rest), distillation(F, T, temperature=temperature) / temperature**2)


def test_decoupled_by_the_authors_weights():
    close(decoupled_distillation(F, T, 0), 0.6133190914)
    close(decoupled_distillation(F, T, 0, temperature=1.0), 0.5573783237)


@settings(deadline=None, max_examples=30)
@given(pairs(), hnp.arrays(np.int32, (4,), elements=st.integers(0, 4)), st.sampled_from([1.0, 4.0]))
def test_decoupled_with_the_teachers_doubt_is_distillation(case, labels, temperature):
    student, teacher = case
    probs = special.softmax(teacher.astype(np.float64) / temperature, axis=-1)
    doubt = (1 - probs[np.arange(4), labels]).astype(np.float32)
    found, expected = _decoupled_and_whole(student, teacher, labels, doubt, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@jax.jit
def _decoupled_and_whole(student, teacher, labels, weight, temperature):
    return decoupled_distillation(
        student, teacher, labels, non_target_weight=weight, temperature=temperature
    ), distillation(student, teacher, temperature=temperature)


def test_of_two_classes_only_the_target_is_left():
    student, teacher = np.array([[0.3, -1.0], [2.0, 1.0]]), np.array([[1.0, 2.0], [-3.0, 1.0]])
    found = decoupled_distillation(student, teacher, np.array([0, 1]), non_target_weight=1e3)
    close(found, distillation(student, teacher, temperature=4.0))


def test_a_teacher_sure_of_the_label_has_no_opinion_on_the_others():
    sure = np.where(np.arange(4) == 2, 0.0, -np.inf).astype(np.float32)
    value, gradient = jax.value_and_grad(
        lambda z: decoupled_distillation(z, sure, 2, temperature=1.0)
    )(F)
    close(value, token_cross_entropy(F, 2))
    np.testing.assert_allclose(gradient, special.softmax(F) - np.eye(4)[2], rtol=1e-5, atol=1e-6)


def test_labels_out_of_range_give_nan_and_only_there():
    rows = np.stack([F] * 4)
    labels = np.array([-1, 0, 4, 3])
    for found in (
        decoupled_distillation(rows, rows + 1, labels),
        labelled_distillation(rows, rows + 1, labels),
    ):
        np.testing.assert_array_equal(np.isnan(found), [True, False, True, False])


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (distillation, (F, T), {"kind": "sideways"}, ValueError, "kind must be.*'sideways'"),
        (distillation, (F, T), {"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\]; got 1.5"),
        (distillation, (F, T), {"temperature": 0.0}, ValueError, "temperature must be positive"),
        (distillation, (F, T), {"temperature": np.nan}, ValueError, "must be positive; got nan"),
        (distillation, (F[0], T[0]), {}, ValueError, r"student has shape \(\)"),
        (decoupled_distillation, (F, T, 0), {"temperature": -1.0}, ValueError, "positive; got -1"),
        (decoupled_distillation, (F[:1], T[:1], 0), {}, ValueError, r"two classes.*\(1,\)"),
        (decoupled_distillation, (F, T, 0.0), {}, TypeError, "labels must be integers; got float"),
        (decoupled_distillation, (F, T, np.zeros(1, int)), {}, ValueError, r"labels.*\(1,\).*\(\)"),
        (labelled_distillation, (F, T, 0.0), {}, TypeError, "labels must be integers; got float"),
        (
            labelled_distillation,
            (F, T, 0),
            {"teacher_weight": np.ones(4)},
            ValueError,
            r"teacher_weight has shape \(4,\)",
        ),
        (hard_distillation, (F, T), {"label_smoothing": 2.0}, ValueError, "label_smoothing"),
    ],
)
def test_input_that_does_not_fit_raises(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
