import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regjax.models.vision.layers import BatchNorm, max_of_quarters


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_pooling_and_its_gradient_are_those_of_torch(shape):
    random = np.random.default_rng(0)
    images = random.normal(size=shape).astype(np.float32)
    given = torch.tensor(images, requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(given.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    weights = random.normal(size=pooled.shape).astype(np.float32)
    (pooled * torch.tensor(weights)).sum().backward()
    np.testing.assert_array_equal(max_of_quarters(jnp.asarray(images)), pooled.detach())
    gradient = jax.grad(lambda images: jnp.sum(weights * max_of_quarters(images)))(images)
    np.testing.assert_array_equal(gradient, given.grad)


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
