"""Image files and folders of class folders: conversion, geometry, order, and what is refused."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcnn.data import images
from jaxcnn.data.images import read_image, resize
from jaxcnn.data.sources import load
from jaxcnn.errors import InputError

GRADIENT = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def solid(path: Path, value: int, *, size: tuple[int, int] = (8, 8)) -> Path:
    return save(path, np.full((*size, 3), value, np.uint8))


# One file.


def test_rgb_is_read_as_it_is(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", array)), array)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "RGB"])
def test_every_mode_becomes_three_equal_channels_of_a_grey_picture(tmp_path, mode):
    array = np.where(GRADIENT > 100, 255, 0).astype(np.uint8)
    image = read_image(save(tmp_path / "a.png", array, mode))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(array[..., None], 3, axis=2))


def test_cmyk_becomes_rgb(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((8, 8, 3), (255, 0, 0), np.uint8), "CMYK", quality=100)
    np.testing.assert_allclose(read_image(path)[0, 0].astype(int), (255, 0, 0), atol=3)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    array = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], [[0, 1, 128, 255]])


def test_transparency_is_dropped_and_a_transparent_palette_is_no_warning(tmp_path):
    array = np.dstack([np.full((4, 4, 3), 77, np.uint8), np.zeros((4, 4), np.uint8)])
    assert (read_image(save(tmp_path / "a.png", array)) == 77).all()
    path = save(tmp_path / "b.png", GRADIENT, "P", transparency=bytes(range(24)))
    assert read_image(path).shape == (4, 6, 3)


def test_the_exif_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = save(tmp_path / "a.png", GRADIENT, exif=exif)
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], np.rot90(GRADIENT, -1))


def test_the_centre_is_kept_when_the_shape_differs(tmp_path):
    array = np.zeros((4, 12), np.uint8)
    array[:, 4:8] = 200
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", array), size=(4, 4)), 200)
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", array.T), size=(4, 4)), 200)
    assert read_image(tmp_path / "a.png", size=(9, 5), channels=1).shape == (9, 5, 1)


def test_scaling_down_averages():
    checks = np.indices((16, 16)).sum(axis=0) % 2 * 200
    small = resize(checks.astype(np.uint8)[None, ..., None], (4, 4))
    np.testing.assert_allclose(small[0, 1:3, 1:3, 0].astype(int), 100, atol=6)


def test_resizing_arrays_agrees_with_reading_at_that_size(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    path = save(tmp_path / "a.png", array)
    np.testing.assert_array_equal(resize(array[None], (6, 6))[0], read_image(path, size=(6, 6)))
    with pytest.raises(InputError, match="float32"):
        resize(array[None].astype(np.float32), (6, 6))


def half_a_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()[: stream.tell() // 2]


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", half_a_jpeg(), b"GIF89a" + bytes(50)], ids=range(5)
)
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read image .*broken\.png: \w+"):
        read_image(path)
    with pytest.raises(InputError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("limit", [700, 400])  # Pillow warns above its limit, and refuses above twice that
def test_a_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "bomb.png", np.zeros((30, 30), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"bomb\.png: decompression bomb: .*900 pixels"):
        read_image(path)


# A folder.


def test_classes_and_examples_come_in_sorted_order(tmp_path, monkeypatch):
    for i, name in enumerate(["zebra", "ant", "Moth"]):
        for j in range(10):
            solid(tmp_path / "pets" / name / f"{j}.{'jpg' if j % 2 else 'PNG'}", 80 * i + j)
    (tmp_path / "pets" / "ant" / "notes.txt").write_text("ignored")
    (tmp_path / "pets" / ".cache").mkdir()
    data = load("pets", data_dir=tmp_path)
    assert data.name == "pets"
    assert data.classes == ("Moth", "ant", "zebra")
    assert data.train.images.shape == (24, 8, 8, 3)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    first = {label: value for value, label in enumerate(["zebra", "ant", "Moth"])}
    for split in (data.train, data.test):
        kind = split.images[:, 0, 0, 0] // 80
        assert kind.tolist() == [first[data.classes[label]] for label in split.labels]
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    again = load("folder:pets", data_dir=tmp_path)
    np.testing.assert_array_equal(again.train.images, data.train.images)
    np.testing.assert_array_equal(again.test.images, data.test.images)
    assert again.digests == data.digests


def test_the_digest_covers_names_and_bytes(tmp_path):
    for j in range(5):
        solid(tmp_path / "pets" / "a" / f"{j}.png", j)
    digests = [load("pets", data_dir=tmp_path).digests["pets"]]
    solid(tmp_path / "pets" / "a" / "0.png", 9)
    digests.append(load("pets", data_dir=tmp_path).digests["pets"])
    (tmp_path / "pets" / "a" / "4.png").rename(tmp_path / "pets" / "a" / "5.png")
    digests.append(load("pets", data_dir=tmp_path).digests["pets"])
    assert len(set(digests)) == 3
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)


@pytest.mark.parametrize("held", ["test", "val"])
def test_given_splits_are_used(tmp_path, held):
    for name in ("a", "b"):
        solid(tmp_path / "pets" / "train" / name / "0.png", 10)
        solid(tmp_path / "pets" / held / name / "0.png", 20)
    data = load("pets", data_dir=tmp_path)
    assert (data.train.images == 10).all()
    assert (data.test.images == 20).all()
    assert data.classes == ("a", "b")
    solid(tmp_path / "pets" / held / "c" / "0.png", 20)
    with pytest.raises(InputError, match=rf"pets/{held} and .*pets/train differ in their class folders: c"):
        load("pets", data_dir=tmp_path)


def test_images_of_several_sizes_need_one_size(tmp_path):
    for j in range(5):
        solid(tmp_path / "pets" / "a" / f"{j}.png", j, size=(8, 8 + j // 4))
    with pytest.raises(InputError, match=r"8 x 9 pixels|8 x 8 pixels") as caught:
        load("pets", data_dir=tmp_path)
    assert "--data.image-size" in str(caught.value)
    assert load("pets", data_dir=tmp_path, image_size=(4, 6)).train.images.shape == (4, 4, 6, 3)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(InputError, match=r"pets: no class folder found"):
        load("pets", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"absent: no class folder found"):
        load("folder:absent", data_dir=tmp_path)
    (tmp_path / "pets" / "cat").mkdir()
    with pytest.raises(InputError, match=r"pets/cat: empty class folder"):
        load("pets", data_dir=tmp_path)
    solid(tmp_path / "pets" / "cat" / "0.png", 1)
    with pytest.raises(InputError, match="too few images for a test split"):
        load("pets", data_dir=tmp_path)
    (tmp_path / "pets" / "cat" / "1.jpg").write_bytes(b"not a picture")
    solid(tmp_path / "pets" / "cat" / "2.png", 1)
    with pytest.raises(InputError, match=r"cannot read image .*1\.jpg"):
        load("pets", data_dir=tmp_path)


def test_the_fixed_split_takes_a_fifth():
    assert images.TEST_FRACTION == 0.2
