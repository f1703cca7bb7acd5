"""Labelled images from IDX files, folders, tar archives, TFDS and Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regjax.data.images.decoding import decode_all, resize
from regjax.data.images.folders import folder_files, labelled, tar_files
from regjax.data.images.idx import read_idx
from regjax.data.images.image_set import ImageSet, checked
from regjax.data.sources import TFDS_SPEC
from regjax.errors import InputError

EXPECTED = (
    "expected idx:FOLDER:train, idx:FOLDER:test, folder:PATH, tar:FILE.tar[.gz|.bz2|.xz] or "
    "tfds:NAME:SPLIT"
)


def read_images(source: str | ImageSet, image_size: int = 0) -> ImageSet:
    """Every image of `source`, in its order, with its class.

    - `idx:FOLDER:train` or `idx:FOLDER:test`: see `regjax.data.images.idx.read_idx`.
    - `folder:PATH`: images in `PATH/CLASS/` or `PATH/CLASS/images/`, classes and names sorted; or in
      `PATH/images/`, listed in `PATH/val_annotations.txt` as Tiny ImageNet's are.
    - `tar:FILE`: the same in an archive, plain or compressed, in the archive's order.
    - `tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=PATH]`: the features `image` and `label`, read by
      `tfds.data_source` without TensorFlow.
    - an `ImageSet`.

    Images are gray if all are, else RGB; palettes are resolved and transparency is dropped.

    Args:
        source: where the images are.
        image_size: scales the shorter side to this many pixels (bilinear, antialiased) and crops the
            middle to a square; 0: as they are, then all have to be of one size.

    Returns:
        The set, whole: at least two classes, at least one image in each.

    Raises:
        InputError: another form of source, a file that is missing or cannot be read, an image that
            cannot be decoded, sizes that differ, labels out of range, a class without an image; each
            with the file's name.
    """
    if image_size < 0:
        raise InputError(
            f"image_size is {image_size}: expected pixels, or 0 for images as they are"
        )
    if isinstance(source, ImageSet):
        whole = checked(source, "the set of images")
        return whole._replace(images=resize(whole.images, image_size))
    kind, _, rest = source.partition(":")
    if kind == "idx":
        folder, _, split = rest.rpartition(":")
        if not folder:
            raise InputError(f"{source!r}: expected idx:FOLDER:train or idx:FOLDER:test")
        whole = checked(read_idx(Path(folder).expanduser(), split), source)
        return whole._replace(images=resize(whole.images, image_size))
    if kind == "folder" and rest:
        return checked(labelled(folder_files(Path(rest).expanduser()), image_size), source)
    if kind == "tar" and rest:
        return checked(labelled(tar_files(Path(rest).expanduser()), image_size), source)
    if kind == "tfds":
        return checked(_read_tfds(source, image_size), source)
    raise InputError(f"{source!r} is no source of images: {EXPECTED}")


def _read_tfds(spec: str, image_size: int) -> ImageSet:
    match = TFDS_SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec}: expected tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=PATH]")
    name, split, data_dir = match["name"], match["split"], match["data_dir"]
    import tensorflow_datasets as tfds

    encoded = {"image": tfds.decode.SkipDecoding()}
    labels: list[int] = []
    try:
        rows = tfds.data_source(name, split=split, data_dir=data_dir, decoders=encoded)
        names = tuple(rows.dataset_info.features["label"].names)
        places = [f"{name}/{split}[{i}]" for i in range(len(rows))]

        def contents():
            for place, row in zip(places, rows, strict=True):
                labels.append(int(row["label"]))
                yield place, row["image"]

        images = decode_all(contents(), image_size)
    except InputError:
        raise
    except Exception as error:  # TFDS raises many kinds; each means that this spec cannot be read
        raise InputError(f"{spec} cannot be read: {type(error).__name__}: {error}") from error
    return ImageSet(images, np.array(labels, np.int32), names, places)
