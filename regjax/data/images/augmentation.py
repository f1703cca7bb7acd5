"""Random changes of training images, on the device and as functions of a key."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What `augment` and `mixup` do to a batch; by default nothing.

    Raises:
        InputError: a negative number, or one that is not finite.
    """

    crop_padding: int = 0
    """Black pixels added on each side before the image's own size is cropped at a random place."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Side of a square of mean colour around a random pixel, cut off at the edges; 0: none."""
    mixup: float = 0.0
    """Parameter of the beta distribution that pairs of images are mixed by; 0: they are not."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout", "mixup"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"augmentation.{name} is {value}: expected 0 or more")

    def check(self, height: int, width: int) -> None:
        """Whether images of this size can be changed so.

        Raises:
            InputError: a padding that can crop the whole image away, a square larger than the image.
        """
        if self.crop_padding >= min(height, width):
            raise InputError(
                f"augmentation.crop_padding is {self.crop_padding}: expected less than the "
                f"{height} x {width} pixels of the images"
            )
        if self.cutout > max(height, width):
            raise InputError(
                f"augmentation.cutout is {self.cutout}: expected at most the {height} x {width} pixels "
                "of the images"
            )


class Draws(NamedTuple):
    """What is random in a batch of B images."""

    offsets: jax.Array  # int32 [B, 2], 0 to 2 crop_padding: row, column where the crop begins
    flips: jax.Array  # bool [B]
    centres: jax.Array  # int32 [B, 2], row, column of the square that is cut out


def draw(key: jax.Array, count: int, height: int, width: int, augmentation: Augmentation) -> Draws:
    """Offsets, flips and centres of `count` images, each uniform and independent."""
    crop, flip, row, column = jax.random.split(key, 4)
    padding = augmentation.crop_padding
    rows = jax.random.randint(row, (count,), 0, height)
    columns = jax.random.randint(column, (count,), 0, width)
    return Draws(
        jax.random.randint(crop, (count, 2), 0, 2 * padding + 1),
        jax.random.bernoulli(flip, 0.5, (count,)),
        jnp.stack([rows, columns], axis=1),
    )


def standardise(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """(images / 255 - mean) / std, float32, from uint8 `[..., C]` and mean and std `[C]`."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def augment(
    key: jax.Array,
    images: jax.Array,
    augmentation: Augmentation,
    mean: ArrayLike,
    std: ArrayLike,
) -> jax.Array:
    """Images cropped, flipped, standardised and cut out, in this order.

    A function of the key, the same however the batch lies on devices. With nothing to do it is
    `standardise`.

    Args:
        key: a key of `jax.random`; one for each step.
        images: uint8 `[B, H, W, C]`.
        augmentation: what to do, static.
        mean: `[C]`, as `channel_statistics` gives it.
        std: `[C]`.

    Returns:
        float32 `[B, H, W, C]`.
    """
    count, height, width, _ = images.shape
    return apply_draws(
        images, draw(key, count, height, width, augmentation), augmentation, mean, std
    )


def apply_draws(
    images: jax.Array,
    draws: Draws,
    augmentation: Augmentation,
    mean: ArrayLike,
    std: ArrayLike,
) -> jax.Array:
    """`augment`, given what is random."""
    _, height, width, _ = images.shape
    rows, columns = jnp.arange(height), jnp.arange(width)
    padding = augmentation.crop_padding
    if padding or augmentation.flip:
        to_rows = rows + draws.offsets[:, :1] - padding
        mirrored = jnp.where(draws.flips[:, None] & augmentation.flip, width - 1 - columns, columns)
        to_columns = mirrored + draws.offsets[:, 1:] - padding
        images = jax.lax.platform_dependent(
            images, to_rows, to_columns, tpu=_take_by_products, default=_take
        )
    found = standardise(images, mean, std)
    if augmentation.cutout:
        first = draws.centres - augmentation.cutout // 2
        in_rows = _within(rows, first[:, :1], augmentation.cutout)
        in_columns = _within(columns, first[:, 1:], augmentation.cutout)
        found = jnp.where((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0.0, found)
    return found


def _take(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """images[b, rows[b]][:, columns[b]] for each b, black where they lie outside.

    On a CPU as fast as slices of a padded batch, of which a flip would be another pass.
    """

    def take(image, rows, columns):
        return image.at[rows[:, None], columns].get(
            mode="fill", fill_value=0, wrap_negative_indices=False
        )

    return jax.vmap(take)(images, rows, columns)


def _take_by_products(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`_take` by products with one-hot matrices: exact, since bfloat16 holds 0 to 255.

    By its compiler's estimate a TPU takes a sixth of the time that the gather takes; a CPU takes
    twice.
    """
    _, height, width, _ = images.shape
    of_rows = jax.nn.one_hot(rows, height, dtype=jnp.bfloat16)
    of_columns = jax.nn.one_hot(columns, width, dtype=jnp.bfloat16)
    found = jnp.einsum("bij,bjwc->biwc", of_rows, images.astype(jnp.bfloat16))
    return jnp.einsum("bkw,biwc->bikc", of_columns, found).astype(jnp.uint8)


def _within(positions: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return (positions >= first) & (positions < first + size)


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Each image and its target mixed with those of another place in the batch.

        x_i' = w x_i + (1 - w) x_p(i),    t_i' = w t_i + (1 - w) t_p(i),    w ~ beta(alpha, alpha)

    with one w and one permutation p for the batch.

    Args:
        key: a key of `jax.random`.
        images: float32 `[B, H, W, C]`.
        targets: float32 `[B, L]`, distributions over the classes.
        alpha: static; 0: nothing is mixed.

    Returns:
        (images, targets), mixed.

    References:
        Zhang, Cisse, Dauphin, Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018,
        https://arxiv.org/abs/1710.09412.
    """
    if not alpha:
        return images, targets
    weight, order = mixing(key, len(images), alpha)
    return (
        weight * images + (1.0 - weight) * images[order],
        weight * targets + (1.0 - weight) * targets[order],
    )


def mixing(key: jax.Array, count: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """The weight `[]` and the permutation `[count]` of `mixup`."""
    weight, order = jax.random.split(key)
    return jax.random.beta(weight, alpha, alpha), jax.random.permutation(order, count)
