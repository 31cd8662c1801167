"""SqueezeNet against its published counts, module by module."""

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
    """Random parameters in place of shapes, without compiling an initialiser."""
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda p: draw(p.shape, np.float32) * (p.shape[-1] / p.size) ** 0.5, tree["params"])


COUNTS = {"squeezenet1_0": 1_248_424, "squeezenet1_1": 1_235_496}  # torchvision


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_count(name):
    outputs, variables = shapes(name)
    assert outputs.shape == (2, 1000)
    assert count(variables["params"]) == COUNTS[name]
    assert "batch_stats" not in variables


# Weights and biases of each fire module; with conv1 (14,208) and conv10 (513,000) they add up to 1,248,424.
FIRES = {2: 11_920, 3: 12_432, 4: 45_344, 5: 49_440, 6: 104_880, 7: 111_024, 8: 188_992, 9: 197_184}


@pytest.mark.parametrize("name", COUNTS)
def test_each_fire_module(name):
    params = shapes(name)[1]["params"]
    fires = {i: count(params[f"fire{i}"]) for i in FIRES}
    assert fires == (FIRES if name == "squeezenet1_0" else {**FIRES, 2: 11_408})  # 1.1 has 64 maps in conv1
    for i in FIRES:
        squeezed = params[f"fire{i}"]["squeeze1x1"]["kernel"].shape[-1]
        assert params[f"fire{i}"]["expand1x1"]["kernel"].shape == (1, 1, squeezed, 4 * squeezed)
        assert params[f"fire{i}"]["expand3x3"]["kernel"].shape == (3, 3, squeezed, 4 * squeezed)


def test_sizes_of_1_0():
    outputs = shapes("squeezenet1_0")[1]["intermediates"]
    sizes = {k: outputs[k]["__call__"][0].shape[1:] for k in ("conv1", "pool1", "pool4", "pool8", "fire9", "conv10")}
    assert sizes == {
        "conv1": (109, 109, 96),
        "pool1": (54, 54, 96),
        "pool4": (27, 27, 256),
        "pool8": (13, 13, 512),
        "fire9": (13, 13, 512),
        "conv10": (13, 13, 1000),
    }


def test_pools_stand_where_the_versions_put_them_and_reach_over_the_end():
    outputs = shapes("squeezenet1_1")[1]["intermediates"]
    sizes = {k: outputs[k]["__call__"][0].shape[1] for k in outputs if k.startswith("pool")}
    assert sizes == {"pool1": 55, "pool3": 27, "pool5": 13}
    outputs = shapes("squeezenet1_1", (37, 37, 3))[1]["intermediates"]
    sizes = {k: outputs[k]["__call__"][0].shape[1] for k in outputs if k.startswith("pool")}
    assert outputs["conv1"]["__call__"][0].shape[1] == 18
    assert sizes == {"pool1": 9, "pool3": 4, "pool5": 2}  # ceil mode: floor would leave 8, 3 and 1
    padded = shapes("squeezenet1_1", conv1_padding=1)[1]["intermediates"]
    assert padded["conv1"]["__call__"][0].shape == (2, 112, 112, 64)


def test_counts_under_overrides():
    assert count(shapes("squeezenet1_0", num_classes=10)[1]["params"]) == COUNTS["squeezenet1_0"] - 990 * 513
    variables = shapes("squeezenet1_0", width=6, num_classes=3, norm="batch")[1]
    total, channels, normalised = (49 * 3 + 1) * 6, 6, 6
    for squeeze in (1, 1, 2, 2, 3, 3, 4, 4):
        total += (channels + 1) * squeeze + 2 * 4 * squeeze + (1 + 9) * squeeze * 4 * squeeze
        channels = 8 * squeeze
        normalised += 9 * squeeze
    total += (channels + 1) * 3
    assert count(variables["params"]) == total + 2 * normalised
    assert count(variables["batch_stats"]) == 2 * normalised


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("size", "dimensions"), [((64, 48, 3), 2), ((227, 227, 1), 2), ((64, 3), 1), ((32,) * 4, 3)])
def test_other_sizes(name, size, dimensions):
    assert shapes(name, size, dimensions=dimensions)[0].shape == (2, 1000)


@pytest.mark.slow
def test_bfloat16_gradient_is_finite():
    overrides = {"dtype": jnp.bfloat16, "width": 4, "num_classes": 3}
    module, abstract = create("squeezenet1_1", **overrides), shapes("squeezenet1_1", (40, 40, 3), **overrides)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    params = values(abstract)
    x = np.random.default_rng(1).standard_normal((2, 40, 40, 3), np.float32)

    def loss(params):
        logits = module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
        assert logits.dtype == jnp.bfloat16
        return logits.astype(jnp.float32).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_conv10_starts_small():
    module = create("squeezenet1_1", width=16, num_classes=50)
    x = np.zeros((1, 40, 40, 3), np.float32)
    kernel = jax.jit(lambda x: module.init(jax.random.key(1), x, train=False)["params"]["conv10"]["kernel"])(x)
    np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes("squeezenet1_0", (8, 8, 3)), "^pool1: pooling window 3 is larger"),
        (lambda: shapes("squeezenet1_0", (6, 6, 3)), "^conv1: convolution: input \\(6, 6\\)"),
        (lambda: shapes("squeezenet1_0", width=64), "width 64: expected a positive multiple of 6"),
        (lambda: shapes("squeezenet1_0", (224, 3)), "expected images \\(b, h, w, c\\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
