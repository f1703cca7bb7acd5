"""Images and labels in the IDX files of MNIST and its kin."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from regjax.data.images.image_set import ImageSet
from regjax.errors import InputError

PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(folder: Path, split: str) -> ImageSet:
    """The images `[N, H, W, 1]` and labels of a split, `train` or `test`.

    Read are `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, for `test` those that begin
    with `t10k`, each plain or `.gz`. The classes are named by their numbers, from 0 to the largest.

    Raises:
        InputError: a file that is missing, is not whole, or whose header differs from its content;
            as many labels as images are expected.
    """
    if split not in PREFIXES:
        raise InputError(f"{folder}: the split is {split!r}: expected train or test")
    image_file = _find(folder, f"{PREFIXES[split]}-images-idx3-ubyte")
    label_file = _find(folder, f"{PREFIXES[split]}-labels-idx1-ubyte")
    images, labels = read_array(image_file, 3), read_array(label_file, 1)
    if len(images) != len(labels):
        raise InputError(
            f"{label_file} holds {len(labels)} labels for {len(images)} images in {image_file.name}: "
            "take both from the same set"
        )
    names = tuple(map(str, range(int(labels.max(initial=0)) + 1)))
    places = [f"{image_file.name}[{row}]" for row in range(len(images))]
    return ImageSet(images[..., None], labels, names, places)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise InputError(f"{folder / name}: no such file, nor {name}.gz")


def read_array(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file, plain or `.gz`.

    The header is two zero bytes, 8 for unsigned bytes, the number of dimensions, and the length of
    each as four bytes, the highest first.

    Raises:
        InputError: not a gzip file, another header, more or fewer bytes than it says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}; fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    expected = bytes((0, 0, 8, dimensions))
    if content[:4] != expected:
        raise InputError(
            f"{path} begins with the bytes {content[:4].hex()}: expected {expected.hex()}, those of an "
            f"IDX file of unsigned bytes in {dimensions} dimensions"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InputError(f"{path} ends within its header: fetch it again")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{path} is said to hold {' x '.join(map(str, shape))} bytes, but holds "
            f"{len(content) - start}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
