"""The vanilla CNN against closed forms and a network written with plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create


def shapes(size=None, **overrides):
    module = create("vanilla_cnn", **overrides)
    sample = jax.ShapeDtypeStruct((2, *(size or MODELS["vanilla_cnn"].input)), jnp.float32)

    def run(x):
        return module.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True)

    return jax.eval_shape(run, sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def values(tree):
    """Random parameters in place of shapes, and ones in place of statistics, without compiling an initialiser."""
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda p: draw(p.shape, np.float32) * (p.shape[-1] / p.size) ** 0.5, tree["params"])
    statistics = jax.tree.map(lambda s: np.ones(s.shape, np.float32), tree.get("batch_stats", {}))
    return {"params": params, "batch_stats": statistics}


def closed_form(*, size=32, channels=3, stages=3, convs=1, dense_layers=2, width=32, hidden=256, classes=10):
    total = 0
    for i in range(stages):
        for _ in range(convs):
            total += (9 * channels + 1) * width * 2**i
            channels = width * 2**i
    units = channels * (size // 2**stages) ** 2
    for out in [hidden] * (dense_layers - 1) + [classes]:
        total += (units + 1) * out
        units = out
    return total


@pytest.mark.parametrize(
    "fields",
    [{}, {"stages": 2, "dense_layers": 3}, {"convs": 2, "width": 5}, {"stages": 5, "dense_layers": 1}, {"hidden": 7}],
)
def test_parameter_count(fields):
    outputs, variables = shapes(**fields)
    assert outputs.shape == (2, 10)
    assert count(variables["params"]) == closed_form(**fields)
    assert "batch_stats" not in variables
    weighted = sum("kernel" in layer for layer in variables["params"].values())
    assert weighted == fields.get("stages", 3) * fields.get("convs", 1) + fields.get("dense_layers", 2)


def test_count_by_hand():
    # conv1 896, conv2 18,496, conv3 73,856; fc1 on 4x4x128, fc2
    assert count(shapes()[1]["params"]) == 896 + 18_496 + 73_856 + 2_049 * 256 + 2_570


def test_names():
    variables = shapes(norm="batch")[1]
    stages = {f"{kind}{i}" for kind in ("conv", "bn", "relu", "pool") for i in (1, 2, 3)}
    dense = {"drop_fc1", "fc1", "relu_fc1", "drop_fc2", "fc2"}
    assert set(variables["intermediates"]) == stages | dense | {"__call__"}
    assert count(variables["batch_stats"]) == 2 * (32 + 64 + 128)
    assert {"conv2_1", "conv2_2"} <= set(shapes(convs=2)[1]["params"])


@pytest.mark.parametrize(("size", "dimensions"), [((28, 28, 1), 2), ((8, 11, 4), 2), ((64, 3), 1), ((8, 9, 10, 1), 3)])
@pytest.mark.parametrize("fully_convolutional", [False, True])
def test_other_sizes(size, dimensions, fully_convolutional):
    assert shapes(size, dimensions=dimensions, fully_convolutional=fully_convolutional)[0].shape == (2, 10)


def test_fully_convolutional_has_one_set_of_parameters_for_every_size():
    small, large = (shapes((n, n, 3), fully_convolutional=True)[1]["params"] for n in (8, 40))
    assert jax.tree.map(lambda leaf: leaf.shape, small) == jax.tree.map(lambda leaf: leaf.shape, large)
    assert count(small) == closed_form(size=8)  # on one position, the same layers


FIELDS = {"stages": 1, "width": 4, "hidden": 5, "num_classes": 3}


def logits(params, x, **fields):
    module = create("vanilla_cnn", **FIELDS, **fields)
    return jax.jit(lambda p, x: module.apply({"params": p}, x, train=False))(params, x)


def test_equals_plain_operations():
    x = np.random.default_rng(1).standard_normal((2, 6, 6, 2), np.float32)
    params = values(shapes((6, 6, 2), **FIELDS)[1])["params"]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    y = np.einsum("bhwcij,ijck->bhwk", windows, params["conv1"]["kernel"]) + params["conv1"]["bias"]
    y = np.maximum(y, 0).reshape(2, 3, 2, 3, 2, 4).max((2, 4)).reshape(2, -1)
    y = np.maximum(y @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    y = y @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(logits(params, x), y, atol=1e-5)


def test_fully_convolutional_is_the_mean_of_the_dense_network_over_positions():
    x = np.random.default_rng(1).standard_normal((1, 4, 6, 2), np.float32)
    params = values(shapes((2, 2, 2), **FIELDS)[1])["params"]
    params["conv1"]["kernel"][[[0], [2]]] = 0
    params["conv1"]["kernel"][:, [0, 2]] = 0  # each pixel alone, so that each position sees its own 2x2
    tiles = x.reshape(2, 2, 3, 2, 2).transpose(0, 2, 1, 3, 4).reshape(6, 2, 2, 2)
    like = shapes((4, 6, 2), fully_convolutional=True, **FIELDS)[1]["params"]
    reshaped = jax.tree.map(lambda p, like: p.reshape(like.shape), params, like)
    whole = logits(reshaped, x, fully_convolutional=True)
    np.testing.assert_allclose(whole, logits(params, tiles).mean(0, keepdims=True), atol=1e-5)


def test_maxout_halves_the_channels():
    params = shapes(act="maxout")[1]["params"]
    assert params["conv1"]["kernel"].shape == (3, 3, 3, 32)
    assert params["conv2"]["kernel"].shape == (3, 3, 16, 64)
    assert params["fc1"]["kernel"].shape == (4 * 4 * 64, 256)
    assert params["fc2"]["kernel"].shape == (128, 10)


def test_bfloat16_gradient_is_finite_and_statistics_move():
    overrides = {**FIELDS, "dtype": jnp.bfloat16, "norm": "batch", "dropout": 0.5}
    module, abstract = create("vanilla_cnn", **overrides), shapes((6, 6, 3), **overrides)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    variables = values(abstract)
    x = np.random.default_rng(1).standard_normal((4, 6, 6, 3), np.float32)

    def loss(params):
        rngs = {"dropout": jax.random.key(2)}
        logits, updated = module.apply({**variables, "params": params}, x, train=True, mutable=True, rngs=rngs)
        assert logits.dtype == jnp.bfloat16
        return logits.astype(jnp.float32).mean(), updated["batch_stats"]

    gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(variables["batch_stats"]), strict=True)
    assert all((a != b).any() for a, b in pairs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes((4, 4, 3)), "^pool3: pooling window 2 is larger"),
        (lambda: shapes((32, 3, 3)), "^pool2: pooling window 2 is larger"),
        (lambda: shapes(stages=6), "^pool6: pooling window 2 is larger"),
        (lambda: shapes(stages=0), "stages=0: vanilla_cnn needs at least 1"),
        (lambda: shapes(dense_layers=0), "dense_layers=0"),
        (lambda: shapes(width=3, act="maxout"), "relu1: maxout: 3 channels"),
        (lambda: shapes((32, 32)), "expected images \\(b, h, w, c\\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
