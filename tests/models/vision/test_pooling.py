import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regjax.models.vision.pooling import max_pool


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 6, 8, 3), 2), ((2, 7, 5, 3), 2), ((1, 9, 7, 2), 3)]
)
@pytest.mark.parametrize("distinct", [True, False])
def test_pooling_and_its_gradient_are_those_of_torch_also_where_pixels_are_equal(
    shape, window, distinct
):
    random = np.random.default_rng(0)
    images = random.normal(size=shape) if distinct else random.integers(0, 2, size=shape)
    images = images.astype(np.float32)
    given = torch.tensor(images, requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(given.permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)
    weights = random.normal(size=pooled.shape).astype(np.float32)
    (pooled * torch.tensor(weights)).sum().backward()
    np.testing.assert_array_equal(max_pool(jnp.asarray(images), window), pooled.detach())
    gradient = jax.grad(lambda images: jnp.sum(weights * max_pool(images, window)))(images)
    np.testing.assert_array_equal(gradient, given.grad)
