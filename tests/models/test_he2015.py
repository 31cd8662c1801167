"""The 22- and 30-layer networks against the figures of the paper that state them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create
from jaxcnn.models.he2015 import spatial_pyramid_pool


def shapes(name, size=None, **overrides):
    module = create(name, **overrides)
    sample = jax.ShapeDtypeStruct((2, *(size or MODELS[name].input)), jnp.float32)

    def run(x):
        return module.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True)

    return jax.eval_shape(run, sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def values(tree):
    """Parameters of variance 2 / fan-in, equation 10, in place of shapes, without compiling an initialiser."""
    draw = np.random.default_rng(0).standard_normal

    def value(p):
        return (
            draw(p.shape, np.float32) * (2 * p.shape[-1] / p.size) ** 0.5
            if p.ndim > 1
            else np.zeros(p.shape, np.float32)
        )

    return jax.tree.map(value, tree["params"])


def macs(variables):
    total = 0
    for layer, parameters in variables["params"].items():
        positions = variables["intermediates"][layer]["__call__"][0].shape[1:-1]
        total += parameters["kernel"].size * int(np.prod(positions))
    return total


def chain(*, window, width, stages, bins, dense):
    """Parameters of conv1 (7x7 on 3 channels), stages of (layers, maps), and dense layers on `bins` positions."""
    total, channels = (49 * 3 + 1) * width, width
    for layers, maps in stages:
        for _ in range(layers):
            total += (window**2 * channels + 1) * maps
            channels = maps
    units = bins * channels
    for out in dense:
        total += (units + 1) * out
        units = out
    return total


DENSE = (4096, 4096, 1000)


@pytest.mark.parametrize(("name", "layers"), [("he22", 22), ("he30", 30)])
def test_weighted_layers(name, layers):
    outputs, variables = shapes(name)
    assert outputs.shape == (2, 1000)
    kernels = [layer for layer, parameters in variables["params"].items() if "kernel" in parameters]
    assert len(kernels) == layers
    assert sum(layer.startswith("fc") for layer in kernels) == 3
    assert "batch_stats" not in variables


def test_counts():
    """The paper states none; these follow from its tables, and are frozen here."""
    he22 = chain(window=3, width=96, stages=[(6, 256), (6, 512), (6, 512)], bins=49 + 9 + 4 + 1, dense=DENSE)
    he30 = chain(window=2, width=64, stages=[(4, 128), (22, 256)], bins=36 + 9 + 4 + 1, dense=DENSE)
    assert count(shapes("he22")[1]["params"]) == he22 == 183_327_080
    assert count(shapes("he30")[1]["params"]) == he30 == 79_192_296


def test_counts_under_overrides():
    small = chain(window=3, width=6, stages=[(6, 16), (6, 32), (6, 32)], bins=63, dense=(8, 8, 10))
    assert count(shapes("he22", width=6, hidden=8, num_classes=10)[1]["params"]) == small
    small = chain(window=2, width=4, stages=[(4, 8), (22, 16)], bins=50, dense=(8, 8, 10))
    assert count(shapes("he30", width=4, hidden=8, num_classes=10)[1]["params"]) == small
    variables = shapes("he30", width=4, norm="batch")[1]
    assert count(variables["batch_stats"]) == 2 * (4 + 4 * 8 + 22 * 16)


def test_operations_of_table_3():
    """Model B, and model A with five convolutions a stage; the figures are from memory of the paper's table 3."""
    np.testing.assert_allclose(macs(shapes("he22")[1]), 2.32e10, rtol=0.005)
    np.testing.assert_allclose(macs(shapes("he22", convs=(5, 5, 5))[1]), 1.90e10, rtol=0.005)


def test_sizes():
    outputs = shapes("he22")[1]["intermediates"]
    sizes = {name: outputs[name]["__call__"][0].shape[1:] for name in ("conv1", "pool1", "pool2", "pool3", "conv4_6")}
    assert sizes == {
        "conv1": (112, 112, 96),
        "pool1": (56, 56, 96),
        "pool2": (28, 28, 256),
        "pool3": (14, 14, 512),
        "conv4_6": (14, 14, 512),
    }
    assert outputs["spp"]["__call__"][0].shape == (2, 63 * 512)
    outputs = shapes("he30")[1]["intermediates"]
    sizes = {name: outputs[name]["__call__"][0].shape[1] for name in ("pool1", "conv2_1", "conv2_4", "conv3_22")}
    assert sizes == {"pool1": 36, "conv2_1": 37, "conv2_4": 36, "conv3_22": 18}
    assert outputs["spp"]["__call__"][0].shape == (2, 50 * 256)


def test_adding_sixteen_layers_to_the_14_layer_network_of_table_1_gives_he30():
    small, large = (shapes("he30", **fields)[1]["params"] for fields in ({"convs": (4, 6)}, {}))
    assert sum("kernel" in layer for layer in small.values()) == 14
    added = [large[layer]["kernel"].shape for layer in large.keys() - small.keys()]
    assert added == [(2, 2, 256, 256)] * 16


@pytest.mark.parametrize("name", ["he22", "he30"])
@pytest.mark.parametrize(("size", "dimensions"), [((17, 32, 3), 2), ((160, 192, 1), 2), ((64, 3), 1), ((17,) * 4, 3)])
def test_other_sizes(name, size, dimensions):
    assert shapes(name, size, width=3, hidden=4, dimensions=dimensions)[0].shape == (2, 1000)


TINY = {"width": 12, "hidden": 32, "num_classes": 5}


@pytest.mark.parametrize("name", ["he22", "he30"])
def test_the_initialiser_is_every_layers(name):
    module = create(name, kernel_init="zeros", **TINY)
    x = np.zeros((1, 17, 17, 3), np.float32)
    params = jax.jit(lambda x: module.init(jax.random.key(0), x, train=False)["params"])(x)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("name", "layers"), [("he22", 22), ("he30", 30)])
def test_half_the_variance_shrinks_the_signal_by_the_root_of_two_a_layer(name, layers):
    """n Var[w] = 1 in place of 2: ReLU networks without biases are homogeneous in the weights of each layer."""
    params = values(shapes(name, (17, 17, 3), **TINY)[1])
    x = np.random.default_rng(1).standard_normal((2, 17, 17, 3), np.float32)
    run = jax.jit(lambda p, x: create(name, **TINY).apply({"params": p}, x, train=False))
    logits = run(params, x)
    assert logits.all()
    half = run(jax.tree.map(lambda p: p / np.sqrt(2, dtype=p.dtype), params), x)
    np.testing.assert_allclose(half, logits * 2 ** (-layers / 2), rtol=1e-3)


def test_bfloat16_gradient_is_finite():
    overrides = {"dtype": jnp.bfloat16, **TINY}
    module, abstract = create("he30", **overrides), shapes("he30", (17, 17, 3), **overrides)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    params = values(abstract)
    x = np.random.default_rng(1).standard_normal((2, 17, 17, 3), np.float32)

    def loss(params):
        logits = module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
        assert logits.dtype == jnp.bfloat16
        return jnp.square(logits.astype(jnp.float32)).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.abs(gradient["conv1"]["kernel"]).max() > 0


def test_the_pyramid_holds_the_maxima_of_its_bins():
    x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    pooled = jax.jit(partial(spatial_pyramid_pool, bins=(3, 1)))(x)
    np.testing.assert_array_equal(pooled, [[7, 9, 11, 19, 21, 23, 31, 33, 35, 35]])
    odd = jax.ShapeDtypeStruct((2, 5, 9, 3), jnp.float32)
    assert jax.eval_shape(partial(spatial_pyramid_pool, bins=(6, 3, 2, 1)), odd).shape == (2, 50 * 3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("he22", (14, 14, 3), "^pool3: pooling window 2 is larger"),
        ("he30", (16, 16, 3), "^pool2: pooling window 2 is larger"),
        ("he30", (6, 6, 3), "^conv1: convolution: input \\(6, 6\\)"),
    ],
)
def test_too_small_an_image_names_the_layer(name, size, message):
    with pytest.raises(InputError, match=message):
        shapes(name, size)
