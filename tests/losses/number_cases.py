"""Every loss of numbers, orders, bags, lists and samples, and its formula in float64 NumPy."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from regjax.losses.aggregate import aggregate_response
from regjax.losses.numeric import ordered_quantiles, pinball, relative_error
from regjax.losses.ordinal import coral, corn, earth_mover, fidelity
from regjax.losses.policy import generalized_policy_gradient, sampled_kl
from regjax.losses.ranking import label_aggregation, loss_aggregation, pairwise_ranking
from regjax.losses.soft_labels import histogram_levels, soft_label_loss, two_hot
from regjax.scores import TokenGrid

VALUES = np.array([1.0, 2.0, 3.5, 4.0, 7.0])
GRID = TokenGrid.from_ids([5, 0, 3, 1, 6], VALUES)
TOKENS = [5, 0, 3, 1, 6]
GRID3 = TokenGrid.from_ids([0, 1, 2], [1.0, 2.0, 4.0])
BINS = TokenGrid.from_ids([0, 1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0, 5.0])
EDGES = np.array([0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
LEVELS = [0.1, 0.5, 0.8]
WEIGHTS = np.array([1.0, 0.5])


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def log_sigmoid(z):
    return -np.logaddexp(0.0, -z)


def normal(z):
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def soft(kind="cross_entropy", normalize=False):
    def formula(z, q):
        log_p = log_softmax(z)[TOKENS]
        if normalize:
            log_p = log_softmax(log_p)
        kept = q > 0
        entropy = -np.sum(q[kept] * np.log(q[kept])) if kind == "kl" else 0.0
        return -np.sum(q[kept] * log_p[kept]) - entropy

    return formula


def histogram(z, y, sigma=0.75):
    masses = np.diff([normal((edge - y) / sigma) for edge in EDGES])
    return -np.sum(masses / masses.sum() * log_softmax(z))


def mover(kind):
    def formula(z, q):
        p = np.exp(log_softmax(z[TOKENS]))
        difference = np.cumsum(p - q)[:-1]
        power = np.abs(difference) if kind == "plain" else difference**2
        total = np.sum(power * np.diff(VALUES))
        return math.sqrt(total / 5) if kind == "root_mean_squared" else total

    return formula


def thresholds(z, y, conditional):
    total = 0.0
    for k in range(len(z)):
        if not conditional or y >= k:
            total -= log_sigmoid(z[k]) if y > k else log_sigmoid(-z[k])
    return total


def fidelity_formula(scores, preference, epsilon=1e-8):
    d = (scores[0] - scores[1]) / math.sqrt(2.0)
    agreed = math.sqrt(normal(d) * preference + epsilon)
    return 1 - agreed - math.sqrt(normal(-d) * (1 - preference) + epsilon)


def pinball_formula(q, y):
    return np.mean(
        [tau * (y - v) if y >= v else (tau - 1) * (y - v) for tau, v in zip(LEVELS, q, strict=True)]
    )


def ordered(o, y):
    q = [o[0]]
    for x in o[1:]:
        q.append(q[-1] + np.logaddexp(0.0, x))
    return pinball_formula(q, y)


def bag(loss, rho):
    def squared(f, y):
        return (f - y) ** 2

    def of_probability(log_p, log_rest, y):
        return -y * log_p - (1 - y) * log_rest

    def formula(f, y):
        if loss == "squared":
            return (1 - rho) * squared(f.mean(), y) + rho * np.mean(squared(f, y))
        count = np.log(len(f))
        means = [np.logaddexp.reduce(log_sigmoid(x)) - count for x in (f, -f)]
        each = [of_probability(log_sigmoid(x), log_sigmoid(-x), y) for x in f]
        return (1 - rho) * of_probability(*means, y) + rho * np.mean(each)

    return formula


PHI = {
    "logistic": lambda z: np.logaddexp(0.0, -z),
    "hinge": lambda z: max(0.0, 0.7 - z),
    "squared_hinge": lambda z: max(0.0, 0.7 - z) ** 2,
}


def pairwise(surrogate, cost):
    def formula(f, y):
        total = costs = 0.0
        for i in range(len(f)):
            for j in range(len(f)):
                if y[i] > y[j]:
                    c = y[i] - y[j] if cost == "difference" else 1.0
                    total += c * PHI[surrogate](f[i] - f[j])
                    costs += c
        return total / costs if costs else 0.0

    return formula


def by_label(surrogate, normalize):
    def formula(f, y):
        total = 0.0
        for k, weight in enumerate(WEIGHTS):
            positive, negative = f[y[:, k] == 1], f[y[:, k] == 0]
            pairs = [PHI[surrogate](a - b) for a in positive for b in negative]
            if pairs:
                total += weight * sum(pairs) / (len(pairs) if normalize else len(f) ** 2)
        return total

    return formula


def by_sum(f, y):
    return pairwise("logistic", "difference")(f, y @ WEIGHTS)


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


def one_by_one(formula):
    """`formula(row, target)` of every example that counts."""

    def reference(x, y, where):
        losses = np.zeros(where.shape)
        for index in np.ndindex(where.shape):
            if where[index]:
                losses[index] = formula(x[index], y[index])
        return losses

    return reference


def of_items(formula, with_targets):
    """`formula(items, target)` of the items of each list that count; zero for an empty list."""

    def reference(x, y, where):
        losses = np.zeros(where.shape[:-1])
        for index in np.ndindex(losses.shape):
            kept = where[index]
            if kept.any():
                target = y[index][kept] if with_targets else y[index]
                losses[index] = formula(x[index][kept], target)
        return losses

    return reference


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    # (predictions, targets, where)
    loss: Callable
    # The same in float64, with a mask that is never None.
    reference: Callable
    shape: tuple[int, ...]
    targets: np.ndarray
    # What the shape of `where` leaves of that of the predictions.
    mask_shape: tuple[int, ...]
    # The mathematics is finite at +-1e4.
    extreme: bool = True
    # What the function calls its predictions.
    argument: str = "logits"
    # The value's derivative is not the gradient on purpose.
    surrogate: bool = False


def whole(y):
    return jnp.nan_to_num(y, nan=-100.0, posinf=-100.0, neginf=-100.0).astype(jnp.int32)


RNG = np.random.default_rng(11)
SOFT = RNG.dirichlet(np.ones(5), 4)
SOFT[1] = [0.0, 0.0, 1.0, 0.0, 0.0]
SOFT[2, :2] = 0.0
SOFT /= SOFT.sum(-1, keepdims=True)
NUMBERS = np.array([3.2, 0.5, 5.0, -2.0])
CLASSES = np.array([2.0, 0.0, 3.0, 1.0])
PREFERENCES = np.array([0.9, 0.3, 1.0, 0.0])
RELEVANCE = np.array([[2.0, 0, 1, 2, 0], [1, 1, 0, 0, 0], [0, 3, 3, 1, 0]])
LABELS = (RNG.random((3, 5, 2)) < 0.5).astype(float)
PROPORTIONS = np.array([0.5, 0.25, 1.0])


def single(name, loss, formula, width, targets, argument="logits", extreme=True):
    shape = (4, width) if width else (4,)
    return Case(name, loss, one_by_one(formula), shape, targets, (4,), extreme, argument)


def soft_case(**options):
    def loss(x, y, where):
        return soft_label_loss(x, y, GRID, where=where, **options)

    return single(f"soft {options}", loss, soft(**options), 7, SOFT)


def mover_case(kind):
    def loss(x, y, where):
        return earth_mover(x, y, GRID, kind=kind, where=where)

    return single(f"earth mover {kind}", loss, mover(kind), 7, SOFT)


def bag_case(kind, weight):
    def loss(x, y, where):
        return aggregate_response(x, y, instance_weight=weight, loss=kind, where=where)

    targets = NUMBERS[:3] if kind == "squared" else PROPORTIONS
    reference = of_items(bag(kind, weight), False)
    return Case(
        f"bag {kind} {weight}", loss, reference, (3, 4), targets, (3, 4), argument="predictions"
    )


def list_case(name, function, formula, targets, **options):
    def loss(x, y, where):
        return function(x, y, where=where, **options)

    shape = (3, 5)
    return Case(name, loss, of_items(formula, True), shape, targets, shape, argument="scores")


def policy(x, y, where):
    return generalized_policy_gradient(x[..., 0], x[..., 1], y, reward_weight=0.3, where=where)


def kl_case(kind):
    def loss(x, y, where):
        return sampled_kl(x, y, kind=kind, where=where)

    def formula(x, y):
        return KL[kind](x - y)

    return single(f"kl {kind}", loss, formula, None, NUMBERS, "log_probs", kind != "k3")


CASES = [
    soft_case(),
    soft_case(kind="kl", normalize=True),
    single(
        "two-hot",
        lambda x, y, where: soft_label_loss(x, two_hot(y, [1.0, 2.0, 4.0]), GRID3, where=where),
        lambda z, y: -np.interp(y, [1, 2, 4], log_softmax(z)),
        3,
        NUMBERS,
    ),
    single(
        "histogram",
        lambda x, y, where: soft_label_loss(
            x, histogram_levels(y, EDGES, sigma=0.75), BINS, where=where
        ),
        histogram,
        5,
        NUMBERS,
    ),
    *(mover_case(kind) for kind in ("plain", "squared", "root_mean_squared")),
    single(
        "coral",
        lambda x, y, where: coral(x, whole(y), where=where),
        lambda z, y: thresholds(z, y, False),
        3,
        CLASSES,
    ),
    single(
        "corn",
        lambda x, y, where: corn(x, whole(y), where=where),
        lambda z, y: thresholds(z, y, True),
        3,
        CLASSES,
    ),
    single(
        "fidelity",
        lambda x, y, where: fidelity(x[..., 0], x[..., 1], y, where=where),
        fidelity_formula,
        2,
        PREFERENCES,
        "first",
    ),
    single(
        "pinball",
        lambda x, y, where: pinball(x, y, LEVELS, where=where),
        pinball_formula,
        3,
        NUMBERS,
        "quantiles",
    ),
    single(
        "ordered pinball",
        lambda x, y, where: pinball(ordered_quantiles(x, where=where), y, LEVELS, where=where),
        ordered,
        3,
        NUMBERS,
        "outputs",
    ),
    single(
        "relative",
        lambda x, y, where: relative_error(x, y, where=where),
        lambda x, y: abs(x - y) / (abs(x) + abs(y) + 1e-8),
        None,
        NUMBERS,
        "predictions",
    ),
    *(bag_case("squared", weight) for weight in (0.0, 0.3, 1.0)),
    *(bag_case("binary_cross_entropy", weight) for weight in (0.0, 0.3)),
    list_case("pairs", pairwise_ranking, pairwise("logistic", "difference"), RELEVANCE),
    *(
        list_case(
            f"pairs {surrogate}",
            pairwise_ranking,
            pairwise(surrogate, "uniform"),
            RELEVANCE,
            surrogate=surrogate,
            margin=0.7,
            cost="uniform",
        )
        for surrogate in ("hinge", "squared_hinge")
    ),
    list_case("label aggregation", label_aggregation, by_sum, LABELS, weights=WEIGHTS),
    list_case(
        "loss aggregation", loss_aggregation, by_label("logistic", True), LABELS, weights=WEIGHTS
    ),
    list_case(
        "loss aggregation, all pairs",
        loss_aggregation,
        by_label("hinge", False),
        LABELS,
        weights=WEIGHTS,
        surrogate="hinge",
        margin=0.7,
        normalize=False,
    ),
    single(
        "policy",
        policy,
        lambda x, y: -y * x[0] - 0.3 * x[1],
        2,
        NUMBERS,
        "log_probs",
    ),
    *(kl_case(kind) for kind in KL),
]
