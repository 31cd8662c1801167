import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxcnn.errors import InputError
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels

IMAGENET = PREPROCESSINGS["imagenet"]
GREY = np.full((1, 2, 2, 3), 128, np.uint8)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet", [(128 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]),
        ("imagenet_bicubic", [(128 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]),
        ("inception", [128 / 127.5 - 1] * 3),
        ("caffe", [128 - 103.939, 128 - 116.779, 128 - 123.68]),
        ("squeezenet", [24.0, 11.0, 5.0]),
    ],
)
def test_closed_forms(name, expected):
    for images in (GREY, GREY.astype(np.float32) / 255):
        np.testing.assert_allclose(np.asarray(PREPROCESSINGS[name](images))[0, 0, 0], expected, atol=2e-5)


def test_the_channels_of_caffe_are_blue_green_red():
    red = np.zeros((1, 1, 1, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_allclose(PREPROCESSINGS["caffe"](red)[0, 0, 0], [-103.939, -116.779, 255 - 123.68], rtol=1e-6)


def test_uint8_and_the_same_in_0_to_1_agree_and_types_are_kept():
    images = picture(5, 7)[None]
    for pixels in PREPROCESSINGS.values():
        whole, scaled = pixels(images), pixels(images.astype(np.float32) / 255)
        assert whole.dtype == scaled.dtype == jnp.float32
        np.testing.assert_allclose(whole, scaled, rtol=1e-5, atol=3e-5)
        assert pixels(jnp.asarray(images / 255, jnp.bfloat16)).dtype == jnp.bfloat16


def test_it_can_be_compiled_and_takes_any_size():
    images = jnp.asarray(picture(9, 197)[None])
    np.testing.assert_allclose(jax.jit(IMAGENET.__call__)(images), IMAGENET(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [np.zeros((2, 2, 3)), np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 3), np.int32)])
def test_other_shapes_and_types_are_refused(images):
    with pytest.raises(InputError, match="preprocessing got images of"):
        IMAGENET(images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 1.5}, "crop 1.5"),
        ({"size": (0, 224)}, "size"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"scale": 0.0}, "scale"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"order": "RBG"}, "unknown channel order 'RBG'"),
    ],
)
def test_impossible_preprocessings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(IMAGENET, **fields)


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(300, 400), (400, 301), (100, 90)])
def test_reading_is_pillows_resize_and_centre_crop(tmp_path, name, size):
    """Resize(256) and CenterCrop as torchvision defines them: the shorter side exactly, the longer one rounded down."""
    pixels, (height, width) = PREPROCESSINGS[name], size
    Image.fromarray(picture(height, width)).save(tmp_path / "a.png")
    short, side = min(size), pixels.size[0]
    resized = Image.open(tmp_path / "a.png").resize(
        (int(256 * width / short), int(256 * height / short)),
        Image.Resampling.BICUBIC if name == "imagenet_bicubic" else Image.Resampling.BILINEAR,
    )
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    expected = np.asarray(resized)[top : top + side, left : left + side]
    found = pixels.read(tmp_path / "a.png")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_the_sizes_of_timms_crops():
    """timm scales the shorter side to floor(224 / crop): 235 for 0.95, 232 for 0.965, 238 for 0.94, 248 for 0.9."""
    for crop, side in ((0.95, 235), (0.965, 232), (0.94, 238), (0.9, 248), (0.875, 256), (1.0, 224)):
        assert dataclasses.replace(IMAGENET, crop=crop)._covering(300, 300) == (side, side)


def test_grey_images_become_rgb_and_a_picture_of_the_right_size_stays(tmp_path):
    pixels = dataclasses.replace(IMAGENET, size=(8, 6), crop=1.0)
    image = picture(8, 6)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels.read(tmp_path / "a.png"), image)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels.read(tmp_path / "grey.png"), np.repeat(image[..., :1], 3, axis=-1))


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    image=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    crop=st.floats(0.1, 1.0),
)
def test_the_scaled_image_just_covers_what_is_cut_from(size, image, crop):
    pixels = Pixels(size, crop, "bilinear", IMAGENET.mean, IMAGENET.std)
    width, height = pixels._covering(image[1], image[0])
    least = [int(side / crop) for side in size]
    assert height >= least[0] >= size[0]
    assert width >= least[1] >= size[1]
    assert height == least[0] or width == least[1]


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match=r"cannot read image .*a\.png"):
        IMAGENET.read(tmp_path / "a.png")
