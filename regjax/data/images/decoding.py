"""Files of images as arrays of one size."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np

from regjax.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

GRAY = ("1", "L", "LA", "La")
DEEP = ("I", "I;16", "I;16B", "I;16L", "F")


def decode(content: bytes, place: str, image_size: int = 0) -> np.ndarray:
    """One encoded image as uint8 `[H, W, 1]` where it is gray, else `[H, W, 3]`, RGB.

    Palettes are resolved, transparency is dropped, of an animation the first frame is taken.

    Args:
        content: the bytes of the file.
        place: what errors call it.
        image_size: the shorter side is scaled to this many pixels (bilinear, antialiased) and the
            middle cropped to a square; 0 leaves the size as it is.

    Raises:
        InputError: bytes that Pillow cannot decode, or pixels of more than 8 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode in DEEP:
                raise InputError(
                    f"{place} has pixels of more than 8 bits (mode {image.mode}): convert it to 8 bits"
                )
            if image.mode in (
                "P",
                "PA",
            ):  # a palette may hold transparency, which RGB has no room for
                pixels = image.convert("RGBA").convert("RGB")
            else:
                pixels = image.convert("L" if image.mode in GRAY else "RGB")
    except InputError:
        raise
    except (
        Exception
    ) as error:  # Pillow raises many kinds; each means that this image cannot be read
        raise InputError(
            f"{place} cannot be read as an image: {error}; replace or remove it"
        ) from error
    if image_size and pixels.size != (image_size, image_size):
        pixels = ImageOps.fit(pixels, (image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def decode_all(files: Iterable[tuple[str, bytes]], image_size: int = 0) -> np.ndarray:
    """The images of (place, content) pairs, uint8 `[N, H, W, C]`; `[0]` of no pairs.

    C is 1 if all of them are gray, otherwise 3.

    Raises:
        InputError: an image that cannot be read, or that is of another size than the first.
    """
    images: list[np.ndarray] = []
    first = ""
    for place, content in files:
        image = decode(content, place, image_size)
        first = first or place
        if images and image.shape[:2] != images[0].shape[:2]:
            (height, width), (rows, columns) = image.shape[:2], images[0].shape[:2]
            raise InputError(
                f"{place} has {width} x {height} pixels, but {first} has {columns} x {rows}: give an "
                "image_size that all are scaled and cropped to"
            )
        images.append(image)
    if not images:
        return np.zeros(0, np.uint8)
    channels = max(image.shape[2] for image in images)
    whole = np.empty((len(images), *images[0].shape[:2], channels), np.uint8)
    for row, image in enumerate(images):
        whole[row] = image
    return whole


def resize(images: np.ndarray, image_size: int) -> np.ndarray:
    """Decoded images `[N, H, W, C]` scaled and cropped as in `decode`.

    >>> resize(np.full((2, 4, 6, 1), 7, np.uint8), 2).shape
    (2, 2, 2, 1)
    """
    if not image_size or images.shape[1:3] == (image_size, image_size):
        return images
    from PIL import Image, ImageOps

    whole = np.empty((len(images), image_size, image_size, images.shape[3]), np.uint8)
    for row, image in enumerate(images):
        pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        fitted = ImageOps.fit(pixels, (image_size, image_size), Image.Resampling.BILINEAR)
        whole[row] = np.asarray(fitted).reshape(whole.shape[1:])
    return whole
