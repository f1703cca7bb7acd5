"""Vision transformers, those of Dosovitskiy et al. in the sizes of Touvron et al."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from regjax.errors import InputError
from regjax.models.config import Precision
from regjax.models.vision.checks import ImageShape, require_choice, require_positive
from regjax.models.vision.layers import Convolution, Draws, Linear

EPSILON = 1e-6
"""Of layer norm, as in the published models."""
DEVIATION = 0.02
"""Of new kernels, class token and positions."""


@dataclasses.dataclass(frozen=True)
class VisionTransformer:
    """A transformer over the patches of an image, read out at a class token.

    Patches are projected, a class token put in front and learned positions added; then `depth` layers
    `x + attention(norm(x))`, `x + mlp(norm(x))`, with biases and exact GELU, and a last norm.
    Kernels, class token and positions are normal of deviation 0.02, the patches' kernel of variance
    1 / inputs; biases are zero. `tiny` and `small` are the usual sizes.

    Raises:
        InputError: for a size below 1, a width that the heads do not divide, an unknown type.

    References:
        Dosovitskiy et al., An image is worth 16x16 words, 2021; Touvron et al., Training
        data-efficient image transformers, 2021.
    """

    patch: int = 4
    """Pixels of a patch's side; height and width of the images are multiples of it."""
    width: int = 192
    """D, the size of the residual stream."""
    depth: int = 12
    """Number of layers."""
    heads: int = 3
    """Attention heads, of `width / heads` each."""
    mlp_ratio: int = 4
    """Hidden units of an MLP, in widths."""
    dtype: Precision = "float32"
    """Of matrix products and the residual stream. Norms, softmax and logits are float32."""

    def __post_init__(self) -> None:
        for name in ("patch", "width", "depth", "heads", "mlp_ratio"):
            require_positive(f"VisionTransformer.{name}", getattr(self, name))
        if self.width % self.heads:
            raise InputError(
                f"VisionTransformer.width is {self.width}, not a multiple of heads ({self.heads})."
            )
        require_choice("VisionTransformer.dtype", self.dtype, ("float32", "bfloat16"))

    @classmethod
    def tiny(cls, patch: int = 16) -> "VisionTransformer":
        """ViT-Ti: width 192, 12 layers, 3 heads; 5,717,416 parameters at 224 pixels, 1000 classes."""
        return cls(patch=patch, width=192, depth=12, heads=3)

    @classmethod
    def small(cls, patch: int = 16) -> "VisionTransformer":
        """ViT-S: width 384, 12 layers, 6 heads; 22,050,664 parameters at 224 pixels, 1000 classes."""
        return cls(patch=patch, width=384, depth=12, heads=6)


class Transformer(nnx.Module):
    """All of a `VisionTransformer` but its last layer: `[B, H, W, C]` to `[B, width]`."""

    def __init__(self, config: VisionTransformer, image_shape: ImageShape, draws: Draws):
        height, width, channels = image_shape
        if height % config.patch or width % config.patch:
            raise InputError(
                f"images are {height} by {width} pixels, which VisionTransformer.patch "
                f"({config.patch}) does not divide; choose a patch that does, or resize the images."
            )
        self.patches = Convolution(
            channels,
            config.width,
            config.patch,
            stride=config.patch,
            padding="VALID",
            bias=True,
            gain=1.0,
            dtype=config.dtype,
            draws=draws,
        )
        tokens = 1 + (height // config.patch) * (width // config.patch)
        self.class_token = nnx.Param(draws((config.width,), DEVIATION))
        self.positions = nnx.Param(draws((tokens, config.width), DEVIATION))
        self.layers = nnx.List(Layer(config, draws) for _ in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.width = config.width

    def __call__(self, images: Array, training: bool) -> Array:
        patches = self.patches(images)
        batch, *_, width = patches.shape
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (batch, 1, width))
        states = jnp.concatenate([first, patches.reshape(batch, -1, width)], axis=1)
        states += self.positions[...].astype(states.dtype)
        for layer in self.layers:
            states = layer(states)
        return self.norm(states[:, 0])


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for `x [B, T, D]`."""

    def __init__(self, config: VisionTransformer, draws: Draws):
        width = config.width
        self.heads = config.heads
        self.attention_norm, self.mlp_norm = LayerNorm(width), LayerNorm(width)
        self.query_key_value = _linear(config, width, 3 * width, draws)
        self.mixed = _linear(config, width, width, draws)
        self.expand = _linear(config, width, config.mlp_ratio * width, draws)
        self.contract = _linear(config, config.mlp_ratio * width, width, draws)

    def __call__(self, states: Array) -> Array:
        states += self._attend(self.attention_norm(states))
        hidden = jax.nn.gelu(self.expand(self.mlp_norm(states)), approximate=False)
        return states + self.contract(hidden)

    def _attend(self, states: Array) -> Array:
        batch, tokens, width = states.shape
        heads = self.query_key_value(states).reshape(batch, tokens, 3, self.heads, -1)
        query, key, value = (heads[:, :, each] for each in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value)
        return self.mixed(mixed.reshape(batch, tokens, width))


class LayerNorm(nnx.Module):
    """`scale (x - m) / sqrt(v + epsilon) + bias` over the last axis, in float32."""

    def __init__(self, size: int):
        self.scale, self.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))

    def __call__(self, inputs: Array) -> Array:
        x = inputs.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
        return (x * self.scale[...] + self.bias[...]).astype(inputs.dtype)


def _linear(config: VisionTransformer, inputs: int, outputs: int, draws: Draws) -> Linear:
    return Linear(inputs, outputs, deviation=DEVIATION, dtype=config.dtype, draws=draws)
