"""Label maps move with their images; the weight map and the tiles against the formulas they stand for."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from jaxcnn import parallel
from jaxcnn.data.segmentation import Deformation, _cubic, deform, pack, read_stack, tiles, unpack, weight_map
from jaxcnn.errors import InputError
from jaxcnn.losses import central
from jaxcnn.models import create
from jaxcnn.segmentation import predict_tiles

RNG = np.random.default_rng(0)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=10, deadline=None)
jitted = jax.jit(deform, static_argnames="settings")
SMOOTH = ndimage.gaussian_filter(RNG.normal(size=(3, 40, 48)), (0, 6, 6)).astype(np.float32)


def deformed(seed, batch, **options):
    out = jitted(jax.random.key(seed), batch, settings=Deformation(**options))
    return {name: np.asarray(value) for name, value in out.items()}


def batch_of(maps, **more):
    return {"image": jnp.asarray(maps)[..., None], "label": jnp.zeros(maps.shape, jnp.int32), **more}


# Deformation


@few
@given(seeds)
def test_image_label_and_weight_move_together(seed):
    """A label that is the image's sign stays its sign, where the image is not about 0; the weight stays the image."""
    batch = {
        "image": jnp.asarray(SMOOTH / SMOOTH.std())[..., None],
        "label": jnp.asarray(SMOOTH > 0, jnp.int32),
        "weight": jnp.asarray(SMOOTH / SMOOTH.std()),
    }
    out = deformed(seed, batch, size=32, context=3)
    assert out["image"].shape == (3, 38, 38, 1)
    assert (out["label"].shape, out["label"].dtype) == ((3, 32, 32), np.int32)
    inner = out["image"][:, 3:-3, 3:-3, 0]
    np.testing.assert_allclose(out["weight"], inner, atol=1e-5)
    clear = np.abs(inner) > 0.25
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(out["label"][clear], (inner > 0)[clear])


@few
@given(seeds)
def test_without_displacement_it_is_an_exact_window_in_one_of_eight_positions(seed):
    image = np.arange(20.0 * 20, dtype=np.float32).reshape(1, 20, 20)
    out = deformed(seed, batch_of(image) | {"label": jnp.asarray(image, jnp.int32)}, size=16, std=0.0)
    window = out["image"][0, ..., 0]
    np.testing.assert_array_equal(window, out["label"][0])
    windows = np.lib.stride_tricks.sliding_window_view(image[0], (16, 16)).reshape(-1, 16, 16)
    turned = [np.rot90(side, k) for side in (window, window.T) for k in range(4)]
    assert sum((windows == one).all((1, 2)).any() for one in turned) == 1


def test_all_eight_positions_and_every_corner_occur():
    image = np.broadcast_to(np.arange(36.0, dtype=np.float32).reshape(1, 6, 6), (512, 6, 6))
    out = deformed(0, batch_of(image), size=5, std=0.0)["image"]
    assert len(np.unique(out.reshape(512, -1), axis=0)) == 8 * 4


def test_the_context_is_mirrored_about_the_outermost_pixels():
    image = RNG.normal(size=(2, 8, 8)).astype(np.float32)
    out = deformed(0, batch_of(image), size=8, context=5, std=0.0, symmetries=False)
    np.testing.assert_array_equal(out["image"][..., 0], np.pad(image, [(0, 0), (5, 5), (5, 5)], mode="reflect"))


def test_displacements_have_the_stated_size_and_are_smooth():
    """Of two ramps, what comes out is where it comes from: mean 0, and the standard deviation on the grid's points."""
    n, size = 400, 33
    ramp = np.arange(size, dtype=np.float32) + 100
    rows = np.broadcast_to(ramp[None, :, None], (n, size, size))
    batch = {"image": jnp.stack([rows, rows.swapaxes(1, 2)], -1), "label": jnp.zeros((n, size, size), jnp.int32)}
    out = deformed(1, batch, size=size, std=1.0, symmetries=False)["image"]
    shift = out - np.asarray(batch["image"])
    middle = shift[:, size // 2, size // 2]
    np.testing.assert_allclose(middle.std(0), 1, rtol=0.1)
    assert np.abs(middle.mean(0)).max() < 0.2
    inside = shift[:, 8:-8, 8:-8]
    assert np.abs(np.diff(inside, axis=1)).max() < 0.5  # of points 16 pixels apart


def test_cubic_interpolation_meets_its_points_and_keeps_constants_and_lines():
    x = jnp.arange(65, dtype=jnp.float32)
    weights = np.asarray(_cubic(x, 65, 5))
    np.testing.assert_allclose(weights[::16], np.eye(5), atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    line = weights @ np.arange(5)
    np.testing.assert_allclose(line[16:49], np.arange(16, 49) / 16, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_an_example_does_not_depend_on_the_number_of_devices():
    batch = batch_of(RNG.normal(size=(8, 24, 24)).astype(np.float32))
    whole = deformed(5, batch, size=16)["image"]
    sharded = jax.device_put(batch, parallel.by_example(parallel.make_mesh()))
    np.testing.assert_allclose(deformed(5, sharded, size=16)["image"], whole, atol=1e-5)
    assert not np.allclose(whole[0], deformed(6, batch, size=16)["image"][0])


def test_pack_and_unpack():
    labels, weights = RNG.integers(0, 3, (2, 4, 5)), RNG.uniform(size=(2, 4, 5)).astype(np.float32)
    batch = unpack({"image": None, "label": jnp.asarray(pack(labels, weights))})
    np.testing.assert_array_equal(batch["label"], labels)
    np.testing.assert_array_equal(batch["weight"], weights)
    assert batch["label"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (batch_of(np.zeros((1, 8, 8), np.uint8)), "expected .* floating point"),
        ({"image": jnp.zeros((1, 20, 20, 1)), "label": jnp.zeros((1, 20, 16))}, "expected"),
        (batch_of(np.zeros((1, 8, 40), np.float32)), "lower the size"),
    ],
)
def test_deform_refuses(batch, message):
    with pytest.raises(InputError, match=message):
        deform(jax.random.key(0), batch, settings=Deformation(size=16))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 4, "context": -1}, {"size": 4, "grid": 1}])
def test_settings_refuse(options):
    with pytest.raises(InputError, match="at least"):
        Deformation(**options)


# Weight map


def brute_force_weights(label, w0, sigma):
    """Equation 2 by the distances of every pixel to every pixel of every cell."""
    components, n = ndimage.label(label)
    at = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), -1)
    distances = np.full((max(n, 2), *label.shape), np.inf)
    for i in range(n):
        cell = np.argwhere(components == i + 1)
        distances[i] = np.sqrt(((at[:, :, None] - cell[None, None]) ** 2).sum(-1)).min(-1)
    d1, d2 = np.sort(distances, axis=0)[:2]
    return np.where(label > 0, 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)))


@pytest.mark.parametrize("options", [{"w0": 10.0, "sigma": 5.0}, {"w0": 3.0, "sigma": 1.0}])
def test_weight_map_is_equation_2(options):
    label = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(36, 44)), 2) > 0.05
    assert ndimage.label(label)[1] > 5
    expected = 1 + brute_force_weights(label, **options)
    np.testing.assert_allclose(weight_map(label, balance=False, **options), expected, rtol=1e-5, atol=1e-6)


def test_balance_gives_both_classes_the_same_weight():
    label = np.zeros((10, 10), np.uint8)
    label[:2] = 1
    weights = weight_map(label)
    np.testing.assert_allclose(weights[label == 1].sum(), 50)
    np.testing.assert_allclose(weights[label == 0].sum(), 50)
    np.testing.assert_array_equal(weight_map(np.ones((4, 4))), 1)
    np.testing.assert_array_equal(weight_map(np.zeros((4, 4))), 1)


def test_weight_map_refuses():
    with pytest.raises(InputError, match="expected"):
        weight_map(np.zeros((2, 3, 4)))
    with pytest.raises(InputError, match="expected"):
        weight_map(np.zeros((3, 4)), sigma=0)


# Tiles


@pytest.mark.parametrize("shape", [(12, 8), (13, 9), (3, 5)])
def test_the_middles_of_tiles_are_the_image(shape):
    images = RNG.normal(size=(2, *shape, 3)).astype(np.float32)
    pieces = tiles(images, tile=4, context=6)
    assert pieces.shape[1:] == (16, 16, 3)
    rows, columns = (-(-size // 4) for size in shape)
    middle = pieces[:, 6:10, 6:10].reshape(2, rows, columns, 4, 4, 3).swapaxes(2, 3)
    np.testing.assert_array_equal(middle.reshape(2, rows * 4, columns * 4, 3)[:, : shape[0], : shape[1]], images)


@pytest.mark.parametrize(("padding", "depth", "context"), [("valid", 2, 22), ("same", 1, 8)])
def test_tiles_give_the_prediction_of_the_whole_image(padding, depth, context):
    """Depth 2 takes 20 pixels away on either side; 16 + 2 * 22 = 60 pixels fit, and so does the mirrored image."""
    net = create("unet", width=2, depth=depth, padding=padding, dropout=0.0)
    image = RNG.normal(size=(32, 48, 1)).astype(np.float32)
    side = 16 + 2 * context
    shapes = jax.eval_shape(partial(net.init, train=False), jax.random.key(0), jnp.zeros((1, side, side, 1)))
    variables = jax.tree.map(lambda x: RNG.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)
    apply = jax.jit(lambda x: net.apply(variables, x, train=False))
    around = np.pad(image, [(context, context), (context, context), (0, 0)], mode="reflect")
    expected = central(apply(around[None]), np.zeros((1, 32, 48)))[0]
    np.testing.assert_allclose(predict_tiles(apply, image, tile=16, context=context), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_predict_tiles_covers_any_size_and_refuses_what_does_not_fit():
    image = RNG.normal(size=(13, 22, 2)).astype(np.float32)
    np.testing.assert_array_equal(predict_tiles(lambda x: x, image, tile=8, context=3), image)
    np.testing.assert_array_equal(predict_tiles(lambda x: x[:, 2:-2, 2:-2], image, tile=8, context=3), image)
    for margin in (7, 1):
        with pytest.raises(InputError, match="change the context"):
            predict_tiles(lambda x, m=margin: x[:, m:, m:], image, tile=8, context=3)
    with pytest.raises(InputError, match="one image"):
        predict_tiles(lambda x: x, image[None], tile=8, context=3)
    with pytest.raises(InputError, match="tile >= 1"):
        predict_tiles(lambda x: x, image, tile=0, context=3)


# Files


def write(folder, part, name, array):
    (folder / part).mkdir(exist_ok=True)
    Image.fromarray(array).save(folder / part / name)


@pytest.fixture
def stack(tmp_path):
    for i in (0, 2, 10):
        write(tmp_path, "image", f"{i}.png", np.full((6, 5), i, np.uint8))
        write(tmp_path, "label", f"{i}.png", np.full((6, 5), 255 * (i == 2), np.uint8))
    return tmp_path


def test_slices_come_in_the_order_of_their_numbers(stack):
    images, labels = read_stack(stack)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((3, 6, 5, 1), np.uint8, (3, 6, 5), np.uint8)
    assert [*images[:, 0, 0, 0]] == [0, 2, 10]
    assert [*labels[:, 0, 0]] == [0, 1, 0]


def test_a_bad_stack_is_refused(stack, tmp_path):
    with pytest.raises(InputError, match=r"holds no \.png"):
        read_stack(tmp_path / "nowhere")
    (stack / "label" / "2.png").rename(stack / "label" / "3.png")
    with pytest.raises(InputError, match=r"2\.png, 3\.png only in one"):
        read_stack(stack)
    (stack / "label" / "3.png").rename(stack / "label" / "2.png")
    write(stack, "label", "10.png", np.full((6, 5), 7, np.uint8))
    with pytest.raises(InputError, match=r"10\.png holds other values"):
        read_stack(stack)
    write(stack, "label", "10.png", np.zeros((6, 6), np.uint8))
    with pytest.raises(InputError, match="one size"):
        read_stack(stack)
    (stack / "image" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot read image"):
        read_stack(stack)


def test_the_real_stack():
    root = os.environ.get("JAXCNN_DATA")
    if not root or not (Path(root) / "isbi2012").is_dir():
        pytest.skip("needs JAXCNN_DATA with isbi2012/")
    images, labels = read_stack(Path(root) / "isbi2012")
    assert images.shape == (30, 512, 512, 1)
    assert labels.shape == (30, 512, 512)
    assert 0.75 < labels.mean() < 0.8
    dark = [
        image[..., 0][label == 0].mean() < image[..., 0][label == 1].mean()
        for image, label in zip(images, labels, strict=True)
    ]
    assert all(dark)  # membranes are darker than cells
