"""Images from IDX, folders, archives, TFDS and memory; whatever is wrong with a source is said."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from regjax.data.images import ImageSet, channel_statistics, read_images
from regjax.data.images.decoding import decode, resize
from regjax.errors import InputError

FUZZ = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, images, labels, prefix="train", packed=False):
    for name, array in (
        (f"{prefix}-images-idx3-ubyte", images),
        (f"{prefix}-labels-idx1-ubyte", labels),
    ):
        content = idx_bytes(array)
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)


def write_tar(path, members: dict[str, bytes | None], mode: str = "w") -> None:
    """None: a folder."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_folder(path, files: dict[str, bytes | None]) -> None:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        file = path / name
        if content is None:
            file.mkdir(parents=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


A, B, C = (pixels(seed, 4, 5, 3) for seed in range(3))
GRAY = pixels(3, 4, 5, 1)


# IDX


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_gives_what_was_written(tmp_path, packed):
    images, labels = pixels(0, 6, 4, 3), np.array([2, 0, 1, 1, 2, 0], np.uint8)
    write_idx(tmp_path, images, labels, packed=packed)
    write_idx(tmp_path, images[::-1], labels[::-1], "t10k", packed=packed)
    train, test = (read_images(f"idx:{tmp_path}:{split}") for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images[..., None])
    np.testing.assert_array_equal(test.images, images[::-1, ..., None])
    assert train.labels.dtype == np.int32 and train.labels.tolist() == labels.tolist()
    assert train.class_names == ("0", "1", "2")
    assert train.places[3] == f"train-images-idx3-ubyte{'.gz' * packed}[3]"


def test_idx_that_lies_is_refused_with_the_file(tmp_path):
    images, labels = pixels(0, 6, 4, 3), np.array([2, 0, 1, 1, 2, 0], np.uint8)
    image_file = tmp_path / "train-images-idx3-ubyte"
    label_file = tmp_path / "train-labels-idx1-ubyte"

    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            read_images(f"idx:{tmp_path}:train")
        return str(caught.value)

    refused("train-images-idx3-ubyte: no such file, nor .*gz")
    write_idx(tmp_path, images, labels)
    whole = image_file.read_bytes()
    for content, match in [
        (whole[:-1], "said to hold 6 x 4 x 3 bytes, but holds 71"),
        (whole + b"\0", "but holds 73"),
        (whole[:10], "ends within its header"),
        (b"", "begins with the bytes : expected 00000803"),
        (idx_bytes(images[0]), "begins with the bytes 00000802: expected 00000803"),
        (whole[:4] + b"\xff" * 12 + whole[16:], "4294967295 x 4294967295 x 4294967295 bytes"),
    ]:
        image_file.write_bytes(content)
        assert str(image_file) in refused(match)
    image_file.write_bytes(whole)
    label_file.write_bytes(idx_bytes(labels[:5]))
    assert str(label_file) in refused("5 labels for 6 images")
    label_file.write_bytes(idx_bytes(np.array([2, 0, 0, 0, 2, 0], np.uint8)))
    assert str(tmp_path) in refused("class 1, '1', has no image")
    write_idx(tmp_path, images[:0], labels[:0])
    assert str(tmp_path) in refused("holds no image")
    image_file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    refused("is not a whole gzip file")
    with pytest.raises(InputError, match="expected train or test"):
        read_images(f"idx:{tmp_path}:validation")


@FUZZ
@given(at=st.integers(0, 30), value=st.integers(0, 255), cut=st.integers(0, 31))
def test_a_changed_idx_file_is_read_as_it_is_or_refused(tmp_path, at, value, cut):
    """Whatever byte is changed: what is read has the shape and the bytes that are there."""
    labels = np.array([0, 1] * 5, np.uint8)
    write_idx(tmp_path, pixels(0, 10, 1, 1), labels)
    path = tmp_path / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[min(at, len(content) - 1)] = value
    content = content[: len(content) - cut]
    path.write_bytes(content)
    try:
        found = read_images(f"idx:{tmp_path}:train")
    except InputError as error:
        assert str(tmp_path) in str(error)
    else:
        assert found.images.tobytes() == bytes(content[16:])
        assert len(found.images) == 10 and content[:4] == bytes((0, 0, 8, 3))


# Folders and archives


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_keeps_its_order_and_sorts_its_classes(tmp_path, mode):
    files = {
        "./train/": None,
        "./train/zebra/0.png": encoded(A),
        "./train/ape/images/7.png": encoded(B),
        "./train/zebra/._0.png": b"hidden",
        "./train/ape/boxes.txt": b"other",
        "./train/zebra/1.PNG": encoded(C),
    }
    write_tar(tmp_path / "train.tar", files, mode)
    found = read_images(f"tar:{tmp_path / 'train.tar'}")
    np.testing.assert_array_equal(found.images, [A, B, C])
    assert found.labels.tolist() == [1, 0, 1]
    assert found.class_names == ("ape", "zebra")
    assert found.places[1] == f"{tmp_path / 'train.tar'}: ./train/ape/images/7.png"


def test_a_folder_sorts_classes_and_names(tmp_path):
    files = {
        "zebra/b.png": encoded(A),
        "zebra/a.png": encoded(B),
        "ape/images/x.png": encoded(C),
        "ape/boxes.txt": b"",
        ".cache/x.png": b"",
        "README": b"",
    }
    write_folder(tmp_path / "set", files)
    found = read_images(f"folder:{tmp_path / 'set'}")
    np.testing.assert_array_equal(found.images, [C, B, A])
    assert found.labels.tolist() == [0, 1, 1] and found.class_names == ("ape", "zebra")
    assert found.places[0] == str(tmp_path / "set/ape/images/x.png")


LIST = "val_annotations.txt"


def test_listed_images_have_the_classes_of_the_list(tmp_path):
    files = {
        "images/1.JPEG": encoded(A), "images/0.JPEG": encoded(B), "images/2.JPEG": encoded(C),
        LIST: b"2.JPEG\tzebra\t0\t32\t44\t62\n0.JPEG\tape\t1\t2\t3\t4\r\n1.JPEG\tzebra\n",
    }  # fmt: skip
    write_folder(tmp_path / "val", files)
    found = read_images(f"folder:{tmp_path / 'val'}")
    np.testing.assert_array_equal(found.images, [C, B, A])
    assert found.labels.tolist() == [1, 0, 1] and found.class_names == ("ape", "zebra")
    assert found.places[1] == str(tmp_path / "val/images/0.JPEG")


def test_gray_stays_gray_unless_another_image_has_colours(tmp_path):
    write_folder(tmp_path / "gray", {"a/0.png": encoded(GRAY), "b/0.png": encoded(GRAY, mode="LA")})
    found = read_images(f"folder:{tmp_path / 'gray'}")
    np.testing.assert_array_equal(found.images, [GRAY, GRAY])
    write_folder(tmp_path / "mixed", {"a/0.png": encoded(GRAY), "b/0.png": encoded(A)})
    found = read_images(f"folder:{tmp_path / 'mixed'}")
    np.testing.assert_array_equal(found.images, [np.repeat(GRAY, 3, axis=2), A])


def test_palettes_and_transparency_become_rgb():
    few = (A // 128) * 255  # at most eight colours, which a palette holds exactly
    palette = Image.fromarray(few).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(decode(buffer.getvalue(), "x"), few)
    alpha = np.concatenate([A, pixels(9, 4, 5, 1)], axis=2)
    np.testing.assert_array_equal(decode(encoded(alpha), "x"), A)
    bits = (GRAY > 127).astype(np.uint8) * 255
    np.testing.assert_array_equal(decode(encoded(bits, mode="1"), "x"), bits)


@pytest.mark.parametrize("array", [np.zeros((4, 5), np.uint16), np.zeros((4, 5), np.float32)])
def test_pixels_of_more_than_eight_bits_are_refused(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF")
    with pytest.raises(InputError, match=r"deep\.tif has pixels of more than 8 bits"):
        decode(buffer.getvalue(), "deep.tif")


def test_an_image_size_scales_and_crops_the_middle(tmp_path):
    wide, high = pixels(6, 4, 12, 3), pixels(7, 8, 2, 3)
    write_folder(tmp_path / "set", {"a/0.png": encoded(wide), "b/0.png": encoded(high)})
    with pytest.raises(
        InputError, match=r"b/0.png has 2 x 8 pixels, but .*a/0.png has 12 x 4: give an"
    ):
        read_images(f"folder:{tmp_path / 'set'}")
    found = read_images(f"folder:{tmp_path / 'set'}", image_size=2).images
    assert found.shape == (2, 2, 2, 3)
    scaled = np.asarray(Image.fromarray(wide).resize((6, 2), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found[0].astype(int), scaled[:, 2:4], atol=1)
    np.testing.assert_array_equal(found[1], high[3:5])
    # A set in memory is changed in the same way.
    batch = pixels(5, 3, 6, 9, 3)
    expected = [decode(encoded(image), "x", 4) for image in batch]
    np.testing.assert_array_equal(resize(batch, 4), expected)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a/0.png": encoded(A), "b/0.png": b"no image"}, r"b/0.png cannot be read as an image"),
        ({"a/0.png": encoded(A), "b/0.png": encoded(A)[:-30]}, r"b/0.png cannot be read as an im"),
        ({"a/0.png": encoded(A), "b/0.jpg": encoded(A, "JPEG")[:200]}, r"b/0.jpg cannot be read"),
        ({"a/0.png": encoded(A), "b/0.png": b""}, r"b/0.png cannot be read as an image"),
        ({"a/0.png": encoded(A), "b": None}, r"/b holds no image"),
        ({"a/0.png": encoded(A), "b/sub/0.png": encoded(A)}, r"/b holds no image"),
        ({"a/0.png": encoded(A), "0.png": encoded(A)}, r"/0.png is in no class folder"),
        ({"a/0.png": encoded(A)}, r"the classes are a: expected at least two"),
        ({"README": b""}, r"holds no class folder"),
        ({"images/0.png": encoded(A), LIST: b"0.png ape"}, r"line 1 is '0.png ape': expected NAME"),
        ({"images/0.png": encoded(A), LIST: b"0.png\t\t1"}, r"line 1 is '0.png.*: expected NAME"),
        ({"images/0.png": encoded(A), LIST: b"0.png\ta\n1.png\tb"}, r"line 2: .* no image '1.png'"),
        ({"images/0.png": encoded(A), LIST: b"0.png\ta\n0.png\tb"}, r"an earlier line has it"),
        ({"images/0.png": encoded(A), LIST: b""}, r"images/0.png has no line in .*val_annot"),
        ({LIST: b""}, r"no image"),
    ],
)
def test_a_bad_folder_is_refused_with_the_file(tmp_path, files, match):
    write_folder(tmp_path / "set", files)
    with pytest.raises(InputError, match=match):
        read_images(f"folder:{tmp_path / 'set'}")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"t/a/0.png": encoded(A), "t/b/0.png": b"no"}, r"set.tar: t/b/0.png cannot be read as an"),
        ({"t/a/0.png": encoded(A), "0.png": encoded(A)}, r"set.tar: 0.png is in no class folder"),
        (
            {"train/a/0.png": encoded(A), "test/a/0.png": encoded(A)},
            r"set.tar: train/a/0.png and test/a/0.png are in class folders of different places",
        ),
        ({"t/a/0.png": encoded(A), "t/0.png": encoded(A)}, "of different places"),
        ({"t/a/0.png": encoded(A), "t/b": None}, r"set.tar: t/b holds no image"),
        ({"a/0.png": encoded(A)}, r"the classes are a: expected at least two"),
        ({"a/README": b""}, r"set.tar holds no image"),
    ],
)
def test_a_bad_archive_is_refused_with_the_member(tmp_path, files, match):
    write_tar(tmp_path / "set.tar", files)
    with pytest.raises(InputError, match=match):
        read_images(f"tar:{tmp_path / 'set.tar'}")


def test_a_link_in_an_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        member = tarfile.TarInfo("a/0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(InputError, match=r"set.tar: a/0.png is a link or no file"):
        read_images(f"tar:{tmp_path / 'set.tar'}")


SMALL = {f"t/{name}/{i}.png": encoded(pixels(i, 2, 2, 1)) for i in range(3) for name in "ab"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_archive_is_refused_wherever_it_is_cut(tmp_path, mode, share):
    path = tmp_path / "cut.tar"
    write_tar(path, SMALL, mode)
    content = path.read_bytes()
    # Zeros that fill a plain archive up after its end mark may be missing.
    length = len(SMALL) * 2 * tarfile.BLOCKSIZE if mode == "w" else len(content) - 16
    path.write_bytes(content[: int(share * length)])
    with pytest.raises(InputError, match=r"cut\.tar"):
        read_images(f"tar:{path}")


@FUZZ
@given(at=st.integers(0, 6 * 1024 - 1), value=st.integers(0, 255))
def test_a_changed_archive_is_whole_or_refused(tmp_path, at, value):
    """No member is lost without a word: six images, or an error that names the file."""
    path = tmp_path / "changed.tar"
    write_tar(path, SMALL)
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    try:
        found = read_images(f"tar:{path}")
    except InputError as error:
        assert "changed.tar" in str(error)
    else:
        assert len(found.images) == 6


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("", "is no source of images: expected idx:"),
        ("train.tar", "is no source of images: expected idx:"),
        ("folder:", "is no source of images"),
        ("idx:train", "expected idx:FOLDER:train"),
        ("folder:/no/such", "/no/such: no such folder"),
        ("tar:/no/such.tar", "/no/such.tar: no such file"),
        ("tfds:cifar10", "expected tfds:NAME"),
    ],
)
def test_a_source_that_is_none(source, match):
    with pytest.raises(InputError, match=match):
        read_images(source)


# Memory


def in_memory(**changed) -> ImageSet:
    whole = {
        "images": pixels(0, 4, 3, 3, 1),
        "labels": np.array([0, 1, 1, 0]),
        "class_names": ("a", "b"),
        "places": list("wxyz"),
    }
    return ImageSet(**{**whole, **changed})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"images": np.zeros((4, 3, 3, 1))}, "images are float64 .* expected uint8"),
        ({"images": pixels(0, 4, 3, 3)}, r"uint8 of shape \(4, 3, 3\)"),
        ({"images": pixels(0, 4, 3, 3, 2)}, "one channel or three"),
        ({"images": pixels(0, 0, 3, 3, 1)}, "holds no image"),
        ({"labels": np.array([0, 1, 2, 0])}, "y has label 2: expected 0 to 1"),
        ({"labels": np.array([0, 1, -1, 0])}, "y has label -1"),
        ({"labels": np.array([0, 1, 1])}, "an integer for each of 4 images"),
        ({"labels": np.array([0.0, 1, 1, 0])}, "an integer for each of 4 images"),
        ({"labels": np.array([1, 1, 1, 1])}, "class 0, 'a', has no image"),
        ({"class_names": ("a", "a")}, "named differently"),
        ({"places": ["w"]}, "1 places for 4 images"),
    ],
)
def test_a_set_in_memory_is_checked(changed, match):
    with pytest.raises(InputError, match=match):
        read_images(in_memory(**changed))
    found = read_images(in_memory())
    assert found.labels.dtype == np.int32 and found.labels.tolist() == [0, 1, 1, 0]


def test_channel_statistics_are_those_of_numpy():
    images = pixels(0, 5000, 3, 2, 3)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)
    mean, std = channel_statistics(np.full((3, 2, 2, 1), 51, np.uint8))
    np.testing.assert_allclose([mean[0], std[0]], [0.2, 1.0], rtol=1e-15)


# TFDS

TFDS_PROGRAM = """
    import json, sys
    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image

    class Pictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 5, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["zebra", "ape"]),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                pixels = np.full((4, 5, 3), 40 * i, np.uint8)
                yield i, {"image": Image.fromarray(pixels), "label": i % 2}

    folder = sys.argv[1]
    Pictures(data_dir=folder, file_format="array_record").download_and_prepare()
    from regjax.data.images import read_images
    found = read_images(f"tfds:pictures:train?data_dir={folder}")
    assert "tensorflow" not in sys.modules
    shape, values = found.images.shape, found.images[:, 0, 0, 0].tolist()
    print(json.dumps([shape, values, found.labels.tolist(), found.class_names, found.places]))
"""


def test_tfds_without_tensorflow(tmp_path):
    """A builder made here, prepared as array_record, read where TensorFlow is never imported."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(TFDS_PROGRAM))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shape, values, labels, names, places = json.loads(done.stdout.splitlines()[-1])
    assert shape == [6, 4, 5, 3] and sorted(values) == [0, 40, 80, 120, 160, 200]
    assert labels == [(value // 40) % 2 for value in values]
    assert names == ["zebra", "ape"] and places[5] == "pictures/train[5]"


def test_tfds_unknown_data_set(tmp_path):
    with pytest.raises(InputError, match=r"tfds:no_such_set:train.* cannot be read"):
        read_images(f"tfds:no_such_set:train?data_dir={tmp_path}")
