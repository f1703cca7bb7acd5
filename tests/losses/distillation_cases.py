"""Every distillation loss with options, and the same formula in float64 NumPy."""

import dataclasses
from collections.abc import Callable

import numpy as np

from regjax.losses.adaptive_distillation import adaptive_margin, adaptive_mixing, margin_offsets
from regjax.losses.distillation import (
    decoupled_distillation,
    distillation,
    hard_distillation,
    labelled_distillation,
)
from regjax.losses.feature_distillation import patient_features, pearson_features
from regjax.losses.relational_distillation import correlation_distillation
from regjax.losses.sequence_distillation import (
    on_policy_distillation,
    sequence_cross_entropy,
    sequence_distillation,
)
from regjax.losses.standardization import standardize_logits
from regjax.losses.top_k_teacher import teacher_top_k, top_k_distillation

ROWS = (5, 6)
BATCHES = (2, 5, 4)
SEQUENCES = (2, 4, 5)
LABELS = np.array([0, 5, 2, 2, 4])
TOKENS = np.array([[0, 4, 2, 2], [3, 1, 0, 4]])
GAMMAS = np.array([0.9, 0.5, -0.2, 0.3, 1.0, 0.0], np.float32)
WEIGHTS = np.array([0.1, 0.9, 0.5, 0.0, 1.0], np.float32)
OFFSETS = -np.log(np.maximum(GAMMAS, 0.05))
MARGINS = np.random.default_rng(9).normal(size=(6, 6)).astype(np.float32)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(log_a, log_b):
    """Terms of probability zero count as zero."""
    a = np.exp(log_a)
    return (a * (np.where(a > 0, log_a, 0) - np.where(a > 0, log_b, 0))).sum(-1)


def cross_entropy(log_q, log_p):
    q = np.exp(log_q)
    return -(q * np.where(q > 0, log_p, 0)).sum(-1)


def divergence(log_q, log_p, kind="forward", beta=0.5):
    if kind == "cross_entropy":
        return cross_entropy(log_q, log_p)
    if kind == "forward" or (kind in ("jensen_shannon", "skew") and beta == 0):
        return kl(log_q, log_p)
    if kind == "reverse" or beta == 1:
        return kl(log_p, log_q)
    log_m = np.logaddexp(np.log(beta) + log_q, np.log(1 - beta) + log_p)
    first, second = (beta, 1 - beta) if kind == "jensen_shannon" else (1 - beta, beta)
    return first * kl(log_q, log_m) + second * kl(log_p, log_m)


def soft(temperature=1.0, squared=True, **options):
    def reference(student, teacher, _=None):
        loss = divergence(
            log_softmax(teacher / temperature), log_softmax(student / temperature), **options
        )
        return loss * temperature**2 if squared else loss

    return reference


def decoupled(alpha, beta, temperature):
    def reference(student, teacher, i):
        log_p = log_softmax(student / temperature)
        log_q = log_softmax(teacher / temperature)
        y = LABELS[i]
        pairs, others = [], []
        for log_probs in (log_q, log_p):
            rest = np.delete(log_probs, y)
            pairs.append(np.array([log_probs[y], np.logaddexp.reduce(rest)]))
            others.append(log_softmax(rest))
        return temperature**2 * (alpha * kl(*pairs) + beta * kl(*others))

    return reference


def top_k(k, temperature, tail, **options):
    def reference(student, teacher, _):
        log_q = log_softmax(teacher / temperature)
        log_p = log_softmax(student / temperature)
        order = np.argsort(-log_q, kind="stable")
        with np.errstate(divide="ignore"):
            if tail == "renormalize":
                log_q, log_p = log_softmax(log_q[order[:k]]), log_softmax(log_p[order[:k]])
            else:
                log_q, log_p = (
                    np.append(x[order[:k]], np.logaddexp.reduce(x[order[k:]]))
                    for x in (log_q, log_p)
                )
        return temperature**2 * divergence(log_q, log_p, **options)

    return reference


def mixing(gamma, clip=(0.0, 1.0), temperature=1.0):
    def reference(student, teacher, i):
        log_p, log_q = log_softmax(student), log_softmax(teacher / temperature)
        q, y = np.exp(log_q), LABELS[i]
        others = np.delete(q, y)
        margin = {
            "max": q[y] - others.max(),
            "average": q[y] - others.mean(),
            "class": float(GAMMAS[y]),
        }[gamma]
        alpha = min(max(margin, clip[0]), clip[1])
        return (1 - alpha) * -log_p[y] + alpha * cross_entropy(log_q, log_p)

    return reference


def margin_cross_entropy(margins):
    def reference(student, teacher, _):
        total = 0.0
        for k, q in enumerate(np.exp(log_softmax(teacher))):
            total += q * np.logaddexp.reduce(margins[k] + student - student[k]) if q > 0 else 0.0
        return total

    return reference


def standardized(student, teacher, _):
    z = [(x - x.mean()) / (x.std(ddof=1) + 1e-7) for x in (student, teacher)]
    return soft(2.0)(*z)


def by_row(formula):
    """`formula(student [K], teacher [K], index)` of every example that counts."""

    def reference(student, teacher, where):
        losses = np.zeros(where.shape)
        for index in np.ndindex(where.shape):
            if where[index]:
                losses[index] = formula(student[index], teacher[index], index)
        return losses

    return reference


def by_sequence(formula):
    """`formula(student [M, K], teacher [M, K], index, kept)` of the positions that count."""

    def reference(student, teacher, where):
        losses = np.zeros(where.shape[:-1])
        for index in np.ndindex(losses.shape):
            kept = where[index]
            if kept.any():
                losses[index] = formula(student[index][kept], teacher[index][kept], index, kept)
        return losses

    return reference


def pearson(student, teacher, *_):
    s, t = ((x - x.mean(0)) / (x.std(0) + 1e-6) for x in (student, teacher))
    return np.square(s - t).mean() / 2


def patient(student, teacher, *_):
    s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
    return np.square(s - t).sum()


def correlations(beta, gamma, temperature):
    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8)

    def reference(student, teacher, where):
        losses = np.zeros(where.shape)
        for group in np.ndindex(where.shape[:-1]):
            kept = where[group]
            p, q = (np.exp(log_softmax(x[group][kept] / temperature)) for x in (student, teacher))
            inter = np.array([1 - correlation(*rows) for rows in zip(p, q, strict=True)])
            # The share of every example in the correlations over the batch.
            intra = np.ones(kept.sum())
            for a, b in zip(p.T, q.T, strict=True):
                a, b = a - a.mean(), b - b.mean()
                length, other = np.linalg.norm(a), np.linalg.norm(b)
                factor = length * other / (length * other + 1e-8)
                if length * other > 0:
                    unlike = np.square(a / length - b / other) / 2
                    intra -= (factor - kept.sum() * factor * unlike) / p.shape[1]
            losses[group][kept] = temperature**2 * (beta * inter + gamma * intra)
        return losses

    return reference


def on_policy(gamma, single_step, normalize):
    def formula(student, teacher, index, kept):
        """Steps that do not count keep their place among the powers of gamma."""
        log_p, log_q = log_softmax(student), log_softmax(teacher)
        each = np.arange(len(log_p)), TOKENS[index][kept]
        rewards = log_q[each] - log_p[each]
        steps = np.flatnonzero(kept)
        powers = np.where(steps >= steps[:, None], float(gamma) ** abs(steps - steps[:, None]), 0.0)
        advantages = (powers - np.eye(len(steps)) if single_step else powers) @ rewards
        if normalize:
            advantages = advantages / powers.sum(-1)
        own = kl(log_p, log_q).sum() if single_step else 0.0
        return own - advantages @ log_p[each]

    return by_sequence(formula)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    # (student, teacher, where, **options)
    loss: Callable
    # (student, teacher, where) in float64
    reference: Callable
    shape: tuple[int, ...] = ROWS
    # Accepts teacher_gradient.
    into_teacher: bool = False
    # The value's derivative is not the gradient on purpose.
    surrogate: bool = False
    # Takes the teacher itself, and not what was made of it.
    takes_teacher: bool = True


def case(name, function, reference, *arguments, shape=ROWS, case_options=None, **options):
    def loss(student, teacher, where, **more):
        return function(student, teacher, *arguments, where=where, **options, **more)

    return Case(name, loss, reference, shape, **(case_options or {}))


BOTH = {"into_teacher": True}


def soft_case(**options):
    names = {"squared_temperature": "squared"}
    known = {names.get(key, key): value for key, value in options.items()}
    name = "distillation " + ", ".join(map(str, options.values()))
    return case(name, distillation, by_row(soft(**known)), case_options=BOTH, **options)


def top_k_case(k, temperature=1.0, tail="bucket", **options):
    def loss(student, teacher, where):
        kept = teacher_top_k(teacher, k, temperature=temperature)
        return top_k_distillation(
            student, *kept, temperature=temperature, tail=tail, where=where, **options
        )

    name = f"top {k}, {temperature}, {tail}, {options}"
    reference = by_row(top_k(k, temperature, tail, **options))
    return Case(name, loss, reference, takes_teacher=False)


def standardized_loss(student, teacher, where, **options):
    student = standardize_logits(student, where=where)
    teacher = standardize_logits(teacher, where=where)
    return distillation(student, teacher, temperature=2.0, where=where, **options)


def sequence_reference(normalize, **options):
    def formula(student, teacher, *_):
        losses = soft(**options)(student, teacher)
        return losses.mean() if normalize else losses.sum()

    return by_sequence(formula)


def tokens_reference(normalize):
    def formula(student, _, index, kept):
        losses = -log_softmax(student)[np.arange(kept.sum()), TOKENS[index][kept]]
        return losses.mean() if normalize else losses.sum()

    return by_sequence(formula)


def labelled_reference(student, teacher, i):
    log_p = log_softmax(student)
    weight = WEIGHTS[i].astype(np.float64)
    return (1 - weight) * -log_p[LABELS[i]] + weight * soft(4.0)(student, teacher)


def hard_reference(student, teacher, _):
    log_p = log_softmax(student)
    return 0.9 * -log_p[np.argmax(teacher)] - 0.1 * log_p.mean()


def on_policy_case(gamma, single_step, normalize):
    return case(
        f"on policy {gamma}, {single_step}, {normalize}",
        on_policy_distillation,
        on_policy(gamma, single_step, normalize),
        TOKENS,
        shape=SEQUENCES,
        case_options={"surrogate": True},
        gamma=gamma,
        single_step=single_step,
        length_normalize=normalize,
    )


CASES = [
    soft_case(),
    soft_case(temperature=4.0),
    soft_case(kind="reverse", temperature=2.0),
    soft_case(kind="jensen_shannon", beta=0.25, temperature=2.0),
    soft_case(kind="skew", beta=0.75),
    soft_case(kind="cross_entropy", temperature=2.0),
    Case("standardized", standardized_loss, by_row(standardized), ROWS, into_teacher=True),
    case("hard", hard_distillation, by_row(hard_reference), label_smoothing=0.1),
    case(
        "labelled",
        labelled_distillation,
        by_row(labelled_reference),
        LABELS,
        case_options=BOTH,
        teacher_weight=WEIGHTS,
        temperature=4.0,
    ),
    case(
        "decoupled", decoupled_distillation, by_row(decoupled(1, 8, 4)), LABELS, case_options=BOTH
    ),
    case(
        "correlation weighed",
        correlation_distillation,
        correlations(0.5, 2, 4),
        shape=BATCHES,
        case_options=BOTH,
        inter_weight=0.5,
        intra_weight=2.0,
        temperature=4.0,
    ),
    case("pearson", pearson_features, by_sequence(pearson), shape=BATCHES, case_options=BOTH),
    case("patient", patient_features, by_sequence(patient), shape=BATCHES, case_options=BOTH),
    case(
        "patient, plain",
        patient_features,
        by_sequence(lambda s, t, *_: np.square(s - t).sum()),
        shape=BATCHES,
        case_options=BOTH,
        normalize=False,
    ),
    top_k_case(2),
    top_k_case(3, 2.0, kind="reverse"),
    top_k_case(1, 4.0, kind="jensen_shannon", beta=0.25),
    top_k_case(6, 2.0),
    top_k_case(3, 2.0, "renormalize"),
    case("mixing, class", adaptive_mixing, by_row(mixing("class")), LABELS, GAMMAS),
    case(
        "mixing, max",
        adaptive_mixing,
        by_row(mixing("max", (0.2, 0.5), 2.0)),
        LABELS,
        clip=(0.2, 0.5),
        teacher_temperature=2.0,
    ),
    case(
        "margin, offsets",
        adaptive_margin,
        by_row(margin_cross_entropy(np.subtract.outer(OFFSETS, OFFSETS))),
        margin_offsets(GAMMAS),
    ),
    case("margin, matrix", adaptive_margin, by_row(margin_cross_entropy(MARGINS)), margins=MARGINS),
    case(
        "sequence",
        sequence_distillation,
        sequence_reference(False, temperature=2.0, kind="reverse"),
        shape=SEQUENCES,
        case_options=BOTH,
        temperature=2.0,
        kind="reverse",
    ),
    case(
        "sequence mean",
        sequence_distillation,
        sequence_reference(True),
        shape=SEQUENCES,
        case_options=BOTH,
        length_normalize=True,
    ),
    Case(
        "sequence tokens",
        lambda s, t, where: sequence_cross_entropy(s, TOKENS, where=where),
        tokens_reference(False),
        SEQUENCES,
        takes_teacher=False,
    ),
    on_policy_case(0.5, True, True),
    on_policy_case(0.5, False, False),
]
