"""What a run on images reads, and what is done to it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from regjax.data.images.augmentation import Augmentation
from regjax.data.images.noise import LabelNoise
from regjax.data.images.tails import LongTail
from regjax.errors import InputError

# A command line can only spell the string form; Python configs may pass an ImageSet.
_SourceField = Annotated[Any, tyro.conf.arg(constructor=str, metavar="KIND:PATH")]


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Sources of images (see `regjax.data.images.read_images`), and what is made of them.

    In this order: `limit`, `held_out`, `tail`, `noise`. Which images they take is decided by
    `split_seed`; the noise is drawn anew for every run.

    Raises:
        InputError: no source, a share or a number out of range.

    >>> ImageData(train="idx:fashion:train", test="idx:fashion:test", held_out=0.1).tail
    """

    train: _SourceField = ""
    """Training images: idx:FOLDER:train, folder:PATH, tar:FILE or tfds:NAME:SPLIT."""
    test: _SourceField = ""
    """Test images, of the same classes in the same order."""
    image_size: int = 0
    """Pixels that height and width are scaled and cropped to; 0: the images' own size."""
    limit: int = 0
    """Most images taken of each source, from the classes in their proportions; 0: all."""
    held_out: float = 0.0
    """Share of each class's training images that is held out before tail and noise; 0: none."""
    tail: LongTail | None = None
    """How the training classes are thinned; None: not."""
    noise: LabelNoise | None = None
    """What is wrong with the training labels; None: nothing."""
    augmentation: Augmentation = Augmentation()
    """Random changes of the training images."""
    split_seed: int = 0
    """Decides which images limit, held_out and tail take, the same for every run."""

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if isinstance(getattr(self, name), str) and not getattr(self, name):
                raise InputError(
                    f"{name} is empty: give a source of images, such as tar:{name}.tar"
                )
        if self.image_size < 0:
            raise InputError(f"image_size is {self.image_size}: expected 0 or more pixels")
        if self.limit < 0:
            raise InputError(f"limit is {self.limit}: expected 0 or more images")
        if not 0.0 <= self.held_out < 1.0:
            raise InputError(f"held_out is {self.held_out}: expected a share from 0 to below 1")
