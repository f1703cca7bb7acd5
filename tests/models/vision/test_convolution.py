import functools

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
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(images, kernel)
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


def plain(images, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        padding if isinstance(padding, str) else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_gradients(form, images, kernel, stride, padding):
    def total(images, kernel):
        convolved = form(images, kernel, stride=stride, padding=padding)
        return jnp.sum(jnp.sin(convolved)), convolved

    (_, convolved), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        images, kernel
    )
    return convolved, *gradients


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((4, 6, 8, 3), (3, 3, 3, 2), 1, "SAME"),  # pairs of pixels, groups of images
        ((3, 7, 5, 2), (3, 3, 2, 17), 1, 1),  # neither
        ((2, 9, 9, 2), (3, 3, 2, 4), 2, 1),
        ((2, 7, 10, 2), (3, 2, 2, 4), 3, "VALID"),  # rows and columns that no window reads
        ((2, 8, 9, 3), (1, 1, 3, 4), 2, 0),
        ((2, 5, 5, 2), (2, 2, 2, 4), 3, 1),  # pixels between windows
        ((8, 5, 6, 1), (3, 3, 1, 4), 1, 3),  # more padding than kernel
    ],
)
def test_values_and_gradients_are_those_of_the_compilers_own_in_float64(
    shape, kernel, stride, padding
):
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        images, kernel = jnp.asarray(random.normal(size=shape)), random.normal(size=kernel)
        kernel = jnp.asarray(kernel)
        assert images.dtype == jnp.float64
        expected = value_and_gradients(plain, images, kernel, stride, padding)
        found = value_and_gradients(convolve, images, kernel, stride, padding)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-11)


def test_gradients_of_many_kernels_under_vmap_are_those_of_each():
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 4, 5, 6, 2)).astype(np.float32)
    kernels = random.normal(size=(2, 3, 3, 2, 3)).astype(np.float32)
    together = jax.vmap(lambda *given: value_and_gradients(convolve, *given, 2, 1))(images, kernels)
    for run in range(2):
        alone = value_and_gradients(plain, images[run], kernels[run], 2, 1)
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[run], theirs, atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_the_compilers_own_also_when_a_cpu_compiles_for_them(platform):
    shapes = (
        jax.ShapeDtypeStruct((4, 8, 8, 2), "float32"),
        jax.ShapeDtypeStruct((3, 3, 2, 4), "float32"),
    )

    def text(form):
        def gradients(images, kernel):
            return value_and_gradients(form, images, kernel, 2, 1)

        lowered = jax.jit(gradients).trace(*shapes).lower(lowering_platforms=(platform,))
        return lowered.as_text()

    def convolutions(form):
        lines = text(form).splitlines()
        return [line.split("(", 2)[2] for line in lines if "stablehlo.convolution" in line]

    assert convolutions(convolve) == convolutions(plain)
    assert "stablehlo.while" not in text(convolve)
