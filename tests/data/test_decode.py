"""Pixels of compressed images: as in memory where nothing is drawn, and the random-resized crop against a reference."""

import io
import math

import numpy as np
import pytest
from jpegs import jpeg
from PIL import Image

from jaxcnn.data import decode
from jaxcnn.data.decode import ATTEMPTS, DRAWS, Compressed, centre, crop_box, random_crop, uniform_draws
from jaxcnn.data.images import read_image
from jaxcnn.errors import InputError


def first(*values: float) -> np.ndarray:
    """Draws whose first attempt is `values`: area, shape, top, left."""
    return np.array([*values, *np.full(DRAWS - 4, 0.5)])


def reference(height, width, area, draws):
    """torchvision's RandomResizedCrop.get_params with these draws."""
    for i in range(ATTEMPTS):
        share, shape, top, left = draws[4 * i : 4 * i + 4]
        target = height * width * np.interp(share, (0, 1), area)
        ratio = np.exp(np.interp(shape, (0, 1), np.log(decode.RATIOS)))
        w, h = int(np.round(np.sqrt(target * ratio))), int(np.round(np.sqrt(target / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(np.floor(left * (width - w + 1))), int(np.floor(top * (height - h + 1))), w, h
    ratio = width / height
    w, h = width, height
    if ratio < min(decode.RATIOS):
        h = int(np.round(w / min(decode.RATIOS)))
    elif ratio > max(decode.RATIOS):
        w = int(np.round(h * max(decode.RATIOS)))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (500, 375), (10, 90), (90, 10), (1, 1), (3, 200)])
def test_boxes_are_those_of_the_reference(height, width):
    for position in range(300):
        draws = uniform_draws(7, 3, position)
        box = crop_box(height, width, area=(0.08, 1.0), draws=draws)
        assert box == reference(height, width, (0.08, 1.0), draws)
        assert 0 <= box.left <= width - box.width
        assert 0 <= box.top <= height - box.height
        assert min(box.width, box.height) >= 1


def test_area_shape_and_place_are_spread_as_stated():
    boxes = [crop_box(1000, 1000, area=(0.1, 0.5), draws=uniform_draws(0, step, 0)) for step in range(4000)]
    area = np.array([box.width * box.height for box in boxes]) / 1e6
    shape = np.log([box.width / box.height for box in boxes])
    place = np.array([box.left / (1000 - box.width) for box in boxes])
    for values, low, high in ((area, 0.1, 0.5), (shape, math.log(3 / 4), math.log(4 / 3)), (place, 0.0, 1.0)):
        assert low - 0.005 <= values.min() < low + 0.02 * (high - low)
        assert high + 0.005 >= values.max() > high - 0.02 * (high - low)
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.03 * (high - low))
        np.testing.assert_allclose(values.std(), (high - low) / math.sqrt(12), rtol=0.05)


def test_what_fits_nowhere_becomes_the_largest_central_box():
    assert crop_box(10, 90, area=(1.0, 1.0), draws=np.full(DRAWS, 0.5)) == (38, 0, 13, 10)
    assert crop_box(90, 10, area=(1.0, 1.0), draws=np.full(DRAWS, 0.5)) == (0, 38, 10, 13)


def test_draws_depend_on_seed_step_and_position_alone():
    draws = [tuple(uniform_draws(*key)) for key in np.ndindex(3, 3, 3)]
    assert len(set(draws)) == 27
    assert len({value for row in draws for value in row}) == 27 * DRAWS
    assert draws == [tuple(uniform_draws(*key)) for key in np.ndindex(3, 3, 3)]
    assert 0 <= np.min(draws) < 0.01 < 0.99 < np.max(draws) < 1
    # Pinned: another stream would be another run.
    np.testing.assert_allclose(uniform_draws(1, 2, 3)[:2], [0.7392729637493114, 0.1727219477163251])


def test_the_crop_is_what_pillow_gives_for_the_box():
    image = Compressed(jpeg(40, 60), "a.jpg")
    draws = uniform_draws(0, 0, 0)
    left, top, width, height = reference(40, 60, (0.3, 0.9), draws)
    whole = Image.open(io.BytesIO(image.content))
    expected = whole.crop((left, top, left + width, top + height)).resize((16, 12), Image.Resampling.BILINEAR)
    found = random_crop(image, size=(12, 16), area=(0.3, 0.9), draws=draws)
    assert found.shape == (12, 16, 3)
    assert found.dtype == np.uint8
    inside = (slice(2, -2), slice(2, -2))  # at the edges what lies outside the box counts too
    np.testing.assert_allclose(found[inside].astype(int), np.asarray(expected)[inside].astype(int), atol=1)


def test_a_large_jpeg_decoded_smaller_gives_nearly_the_same():
    image = Compressed(jpeg(600, 800), "a.jpg")
    draws = first(0.9, 0.5, 0.3, 0.7)
    small = random_crop(image, size=(32, 32), area=(0.08, 1.0), draws=draws).astype(int)
    stream = io.BytesIO()
    Image.open(io.BytesIO(image.content)).save(stream, "PNG")  # PNG is decoded whole
    whole = random_crop(Compressed(stream.getvalue(), "a.png"), size=(32, 32), area=(0.08, 1.0), draws=draws)
    assert 0 < np.abs(small - whole).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(40, 64), (400, 640)])
def test_the_exif_orientation_is_obeyed(orientation, shape):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Compressed(jpeg(*shape, exif=exif), "a.jpg")
    stream = io.BytesIO()
    upright = Image.fromarray(centre(turned, size=None))
    assert upright.size == (shape[::-1] if orientation < 5 else shape)
    upright.save(stream, "PNG")
    draws = first(0.5, 0.4, 0.9, 0.1)
    found, expected = (
        random_crop(image, size=(16, 16), area=(0.3, 1.0), draws=draws).astype(int)
        for image in (turned, Compressed(stream.getvalue(), "a.png"))
    )
    assert np.abs(found - expected).mean() < (1 if shape[0] == 40 else 3)


@pytest.mark.parametrize("size", [(16, 16), (20, 9), None])
def test_without_a_crop_the_pixels_are_those_of_read_image(tmp_path, size):
    (tmp_path / "a.jpg").write_bytes(jpeg(40, 31))
    image = Compressed(jpeg(40, 31), "a.jpg")
    np.testing.assert_array_equal(centre(image, size=size), read_image(tmp_path / "a.jpg", size=size))


def test_evaluation_after_random_crops_takes_the_central_seven_eighths():
    image = Compressed(jpeg(64, 96), "a.jpg")
    whole = Image.open(io.BytesIO(image.content))
    expected = whole.resize((28, 28), Image.Resampling.BILINEAR, box=(20, 4, 76, 60))
    np.testing.assert_array_equal(centre(image, size=(28, 28), border=decode.BORDER), expected)


@pytest.mark.parametrize("content", [b"", b"hello", jpeg(64, 64)[:700], b"GIF89a" + bytes(50)], ids=range(4))
def test_a_damaged_image_is_named(content):
    image = Compressed(content, "pets/cat/7.jpg")
    with pytest.raises(InputError, match=r"cannot read image pets/cat/7\.jpg: \w+"):
        centre(image, size=(8, 8))
    with pytest.raises(InputError, match=r"cannot read image pets/cat/7\.jpg: \w+"):
        random_crop(image, size=(8, 8), area=(0.1, 1), draws=uniform_draws(0, 0, 0))
