import jax
import jax.numpy as jnp
import numpy as np

from regjax.models.vision.layers import BatchNorm, normalise


def test_batch_norm_of_values_far_from_zero_is_exact():
    # The mean is a thousand deviations: E[x^2] - E[x]^2 in float32 would keep no digit of the variance.
    values = 1000 + np.random.default_rng(0).normal(size=(512, 4))
    norm = BatchNorm(4)
    normed = norm(jnp.asarray(values, jnp.float32), training=True)
    expected = (values - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + 1e-5)
    np.testing.assert_allclose(normed, expected, atol=2e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        norm.variance[...], 0.9 + 0.1 * values.var(axis=0, ddof=1), rtol=1e-4
    )


def test_gradients_of_batch_norm_are_those_of_its_formula():
    random = np.random.default_rng(0)

    def formula(x, scale, bias):
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        return scale * (x - mean) / jnp.sqrt(variance + 1e-5) + bias

    def gradients(normed):
        return jax.grad(lambda *given: jnp.sum(jnp.sin(normed(*given))), argnums=(0, 1, 2))

    with jax.enable_x64(True):
        given = [jnp.asarray(random.normal(3, 2, size)) for size in ((4, 3, 2, 5), 5, 5)]
        found = jax.jit(gradients(lambda *given: normalise(*given)[0]))(*given)
        for ours, expected in zip(found, jax.jit(gradients(formula))(*given), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-12)
