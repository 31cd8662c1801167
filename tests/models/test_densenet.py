"""DenseNets against their published counts, the structure of the paper, and their memory-efficient form."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers.window import as_written
from jaxcnn.models import MODELS, create
from jaxcnn.tree import flatten

TINY = {"blocks": (2, 1), "growth": 4, "num_classes": 5}


@functools.cache
def shapes(name, size=None, **overrides):
    """Logits and variables, with the output of every named layer among the latter."""
    module = create(name, **overrides)
    collections = ["params", "batch_stats", "intermediates"]

    def run(x):
        key = jax.random.key(0)
        return module.init_with_output(key, x, train=False, capture_intermediates=True, mutable=collections)

    return jax.eval_shape(run, jax.ShapeDtypeStruct((2, *(size or MODELS[name].input)), jnp.float32))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def outputs(variables):
    """{"denseblock1/layer1/conv1": shape without the batch, ...}"""
    named = flatten(variables["intermediates"])
    return {path.removesuffix("/__call__/0"): leaf.shape[1:] for path, leaf in named.items()}


def macs(variables):
    """Multiplications of convolutions and dense layers for one image: every weight once per position."""
    layers = outputs(variables)
    kernels = {p.removesuffix("/kernel"): k for p, k in flatten(variables["params"]).items() if p.endswith("/kernel")}
    return sum(kernel.size * math.prod(layers[path][:-1]) for path, kernel in kernels.items())


def filled(module, x, dtype: Any = np.float32):
    """Variables drawn without compiling `init`, those that must be positive too."""
    draw = np.random.default_rng(0).uniform
    abstract = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(0.1, 0.5, leaf.shape), dtype), abstract)


def step(module, x):
    """(parameters, statistics) -> ((loss, statistics), gradient), jitted."""

    def loss(params, statistics):
        variables, rngs = {"params": params, "batch_stats": statistics}, {"dropout": jax.random.key(2)}
        logits, moved = module.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.square(logits).mean(), moved["batch_stats"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


# torchvision's parameters, checked by arithmetic; statistics are two for each normalised channel.
IMAGENET = {"densenet121": 7_978_856, "densenet161": 28_681_000, "densenet169": 14_149_480, "densenet201": 20_013_928}
# Huang et al. 2017, table 2, in millions: 1.0, 7.0, 27.2, 0.8, 15.3, 25.6.
CIFAR = {
    "cifar_densenet_40_k12": 1_019_722,
    "cifar_densenet_100_k12": 6_979_642,
    "cifar_densenet_100_k24": 27_249_082,
    "cifar_densenet_bc_100_k12": 769_162,
    "cifar_densenet_bc_250_k24": 15_324_406,
    "cifar_densenet_bc_190_k40": 25_624_430,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), {**IMAGENET, **CIFAR}.items())
def test_published_parameter_count(name, parameters):
    logits, variables = shapes(name)
    assert count(variables["params"]) == parameters
    assert logits.shape == (2, 10 if name.startswith("cifar") else 1000)
    scales = {p: leaf.size for p, leaf in flatten(variables["params"]).items() if p.endswith("/scale")}
    assert count(variables["batch_stats"]) == 2 * sum(scales.values())
    # the depth in the name counts convolutions and the dense layer
    depth = int(name.removeprefix("cifar_densenet_").removeprefix("bc_").removeprefix("densenet").split("_")[0])
    assert sum(path.endswith("/kernel") for path in flatten(variables["params"])) == depth


# In units of 1e9, as torchvision publishes them; 2.83 for DenseNet-121 without norms and pooling.
@pytest.mark.parametrize(
    ("name", "published"), {"densenet121": 2.83, "densenet161": 7.73, "densenet169": 3.36, "densenet201": 4.29}.items()
)
def test_published_multiplications(name, published):
    assert macs(shapes(name)[1]) / 1e9 == pytest.approx(published, rel=5e-3)


def test_counts_under_overrides():
    assert count(shapes("densenet121", num_classes=10)[1]["params"]) == IMAGENET["densenet121"] - 990 * 1025
    assert count(shapes("cifar_densenet_40_k12", num_classes=100)[1]["params"]) == 1_019_722 + 90 * 449
    assert count(shapes("cifar_densenet_40_k12", (32, 32, 1))[1]["params"]) == 1_019_722 - 2 * 9 * 16
    # growth 2: 3 blocks of 12 layers on 16, 40 and 64 channels, 9 * 2 weights and 2 of the norm for each channel
    layers = sum((start + 2 * i) * 20 for start in (16, 40, 64) for i in range(12))
    rest = 27 * 16 + 40 * 42 + 64 * 66 + 2 * 88 + 10 * 89
    assert count(shapes("cifar_densenet_40_k12", growth=2)[1]["params"]) == layers + rest
    plain = shapes("densenet121", norm="none")[1]
    assert count(plain["params"]) == IMAGENET["densenet121"] - 83_648
    assert "batch_stats" not in plain


def test_densenet121_is_the_papers_table():
    layers = outputs(shapes("densenet121")[1])
    expected = {
        "conv0": (112, 112, 64), "norm0": (112, 112, 64), "relu0": (112, 112, 64), "pool0": (56, 56, 64),
        "denseblock1": (56, 56, 256), "transition1/conv": (56, 56, 128), "transition1/pool": (28, 28, 128),
        "denseblock2": (28, 28, 512), "transition2": (14, 14, 256), "denseblock3": (14, 14, 1024),
        "transition3": (7, 7, 512), "denseblock4": (7, 7, 1024), "norm5": (7, 7, 1024), "fc": (1000,),
    }  # fmt: skip
    assert {path: layers[path] for path in expected} == expected
    assert [sum(f"denseblock{b}/layer{i}" in layers for i in range(1, 65)) for b in (1, 2, 3, 4)] == [6, 12, 24, 16]
    assert "transition4" not in layers


@pytest.mark.parametrize(("name", "growth", "start"), [("densenet161", 48, 96), ("cifar_densenet_bc_100_k12", 12, 24)])
def test_every_layer_sees_all_before_it(name, growth, start):
    layers = outputs(shapes(name)[1])
    for i in range(1, 7):
        assert layers[f"denseblock1/layer{i}/norm1"][-1] == start + (i - 1) * growth
        assert layers[f"denseblock1/layer{i}/conv1"][-1] == 4 * growth
        assert layers[f"denseblock1/layer{i}"][-1] == growth


def test_without_bottleneck_and_compression():
    layers = outputs(shapes("cifar_densenet_40_k12")[1])
    assert layers["conv0"] == (32, 32, 16)
    assert layers["denseblock1/layer1/conv1"] == (32, 32, 12)
    assert not [path for path in layers if "conv2" in path]
    assert [layers[f"transition{i}"] for i in (1, 2)] == [(16, 16, 160), (8, 8, 304)]
    assert layers["denseblock3"] == (8, 8, 448)


def test_compression_rounds_down():
    layers = outputs(shapes("cifar_densenet_bc_100_k12", growth=3, blocks=(3, 1), compression=0.5)[1])
    assert layers["transition1"][-1] == 7  # of 6 + 3 * 3


def test_a_block_is_the_concatenation_of_its_input_and_its_layers():
    module = create("cifar_densenet_bc_100_k12", **TINY)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = filled(module, x)

    @jax.jit
    def inside(x):
        return module.apply(variables, x, train=False, capture_intermediates=True, mutable=["intermediates"])[1]

    layers = {path.removesuffix("/__call__/0"): leaf for path, leaf in flatten(inside(x)["intermediates"]).items()}
    block = np.concatenate([layers[p] for p in ("conv0", "denseblock1/layer1", "denseblock1/layer2")], axis=-1)
    np.testing.assert_array_equal(layers["denseblock1"], block)
    normal = layers["transition1/relu"] @ variables["params"]["transition1"]["conv"]["kernel"][0, 0]
    np.testing.assert_allclose(
        layers["transition1"], normal.reshape(2, 4, 2, 4, 2, -1).mean((2, 4)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [(29, 29, 3), (64, 96, 1), (256, 256, 3)])
def test_other_sizes(size):
    assert shapes("densenet121", size)[0].shape == (2, 1000)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_one_and_three_dimensions(dimensions):
    logits, variables = shapes("densenet121", (32,) * dimensions + (2,), dimensions=dimensions)
    assert logits.shape == (2, 1000)
    assert variables["params"]["conv0"]["kernel"].shape == (7,) * dimensions + (2, 64)


def test_group_norm_finds_groups_that_divide_every_layer():
    for name in ("densenet161", "cifar_densenet_bc_100_k12"):
        assert "batch_stats" not in shapes(name, norm="group")[1]


@pytest.mark.slow
def test_remat_changes_no_result(float64):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 2), jnp.float64)
    options = {"blocks": (2,), "growth": 2, "num_classes": 3, "dropout": 0.2}
    kept, recomputed = (create("cifar_densenet_bc_100_k12", remat=remat, **options) for remat in (False, True))
    variables = filled(kept, x, np.float64)
    expected, actual = (
        flatten(step(module, x)(variables["params"], variables["batch_stats"])) for module in (kept, recomputed)
    )
    assert list(actual) == list(expected)
    for path, leaf in actual.items():
        assert leaf.dtype == jnp.float64
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-12, atol=1e-12, err_msg=path)
    before = flatten({"0": {"1": variables["batch_stats"]}})
    assert before.keys() <= actual.keys()
    assert all((actual[path] != leaf).all() for path, leaf in before.items())


@pytest.mark.slow
def test_remat_needs_less_memory():
    def temporaries(remat):
        x = jnp.zeros((4, 8, 8, 3))
        module = create("cifar_densenet_40_k12", blocks=(8,), growth=12, remat=remat)
        variables = filled(module, x)
        program = step(module, x).lower(variables["params"], variables["batch_stats"]).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(True) < 0.75 * temporaries(False)


def test_remat_has_the_same_names_and_none_where_traced_as_written():
    plain, remat = (shapes("cifar_densenet_bc_100_k12", remat=r)[1] for r in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(remat)
    module = create("cifar_densenet_bc_100_k12", remat=True, **TINY)
    x = jnp.zeros((1, 8, 8, 3))
    variables = filled(module, x)

    def loss(x):
        logits: Any = module.apply(variables, x, train=False)
        return logits.sum()

    def recomputes():
        program = str(jax.make_jaxpr(jax.grad(loss))(x))
        return "remat" in program or "checkpoint" in program

    assert recomputes()
    with as_written():
        assert not recomputes()


def test_statistics_rest_in_evaluation():
    module = create("cifar_densenet_bc_100_k12", remat=True, **TINY)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = filled(module, x)
    moved = jax.jit(lambda x: module.apply(variables, x, train=False, mutable=["batch_stats"])[1])(x)
    jax.tree.map(np.testing.assert_array_equal, moved["batch_stats"], variables["batch_stats"])


def test_forward_and_gradient_are_finite_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    module = create("cifar_densenet_bc_100_k12", dtype=jnp.bfloat16, remat=True, **{**TINY, "blocks": (1, 1)})
    variables = filled(module, x)
    (loss, moved), gradient = step(module, x)(variables["params"], variables["batch_stats"])
    assert loss.dtype == jnp.bfloat16
    leaves = jax.tree.leaves((gradient, moved))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "cifar_densenet_40_k12"])
def test_a_step_of_the_whole_network_is_finite(name):
    module = create(name)
    x = jax.random.normal(jax.random.key(0), (2, *MODELS[name].input))
    variables = jax.jit(lambda x: module.init(jax.random.key(1), x, train=False))(x)
    (loss, _), gradient = step(module, x)(variables["params"], variables["batch_stats"])
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes("densenet121", (28, 28, 3)), "transition3/pool: pooling window 2 is larger"),
        (lambda: shapes("densenet121", (3, 3, 3)), "pool"),
        (lambda: shapes("cifar_densenet_40_k12", (3, 3, 3)), "transition2/pool"),
        (lambda: shapes("densenet121", (224, 3)), "expected images"),
        (lambda: shapes("densenet121", blocks=(6, 0)), "positive"),
        (lambda: shapes("densenet121", growth=0), "positive"),
        (lambda: shapes("densenet121", compression=0.0), "compression"),
        (lambda: shapes("densenet121", stem="cfar"), "did you mean 'cifar'"),
        (lambda: shapes("densenet121", dropout=1.0), "dropout rate"),
        (lambda: create("densenet122"), "did you mean 'densenet121'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
