"""BatchNorm folding against the formula, over the table's families, user modules, and every reason not to fold."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.analysis.batchnorm import compare, fold, largest_difference
from jaxcnn.errors import InputError
from jaxcnn.layers.blocks import BasicBlock, Stage
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.norm import BatchNorm, GroupNorm
from jaxcnn.layers.upsample import ConvTranspose
from jaxcnn.models import create
from jaxcnn.models.table import call_options
from jaxcnn.tree import flatten


def variables(net, input, seed=0):
    """He's kernels, and norms that change everything: statistics, scales and biases far from their start."""
    options = call_options(net, train=False)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, *input)), **options))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape), leaf.dtype)
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


def images(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(net, input, bound=1e-5):
    """Folds, compares logits, and returns what was folded."""
    held = variables(net, input)
    folded = fold(net, held, input=input)
    assert largest_difference(net, held, folded, images(2, *input))[1] < bound
    left = {path.partition("/")[2].rpartition("/")[0] for path in flatten(folded.variables)}
    assert left.isdisjoint(folded.folded)
    assert left.issuperset(folded.kept)
    return folded


class Net(nn.Module):
    """A user's: Flax's layers, no `train`."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, use_scale=False)(x))
        x = nn.BatchNorm(use_running_average=True, use_bias=False)(nn.Dense(5)(x.mean((1, 2))))
        return nn.Dense(3)(x)


def test_formula():
    """W' = gamma W / sqrt(v + eps), b' = gamma (b - mu) / sqrt(v + eps) + beta, rounded once from float64."""
    net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True, epsilon=1e-3)])
    held = flatten(variables(net, (3,)))
    folded = fold(net, variables(net, (3,)), input=(3,))
    wide = {path.split("/", 1)[1]: np.asarray(leaf, np.float64) for path, leaf in held.items()}
    gain = wide["layers_1/scale"] / np.sqrt(wide["layers_1/var"] + 1e-3)
    bias = gain * (wide["layers_0/bias"] - wide["layers_1/mean"]) + wide["layers_1/bias"]
    assert folded.folded == ("layers_1",)
    assert folded.kept == {}
    assert list(flatten(folded.variables)) == ["params/layers_0/bias", "params/layers_0/kernel"]
    layer = folded.variables["params"]["layers_0"]
    np.testing.assert_array_equal(layer["kernel"], (wide["layers_0/kernel"] * gain[None]).astype(np.float32))
    np.testing.assert_array_equal(layer["bias"], bias.astype(np.float32))


def test_scale_and_bias_that_undo_the_statistics_are_the_identity():
    net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    held = variables(net, (3,))
    statistics = held["batch_stats"]["layers_1"]
    held["params"]["layers_1"] = {"scale": np.sqrt(statistics["var"] + 1e-5), "bias": statistics["mean"]}
    folded = fold(net, held, input=(3,))
    for name, leaf in held["params"]["layers_0"].items():
        np.testing.assert_allclose(folded.variables["params"]["layers_0"][name], leaf, rtol=2e-7, atol=1e-7)


def test_user_module():
    folded = check(Net(), (8, 8, 3))
    assert folded.folded == ("BatchNorm_0", "BatchNorm_1", "BatchNorm_2")
    assert list(folded.variables) == ["params"]
    assert "bias" in folded.variables["params"]["Conv_0"]  # which had none
    with pytest.raises(InputError, match="for evaluation"):
        folded.module.apply(folded.variables, images(1, 8, 8, 3), train=True)


SMALL = {
    "resnet50": ({"width": 4, "blocks": (1, 1)}, 9),
    "vgg16_bn": ({"width": 4, "hidden": 8, "convs": (1, 2)}, 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_no_norm_is_left(name):
    options, norms = SMALL[name]
    folded = check(create(name, num_classes=5, **options), (32, 32, 3))
    assert len(folded.folded) == norms
    assert folded.kept == {}
    assert list(folded.variables) == ["params"]


def test_densenet_keeps_the_norms_of_concatenations():
    folded = check(create("densenet121", num_classes=5, blocks=(2, 2), growth=4), (32, 32, 3))
    layers = [f"denseblock{b}/layer{n}" for b in (1, 2) for n in (1, 2)]
    assert folded.folded == ("norm0", *(f"{layer}/norm2" for layer in layers))
    concatenated = "follows a concatenation"
    assert folded.kept == {
        "denseblock1/layer1/norm1": "follows max_pool",
        "denseblock1/layer2/norm1": concatenated,
        "transition1/norm": concatenated,
        "denseblock2/layer1/norm1": "follows avg_pool",
        "denseblock2/layer2/norm1": concatenated,
        "norm5": concatenated,
    }


def test_preactivation_keeps_the_norms_of_sums():
    folded = check(create("resnetv2_50", num_classes=5, width=4, blocks=(2, 1)), (32, 32, 3))
    blocks = ("stage1/block1", "stage1/block2", "stage2/block1")
    assert folded.folded == tuple(f"{block}/bn{n}" for block in blocks for n in (2, 3))
    summed = dict.fromkeys(("stage1/block2/bn1", "stage2/block1/bn1", "bn"), "follows a sum")
    assert folded.kept == {"stage1/block1/bn1": "follows max_pool", **summed}


class Stages(nn.Module):
    """`bn1` is a path in a block that is compiled by itself, too."""

    options: dict

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm(name="bn1")(Conv(4, 3, name="conv1")(x), train=train)
        block = partial(BasicBlock, conv=partial(Conv, use_bias=False), norm=BatchNorm)
        for i in (1, 2):
            x = Stage(block, 3, 4 * i, i, **self.options, name=f"stage{i}")(x, train=train)
        return x


@pytest.mark.parametrize("options", [{"scan": True}, {"remat": True, "scan": False}])
def test_blocks_compiled_as_loops_are_written_out(options):
    net = Stages(options)
    folded = check(net, (8, 8, 3))
    blocks = [f"{stage}/block{i}/bn{n}" for stage in ("stage1", "stage2") for i in (1, 2, 3) for n in (1, 2)]
    assert set(folded.folded) == {"bn1", "stage2/block1/projection_bn", *blocks}
    assert folded.kept == {}


class One(nn.Module):
    """`fn(layers, x)`."""

    fn: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        return self.fn(x)


BN = partial(nn.BatchNorm, use_running_average=True, name="bn")


class Standardised(nn.Module):
    """Its kernel's scale does not matter."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4))
        return x @ ((kernel - kernel.mean(0, keepdims=True)) / kernel.std(0, keepdims=True))


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        return (x - mean.value.reshape(1, 1, 1, -1)) / var.value.reshape(1, 1, 1, -1)


class Doubled(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


def _twice(x):
    conv = nn.Conv(3, (1, 1), name="conv")
    return BN()(conv(conv(x)))


def _used(x):
    y = nn.Conv(3, (1, 1), name="conv")(x)
    return BN()(y) + nn.relu(y)


def _shared(x):
    norm = BN()
    return norm(nn.Conv(3, (1, 1))(norm(nn.Conv(3, (1, 1))(x))))


def _looped(x):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return BN()(nn.Conv(3, (1, 1))(x)), None

    return nn.scan(Body, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)(
        name="body"
    )(x, None)[0]


REASONS = {
    "follows the input of the network": lambda x: BN()(x),
    "follows relu": lambda x: BN()(nn.relu(nn.Conv(3, (1, 1))(x))),
    "follows a sum": lambda x: BN()(x + nn.Conv(3, (1, 1))(x)),
    "the output of conv is used elsewhere too": _used,
    "follows conv, which is called 2 times": _twice,
    "is called 2 times": _shared,
    "follows layer, which is no plain convolution or dense layer": lambda x: BN()(Standardised(name="layer")(x)),
    "its statistics are over another axis than the last, 1": lambda x: BN(axis=1)(nn.Conv(3, (1, 1))(x)),
    "normalises by the batch's own statistics in evaluation too": lambda x: BN(use_running_average=False)(
        nn.Conv(3, (1, 1))(x)
    ),
    "is a OwnNorm, no BatchNorm of jaxcnn.layers or flax.linen": lambda x: OwnNorm(name="bn")(nn.Conv(3, (1, 1))(x)),
    "is a Doubled, no BatchNorm of jaxcnn.layers or flax.linen": lambda x: Doubled(name="bn", use_running_average=True)(
        nn.Conv(3, (1, 1))(x)
    ),
    "is inside a loop, whose rounds share one program": _looped,
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_folded_says_why(reason):
    net = One(REASONS[reason])
    held = variables(net, (4, 4, 3))
    folded = fold(net, held, input=(4, 4, 3))
    assert folded.folded == ()
    assert list(folded.kept.values()) == [reason]
    x = images(2, 4, 4, 3)
    mutable = ["batch_stats"] if "own statistics" in reason else False
    want, got = (m.apply(v, x, mutable=mutable) for m, v in ((net, held), (folded.module, folded.variables)))
    jax.tree.map(np.testing.assert_array_equal, want, got)


class Named(nn.Module):
    """What lies between layer and norm is nothing but names."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (1, 1), name="conv")(x)


FOLDABLE = {
    "named": lambda x: BN()(Named(name="block")(x)),
    "dropout": lambda x: BN()(nn.Dropout(0.5, deterministic=True)(nn.Conv(4, (1, 1))(x))),
    "remat": lambda x: nn.remat(nn.Sequential)([nn.Conv(4, (1, 1)), nn.BatchNorm(use_running_average=True)])(x),
    "jit": lambda x: nn.jit(nn.Sequential)([nn.Conv(4, (1, 1)), nn.BatchNorm(use_running_average=True)])(x),
    "circular": lambda x: BN()(nn.Conv(4, (3, 3), padding="CIRCULAR", use_bias=False)(x)),
    "transposed": lambda x: BN()(ConvTranspose(4, 3, strides=2, use_bias=False)(x)),
    "flax_transposed": lambda x: BN()(nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)),
    "depthwise": lambda x: BN()(Conv(3, 3, groups=3, use_bias=False)(x)),
    "dense_on_maps": lambda x: BN()(nn.Dense(4)(x)),
    "general": lambda x: BN()(nn.DenseGeneral(4, axis=(-2, -1))(x)),
    "ours": lambda x: BatchNorm(name="bn", statistics="frozen")(Conv(4, 3)(x), train=False),
    "last_axis": lambda x: BN(axis=3)(nn.Conv(4, (1, 1))(x)),
    "half": lambda x: BN(dtype=jnp.bfloat16)(nn.Conv(4, (1, 1), dtype=jnp.bfloat16)(x)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_layers_that_norms_are_folded_into(name):
    net = One(FOLDABLE[name])
    folded = check(net, (4, 5, 3), bound=2e-2 if name == "half" else 1e-6)
    assert len(folded.folded) == 1
    assert folded.kept == {}
    assert list(folded.variables) == ["params"]
    y: Any = folded.module.apply(folded.variables, images(1, 4, 5, 3))
    assert y.dtype == (jnp.bfloat16 if name == "half" else "f4")


def test_other_norms_are_neither_folded_nor_listed():
    folded = check(One(lambda x: GroupNorm(groups=2)(Conv(4, 3)(x), train=False)), (4, 4, 3))
    assert folded.folded == ()
    assert folded.kept == {}


def test_float64(float64):
    net = Net()
    held = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables(net, (8, 8, 3)))
    x = images(2, 8, 8, 3).astype(np.float64)
    assert largest_difference(net, held, fold(net, held, x=x), x)[1] < 1e-14


def test_compare():
    net, held, x = Net(), variables(Net(), (8, 8, 3)), images(4, 8, 8, 3)
    folded = fold(net, held, x=x)
    found = compare(net, held, folded, x, calls=3)
    assert found[:2] == largest_difference(net, held, folded, x)
    assert found.speedup > 0
    off = folded.variables["params"]["Dense_1"]
    off["bias"] = off["bias"] + 1
    assert compare(net, held, folded, x, calls=1).difference == pytest.approx(1, abs=1e-5)


def test_bad_input():
    net, held = Net(), variables(Net(), (8, 8, 3))
    with pytest.raises(InputError, match="either input"):
        fold(net, held)
    with pytest.raises(InputError, match="either input"):
        fold(net, held, input=(8, 8, 3), x=images(1, 8, 8, 3))
    del held["params"]["Dense_1"]["kernel"]
    with pytest.raises(InputError, match=r"Dense_1/kernel should be \(5, 3\) and is missing"):
        fold(net, held, input=(8, 8, 3))


FULL = {"resnet50": (224, 53), "mobilenet_v1": (224, 27), "vgg16_bn": (224, 13)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_networks(name):
    size, norms = FULL[name]
    folded = check(create(name), (size, size, 3))
    assert len(folded.folded) == norms
    assert folded.kept == {}
    assert list(folded.variables) == ["params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "norms", "kept"),
    [("densenet121", 224, 59, 62), ("resnetv2_50", 224, 32, 17), ("cifar_resnetv2_110", 32, 54, 55)],
)
def test_full_networks_of_which_norms_are_kept(name, size, norms, kept):
    folded = check(create(name), (size, size, 3))
    assert (len(folded.folded), len(folded.kept)) == (norms, kept)
