import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regjax.models.vision import convolve


def torch_convolve(images, kernel, stride, padding):
    images, kernel = (torch.tensor(np.asarray(each, np.float64)) for each in (images, kernel))
    convolved = torch.nn.functional.conv2d(
        images.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=stride, padding=padding
    )
    return convolved.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("size", "stride", "padding", "theirs"),
    [
        ((3, 3), 1, "SAME", 1),
        ((3, 3), 2, 1, 1),
        ((1, 1), 2, 0, 0),
        ((7, 7), 2, 3, 3),
        ((4, 4), 4, "VALID", 0),
        ((2, 3), 1, "VALID", 0),
        ((5, 3), 2, 2, 2),
    ],
)
def test_values_and_gradients_are_those_of_torch(size, stride, padding, theirs):
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 8, 9, 3)).astype(np.float32)
    kernel = random.normal(size=(*size, 3, 5)).astype(np.float32)

    def total(images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel, stride=stride, padding=padding)))

    convolved = convolve(images, kernel, stride=stride, padding=padding)
    np.testing.assert_allclose(
        convolved, torch_convolve(images, kernel, stride, theirs), atol=1e-4, rtol=1e-5
    )

    inputs = [
        torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (images, kernel)
    ]
    torch.nn.functional.conv2d(
        inputs[0].permute(0, 3, 1, 2), inputs[1].permute(3, 2, 0, 1), stride=stride, padding=theirs
    ).sin().sum().backward()
    gradients = jax.grad(total, argnums=(0, 1))(images, kernel)
    for ours, given in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(ours, given.grad.numpy(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("height", "rows"), [(8, 4), (9, 5)])
def test_same_padding_keeps_the_ceiling_and_pads_more_at_the_end(height, rows):
    images = np.random.default_rng(0).normal(size=(1, height, height, 2)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 2)).astype(np.float32)
    before = (2 * (rows - 1) + 3 - height) // 2
    padded = np.pad(images, ((0, 0), (before, 2), (before, 2), (0, 0)))
    expected = torch_convolve(padded, kernel, 2, 0)[:, :rows, :rows]
    np.testing.assert_allclose(convolve(images, kernel, stride=2), expected, atol=1e-5)


def test_many_kernels_under_vmap_are_as_many_convolutions():
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 6, 6, 3)).astype(np.float32)
    kernels = random.normal(size=(4, 3, 3, 3, 5)).astype(np.float32)
    together = jax.vmap(lambda kernel: convolve(images, kernel, stride=2, padding=1))(kernels)
    for kernel, convolved in zip(kernels, together, strict=True):
        np.testing.assert_allclose(
            convolved, convolve(images, kernel, stride=2, padding=1), atol=1e-5
        )


def test_bfloat16_stays_bfloat16():
    images, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 1), jnp.bfloat16)
    convolved = convolve(images, kernel)
    assert convolved.dtype == jnp.bfloat16
    assert convolved[0, 1, 1, 0] == 18
