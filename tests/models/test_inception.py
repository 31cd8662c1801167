"""Inception v1 and BN-Inception against their tables, published counts and stated choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers.pool import max_pool
from jaxcnn.models import create
from jaxcnn.models.inception import _BN, _V1, DoubleInception, Inception, InceptionOutput, _halve


def shapes(name, size=(224, 224, 3), train=False, **overrides):
    module = create(name, **overrides)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    sample = jax.ShapeDtypeStruct((2, *size), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(keys, x, train=train), sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def stages(name, size=(224, 224, 3), **overrides):
    """The shape, without batch, of what every direct child of the network returns."""
    module = create(name, **overrides)
    variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True)[
            1
        ],
        jax.ShapeDtypeStruct((1, *size), jnp.float32),
    )
    found = variables["intermediates"]
    return {child: found[child]["__call__"][0].shape[1:] for child in found if child != "__call__"}


# torchvision: GoogLeNet 6,624,904 without heads, 13,004,888 with both. Caffe's bvlc_googlenet, the paper's net with
# its heads: 13,378,280, and 6,998,552 without. pretrainedmodels' bninception: 11,295,240, of which 10,016 are biases
# of convolutions before a BatchNorm.
@pytest.mark.parametrize(
    ("name", "overrides", "trained", "statistics"),
    [
        ("inception_v1", {}, 6_624_904, 2 * 7_280),
        ("inception_v1", {"aux": True}, 13_004_888, 2 * (7_280 + 2 * 128)),
        ("inception_v1", {"five": 5, "pool4": 3, "norm": "none"}, 6_998_552, 0),
        ("inception_v1", {"five": 5, "pool4": 3, "norm": "none", "aux": True}, 13_378_280, 0),
        ("bn_inception", {"use_bias": True}, 11_295_240, 2 * 10_016),
        ("bn_inception", {}, 11_295_240 - 10_016, 2 * 10_016),
        ("bn_inception", {"norm": "none"}, 11_295_240 - 2 * 10_016, 0),
    ],
)
def test_published_parameter_count(name, overrides, trained, statistics):
    output, variables = shapes(name, **overrides)
    assert output.shape == (2, 1000)
    assert count(variables["params"]) == trained
    assert count(variables.get("batch_stats", {})) == statistics
    assert ("batch_stats" in variables) == (statistics > 0)


def convolutions(name, width, five):
    """(window area, channels in, channels out) of every convolution, from the table of the paper."""

    def scaled(n):
        return n * width // 64

    layers = [(49, 3, scaled(64)), (1, scaled(64), scaled(64)), (9, scaled(64), scaled(192))]
    c = 192
    for one, reduce3, three, reduce5, big, proj in (_V1 if name == "inception_v1" else _BN).values():
        rows = [(1, c, one), (1, c, reduce3), (9, reduce3, three), (1, c, reduce5), (five**2, reduce5, big)]
        rows += [(9, big, big)] if name == "bn_inception" else []
        rows += [(1, c, proj)]
        layers += [(k, scaled(i), scaled(o)) for k, i, o in rows if o]
        c = one + three + big + (proj or c)
    return layers, scaled(c)


@pytest.mark.parametrize("name", ["inception_v1", "bn_inception"])
@pytest.mark.parametrize(("width", "classes", "norm", "five"), [(64, 10, "batch", 3), (32, 7, "none", 5)])
def test_closed_form_of_the_count_under_overrides(name, width, classes, norm, five):
    overrides = {"five": five} if name == "inception_v1" else {}
    layers, last = convolutions(name, width, overrides.get("five", 3))
    extra = 2 if norm == "batch" else 1  # scale and bias, or bias
    expected = sum(k * i * o + extra * o for k, i, o in layers) + (last + 1) * classes
    variables = shapes(name, (64, 64, 3), width=width, num_classes=classes, norm=norm, **overrides)[1]
    assert count(variables["params"]) == expected


def test_output_sizes_of_table_1():
    found = stages("inception_v1")
    assert found["conv1"] == (112, 112, 64)
    assert found["pool1"] == (56, 56, 64)
    assert found["conv2"] == (56, 56, 192)
    assert found["pool2"] == (28, 28, 192)
    depths = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
    pixels = {"3": 28, "4": 14, "5": 7}
    for stage, depth in depths.items():
        assert found[f"inception_{stage}"] == (pixels[stage[0]],) * 2 + (depth,)
    assert found["pool3"] == (14, 14, 480)
    assert found["pool4"] == (7, 7, 832)
    assert found["pool5"] == (1024,)
    assert stages("inception_v1", pool4=3)["pool4"] == (7, 7, 832)


def test_output_sizes_of_figure_5():
    """4c, 4d and 4e are the sums of their branches, where the figure prints 576, 576 and 1024."""
    found = stages("bn_inception")
    depths = {"3a": 256, "3b": 320, "3c": 576, "4a": 576, "4b": 576, "4c": 608, "4d": 608, "4e": 1056}
    depths |= {"5a": 1024, "5b": 1024}
    pixels = dict.fromkeys(depths, 14) | {"3a": 28, "3b": 28, "4e": 7, "5a": 7, "5b": 7}
    for stage, depth in depths.items():
        assert found[f"inception_{stage}"] == (pixels[stage], pixels[stage], depth)


def test_branches_stand_where_the_papers_put_them():
    one = {"conv1x1", "reduce3x3", "conv3x3", "reduce5x5", "conv5x5", "pool_proj"}
    params = shapes("inception_v1")[1]["params"]
    modules = [name for name in params if name.startswith("inception")]
    assert modules == [f"inception_{stage}" for stage in _V1]
    for name in modules:
        assert set(params[name]) == one | {f"{layer}_bn" for layer in one}
    assert params["inception_3a"]["conv5x5"]["kernel"].shape == (3, 3, 16, 32)
    assert set(params) - set(modules) == {
        "conv1", "conv1_bn", "conv2_reduce", "conv2_reduce_bn", "conv2", "conv2_bn", "fc",
    }  # fmt: skip

    params = shapes("bn_inception", norm="none")[1]["params"]
    inner = {"reduce3x3", "conv3x3", "reduce_double3x3", "double3x3_1", "double3x3_2"}
    for stage in _BN:
        ends = set() if stage in ("3c", "4e") else {"conv1x1", "pool_proj"}
        assert set(params[f"inception_{stage}"]) == inner | ends


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v1", "bn_inception"])
def test_other_sizes_and_dimensions(name):
    assert shapes(name, (97, 150, 1))[0].shape == (2, 1000)
    small = {"width": 4, "num_classes": 5}
    plane = shapes(name, (64, 64, 2), **small)[1]["params"]
    for dimensions in (1, 3):
        output, variables = shapes(name, (*(64,) * dimensions, 2), dimensions=dimensions, **small)
        assert output.shape == (2, 5)
        assert jax.tree.structure(variables["params"]) == jax.tree.structure(plane)
        assert variables["params"]["conv1"]["kernel"].shape == (*(7,) * dimensions, 2, 4)


def test_the_pass_through_pooling_has_no_padding_on_even_sizes_and_rounds_up_on_odd_ones():
    x = jax.random.normal(jax.random.key(0), (1, 8, 6, 2))
    padded = _halve(x, padding=((0, 1), (0, 1)))
    np.testing.assert_array_equal(padded, max_pool(x, window=3, strides=2, ceil_mode=True))
    assert _halve(x[:, :7, :5], padding=((0, 1), (0, 1))).shape == (1, 4, 3, 2)


def test_switches_of_norm_and_activation():
    assert count(shapes("inception_v1", norm="group")[1]["params"]) == 6_624_904
    assert "batch_stats" not in shapes("bn_inception", norm="group", width=32)[1]
    assert count(shapes("bn_inception", act="sigmoid")[1]["params"]) == 11_285_224
    assert create("inception_v1").epsilon == 1e-3


def test_auxiliary_heads_stand_behind_4a_and_4d_and_exist_after_any_init():
    in_training, trained = shapes("inception_v1", aux=True, train=True)
    in_evaluation, variables = shapes("inception_v1", aux=True, train=False)
    assert jax.tree.map(lambda leaf: leaf.shape, in_training) == InceptionOutput(*((2, 1000),) * 3)
    assert in_evaluation.shape == (2, 1000)
    assert jax.tree.structure(trained) == jax.tree.structure(variables)
    params = variables["params"]
    assert params["aux1"]["conv"]["kernel"].shape == (1, 1, 512, 128)
    assert params["aux2"]["conv"]["kernel"].shape == (1, 1, 528, 128)
    assert params["aux1"]["fc1"]["kernel"].shape == (4 * 4 * 128, 1024)
    assert not [name for name in shapes("inception_v1", train=True)[1]["params"] if name.startswith("aux")]


def draw(module, x):
    """Variables by shape, kernels of variance 2 / fan-in. Compiling `init` takes longer than the test."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key == "kernel":
            return jnp.float32(rng.normal(size=shape.shape) * np.sqrt(2 / np.prod(shape.shape[:-1])))
        return jnp.full(shape.shape, path[-1].key in ("scale", "var"), shape.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))


def check_training_in_bfloat16(module, x, **rngs):
    """Finite gradients that reach every kernel, parameters in float32, statistics that training moves."""
    variables = draw(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    statistics = variables["batch_stats"]

    def loss(params):
        both = {"params": params, "batch_stats": statistics}
        out, moved = module.apply(both, x, train=True, mutable=["batch_stats"], rngs=rngs)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
        return sum(jnp.square(leaf.astype(jnp.float32) - 1).mean() for leaf in jax.tree.leaves(out)), moved

    gradient, moved = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(leaf.any() for path, leaf in jax.tree.leaves_with_path(gradient) if path[-1].key == "kernel")
    changed = jax.tree.map(lambda a, b: (a != b).any(), statistics, moved["batch_stats"])
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("name", ["inception_v1", "bn_inception"])
def test_one_module_trains_in_bfloat16(name):
    network = create(name, width=16, dtype=jnp.bfloat16)
    unit = network._unit(use_bias=False, divisor=8)
    x = jax.random.uniform(jax.random.key(0), (4, 5, 5, 6))
    module = Inception(_V1["3a"], unit, 3) if name == "inception_v1" else DoubleInception(_BN["4e"], unit, max_pool)
    check_training_in_bfloat16(module, x.astype(jnp.bfloat16))


@pytest.mark.slow  # compiling 57 and 69 convolutions with their gradients
@pytest.mark.parametrize(("name", "overrides"), [("inception_v1", {"aux": True}), ("bn_inception", {"dropout": 0.1})])
def test_training_in_bfloat16(name, overrides):
    module = create(name, num_classes=3, width=8, dtype=jnp.bfloat16, **overrides)
    x = jax.random.uniform(jax.random.key(0), (4, 48, 48, 3))
    check_training_in_bfloat16(module, x, dropout=jax.random.key(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes("inception_v1", (14, 14, 3)), "pool3: pooling window 3 is larger"),
        (lambda: shapes("inception_v1", (224, 3)), "expected images"),
        (lambda: shapes("inception_v1", five=4), "five=4"),
        (lambda: shapes("inception_v1", pool4=4), "pool4=4"),
        (lambda: shapes("inception_v1", norm="none", statistics="device"), "belongs to norm 'batch'"),
        (lambda: shapes("bn_inception", act="rely"), "did you mean 'relu'"),
        (lambda: create("bn_inception", aux=True), "unknown override"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
