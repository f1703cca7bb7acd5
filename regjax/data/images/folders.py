"""Images in one folder per class, on disk or in a tar archive, or in one folder with a list."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from regjax.data.images.decoding import SUFFIXES, decode_all
from regjax.data.images.image_set import ImageSet
from regjax.errors import InputError

ANNOTATIONS = "val_annotations.txt"


class ImageFile(NamedTuple):
    """An image as it is stored."""

    place: str
    class_name: str
    content: bytes


def labelled(files: Iterable[ImageFile], image_size: int = 0) -> ImageSet:
    """The files decoded, in their order; the classes are their folders' names, sorted."""
    places: list[str] = []
    folders: list[str] = []

    def contents() -> Iterator[tuple[str, bytes]]:
        for file in files:
            places.append(file.place)
            folders.append(file.class_name)
            yield file.place, file.content

    images = decode_all(contents(), image_size)
    names = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[name] for name in folders], np.int32)
    return ImageSet(images, labels, tuple(names), places)


def folder_files(path: Path) -> Iterator[ImageFile]:
    """The images of `PATH/CLASS/` and `PATH/CLASS/images/`, classes and names sorted.

    Files of other kinds and hidden ones are passed over. Where there is a `PATH/val_annotations.txt`, the
    form of Tiny ImageNet's validation images, they are those of `PATH/images/`, in the order of its lines
    `NAME<tab>CLASS...`.

    Raises:
        InputError: no such folder, no folder in it, an image outside of the class folders, a class
            folder without an image, a file that cannot be read; a list that has other images than
            there are.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if (path / ANNOTATIONS).is_file():
        yield from _annotated_files(path)
        return
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    loose = [entry for entry in entries if _is_image(entry.name) and not entry.is_dir()]
    if loose:
        raise InputError(f"{loose[0]} is in no class folder: move it into {path}/CLASS/")
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        raise InputError(f"{path} holds no class folder: expected {path}/CLASS/NAME.png")
    for folder in classes:
        found = [file for file in sorted(folder.iterdir()) if _is_image(file.name)]
        if (folder / "images").is_dir():
            found += [
                file for file in sorted((folder / "images").iterdir()) if _is_image(file.name)
            ]
        if not found:
            raise InputError(
                f"{folder} holds no image: add some ({', '.join(SUFFIXES)}) or remove the folder"
            )
        for file in found:
            yield ImageFile(str(file), folder.name, _content(file))


def _annotated_files(path: Path) -> Iterator[ImageFile]:
    text = _content(path / ANNOTATIONS).decode("utf-8", errors="replace")
    folder = path / "images"
    left = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    left = {name for name in left if _is_image(name)}
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = line.split("\t")
        if not name or not rest or not rest[0]:
            raise InputError(
                f"{path / ANNOTATIONS}, line {number} is {line[:60]!r}: expected NAME<tab>CLASS"
            )
        if name not in left:
            raise InputError(
                f"{path / ANNOTATIONS}, line {number}: {folder} holds no image {name!r}, or an earlier "
                "line has it"
            )
        left.remove(name)
        yield ImageFile(str(folder / name), rest[0], _content(folder / name))
    if left:
        raise InputError(f"{folder / min(left)} has no line in {path / ANNOTATIONS}")


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def tar_files(path: Path) -> Iterator[ImageFile]:
    """The images of an archive, `.../CLASS/NAME` or `.../CLASS/images/NAME`, in the archive's order.

    The archive may be compressed by gzip, bzip2 or xz. Files of other kinds and hidden ones are
    passed over.

    Raises:
        InputError: not an archive or not a whole one, an image outside of the class folders or that
            is a link, class folders in different places, a class folder without an image.
    """
    roots: dict[tuple[str, ...], str] = {}  # where class folders are, and the first image there
    used: set[str] = set()
    folders: list[tuple[str, ...]] = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = tuple(part for part in PurePosixPath(member.name).parts if part != ".")
                if not parts or parts[-1].startswith("."):
                    continue
                if member.isdir():
                    folders.append(parts)
                    continue
                if not _is_image(parts[-1]):
                    continue
                place = f"{path}: {member.name}"
                reader = archive.extractfile(member) if member.isreg() else None
                if reader is None:
                    raise InputError(f"{place} is a link or no file: archive the image itself")
                above = parts[:-2] if parts[-2:-1] == ("images",) and len(parts) > 2 else parts[:-1]
                if not above:
                    raise InputError(
                        f"{place} is in no class folder: expected .../CLASS/{parts[-1]}"
                    )
                roots.setdefault(above[:-1], place)
                if len(roots) > 1:
                    first, second = roots.values()
                    raise InputError(
                        f"{first} and {second.removeprefix(f'{path}: ')} are in class folders of "
                        "different places: make an archive of one set, all class folders in one place"
                    )
                used.add(above[-1])
                yield ImageFile(place, above[-1], reader.read())
            _check_end(archive, path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"{path} is not a whole tar archive (plain, .gz, .bz2 or .xz): {first_line}; fetch it again"
        ) from error
    if not used:
        raise InputError(f"{path} holds no image: expected .../CLASS/NAME.png")
    (root,) = roots
    for folder in folders:
        if folder[:-1] == root and folder[-1] not in used:
            raise InputError(
                f"{path}: {'/'.join(folder)} holds no image: add some, or leave it out"
            )


def _check_end(archive: tarfile.TarFile, path: Path) -> None:
    """What is left of an archive that was read to its end is a block of zeros and more zeros.

    `tarfile` takes a cut file and a broken header for the end too, and leaves the rest out.
    """
    file = archive.fileobj
    assert file is not None
    if file.tell() - archive.offset < tarfile.BLOCKSIZE:
        raise InputError(f"{path} has no end mark: it was cut off, fetch it again")
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            last = archive.getmembers()[-1].name if archive.getmembers() else "its beginning"
            raise InputError(f"{path} is damaged after {last}: fetch it again")


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
