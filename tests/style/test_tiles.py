"""Tiles: whatever the sizes, the terms and the gradient are those of the whole picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vgg import VGG19, tiny

from jaxcnn.errors import InputError
from jaxcnn.style.losses import Moments, moments
from jaxcnn.style.objective import Objective, Targets
from jaxcnn.style.tiles import Grid, Tile, Tiled

CLOSE = 1e-5
DEEP = Objective((("relu4_2", 1e-3),), tuple((f"relu{i}_1", 1.0) for i in range(1, 6)), tv=1e-4)
SHALLOW = Objective((("relu2_1", 1e-3),), tuple((f"relu{i}_1", 1.0) for i in (1, 2, 3)), tv=1e-4)


def pictures(seed, size, *, count=1):
    """Smooth and rough, as pictures are."""
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(0, 6, n) for n in size)
    waves = np.sin(y[:, None, None] * rng.uniform(1, 3, 3)) * np.cos(x[None, :, None] * rng.uniform(1, 3, 3))
    rough = rng.uniform(-0.2, 0.2, (count, *size, 3))
    return jnp.asarray(0.5 + 0.3 * waves[None] + rough, jnp.float32)


def targets_of(network, objective, size, *, content=1, style=1, regions=1, masks=None, dtype=np.float32):
    """Of no picture in particular, but far from any: `content` and `style` pictures' worth, `regions` styles each."""
    rng = np.random.default_rng(1)
    maps = jax.eval_shape(lambda x: network.features(x, objective.layers), jax.ShapeDtypeStruct((1, *size, 3), dtype))
    held = {name: rng.uniform(0, 2, (content, *maps[name].shape[1:])).astype(dtype) for name, _ in objective.content}
    found = {}
    for name, _ in objective.style:
        samples = 2 * rng.uniform(0, 1, (style, regions, 99, maps[name].shape[-1]))
        found[name] = Moments(
            samples.mean(2).astype(dtype), np.einsum("brmc,brmd->brcd", samples, samples / 99).astype(dtype)
        )
    shares = np.broadcast_to(np.arange(1.0, regions + 1, dtype=dtype), (style, regions)) / sum(range(1, regions + 1))
    return jax.tree.map(jnp.asarray, Targets(held, found, shares, masks))


whole = jax.jit(lambda objective, *arguments: objective.value_and_grad(*arguments), static_argnums=0)


def agree(objective, network, targets, x, tile, *, windows=None, close=CLOSE):
    """Each term, and every derivative by the largest one."""
    grid = Grid(x.shape[1:3], tile, network.reach(objective.layers))
    if windows is not None:
        assert len(list(grid)) == windows
    expected, gradient = whole(objective, network, targets, x)
    terms, tiled_gradient = Tiled(objective, grid).value_and_grad(network, targets, x)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=close, err_msg=name)
    for one, other in zip(tiled_gradient, gradient, strict=True):
        assert np.abs(one - other).max() <= close * np.abs(other).max()
    return grid


def masks_of(size, count, dtype=np.float32):
    """Soft, and 0 over some whole tiles."""
    x = np.linspace(-1, 2, size[1])
    left = np.broadcast_to(np.clip(x, 0, 1), size)
    return jnp.asarray(np.stack([left, 1 - left, np.ones(size)][:count]), dtype)


def test_a_landscape():
    size, network = (61, 79), tiny((1, 1, 1))
    agree(SHALLOW, network, targets_of(network, SHALLOW, size), pictures(0, size), 16, windows=20)


def test_several_styles_for_several_strips_that_are_mirrored_at_their_borders():
    size, network = (90, 20), tiny((1, 1, 1), padding_mode="reflect")
    targets = targets_of(network, SHALLOW, size, style=2, regions=3)
    agree(SHALLOW, network, targets, pictures(0, size, count=2), 8, windows=12)


def test_contents_without_style_for_pictures_smaller_than_a_window():
    """Each has a content of its own."""
    size, network = (31, 28), tiny((1, 1, 1), pooling="avg", padding_mode="reflect")
    objective = Objective((("relu3_1", 1.0), ("relu1_1", 2.0)), ())
    targets = targets_of(network, objective, size, content=2)
    grid = agree(objective, network, targets, pictures(0, size, count=2), 16, windows=1)
    assert grid.window == size


@pytest.mark.parametrize(
    ("size", "tile", "windows", "options"),
    [
        pytest.param((230, 301), 48, 35, {"pooling": "avg"}, marks=pytest.mark.slow),
        pytest.param((301, 290), 64, 25, {"padding_mode": "reflect"}, marks=pytest.mark.slow),
    ],
)
def test_vgg_19_to_relu5_1(size, tile, windows, options):
    network = tiny(VGG19, **options)
    targets = targets_of(network, DEEP, size, regions=2, masks=masks_of(size, 2))
    agree(DEEP, network, targets, pictures(0, size), tile, windows=windows)


@pytest.mark.slow
def test_tiles_are_exact_but_for_rounding(float64):
    """In float64 next to nothing is left of the difference, with Wasserstein's distance too."""
    network, size = tiny((1, 1), dtype=np.float64), (39, 45)
    objective = Objective((("relu2_1", 1e-3),), (("relu1_1", 1.0), ("relu2_1", 1.0)), tv=1e-4, style_loss="wasserstein")
    targets = targets_of(network, objective, size, regions=2, masks=masks_of(size, 2, np.float64), dtype=np.float64)
    agree(objective, network, targets, pictures(0, size).astype(np.float64), 8, windows=30, close=1e-10)


@pytest.mark.slow
def test_wasserstein_s_distance_in_float32():
    """Its derivative magnifies the rounding of the moments where a variance is small."""
    network, size = tiny((1, 1, 1)), (39, 45)
    objective = Objective(SHALLOW.content, SHALLOW.style, tv=1e-4, style_loss="wasserstein")
    targets = targets_of(network, objective, size, regions=2, masks=masks_of(size, 2))
    agree(objective, network, targets, pictures(0, size), 8, windows=30, close=1e-4)


def test_moments_and_features_are_those_of_the_whole():
    """What targets are made of."""
    network, size = tiny((1, 1, 1)), (53, 70)
    layers = ("relu1_1", "pool2", "relu3_1")
    objective = Objective((), tuple((name, 1.0) for name in layers))
    tiled, x, masks = (
        Tiled(objective, Grid(size, 8, network.reach(layers))),
        pictures(0, size, count=2),
        masks_of(size, 2),
    )

    @jax.jit
    def reference(x):
        features = network.features(x, layers)
        targets = Targets({}, {}, jnp.ones((1, 1)), masks)
        return features, {name: moments(one, objective.masks(targets, one)) for name, one in features.items()}

    expected, of_regions = reference(x)
    found, sums = tiled.features(network, x, layers), tiled.moments(network, x, masks)
    for layer in layers:
        for a, b in zip(sums[layer], of_regions[layer], strict=True):
            assert np.abs(a - b).max() <= CLOSE * np.abs(b).max(), layer
    for layer, one in expected.items():
        assert found[layer].shape == one.shape
        assert np.abs(found[layer] - one).max() <= CLOSE * np.abs(one).max(), layer


def test_every_feature_is_owned_by_one_tile():
    size, reach = (61, 79), tiny(VGG19[:3]).reach(("relu1_1", "relu2_1", "relu3_1"))
    grid = Grid(size, 16, reach)
    for stride in (1, 2, 4):
        count = np.zeros([n // stride for n in size], int)
        for each in grid:
            shape = [n // stride for n in grid.window]
            y, x = np.asarray(each.origin) // stride
            count[y : y + shape[0], x : x + shape[1]] += np.asarray(grid.owned(each, shape, stride))
        assert (count == 1).all()


def test_windows_are_of_one_size_and_begin_at_whole_strides():
    grid = Grid((230, 301), 48, tiny(VGG19).reach(DEEP.layers))
    assert grid.window == (48 + 2 * 80 + 230 % 16, 48 + 2 * 80 + 301 % 16)
    for tile in grid:
        assert isinstance(tile, Tile)
        assert (np.asarray(tile.origin) % 16 == 0).all()
        assert (np.asarray(tile.origin) >= 0).all()
        assert (np.asarray(tile.origin) + grid.window <= grid.size).all()


@pytest.mark.parametrize("tile", [0, -16, 8, 100])
def test_tiles_are_whole_strides_of_the_deepest_layer(tile):
    reach = tiny(VGG19).reach(("relu1_1", "relu5_1"))
    with pytest.raises(InputError, match=rf"tile {tile}: expected a multiple of 16, the stride of the deepest layer"):
        Grid((300, 300), tile, reach)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1024, 1000), (777, 1333)])
def test_a_megapixel_to_relu5_1(size):
    network = tiny(VGG19, width=4)
    targets = targets_of(network, DEEP, size, regions=2, masks=masks_of(size, 2))
    agree(DEEP, network, targets, pictures(0, size), 256)
