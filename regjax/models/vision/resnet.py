"""Residual networks: those of He et al. for CIFAR, and ResNet-18, 34 and 50 in both versions."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from regjax.models.config import Precision
from regjax.models.vision.checks import ImageShape, require_choice, require_positive, require_sides
from regjax.models.vision.layers import BatchNorm, Convolution, Draws, mean_of_pixels

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["A", "B"]

CIFAR_DEPTHS = (8, 20, 32, 56, 110)
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A residual network in full. Each stage but the first halves height and width."""

    stem: Stem
    stem_channels: int
    blocks: tuple[int, ...]
    """Of each stage."""
    channels: tuple[int, ...]
    """Of each stage's 3 by 3 convolutions."""
    bottleneck: bool = False
    version: int = 1
    shortcut: Shortcut = "B"
    zero_residual: bool = False
    dtype: Precision = "float32"

    @property
    def halvings(self) -> int:
        return len(self.blocks) - 1 + (2 if self.stem == "imagenet" else 0)


@dataclasses.dataclass(frozen=True)
class CifarResNet:
    """ResNet of `depth = 6 n + 2` layers for images of about 32 by 32 pixels.

    A 3 by 3 convolution, then three stages of n blocks of two 3 by 3 convolutions with 16, 32 and 64
    filters, each after its convolution normed by batch; mean over the pixels. Parameters for 10
    classes and RGB images, as in the paper: ResNet-20 0.27M (269,722), 32 0.46M (464,154), 56 0.85M
    (853,018), 110 1.7M (1,727,962). Kernels are normal of variance 2 / (9 filters).

    Raises:
        InputError: for a depth that is none of these and 8, a factor below 1, an unknown shortcut.

    References:
        He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2016, section 4.2.
    """

    depth: int = 20
    """8, 20, 32, 56 or 110."""
    widen: int = 1
    """All filters, those of the first convolution included, are this many times as many."""
    shortcut: Shortcut = "A"
    """Where a stage halves the image: "A", every second pixel, with zeros for the new channels, which
    adds no parameters and is the paper's choice for CIFAR; or "B", a normed 1 by 1 convolution
    (ResNet-20: 272,474 parameters)."""
    zero_residual: bool = False
    """Start each block as its shortcut: the scale of its last batch norm is zero at first."""
    dtype: Precision = "float32"
    """Of convolutions and what passes between layers. Batch norm and logits are float32."""

    def __post_init__(self) -> None:
        require_choice("CifarResNet.depth", self.depth, CIFAR_DEPTHS)
        require_positive("CifarResNet.widen", self.widen)
        require_choice("CifarResNet.shortcut", self.shortcut, ("A", "B"))
        require_choice("CifarResNet.dtype", self.dtype, ("float32", "bfloat16"))

    @property
    def plan(self) -> Plan:
        return Plan(
            stem="cifar",
            stem_channels=16 * self.widen,
            blocks=((self.depth - 2) // 6,) * 3,
            channels=tuple(self.widen * filters for filters in (16, 32, 64)),
            shortcut=self.shortcut,
            zero_residual=self.zero_residual,
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class ResNet:
    """ResNet-18, 34 (blocks of two 3 by 3 convolutions) or 50 (1 by 1, 3 by 3, 1 by 1).

    Stages of 64, 128, 256 and 512 channels, in ResNet-50 four times as many between blocks, where the
    stride is in the 3 by 3 convolution as in torchvision; shortcuts that change shape are 1 by 1
    convolutions. Parameters for 1000 classes and RGB images, version 1: 11,689,512, 21,797,672 and
    25,557,032. Kernels are normal of variance 2 / (outputs x size of the window).

    Raises:
        InputError: for an unknown depth, version, stem or type.

    References:
        He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2016; Identity mappings
        in deep residual networks, 2016 (version 2).
    """

    depth: int = 18
    """18, 34 or 50."""
    version: int = 1
    """1: batch norm after each convolution, ReLU after each sum. 2: both before each convolution, and
    once more after the last block; projecting shortcuts read what the block's first norm gave, and
    have none of their own."""
    stem: Stem = "imagenet"
    """"imagenet": a 7 by 7 convolution with stride 2, then 3 by 3 max pooling with stride 2.
    "cifar": a 3 by 3 convolution, for images below about 100 pixels."""
    zero_residual: bool = False
    """Start each block as its shortcut: its last scale, in version 2 its last kernel, is zero at first."""
    dtype: Precision = "float32"
    """Of convolutions and what passes between layers. Batch norm and logits are float32."""

    def __post_init__(self) -> None:
        require_choice("ResNet.depth", self.depth, tuple(STAGES))
        require_choice("ResNet.version", self.version, (1, 2))
        require_choice("ResNet.stem", self.stem, ("imagenet", "cifar"))
        require_choice("ResNet.dtype", self.dtype, ("float32", "bfloat16"))

    @property
    def plan(self) -> Plan:
        return Plan(
            stem=self.stem,
            stem_channels=64,
            blocks=STAGES[self.depth],
            channels=(64, 128, 256, 512),
            bottleneck=self.depth == 50,
            version=self.version,
            zero_residual=self.zero_residual,
            dtype=self.dtype,
        )


class Block(nnx.Module):
    """`relu(branch(x) + shortcut(x))`, in version 2 `branch(x) + shortcut(x)`."""

    def __init__(self, plan: Plan, inputs: int, channels: int, stride: int, draws: Draws):
        layers = [(3, channels, stride), (3, channels, 1)]
        if plan.bottleneck:
            layers = [(1, channels, 1), (3, channels, stride), (1, 4 * channels, 1)]
        windows, sizes, strides = zip(*layers, strict=True)
        befores = (inputs, *sizes[:-1])
        self.convolutions = nnx.List(
            Convolution(
                before,
                after,
                window,
                stride=step,
                padding=window // 2,
                dtype=plan.dtype,
                draws=draws,
            )
            for before, after, window, step in zip(befores, sizes, windows, strides, strict=True)
        )
        self.norms = nnx.List(map(BatchNorm, befores if plan.version == 2 else sizes))
        self.version, self.outputs = plan.version, sizes[-1]
        if stride == 1 and inputs == self.outputs:
            self.shortcut: Subsample | Projection | None = None
        elif plan.shortcut == "A":
            self.shortcut = Subsample(inputs, self.outputs, stride)
        else:
            self.shortcut = Projection(plan, inputs, self.outputs, stride, draws)
        if plan.zero_residual:
            last = self.norms[-1].scale if plan.version == 1 else self.convolutions[-1].kernel
            last[...] = jnp.zeros_like(last[...])

    def __call__(self, inputs: Array, training: bool) -> Array:
        if self.version == 1:
            states = self.norms[0](self.convolutions[0](inputs), training)
            for convolution, norm in zip(self.convolutions[1:], self.norms[1:], strict=True):
                states = norm(convolution(jax.nn.relu(states)), training)
            return jax.nn.relu(states + self._shortcut(inputs, inputs, training))
        states = jax.nn.relu(self.norms[0](inputs, training))
        kept = self._shortcut(inputs, states, training)
        states = self.convolutions[0](states)
        for convolution, norm in zip(self.convolutions[1:], self.norms[1:], strict=True):
            states = convolution(jax.nn.relu(norm(states, training)))
        return states + kept

    def _shortcut(self, inputs: Array, activated: Array, training: bool) -> Array:
        """The inputs where the shape stays, else what becomes of the activated ones."""
        return inputs if self.shortcut is None else self.shortcut(activated, training)


class Subsample(nnx.Module):
    """Every `stride`-th pixel, with zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.new, self.stride = outputs - inputs, stride

    def __call__(self, images: Array, training: bool) -> Array:
        kept = images[:, :: self.stride, :: self.stride]
        return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, self.new)))


class Projection(nnx.Module):
    """A 1 by 1 convolution; in version 1, normed."""

    def __init__(self, plan: Plan, inputs: int, outputs: int, stride: int, draws: Draws):
        self.convolution = Convolution(
            inputs, outputs, 1, stride=stride, padding=0, dtype=plan.dtype, draws=draws
        )
        self.norm = BatchNorm(outputs) if plan.version == 1 else None

    def __call__(self, images: Array, training: bool) -> Array:
        projected = self.convolution(images)
        return projected if self.norm is None else self.norm(projected, training)


class ResidualNetwork(nnx.Module):
    """All of a residual network but its last layer: `[B, H, W, C]` to `[B, width]`."""

    def __init__(self, plan: Plan, image_shape: ImageShape, draws: Draws):
        require_sides("ResNet", image_shape, 2**plan.halvings)
        size, stride = (7, 2) if plan.stem == "imagenet" else (3, 1)
        self.stem = Convolution(
            image_shape[-1],
            plan.stem_channels,
            size,
            stride=stride,
            padding=size // 2,
            dtype=plan.dtype,
            draws=draws,
        )
        self.blocks: nnx.List[Block] = nnx.List()
        channels = plan.stem_channels
        for stage, (count, width) in enumerate(zip(plan.blocks, plan.channels, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Block(plan, channels, width, stride, draws))
                channels = self.blocks[-1].outputs
        self.norm = BatchNorm(plan.stem_channels if plan.version == 1 else channels)
        self.version, self.pools, self.width = plan.version, plan.stem == "imagenet", channels

    def __call__(self, images: Array, training: bool) -> Array:
        states = self.stem(images)
        if self.version == 1:
            states = jax.nn.relu(self.norm(states, training))
        if self.pools:
            states = nnx.max_pool(states, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            states = block(states, training)
        if self.version == 2:
            states = jax.nn.relu(self.norm(states, training))
        return mean_of_pixels(states)
