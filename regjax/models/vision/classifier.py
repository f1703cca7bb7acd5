"""An image classifier as two pure functions: what everything outside `models/` uses."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array

from regjax.errors import InputError
from regjax.models.vision.checks import ImageShape, require_positive
from regjax.models.vision.layers import Draws, Linear
from regjax.models.vision.resnet import CifarResNet, ResidualNetwork, ResNet
from regjax.models.vision.small import ConvolutionalNetwork, Mlp, SmallCnn, perceptron
from regjax.models.vision.transformer import Transformer, VisionTransformer
from regjax.paths import Flat, flatten

VisionModel = Mlp | SmallCnn | CifarResNet | ResNet | VisionTransformer


class Outputs(NamedTuple):
    """What a classifier returns for B images."""

    logits: Array
    """`[B, C]` float32, a score for each class."""
    features: Array
    """`[B, D]` float32, what the last linear layer reads."""


class Classifier(NamedTuple):
    """A model without its parameters. Two that were built alike are equal, and hash alike."""

    init: Callable[[Array], tuple[Flat, Flat]]
    """`init(key) -> (params, statistics)`: float32 arrays by path, the running statistics of batch
    norm apart from what is trained; `{}` for models without."""
    apply: Callable[..., tuple[Outputs, Flat]]
    """`apply(params, statistics, images [B, H, W, C] float32, *, training) -> (Outputs, statistics)`.
    With `training`, a Python bool, batch norm reads the batch and returns moved statistics; without,
    it reads the statistics and returns them as they are."""


def build(config: VisionModel, image_shape: ImageShape, num_classes: int) -> Classifier:
    """The classifier that `config` describes, for images `[H, W, C]`, its last layer linear.

    That layer starts normal of variance `1 / (3 D)`, that of torch's, with zero bias. `init` and
    `apply` are pure and take `jax.jit`, `jax.grad`, `jax.lax.scan`, and `jax.vmap` over keys or over
    parameters and statistics.

    >>> classifier = build(Mlp(hidden=(), bias=False), (2, 2, 1), num_classes=3)
    >>> params, statistics = classifier.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params), statistics
    ({'head/kernel': (4, 3)}, {})
    >>> outputs, _ = classifier.apply(params, statistics, jnp.ones((5, 2, 2, 1)), training=False)
    >>> outputs.logits.shape, outputs.features.shape
    ((5, 3), (5, 4))

    Raises:
        InputError: the images are too small for the model or do not divide into its patches, or a
            number is below 1; from `apply`, for images of another shape.
    """
    require_positive("image_shape", *image_shape)
    require_positive("num_classes", num_classes)
    height, width, channels = image_shape
    draws = Draws(None)
    network = nnx.eval_shape(lambda: Network(config, (height, width, channels), num_classes, draws))
    init = _Init(config, (height, width, channels), num_classes, draws.used)
    return Classifier(init, _Apply(nnx.graphdef(network), init.image_shape))


@dataclasses.dataclass(frozen=True)
class _Init:
    config: VisionModel
    image_shape: ImageShape
    num_classes: int
    draws: int

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, key: Array) -> tuple[Flat, Flat]:
        draws = Draws(jax.random.normal(key, (self.draws,)))
        network = Network(self.config, self.image_shape, self.num_classes, draws)
        return _flat(network, nnx.Param), _flat(network, nnx.BatchStat)


@dataclasses.dataclass(frozen=True)
class _Apply:
    structure: nnx.GraphDef[Any] = dataclasses.field(repr=False)
    image_shape: ImageShape

    def __call__(
        self, params: Flat, statistics: Flat, images: Array, *, training: bool
    ) -> tuple[Outputs, Flat]:
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise InputError(
                f"images have the shape {images.shape}; this model was built for "
                f"{('B', *self.image_shape)}."
            )
        network = nnx.merge(self.structure, _nested({**params, **statistics}))
        outputs = network(images, training)
        return outputs, _flat(network, nnx.BatchStat)


def _flat(network: "Network", kind: type[nnx.Variable]) -> Flat:
    return flatten(nnx.to_pure_dict(nnx.state(network, kind)))


def _nested(flat: Flat) -> dict[Any, Any]:
    """As NNX nests it, where the keys of a list are integers: of strings it would put 10 before 2."""
    return traverse_util.unflatten_dict(
        {
            tuple(int(key) if key.isdigit() else key for key in path.split("/")): leaf
            for path, leaf in flat.items()
        }
    )


class Network(nnx.Module):
    """A body and the last linear layer, which is float32 whatever the body computes in."""

    def __init__(
        self, config: VisionModel, image_shape: ImageShape, num_classes: int, draws: Draws
    ):
        self.body = _body(config, image_shape, draws)
        self.head = Linear(
            self.body.width,
            num_classes,
            bias=config.bias if isinstance(config, Mlp) else True,
            deviation=1 / math.sqrt(3 * self.body.width),
            dtype="float32",
            draws=draws,
        )

    def __call__(self, images: Array, training: bool) -> Outputs:
        features = self.body(images, training).astype(jnp.float32)
        return Outputs(self.head(features), features)


def _body(config: VisionModel, image_shape: ImageShape, draws: Draws) -> Any:
    match config:
        case Mlp():
            return perceptron(config, image_shape, draws)
        case SmallCnn():
            return ConvolutionalNetwork(config, image_shape, draws)
        case CifarResNet() | ResNet():
            return ResidualNetwork(config.plan, image_shape, draws)
        case VisionTransformer():
            return Transformer(config, image_shape, draws)
    raise InputError(
        f"model is {config!r}; expected an Mlp, SmallCnn, CifarResNet, ResNet or VisionTransformer."
    )
