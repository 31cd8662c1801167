"""MobileNet against the tables of its paper and its published counts."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create
from jaxcnn.tree import flatten

PAIRS = [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 5, (512, 1024)]
PAIRS += [(1024, 1024)]
DOWN = (2, 4, 6, 12)


@functools.cache
def shapes(size=(224, 224, 3), **overrides):
    """Logits and variables, with the output of every named layer among the latter."""
    module = create("mobilenet_v1", **overrides)
    collections = ["params", "batch_stats", "intermediates"]

    def run(x):
        key = jax.random.key(0)
        return module.init_with_output(key, x, train=False, capture_intermediates=True, mutable=collections)

    return jax.eval_shape(run, jax.ShapeDtypeStruct((2, *size), jnp.float32))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def outputs(variables):
    named = flatten(variables["intermediates"])
    return {path.removesuffix("/__call__/0"): leaf.shape[1:] for path, leaf in named.items()}


def by_arithmetic(alpha, classes):
    """(trained parameters, statistics): weights, and four numbers for each normalised channel, two of them trained."""

    def scaled(c):
        return math.floor(alpha * c)

    weights, channels = 27 * scaled(32), scaled(32)
    for before, after in PAIRS:
        weights += 9 * scaled(before) + scaled(before) * scaled(after)
        channels += scaled(before) + scaled(after)
    return weights + 2 * channels + (scaled(1024) + 1) * classes, 2 * channels


# Published by Keras, without the moving statistics: 4,253,864 with the 21,888 of them at alpha 1.
@pytest.mark.parametrize(
    ("alpha", "parameters", "statistics"),
    [(1.0, 4_231_976, 21_888), (0.75, 2_585_560, 16_416), (0.5, 1_331_592, 10_944), (0.25, 470_072, 5_472)],
)
def test_published_parameter_count(alpha, parameters, statistics):
    logits, variables = shapes(width=alpha)
    assert logits.shape == (2, 1000)
    assert (count(variables["params"]), count(variables["batch_stats"])) == (parameters, statistics)
    assert (parameters, statistics) == by_arithmetic(alpha, 1000)


@pytest.mark.parametrize(("alpha", "classes"), [(0.3, 10), (1.4, 7)])
def test_counts_under_overrides(alpha, classes):
    variables = shapes(width=alpha, num_classes=classes)[1]
    assert (count(variables["params"]), count(variables["batch_stats"])) == by_arithmetic(alpha, classes)


def test_the_first_rows():
    params, stats = (shapes()[1][c] for c in ("params", "batch_stats"))
    assert count(params["conv1"]) == 864
    assert count(params["conv1_bn"]) + count(stats["conv1_bn"]) == 128
    assert count(params["conv1_bn"]) == 64
    assert count(params["conv_dw_1"]) == 288
    assert count(params["conv_pw_1"]) == 2_048
    assert count(params["conv_dw_2"]) == 576
    assert outputs(shapes()[1])["conv_dw_2"] == (56, 56, 64)


def test_every_layer_is_the_papers():
    variables = shapes()[1]
    layers, params = outputs(variables), variables["params"]
    assert layers["conv1"] == (112, 112, 32)
    size = 112
    for i, (before, after) in enumerate(PAIRS, 1):
        size //= 2 if i in DOWN else 1
        assert layers[f"conv_dw_{i}"] == layers[f"conv_dw_{i}_relu"] == (size, size, before)
        assert layers[f"conv_pw_{i}"] == layers[f"conv_pw_{i}_relu"] == (size, size, after)
        assert params[f"conv_dw_{i}"]["kernel"].shape == (3, 3, 1, before)
        assert params[f"conv_pw_{i}"]["kernel"].shape == (1, 1, before, after)
    assert size == 7
    assert not [path for path in flatten(params) if path.endswith("bias") and "_bn" not in path and "fc" not in path]
    assert len(params) == 1 + 1 + 4 * 13 + 1


@pytest.mark.parametrize(("alpha", "published"), [(1.0, 569), (0.75, 325), (0.5, 149), (0.25, 41)])
def test_published_multiplications(alpha, published):
    """Millions, tables 4 and 6 of the paper."""
    variables = shapes(width=alpha)[1]
    layers = outputs(variables)
    kernels = {p.removesuffix("/kernel"): k for p, k in flatten(variables["params"]).items() if p.endswith("/kernel")}
    total = sum(kernel.size * math.prod(layers[path][:-1]) for path, kernel in kernels.items())
    assert round(total / 1e6) == published


@pytest.mark.parametrize("size", [(1, 1, 3), (33, 65, 1), (192, 192, 3)])
def test_other_sizes(size):
    assert shapes(size)[0].shape == (2, 1000)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_one_and_three_dimensions(dimensions):
    variables = shapes((32,) * dimensions + (2,), dimensions=dimensions)[1]
    assert variables["params"]["conv_dw_1"]["kernel"].shape == (3,) * dimensions + (1, 32)


def test_relu6_by_default():
    assert create("mobilenet_v1").act == "relu6"
    assert MODELS["mobilenet_v1"].input == (224, 224, 3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_step_in_bfloat16_is_finite_and_moves_statistics_in_training_alone(norm):
    module = create("mobilenet_v1", width=0.25, num_classes=5, norm=norm, dropout=0.1, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = jax.jit(lambda x: module.init(jax.random.key(1), x, train=False))(x)
    assert ("batch_stats" in variables) == (norm == "batch")
    rest = {c: tree for c, tree in variables.items() if c != "params"}

    def loss(params, train):
        rngs = {"dropout": jax.random.key(2)}
        logits, moved = module.apply({"params": params, **rest}, x, train=train, mutable=["batch_stats"], rngs=rngs)
        assert logits.dtype == jnp.bfloat16
        return logits.astype(jnp.float32).var(), moved

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, moved), gradient = step(variables["params"], True)
    assert all(jnp.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    changed = [(leaf != flatten(rest)[path]).all() for path, leaf in flatten(moved).items()]
    assert len(changed) == (54 if norm == "batch" else 0)
    assert all(changed)
    _, moved = jax.jit(loss, static_argnums=1)(variables["params"], False)
    assert all((leaf == flatten(rest)[path]).all() for path, leaf in flatten(moved).items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes(width=0.01), "width multiplier 0.01"),
        (lambda: shapes(width=-1.0), "width multiplier"),
        (lambda: shapes((224, 224)), "expected images"),
        (lambda: shapes(dropout=1.0), "dropout rate"),
        (lambda: shapes(norm="bach"), "did you mean 'batch'"),
        (lambda: create("mobilenet_v2"), "did you mean 'mobilenet_v1'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
