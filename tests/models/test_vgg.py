"""VGG against its published counts, table 1 of the paper, and a network written with plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create


def shapes(name, size=None, **overrides):
    module = create(name, **overrides)
    sample = jax.ShapeDtypeStruct((2, *(size or MODELS[name].input)), jnp.float32)

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


# torchvision's models; the paper rounds to 133, 133, 138 and 144 million.
COUNTS = {
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
}
CONVOLUTIONS = {"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}
MACS = {"vgg11": 7.61e9, "vgg13": 11.31e9, "vgg16": 15.47e9, "vgg19": 19.63e9}  # torchvision's meta data


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_count(name):
    outputs, variables = shapes(name)
    assert outputs.shape == (2, 1000)
    assert count(variables["params"]) == COUNTS[name]
    plain = name.removesuffix("_bn")
    kernels = [path for path, layer in variables["params"].items() if "kernel" in layer]
    assert sum(path.startswith("conv") for path in kernels) == CONVOLUTIONS[plain]
    # Scale and bias of each normalised channel are trained, mean and variance are statistics.
    assert count(variables.get("batch_stats", {})) == COUNTS[name] - COUNTS[plain]


@pytest.mark.parametrize("name", MACS)
def test_published_operations(name):
    variables = shapes(name)[1]
    outputs = variables["intermediates"]
    macs = 0
    for layer, parameters in variables["params"].items():
        positions = outputs[layer]["__call__"][0].shape[1:-1]
        macs += parameters["kernel"].size * int(np.prod(positions))
    np.testing.assert_allclose(macs, MACS[name], rtol=0.001)


def test_convolutions_alone():
    for name, expected in (("vgg16", 14_714_688), ("vgg19", 20_024_384)):
        params = shapes(name)[1]["params"]
        assert count({k: v for k, v in params.items() if k.startswith("conv")}) == expected


def test_names_and_sizes_are_the_papers():
    outputs = shapes("vgg19_bn")[1]["intermediates"]
    sizes = [outputs[f"pool{i}"]["__call__"][0].shape[1:] for i in range(1, 6)]
    assert sizes == [(112, 112, 64), (56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 512)]
    stages = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4}
    expected = {f"{kind}{i}_{j}" for kind in ("conv", "bn", "relu") for i, n in stages.items() for j in range(1, n + 1)}
    expected |= {f"pool{i}" for i in stages} | {"avgpool", "fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"}
    assert set(outputs) == expected | {"__call__"}


def test_counts_under_overrides():
    assert count(shapes("vgg16", num_classes=10)[1]["params"]) == 138_357_544 - 990 * 4097
    convs = 9 * (3 * 4 + 4 * 8 + 8 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 32 + 32 * 32) + 4 + 8 + 32 + 64 + 64
    dense = 49 * 32 * 6 + 6 + 6 * 6 + 6 + 6 * 5 + 5
    small = shapes("vgg11", width=4, hidden=6, num_classes=5)[1]
    assert count(small["params"]) == convs + dense


@pytest.mark.parametrize(("size", "overrides"), [((32, 32, 3), {}), ((320, 256, 1), {}), ((224, 3), {"dimensions": 1})])
def test_other_sizes(size, overrides):
    assert shapes("vgg11", size, width=4, hidden=6, **overrides)[0].shape == (2, 1000)


def test_three_dimensions():
    outputs, variables = shapes("vgg11", (32, 32, 32, 1), width=4, hidden=6, dimensions=3)
    assert outputs.shape == (2, 1000)
    assert variables["params"]["conv1_1"]["kernel"].shape == (3, 3, 3, 1, 4)
    assert variables["params"]["fc6"]["kernel"].shape == (7**3 * 32, 6)


TINY = {"convs": (1, 1), "width": 2, "hidden": 5, "num_classes": 3}


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_equals_plain_operations(pooling):
    module = create("vgg11", pooling=pooling, **TINY)
    x = np.random.default_rng(1).standard_normal((2, 28, 28, 3), np.float32)
    params = values(shapes("vgg11", (28, 28, 3), **TINY)[1])["params"]
    y = x
    for i in (1, 2):
        layer, padded = params[f"conv{i}_1"], np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        y = np.maximum(np.einsum("bhwcij,ijck->bhwk", windows, layer["kernel"]) + layer["bias"], 0)
        y = y.reshape(2, y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1)
        y = y.max((2, 4)) if pooling == "max" else y.mean((2, 4))
    y = y.reshape(2, -1)
    for i in (6, 7, 8):
        y = y @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"]
        y = np.maximum(y, 0) if i < 8 else y
    logits = jax.jit(lambda p, x: module.apply({"params": p}, x, train=False))(params, x)
    np.testing.assert_allclose(logits, y, atol=1e-5)


def both(size, **overrides):
    """Logits of the dense and of the fully convolutional network, with the same parameters, as functions of (p, x)."""
    dense, whole = (create("vgg11", fully_convolutional=full, **overrides) for full in (False, True))
    like = shapes("vgg11", size, fully_convolutional=True, **overrides)[1]["params"]

    def fully_convolutional(params, x):
        reshaped = jax.tree.map(lambda p, like: p.reshape(like.shape), params, like)
        return whole.apply({"params": reshaped}, x, train=False)

    return jax.jit(lambda p, x: dense.apply({"params": p}, x, train=False)), jax.jit(fully_convolutional)


def test_fully_convolutional_gives_the_same_logits_from_the_same_parameters():
    overrides = {**TINY, "convs": (1, 1, 1, 1, 1)}
    dense, whole = both((224, 224, 3), **overrides)
    x = np.random.default_rng(1).standard_normal((1, 224, 224, 3), np.float32)
    params = values(shapes("vgg11", **overrides)[1])["params"]
    logits = dense(params, x)
    assert jnp.abs(logits).max() > 0.1
    np.testing.assert_allclose(whole(params, x), logits, atol=1e-5)


def test_fully_convolutional_averages_the_class_map():
    """One stage on 14x16 pixels has a map of 1x2 positions, which see the first and the last 14 columns."""
    overrides = {**TINY, "convs": (1,)}
    dense, whole = both((14, 16, 3), **overrides)
    x = np.random.default_rng(1).standard_normal((1, 14, 16, 3), np.float32)
    params = values(shapes("vgg11", (14, 14, 3), **overrides)[1])["params"]
    params["conv1_1"]["kernel"][:, (0, 2)] = 0  # so that nothing crosses the borders of the two
    halves = [dense(params, x[:, :, i : i + 14]) for i in (0, 2)]
    np.testing.assert_allclose(whole(params, x), (halves[0] + halves[1]) / 2, atol=1e-5)


def test_fully_convolutional_has_the_same_count_and_takes_larger_images():
    outputs, variables = shapes("vgg16", (288, 224, 3), fully_convolutional=True)
    assert outputs.shape == (2, 1000)
    assert count(variables["params"]) == COUNTS["vgg16"]
    assert variables["intermediates"]["fc8"]["__call__"][0].shape == (2, 3, 1, 1000)


def test_bfloat16_gradient_is_finite_and_statistics_and_dropout_act_in_training_alone():
    overrides = {"dtype": jnp.bfloat16, **TINY}
    module, abstract = create("vgg11_bn", **overrides), shapes("vgg11_bn", (14, 14, 3), **overrides)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    variables = values(abstract)
    x = np.random.default_rng(1).standard_normal((4, 14, 14, 3), np.float32)

    def run(params, train):
        rngs = {"dropout": jax.random.key(2)}
        logits, updated = module.apply({**variables, "params": params}, x, train=train, mutable=True, rngs=rngs)
        return logits.astype(jnp.float32).mean(), (logits, updated["batch_stats"])

    gradient, (noisy, moved) = jax.jit(jax.grad(lambda p: run(p, True), has_aux=True))(variables["params"])
    _, (calm, still) = jax.jit(lambda p: run(p, False))(variables["params"])
    assert noisy.dtype == calm.dtype == jnp.bfloat16
    assert (noisy != calm).any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    before = variables["batch_stats"]
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(before), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes("vgg16", (16, 16, 3)), "pool5: pooling window 2 is larger"),
        (lambda: shapes("vgg16", (192, 224, 3), fully_convolutional=True), "fc6: convolution: input \\(6, 7\\)"),
        (lambda: shapes("vgg11", pooling="mean"), "unknown pooling 'mean'"),
        (lambda: shapes("vgg11", (224, 3)), "expected images \\(b, h, w, c\\)"),
        (lambda: shapes("vgg11", statistics="device"), "belongs to norm 'batch'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
