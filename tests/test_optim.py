import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax import optim
from regjax.errors import InputError
from regjax.optim import Optimizer, ParameterGroup

PARAMS = {
    "embedding/table": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
    "layers/mlp/kernel": jnp.array([[2.0, 1.0]]),
    "layers/mlp/bias": jnp.array([1.0, -1.0]),
    "layers/norm/scale": jnp.array([1.0, 2.0]),
    "adapter/upscale": jnp.array([4.0]),
}
GRADS = jax.tree.map(lambda leaf: 0.1 * leaf**2 - 0.3, PARAMS)
PLAIN = Optimizer(learning_rate=0.1, schedule="constant", warmup=0.0, clip_norm=0.0)


def updates(config, steps=10, count=1, grads=GRADS):
    """What each of the first `count` steps adds, the gradients being the same."""
    rule = optim.build(config, steps, PARAMS)
    state, params, found = rule.init(PARAMS), PARAMS, []
    for _ in range(count):
        change, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, change)
        found.append(change)
    return found


def assert_trees(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys()
    for path, other in expected.items():
        np.testing.assert_allclose(found[path], other, rtol=rtol, atol=1e-9, err_msg=path)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 300),
    st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_schedule_is_its_formula(kind, steps, warmup, final):
    rate = optim.schedule(
        Optimizer(learning_rate=0.3, schedule=kind, warmup=warmup, final_scale=final), steps
    )
    rise = round(warmup * steps)
    for t in {0, rise // 2, max(rise - 1, 0), min(rise, steps - 1), steps // 2, steps - 1}:
        if t < rise:
            expected = 0.3 * (t + 1) / rise
        else:
            u = (t - rise) / (steps - rise)
            down = {"cosine": (1 + math.cos(math.pi * u)) / 2, "linear": 1 - u, "constant": 1}
            expected = 0.3 * (final + (1 - final) * down[kind])
            if kind == "constant":
                expected = 0.3
        np.testing.assert_allclose(rate(t), expected, rtol=0, atol=1e-6 * 0.3)
        assert rate(t) > 0


def test_the_rate_at_the_first_step_the_end_of_the_warm_up_and_the_last_step():
    rate = optim.schedule(Optimizer(learning_rate=2.0, warmup=0.1, final_scale=0.25), 100)
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose([rate(9), rate(10)], 2.0, rtol=1e-6)
    last = 2 * (0.25 + 0.75 * (1 + math.cos(math.pi * 89 / 90)) / 2)
    np.testing.assert_allclose(rate(99), last, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.5, rtol=1e-6)  # the end, reached after the last update


def test_updates_follow_the_schedule():
    config = Optimizer("sgd", learning_rate=1.0, schedule="linear", warmup=0.5, b1=0, clip_norm=0)
    for change, rate in zip(updates(config, 4, 4), [0.5, 1.0, 1.0, 0.5], strict=True):
        assert_trees(change, jax.tree.map(lambda g, rate=rate: -rate * g, GRADS))


def test_two_steps_of_adamw_are_its_formula():
    config = dataclasses.replace(PLAIN, b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.5)
    first, second = updates(config, count=2)
    for path, g in GRADS.items():
        g, p = np.asarray(g, np.float64), np.asarray(PARAMS[path], np.float64)
        decay = 0.0 if path.endswith(("/bias", "/scale")) else 0.5
        # Both corrected moments of a constant gradient are the gradient and its square.
        direction = g / (np.abs(g) + 1e-3)
        np.testing.assert_allclose(first[path], -0.1 * (direction + decay * p), rtol=0, atol=1e-7)
        p = p - 0.1 * (direction + decay * p)
        np.testing.assert_allclose(second[path], -0.1 * (direction + decay * p), rtol=0, atol=1e-7)


def test_adamw_with_changing_gradients_is_its_formula():
    config = dataclasses.replace(PLAIN, b1=0.8, b2=0.9, epsilon=1e-3)
    rule = optim.build(config, 10, PARAMS)
    state, g = rule.init(PARAMS), np.asarray(GRADS["embedding/table"], np.float64)
    m = v = 0.0
    for t in (1, 2, 3):
        now = g * (-0.5) ** t
        change, state = rule.update(
            jax.tree.map(lambda leaf, t=t: leaf * (-0.5) ** t, GRADS), state, PARAMS
        )
        m, v = 0.8 * m + 0.2 * now, 0.9 * v + 0.1 * now**2
        expected = -0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        np.testing.assert_allclose(change["embedding/table"], expected, rtol=1e-5)


def test_weight_decay_touches_kernels_and_tables_only():
    assert optim.decays(PARAMS) == {
        "embedding/table": True,
        "layers/mlp/kernel": True,
        "layers/mlp/bias": False,
        "layers/norm/scale": False,
        "adapter/upscale": True,
    }
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    (change,) = updates(dataclasses.replace(PLAIN, weight_decay=0.5), grads=zeros)
    for path, leaf in PARAMS.items():
        factor = -0.1 * 0.5 if optim.decays(PARAMS)[path] else 0.0
        np.testing.assert_allclose(change[path], factor * leaf, rtol=1e-6)


def test_the_first_group_that_matches_gives_rate_and_weight_decay():
    groups = (
        ParameterGroup("^layers/.*kernel", learning_rate_scale=0.1, weight_decay=0.0),
        ParameterGroup("^layers", learning_rate_scale=3.0),
        ParameterGroup("table$", weight_decay=0.2),
    )
    # In float32, 1 - b2 has only four digits at the default of 0.999.
    config = dataclasses.replace(PLAIN, b2=0.9, weight_decay=0.5, groups=groups)
    (change,) = updates(config)
    rates = {"embedding/table": 1.0, "layers/mlp/kernel": 0.1, "adapter/upscale": 1.0}
    decays = {"embedding/table": 0.2, "adapter/upscale": 0.5}
    for path, g in GRADS.items():
        step = np.sign(g) + decays.get(path, 0.0) * PARAMS[path]
        np.testing.assert_allclose(
            change[path], -0.1 * rates.get(path, 3.0) * step, rtol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_the_rate_times_the_summed_gradients(momentum):
    config = dataclasses.replace(PLAIN, name="sgd", b1=momentum)
    first, second = updates(config, count=2)
    assert_trees(first, jax.tree.map(lambda g: -0.1 * g, GRADS))
    assert_trees(second, jax.tree.map(lambda g: -0.1 * (1 + momentum) * g, GRADS))


PROMPT = "soft_prompt/task"
ADAFACTOR = Optimizer(
    "adafactor", learning_rate=0.2, schedule="constant", warmup=0, clip_norm=0, factored=False
)
EPS = float(np.finfo(np.float32).eps)


def gradients(shape, seed=0):
    """Signs at random, sizes from 1e-6 to 1e4."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(-6, 4, shape)
    sizes.flat[:2] = 1e-6, 1e4
    return (sizes * random.choice([-1.0, 1.0], shape)).astype(np.float32)


def moved(config, grads, start=None, steps=10):
    """The parameters before and after each of the updates by `grads`, and the optimizer's last state."""
    params = {path: jnp.zeros_like(leaf) for path, leaf in grads[0].items()}
    params = params if start is None else start
    rule = optim.build(config, steps, params)
    state, found = rule.init(params), [params]
    for gradient in grads:
        change, state = rule.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        found.append(params)
    return found, state


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_decay_and_steps_is_that_of_torch(nesterov):
    """Ten updates beside `torch.optim.SGD` with `MultiStepLR`; biases are left out of the decay."""
    torch = pytest.importorskip("torch")
    config = Optimizer(
        name="sgd", learning_rate=0.1, b1=0.9, nesterov=nesterov, weight_decay=0.05,
        schedule="steps", milestones=(0.4, 0.8), milestone_scale=0.1, warmup=0.0, clip_norm=0.0,
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = {"a/kernel": random.normal(size=(3, 2)), "a/bias": random.normal(size=2)}
    gradients = [{k: random.normal(size=v.shape) for k, v in params.items()} for _ in range(10)]
    theirs = {k: torch.tensor(v, dtype=torch.float32) for k, v in params.items()}
    groups = [
        {"params": [theirs["a/kernel"]], "weight_decay": 0.05},
        {"params": [theirs["a/bias"]], "weight_decay": 0.0},
    ]
    rule = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
    rates = torch.optim.lr_scheduler.MultiStepLR(rule, [4, 8], gamma=0.1)
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    tx = optim.build(config, 10, ours)
    state = tx.init(ours)
    for gradient in gradients:
        updates, state = tx.update(
            {k: jnp.asarray(v, jnp.float32) for k, v in gradient.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, value in gradient.items():
            theirs[name].grad = torch.tensor(value, dtype=torch.float32)
        rule.step()
        rates.step()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(100, 64), (150, 130)])
def test_the_first_update_of_adafactor_is_the_rate_against_the_sign(shape):
    gradient = gradients(shape)
    gradient[3, :5] = 0
    (_, after), _ = moved(ADAFACTOR, [{PROMPT: jnp.asarray(gradient)}])
    # The power -1/2, its product, the clipping's quotient and the rate round once or twice each.
    np.testing.assert_allclose(after[PROMPT], -0.2 * np.sign(gradient), rtol=8 * EPS, atol=0)
    # Where the gradient is exactly 0 nothing moves, and the others' 0.2 is none the smaller for it.
    assert not np.asarray(after[PROMPT])[gradient == 0].any()


def test_a_factored_second_moment_moves_no_entry_by_its_sign_alone():
    gradient = gradients((150, 130))
    config = dataclasses.replace(ADAFACTOR, factored=True)
    (_, after), _ = moved(config, [{PROMPT: jnp.asarray(gradient)}])
    square = gradient.astype(np.float64) ** 2
    product = square.mean(1, keepdims=True) * square.mean(0) / square.mean()
    y = gradient / np.sqrt(product)
    y /= max(1, np.sqrt((y**2).mean()))
    np.testing.assert_allclose(after[PROMPT], -0.2 * y, rtol=1e-5)
    assert np.abs(y).min() < 1e-4


@pytest.mark.parametrize("exponent", [0.8, 0.5])
def test_adafactor_is_its_formula(exponent):
    config = dataclasses.replace(
        ADAFACTOR, schedule="linear", weight_decay=0.01, decay_exponent=exponent
    )
    random = np.random.default_rng(1)
    start = random.normal(size=(4, 5)).astype(np.float32)
    grads = [(g * random.normal(size=(4, 5))).astype(np.float32) for g in (1, 1e-3, 3, 0.2, 1e2, 1)]
    found, _ = moved(
        config, [{PROMPT: jnp.asarray(g)} for g in grads], {PROMPT: jnp.asarray(start)}, 6
    )
    v, p, clipped = np.zeros((4, 5)), start.astype(np.float64), 0
    for t, g in enumerate(grads, 1):
        d = 1 - t**-exponent
        v = d * v + (1 - d) * g.astype(np.float64) ** 2
        y = g / np.sqrt(v)
        rms = np.sqrt((y**2).mean())
        clipped += rms > 1.01
        rate = 0.2 * (1 - (t - 1) / 6)
        p = (1 - 0.01) * p - rate * y / max(1, rms)
        np.testing.assert_allclose(found[t][PROMPT], p, rtol=0, atol=1e-6 * t)
    assert 2 <= clipped < 6


def test_adafactor_takes_away_its_weight_decay_whatever_the_rate():
    start = {PROMPT: jnp.array([[3.0, -2.0]]), "norm/scale": jnp.array([5.0])}
    grads = {PROMPT: jnp.array([[1e-3, -4.0]]), "norm/scale": jnp.array([-1.0])}
    config = dataclasses.replace(ADAFACTOR, weight_decay=0.1)
    (_, after), _ = moved(config, [grads], start)
    np.testing.assert_allclose(after[PROMPT], [[0.9 * 3 - 0.2, -0.9 * 2 + 0.2]], rtol=4 * EPS)
    np.testing.assert_allclose(after["norm/scale"], [5.2], rtol=4 * EPS)
    # A rate of 0 for the group, or of nearly 0 for all: the weights still decay.
    still = dataclasses.replace(config, groups=(ParameterGroup(PROMPT, 0.0, 0.25),))
    np.testing.assert_allclose(
        moved(still, [grads], start)[0][1][PROMPT], [[2.25, -1.5]], rtol=4 * EPS
    )
    slow = dataclasses.replace(config, learning_rate=1e-30)
    np.testing.assert_allclose(
        moved(slow, [grads], start)[0][1][PROMPT], [[2.7, -1.8]], rtol=4 * EPS
    )


@pytest.mark.parametrize("factored", [False, True])
def test_no_update_of_adafactor_is_larger_than_the_rate(factored):
    config = dataclasses.replace(ADAFACTOR, factored=factored)
    random = np.random.default_rng(2)
    sizes = (1e-3, 1.0, 1e3, 1e-4, 50.0, 50.0)
    grads = [{PROMPT: jnp.asarray(s * random.normal(size=(130, 128)), jnp.float32)} for s in sizes]
    rule = optim.build(config, len(sizes), grads[0])
    state, rms = rule.init(grads[0]), []
    for gradient in grads:
        change, state = rule.update(gradient, state, gradient)
        rms.append(np.sqrt(np.square(np.asarray(change[PROMPT], np.float64)).mean()))
    # An error of the mean of n squares is at most some log2(n) roundings, taken pairwise.
    assert max(rms) <= 0.2 * (1 + 16 * EPS)
    assert sum(value > 0.2 * (1 - 1e-3) for value in rms) >= 3
    assert min(rms) < 0.1


def moments(config, params):
    """Sizes of the arrays that the optimizer keeps, of more than one entry."""
    state = jax.eval_shape(optim.build(config, 10, params).init, params)
    return sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.size > 1)


def test_adafactor_factors_matrices_from_128_on_unless_told_not_to():
    shapes = {"a/kernel": (128, 128), "b/kernel": (3, 130, 200), PROMPT: (100, 256)}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    factored = dataclasses.replace(ADAFACTOR, factored=True)
    rows_and_columns = [(3, 130), (3, 200), (100, 256), (128,), (128,)]
    assert moments(factored, params) == rows_and_columns
    assert moments(ADAFACTOR, params) == sorted(shapes.values())
    # The group's word counts for its own parameters, either way.
    params[PROMPT] = jax.ShapeDtypeStruct((150, 256), jnp.float32)
    assert moments(factored, params) == [(3, 130), (3, 200), (128,), (128,), (150,), (256,)]
    whole = dataclasses.replace(factored, groups=(ParameterGroup("^soft_prompt/", factored=False),))
    assert moments(whole, params) == [(3, 130), (3, 200), (128,), (128,), (150, 256)]
    only = dataclasses.replace(ADAFACTOR, groups=(ParameterGroup("^a/", factored=True),))
    assert moments(only, params) == [(3, 130, 200), (128,), (128,), (150, 256)]
    silent = dataclasses.replace(factored, groups=(ParameterGroup("^a/"),))
    assert moments(silent, params) == moments(factored, params)


def test_the_parameter_scale_multiplies_the_rate_by_the_rms_of_the_parameter():
    start = {"a/kernel": jnp.array([[3.0, -4.0]]), "b/kernel": jnp.array([[1e-5]])}
    grads = {"a/kernel": jnp.array([[2.0, -7.0]]), "b/kernel": jnp.array([[1.0]])}
    config = dataclasses.replace(ADAFACTOR, parameter_scale=True, weight_decay=0.5)
    (_, after), _ = moved(config, [grads], start)
    change = 0.2 * math.sqrt(12.5)
    np.testing.assert_allclose(
        after["a/kernel"], [[1.5 - change, -2.0 + change]], rtol=0, atol=8 * EPS
    )
    # Of parameters near 0 it is 1e-3, so that they move at all.
    np.testing.assert_allclose(after["b/kernel"], [[0.5e-5 - 0.2e-3]], rtol=8 * EPS)


def test_the_command_line_reaches_a_group():
    config = Optimizer(groups=(ParameterGroup("^soft_prompt/", 3.0),))
    words = "--name adafactor --no-factored --parameter-scale --groups.0.factored True"
    found = tyro.cli(Optimizer, default=config, args=words.split())
    group = ParameterGroup("^soft_prompt/", 3.0, factored=True)
    assert found == Optimizer("adafactor", factored=False, parameter_scale=True, groups=(group,))
    assert tyro.cli(Optimizer, default=config, args=[]) == config


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_gradients_are_clipped_to_a_global_norm(share):
    norm = math.sqrt(sum(float((g**2).sum()) for g in GRADS.values()))
    config = dataclasses.replace(PLAIN, name="sgd", b1=0.0, clip_norm=share * norm)
    (change,) = updates(config)
    assert_trees(change, jax.tree.map(lambda g: -0.1 * min(1, share) * g, GRADS), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate is 0.0; it has to be above 0"),
        ({"learning_rate": math.inf}, "optimizer.learning_rate is inf"),
        ({"warmup": 1.5}, r"optimizer.warmup is 1.5; it has to be in 0..1"),
        ({"final_scale": -0.1}, "optimizer.final_scale is -0.1"),
        ({"clip_norm": math.nan}, "optimizer.clip_norm is nan; it has to be 0 or above"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay is -1.0"),
        ({"b1": 1.0}, "optimizer.b1 is 1.0; it has to be from 0 to below 1"),
        ({"b2": 1.0}, "optimizer.b2 is 1.0"),
        ({"epsilon": 0.0}, "optimizer.epsilon is 0.0; it has to be above 0"),
        (
            {"groups": (ParameterGroup("a"), ParameterGroup("b", -1.0))},
            r"optimizer.groups\[1\].learning_rate_scale is -1.0",
        ),
        (
            {"groups": (ParameterGroup("a", weight_decay=-0.5),)},
            r"optimizer.groups\[0\].weight_decay is -0.5",
        ),
        ({"name": "adafactor", "weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
        ({"decay_exponent": 0.0}, "optimizer.decay_exponent is 0.0; it has to be above 0"),
        (
            {"parameter_scale": True},
            "optimizer.parameter_scale is True, which has no effect with adamw",
        ),
        ({"milestones": (0.75, 0.5)}, "milestones are .*; expected rising shares"),
        ({"milestones": (0.5, 1.0)}, "milestones are .*; expected rising shares"),
        ({"schedule": "steps", "warmup": 0.6}, "milestones begin at 0.5, in the warm-up"),
        ({"milestone_scale": 0.0}, "optimizer.milestone_scale is 0.0; it has to be above 0"),
        ({"nesterov": True}, "nesterov has an effect with sgd and b1 above 0 alone"),
        ({"name": "sgd", "b1": 0.0, "nesterov": True}, "nesterov has an effect"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Optimizer(**changes)


def test_a_group_of_no_parameter_is_refused():
    config = Optimizer(groups=(ParameterGroup("^decoder"),))
    with pytest.raises(InputError, match=r"'\^decoder' matches no parameter"):
        optim.build(config, 10, PARAMS)
