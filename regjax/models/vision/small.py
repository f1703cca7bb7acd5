"""The small models: linear maps, multilayer perceptrons, a convolutional network."""

import dataclasses
import itertools
import math

import jax
from flax import nnx
from jax import Array

from regjax.models.config import Precision
from regjax.models.vision.checks import ImageShape, require_choice, require_positive, require_sides
from regjax.models.vision.layers import Convolution, Draws, Linear
from regjax.models.vision.pooling import max_pool


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A multilayer perceptron with ReLU on the pixels of an image, row by row, channels last.

    Kernels are normal of variance 2 / inputs, biases zero.

    Raises:
        InputError: for a layer without units or an unknown type.
    """

    hidden: tuple[int, ...] = (512, 512)
    """Units of the hidden layers. `()` is a linear map, whose features are the pixels."""
    bias: bool = True
    """Whether the layers, the last one included, have biases."""
    dtype: Precision = "float32"
    """Of matrix products."""

    def __post_init__(self) -> None:
        require_positive("Mlp.hidden", *self.hidden)
        require_choice("Mlp.dtype", self.dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class SmallCnn:
    """Blocks of a 3 by 3 convolution, ReLU and 2 by 2 max pooling; then hidden layers with ReLU.

    Kernels are normal of variance 2 / inputs, biases zero.

    Raises:
        InputError: for a layer without channels or units or an unknown type.
    """

    channels: tuple[int, ...] = (32, 64)
    """Of the blocks. Each halves height and width, rounding down."""
    hidden: tuple[int, ...] = (128,)
    """Units of the hidden layers after the blocks; `()` for none."""
    dtype: Precision = "float32"
    """Of convolutions and matrix products."""

    def __post_init__(self) -> None:
        require_positive("SmallCnn.channels", *self.channels)
        require_positive("SmallCnn.hidden", *self.hidden)
        require_choice("SmallCnn.dtype", self.dtype, ("float32", "bfloat16"))


class Dense(nnx.Module):
    """Hidden layers with ReLU, of inputs that are flattened first: `[B, ...]` to `[B, width]`."""

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], bias: bool, dtype: Precision, draws: Draws
    ):
        sizes = (inputs, *hidden)
        self.width = sizes[-1]
        self.layers = nnx.List(
            Linear(
                before,
                after,
                bias=bias,
                deviation=math.sqrt(2 / before),
                dtype=dtype,
                draws=draws,
            )
            for before, after in itertools.pairwise(sizes)
        )

    def __call__(self, inputs: Array, training: bool) -> Array:
        features = inputs.reshape(inputs.shape[0], -1)
        for layer in self.layers:
            features = jax.nn.relu(layer(features))
        return features


def perceptron(config: Mlp, image_shape: ImageShape, draws: Draws) -> Dense:
    """All of an `Mlp` but its last layer."""
    return Dense(math.prod(image_shape), config.hidden, config.bias, config.dtype, draws)


class ConvolutionalNetwork(nnx.Module):
    """All of a `SmallCnn` but its last layer: `[B, H, W, C]` to `[B, width]`."""

    def __init__(self, config: SmallCnn, image_shape: ImageShape, draws: Draws):
        require_sides("SmallCnn", image_shape, 2 ** len(config.channels))
        height, width, channels = image_shape
        sizes = (channels, *config.channels)
        self.convolutions = nnx.List(
            Convolution(
                before,
                after,
                3,
                padding=1,
                bias=True,
                dtype=config.dtype,
                draws=draws,
            )
            for before, after in itertools.pairwise(sizes)
        )
        shrunk = 2 ** len(config.channels)
        pixels = (height // shrunk) * (width // shrunk)
        self.dense = Dense(pixels * sizes[-1], config.hidden, True, config.dtype, draws)
        self.width = self.dense.width

    def __call__(self, images: Array, training: bool) -> Array:
        for convolution in self.convolutions:
            # Bias and ReLU after the maximum are the same, of a quarter of the pixels.
            largest = max_pool(convolution.without_bias(images), 2)
            images = jax.nn.relu(convolution.shifted(largest))
        return self.dense(images, training)
