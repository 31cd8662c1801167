"""U-Net against figure 1 of its paper, by shapes, closed forms and symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers.init import initializer
from jaxcnn.losses import classification
from jaxcnn.models import create
from jaxcnn.models.unet import _as_matrix, _fitting
from jaxcnn.tree import flatten

TINY = {"width": 2, "depth": 2, "dropout": 0.0}


def shapes(size=(512, 512, 1), **overrides):
    module = create("unet", **overrides)
    sample = jax.ShapeDtypeStruct((2, *size), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def stages(size, **overrides):
    module = create("unet", **overrides)
    variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True)[
            1
        ],
        jax.ShapeDtypeStruct((1, *size), jnp.float32),
    )
    found = variables["intermediates"]
    return {child: found[child]["__call__"][0].shape[1:] for child in found if child != "__call__"}


def closed_form(*, width, depth, classes, channels=1, dimensions=2, norm="none"):
    """Weights and biases of figure 1: two 3x3 a level, 2x2 up-convolutions, 1x1 at the end."""

    def pair(inputs, features):
        extra = 1 if norm == "none" else 2
        return 3**dimensions * (inputs + features) * features + 2 * extra * features

    widths = [width * 2**level for level in range(depth + 1)]
    down = sum(pair(i, f) for i, f in zip([channels, *widths], widths, strict=False))
    up = sum(2**dimensions * 2 * f * f + f + pair(2 * f, f) for f in widths[:-1])
    return down + up + (width + 1) * classes


def test_published_parameter_count():
    """31,030,658 for one channel and two classes: the arithmetic of figure 1."""
    for size, padding, out in ((512, "same", 512), (572, "valid", 388)):
        output, variables = shapes((size, size, 1), padding=padding)
        assert output.shape == (2, out, out, 2)
        assert count(variables["params"]) == 31_030_658 == closed_form(width=64, depth=4, classes=2)
        assert set(variables) == {"params"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"width": 10, "depth": 3, "num_classes": 10, "channels": 3},
        {"width": 8, "depth": 1, "norm": "batch"},
        {"width": 4, "depth": 2, "dimensions": 1},
        {"width": 4, "depth": 2, "dimensions": 3, "norm": "group"},
    ],
)
def test_closed_form_of_the_count_under_overrides(overrides):
    channels, dimensions = overrides.pop("channels", 1), overrides.get("dimensions", 2)
    output, variables = shapes((*(16,) * dimensions, channels), **overrides)
    form = {"classes": overrides.pop("num_classes", 2), "channels": channels, **overrides}
    assert count(variables["params"]) == closed_form(**form)
    assert output.shape == (2, *(16,) * dimensions, form["classes"])
    if overrides.get("norm") == "batch":
        assert count(variables["batch_stats"]) == 2 * (2 * 8 + 2 * 16 + 2 * 8)
        assert "bias" not in variables["params"]["down1"]["conv1"]
    else:
        assert "batch_stats" not in variables


def test_sizes_of_figure_1():
    found = stages((572, 572, 1), padding="valid")
    expected = {
        "down1": (568, 64), "pool1": (284, 64), "down2": (280, 128), "pool2": (140, 128), "down3": (136, 256),
        "pool3": (68, 256), "down4": (64, 512), "pool4": (32, 512), "bottom": (28, 1024), "up4": (52, 512),
        "up3": (100, 256), "up2": (196, 128), "up1": (388, 64), "head": (388, 2),
    }  # fmt: skip
    assert found == {name: (size, size, features) for name, (size, features) in expected.items()}


def test_with_zeros_the_bottleneck_of_512_pixels_is_32_by_32():
    found = stages((512, 512, 3))
    assert found["bottom"] == (32, 32, 1024)
    assert [found[f"down{level}"][0] for level in (1, 2, 3, 4)] == [512, 256, 128, 64]
    assert stages((64, 96, 3), width=2)["bottom"] == (4, 6, 32)


def test_the_paper_counts_23_convolutional_layers():
    paths = [path.removesuffix("/kernel") for path in flatten(shapes()[1]["params"]) if path.endswith("kernel")]
    assert len(paths) == 23
    pairs = [f"{part}/conv{i}" for part in ("bottom", *(f"{d}{n}" for d in ("down", "up") for n in range(1, 5)))
             for i in (1, 2)]  # fmt: skip
    assert set(paths) == {*pairs, *(f"up{n}/upconv" for n in range(1, 5)), "head"}


def draw(module, x):
    """Variables by shape: kernels of variance 2 / N, biases not 0. Compiling `init` takes longer than the test."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key == "kernel":
            return jnp.float32(rng.normal(size=shape.shape) * np.sqrt(2 / np.prod(shape.shape[:-1])))
        if path[-1].key == "bias":
            return jnp.float32(rng.uniform(-0.3, 0.3, shape.shape))
        return jnp.full(shape.shape, path[-1].key != "mean", shape.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))


def tiny(**overrides):
    """The parameters of a tiny net and its jitted evaluation."""
    module = create("unet", **{**TINY, **overrides})
    params = draw(module, jnp.zeros((1, 44, 44, 1)))["params"]
    return params, jax.jit(lambda params, x: module.apply({"params": params}, x, train=False))


def test_valid_tiles_fit_together_without_seams():
    """The overlap-tile strategy: the net on a tile gives what the net on the whole image gives there."""
    params, net = tiny(padding="valid")
    image = jax.random.normal(jax.random.key(1), (1, 60, 60, 1))
    whole = net(params, image)
    assert whole.shape == (1, 20, 20, 2)
    for top, left in ((0, 0), (8, 4), (16, 16)):
        tile = net(params, image[:, top : top + 44, left : left + 44])
        np.testing.assert_allclose(tile, whole[:, top : top + 4, left : left + 4], atol=1e-5)


def test_same_padded_output_moves_with_the_image_by_steps_of_the_depth():
    params, net = tiny()
    image = jax.random.normal(jax.random.key(1), (1, 68, 68, 1))
    here, there = net(params, image[:, 4:, 4:]), net(params, image[:, :64, :64])
    np.testing.assert_allclose(here[:, 24:36, 24:36], there[:, 28:40, 28:40], atol=1e-5)


def test_mirrored_weights_give_the_mirrored_output():
    """So nothing is off centre: not the crops, not the up-convolutions, not the zeros."""
    for padding, size in (("same", 16), ("valid", 44)):
        params, net = tiny(padding=padding)
        image = jax.random.normal(jax.random.key(1), (1, size, size, 1))
        mirrored = jax.tree.map(lambda leaf: leaf[::-1, ::-1] if leaf.ndim == 4 else leaf, params)
        output = net(mirrored, image[:, ::-1, ::-1])
        np.testing.assert_allclose(output[:, ::-1, ::-1], net(params, image), atol=1e-5)
        assert output.std() > 0.1


def test_the_first_skip_connection_sees_four_convolutions_alone():
    """Without the up-convolution into the last level, an output depends on 9x9 pixels: four 3x3 convolutions."""
    params, net = tiny(act="identity")
    params["up1"]["upconv"] = jax.tree.map(jnp.zeros_like, params["up1"]["upconv"])
    gradient = jax.grad(lambda x: net(params, x)[0, 13, 14].sum())(jnp.ones((1, 32, 32, 1)))
    rows, columns = np.nonzero(gradient[0, :, :, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 17, 10, 18)


def test_up_convolutions_start_with_the_variance_of_the_paper():
    """2 / N with N the inputs of one neuron: c, for windows that do not overlap."""
    kernel = _as_matrix(initializer("kaiming_normal"))(jax.random.key(0), (2, 2, 64, 32))
    assert kernel.shape == (2, 2, 64, 32)
    np.testing.assert_allclose(kernel.std((0, 1, 3)), np.sqrt(2 / 64), rtol=0.3)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 64), rtol=0.03)


def test_dropout_stands_at_the_end_of_the_contracting_path_alone():
    module = create("unet", width=4, depth=2, dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 1))
    variables = draw(module, x)

    @jax.jit
    def outputs(key):
        capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
        found = module.apply(variables, x, train=True, rngs={"dropout": key}, **capture)[1]["intermediates"]
        return {name: found[name]["__call__"][0] for name in ("down1", "down2", "bottom", "head")}

    one, other = outputs(jax.random.key(2)), outputs(jax.random.key(3))
    assert {name for name in one if (one[name] != other[name]).any()} == {"down2", "bottom", "head"}
    assert (one["down1"] == other["down1"]).all()


def test_training_on_maps_in_bfloat16():
    module = create("unet", **TINY | {"depth": 1}, dtype=jnp.bfloat16, norm="batch", num_classes=3)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    batch = {"label": jnp.arange(2 * 8 * 8).reshape(2, 8, 8) % 3}
    variables = draw(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params):
        both = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, moved = module.apply(both, x, train=True, mutable=["batch_stats"])
        assert logits.dtype == jnp.bfloat16
        losses = classification()(logits, batch)
        assert losses.shape == (2,)
        return losses.mean(), moved["batch_stats"]

    gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(leaf.any() for path, leaf in jax.tree.leaves_with_path(gradient) if path[-1].key == "kernel")
    changed = jax.tree.map(lambda a, b: (a != b).any(), variables["batch_stats"], moved)
    assert all(jax.tree.leaves(changed))


def test_sizes_that_fit_are_those_that_every_pooling_can_halve():
    def fits(size, depth, lost):
        for _ in range(depth):
            size -= lost
            if size < 2 or size % 2:
                return False
            size //= 2
        size -= lost
        for _ in range(depth):
            size = 2 * size - lost
        return size >= 1

    for depth in (1, 2, 4):
        for valid in (False, True):
            good = [size for size in range(1, 600) if fits(size, depth, 4 if valid else 0)]
            for size in range(1, 400):
                below = [s for s in good if s <= size][-1:]
                above = [s for s in good if s > size][:1]
                found = _fitting(size, depth=depth, valid=valid)
                assert (size in found) == (size in good)
                assert size in good or found == below + above
    assert min(good) == 188


@pytest.mark.parametrize(
    ("size", "overrides", "message"),
    [
        ((500, 512, 3), {}, "500x512: nearest to 500 is 496 or 512"),
        ((8, 8, 3), {}, "nearest to 8 is 16;"),
        ((572, 512, 3), {"padding": "valid"}, "'valid' convolutions .* nearest to 512 is 508 or 524"),
        ((100, 100, 3), {"padding": "valid"}, "nearest to 100 is 188;"),
        ((512, 512), {}, "expected images"),
        ((32, 32, 3), {"padding": "SAME"}, "unknown padding of U-Net"),
        ((32, 32, 3), {"depth": 0}, "at least 1 level"),
        ((32, 32, 3), {"dropout": 1.0}, "dropout rate"),
    ],
)
def test_bad_input(size, overrides, message):
    with pytest.raises(InputError, match=message):
        shapes(size, **overrides)
