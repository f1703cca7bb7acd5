import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


def test_adafactor_is_that_of_optax_without_parameter_scale():
    config = dataclasses.replace(PLAIN, name="adafactor")
    rule = optax.adafactor(0.1, multiply_by_parameter_scale=False)
    state, params = rule.init(PARAMS), PARAMS
    for found in updates(config, count=3):
        change, state = rule.update(GRADS, state, params)
        params = optax.apply_updates(params, change)
        assert_trees(found, change)
    # Its first step: the gradient over its root mean square of one step, which is its sign.
    (first,) = updates(config)
    np.testing.assert_allclose(
        first["embedding/table"], -0.1 * np.sign(GRADS["embedding/table"]), rtol=1e-4
    )


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
        ({"name": "adafactor", "weight_decay": 0.1}, "no effect with adafactor; set it to 0 or"),
        ({"name": "sgd", "weight_decay": 0.1}, "weight_decay is 0.1, which has no effect with sgd"),
        (
            {"name": "sgd", "groups": (ParameterGroup("a", weight_decay=0.1),)},
            r"optimizer.groups\[0\].weight_decay is 0.1, which has no effect",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Optimizer(**changes)


def test_a_group_of_no_parameter_is_refused():
    config = Optimizer(groups=(ParameterGroup("^decoder"),))
    with pytest.raises(InputError, match=r"'\^decoder' matches no parameter"):
        optim.build(config, 10, PARAMS)
