"""Warps, colours and RandAugment: against Pillow and SciPy, and what holds for any key."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from jaxcnn import build, config
from jaxcnn.config import Data, Experiment, Train
from jaxcnn.data import color, preprocess
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.randaugment import OPERATIONS, randaugment
from jaxcnn.data.warp import rotation, warp
from jaxcnn.errors import InputError

B, H, W, K = 16, 12, 10, 4
FILL = np.array([0.2, 0.5, 0.7], np.float32)
LEVELS = np.random.default_rng(0).integers(20, 220, (B, H, W, 3)).astype(np.uint8)
IMAGES = LEVELS.astype(np.float32) / 255
LABELS = np.arange(B, dtype=np.int32) % K
jitted = jax.jit(augment, static_argnames=("settings", "num_classes"))


def run(seed, images: Any = IMAGES, fill: Any = FILL, **options: Any):
    key, labels = jax.random.key(seed), jnp.arange(len(images)) % K
    out = jitted(key, jnp.asarray(images), labels, settings=Augmentation(**options), num_classes=K, fill=fill)
    return np.asarray(out.images)


# Warps


def turned(image, degrees, zoom=1.0, fill=FILL):
    matrix = rotation(jnp.float32(degrees), zoom=jnp.float32(zoom))
    return np.asarray(jax.jit(warp)(jnp.asarray(image), matrix, fill=jnp.asarray(fill)))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_those_of_numpy(quarters):
    image = IMAGES[0, :10]
    np.testing.assert_allclose(turned(image, 90 * quarters), np.rot90(image, quarters), atol=1e-5)


def test_the_identity_changes_no_bit():
    np.testing.assert_array_equal(turned(IMAGES[0], 0.0), IMAGES[0])


@pytest.mark.parametrize("angle", [-170.0, -12.5, 33.0])
def test_a_rotation_is_that_of_scipy_with_its_border(angle):
    """scipy.ndimage.rotate turns from the first axis to the second: clockwise on images with rows downwards."""
    for channel in range(3):
        expected = ndimage.rotate(
            IMAGES[0, ..., channel], angle, reshape=False, order=1, mode="grid-constant", cval=FILL[channel]
        )
        np.testing.assert_allclose(turned(IMAGES[0], angle)[..., channel], expected, atol=2e-5)


@pytest.mark.parametrize("zoom", [0.7, 1.0, 1.6])
def test_any_matrix_is_that_of_scipy(zoom):
    square = np.array([[0.9, 0.3], [-0.2, 1.1]]) / zoom
    shift = np.array([1.5, -0.25])
    middle = (np.array([H, W]) - 1) / 2
    matrix = jnp.asarray(np.c_[square, shift], jnp.float32)
    found = jax.jit(warp)(jnp.asarray(IMAGES[1]), matrix, fill=FILL)
    for channel in range(3):
        expected = ndimage.affine_transform(
            IMAGES[1, ..., channel],
            square,
            offset=middle + shift - square @ middle,
            order=1,
            mode="grid-constant",
            cval=FILL[channel],
        )
        np.testing.assert_allclose(found[..., channel], expected, atol=2e-5)


def test_zoom_2_shows_the_middle_at_twice_the_size():
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32)[:, None, None], (9, 9, 3))
    np.testing.assert_allclose(turned(ramp, 0.0, 2.0)[:, 4, 0], 4 + (np.arange(9) - 4) / 2, atol=1e-6)


# Colours


def pillow(image, change):
    return np.asarray(change(Image.fromarray(image))).astype(float) / 255


BITS = 3
COLOURS = {
    "autocontrast": (color.autocontrast, ImageOps.autocontrast),
    "equalize": (color.equalize, ImageOps.equalize),
    "solarize": (lambda x: color.solarize(x, 100 / 255), lambda x: ImageOps.solarize(x, 100)),
    "posterize": (lambda x: color.posterize(x, BITS), lambda x: ImageOps.posterize(x, BITS)),
}
for factor in (0.0, 0.4, 1.7):
    for ours, theirs in (
        (color.brightness, ImageEnhance.Brightness),
        (color.contrast, ImageEnhance.Contrast),
        (color.saturation, ImageEnhance.Color),
        (color.sharpness, ImageEnhance.Sharpness),
    ):
        COLOURS[f"{ours.__name__} {factor}"] = (
            lambda x, ours=ours, factor=factor: ours(x, factor),
            lambda x, theirs=theirs, factor=factor: theirs(x).enhance(factor),
        )


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_operation_is_that_of_pillow(name):
    """Pillow rounds its result, and before that the grey or smooth image, each to 1/255."""
    ours, theirs = COLOURS[name]
    rng = np.random.default_rng(3)
    dull = rng.integers(90, 140, (33, 40, 3)).astype(np.uint8)
    gradient = np.broadcast_to(np.arange(0, 240, 6)[None, :, None], (33, 40, 3)).astype(np.uint8)
    found = jax.jit(jax.vmap(ours))(jnp.asarray([dull / 255, gradient / 255], jnp.float32))
    for got, image in zip(found, (dull, gradient), strict=True):
        tolerance = 0.5 if name == "posterize" else 2.01
        np.testing.assert_allclose(got, pillow(image, theirs), atol=tolerance / 255)
        assert got.min() >= 0
        assert got.max() <= 1


def test_equalize_is_exact_and_leaves_what_has_too_few_pixels():
    equalize = jax.jit(color.equalize)
    levels = LEVELS.reshape(-1, 3)[:1600].reshape(40, 40, 3)
    found = equalize(jnp.asarray(levels / 255, jnp.float32))
    np.testing.assert_array_equal(np.round(np.asarray(found) * 255), 255 * pillow(levels, ImageOps.equalize))
    np.testing.assert_array_equal(equalize(jnp.asarray(IMAGES[0])), IMAGES[0])


def test_grey_images_and_those_of_one_value_pass():
    grey = jnp.asarray(IMAGES[0, ..., :1])
    np.testing.assert_array_equal(color.saturation(grey, 0.3), grey)
    flat = jnp.full((20, 20, 3), 0.25)
    for change in (color.autocontrast, color.equalize):
        np.testing.assert_array_equal(jax.jit(change)(flat), flat)


# RandAugment

jitted_randaugment = jax.jit(randaugment, static_argnames="magnitude")


def one(image, name, *, magnitude, negative=0):
    choices = jnp.array([[OPERATIONS.index(name), negative]])
    return np.asarray(jitted_randaugment(jnp.asarray(image), choices, magnitude=magnitude, fill=FILL))


M9 = {  # torchvision's strengths at magnitude 9 of 30, in Pillow's terms
    "identity": lambda x: x,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "solarize": lambda x: ImageOps.solarize(x, 179),
    "posterize": lambda x: ImageOps.posterize(x, 7),
    "color": lambda x: ImageEnhance.Color(x).enhance(1.27),
    "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.27),
    "brightness": lambda x: ImageEnhance.Brightness(x).enhance(1.27),
    "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(1.27),
    "rotate": lambda x: x.rotate(9, Image.Resampling.BILINEAR),
    "shear_x": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0.09, 0, 0, 1, 0), Image.Resampling.BILINEAR),
    "shear_y": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0.09, 1, 0), Image.Resampling.BILINEAR),
    "translate_x": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 4, 0, 1, 0)),
    "translate_y": lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_magnitude_9_is_that_of_pillow(name):
    rng = np.random.default_rng(4)
    small = rng.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(small).resize((32, 40), Image.Resampling.BILINEAR))
    found, expected = one(image / np.float32(255), name, magnitude=9), pillow(image, M9[name])
    inner = (slice(8, -8),) * 2 if name.startswith(("rotate", "shear", "translate")) else ()
    np.testing.assert_allclose(found[inner], expected[inner], atol=2.01 / 255)


def test_negative_strengths_darken_and_shift_back():
    image = IMAGES[0] / 3
    np.testing.assert_allclose(one(image, "brightness", magnitude=15, negative=1), 0.55 * image, atol=1e-6)
    np.testing.assert_allclose(one(image, "brightness", magnitude=15), 1.45 * image, atol=1e-6)
    shifted = one(one(image, "translate_y", magnitude=15), "translate_y", magnitude=15, negative=1)
    np.testing.assert_array_equal(shifted[2:], image[2:])
    np.testing.assert_array_equal(shifted[:2], np.broadcast_to(FILL, (2, W, 3)))


def test_every_operation_is_drawn_as_often_and_with_either_sign(monkeypatch):
    """Read off a table of constant images in place of the operations."""
    n = 14 * 400

    def marked(image, choices, **_):
        return jnp.broadcast_to((choices[0, 0] + 0.5 * choices[0, 1]) / 16, image.shape)

    monkeypatch.setattr("jaxcnn.data.augment.randaugment", marked)
    images = jnp.zeros((n, 1, 1, 3))
    settings = Augmentation(randaugment=(1, 5))
    out = augment(
        jax.random.key(0), images, jnp.zeros(n, jnp.int32), settings=settings, num_classes=1, fill=jnp.zeros(3)
    )
    counts = np.unique(np.asarray(out.images)[:, 0, 0, 0], return_counts=True)[1]
    assert len(counts) == 28
    assert stats.chisquare(counts).pvalue > 0.001


# Inside `augment`

NEW: dict[str, Any] = {"rotation": 20.0, "scaling": 0.2, "color_jitter": 0.4, "randaugment": (2, 9)}


@pytest.mark.usefixtures("strict_dtypes")
def test_range_stays_and_most_images_change():
    images = run(0, **NEW)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (images != IMAGES).any((1, 2, 3)).sum() > B // 2


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_shape_and_dtype_stay(dtype, float64):
    images = jnp.asarray(IMAGES, dtype)
    out = jax.eval_shape(
        lambda key: augment(
            key, images, jnp.asarray(LABELS), settings=Augmentation(**NEW), num_classes=K, fill=jnp.asarray(FILL)
        ),
        jax.random.key(0),
    )
    assert (out.images.shape, out.images.dtype) == (IMAGES.shape, dtype)


def test_the_same_key_gives_the_same_images_and_another_others():
    first = run(1, **NEW)
    np.testing.assert_array_equal(first, run(1, **NEW))
    assert (first != run(2, **NEW)).any()


def test_an_example_depends_on_its_index_alone():
    np.testing.assert_array_equal(run(7, IMAGES[:5], **NEW), run(7, **NEW)[:5])


def test_sharded_over_8_devices_equals_one_device_bit_for_bit_and_nothing_is_exchanged():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.NamedSharding(mesh, jax.P("data"))
    placed = jax.device_put((IMAGES, LABELS), over)
    sharded = jax.jit(augment, static_argnames=("settings", "num_classes"), out_shardings=over).lower(
        jax.random.key(0), *placed, settings=Augmentation(**NEW), num_classes=K, fill=FILL
    )
    compiled = sharded.compile()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in str(compiled.as_text())
    for seed in range(8):
        np.testing.assert_array_equal(
            run(seed, **NEW),
            compiled(jax.device_put(jax.random.key(seed), jax.NamedSharding(mesh, jax.P())), *placed, fill=FILL).images,
        )


def test_new_operations_draw_from_streams_of_their_own():
    """Where nothing is rotated visibly or recoloured, crops, flips and cutout are what they are alone."""
    old = {"crop_padding": 2, "flip": True, "cutout": 3}
    np.testing.assert_allclose(run(8, **old, rotation=1e-6, color_jitter=1e-6), run(8, **old), atol=1e-5)


def test_angles_and_zooms_are_uniform_in_their_ranges():
    """A dot off the middle shows both: where it lies in polar coordinates."""
    n, size = 1500, 41
    rows, columns = np.mgrid[:size, :size] - size // 2
    dot = np.exp(-((rows + 12) ** 2 + columns**2) / 8).astype(np.float32)  # 12 pixels above the middle
    images = np.broadcast_to(dot[None, ..., None], (n, size, size, 1))
    found = run(5, images, fill=np.zeros(1, np.float32), rotation=30.0, scaling=0.3)[..., 0].astype(float)
    mass = found.sum((1, 2))
    y, x = ((found * axis).sum((1, 2)) / mass for axis in (rows, columns))
    angles, zooms = np.degrees(np.arctan2(-x, -y)), np.hypot(x, y) / 12
    assert stats.kstest(angles, stats.uniform(-30, 60).cdf).pvalue > 0.01
    assert stats.kstest(zooms, stats.uniform(0.7, 0.6).cdf).pvalue > 0.01
    assert abs(np.corrcoef(angles, zooms)[0, 1]) < 4 / math.sqrt(n)


def test_color_jitter_is_brightness_contrast_and_saturation_in_this_order():
    """One of them acts alone on suitable images; on others the result is one of the three in order."""
    grey = np.broadcast_to(np.linspace(0.2, 0.4, 2)[None, None, :, None], (500, 2, 2, 3)).astype(np.float32)
    found = run(3, grey, color_jitter=0.5)
    np.testing.assert_allclose(found[..., 0], found[..., 2], atol=1e-6)  # no saturation to change
    brightness, contrast = found[:, 0].sum((1, 2)) / grey[:, 0].sum((1, 2)), np.ptp(found, axis=2)[:, 0, 0] / 0.2
    for factors in (brightness, contrast / brightness):
        assert stats.kstest(factors, stats.uniform(0.5, 1).cdf).pvalue > 0.01
    assert abs(np.corrcoef(brightness, contrast / brightness)[0, 1]) < 4 / math.sqrt(500)


@pytest.mark.parametrize("kind", ["standardize", "none", "zca"])
def test_a_run_recolours_before_it_preprocesses(kind):
    data = Data(preprocessing=kind, crop_padding=1, color_jitter=0.4)
    fitted = preprocess.fit(kind, LEVELS)
    experiment = config.validate(Experiment(data=data, train=Train(steps=1)))
    batch = {"image": jnp.asarray(LEVELS), "label": jnp.asarray(LABELS)}
    prepared = jax.jit(build.prepare_train(experiment, fitted, num_classes=K))(batch, jax.random.key(2))
    mean = LEVELS.mean((0, 1, 2)) / 255
    expected = fitted(run(2, fill=mean.astype(np.float32), crop_padding=1, color_jitter=0.4))
    np.testing.assert_allclose(prepared["image"], expected, atol=1e-3 if kind == "zca" else 1e-4)


def test_the_configuration_survives_its_file_and_is_passed_on_whole():
    experiment = Experiment(data=Data(rotation=5.0, randaugment=(2, 9)))
    assert config.from_json(json.loads(json.dumps(config.to_json(experiment)))) == experiment
    names = {field.name for field in dataclasses.fields(Augmentation)}
    assert names <= {field.name for field in dataclasses.fields(Data)}


BAD = [
    ("rotation", 181.0),
    ("rotation", -1.0),
    ("rotation", math.nan),
    ("scaling", 1),
    ("color_jitter", 1.5),
    ("color_jitter", -0.1),
    ("randaugment", (0, 5)),
    ("randaugment", (2, 31)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_outside_their_ranges_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is "):
        Augmentation(**{name: value})
    with pytest.raises(InputError, match=f"--data.{name.replace('_', '-')} "):
        config.validate(Experiment(data=Data(**{name: value}), train=Train(steps=1)))


@pytest.mark.parametrize(("name", "value"), [("rotation", True), ("randaugment", 9), ("randaugment", (2.0, 9))])
def test_values_of_another_kind_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is "):
        Augmentation(**{name: value})


def test_colours_of_two_channels_are_refused():
    with pytest.raises(InputError, match="2 channels"):
        run(0, IMAGES[..., :2], fill=FILL[:2], color_jitter=0.1)
