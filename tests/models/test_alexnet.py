"""AlexNet against its published count and table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create


def shapes(size=None, **overrides):
    module = create("alexnet", **overrides)
    sample = jax.ShapeDtypeStruct((2, *(size or MODELS["alexnet"].input)), jnp.float32)

    def run(x):
        return module.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True)

    return jax.eval_shape(run, sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def values(tree):
    """Random parameters in place of shapes, without compiling an initialiser."""
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda p: draw(p.shape, np.float32) * (p.shape[-1] / p.size) ** 0.5, tree["params"])


def test_published_parameter_count():
    outputs, variables = shapes()
    assert outputs.shape == (2, 1000)
    assert count(variables["params"]) == 61_100_840  # torchvision
    assert "batch_stats" not in variables


def test_counts_under_overrides():
    assert count(shapes(num_classes=10)[1]["params"]) == 61_100_840 - 990 * 4097
    windows = 121 * 3 * 2 + 25 * 2 * 6 + 9 * (6 * 12 + 12 * 8 + 8 * 8)
    dense = 36 * 8 * 5 + 5 + 5 * 5 + 5 + 5 * 3 + 3
    variables = shapes(width=2, hidden=5, num_classes=3, norm="batch")[1]
    channels = 2 + 6 + 12 + 8 + 8
    assert count(variables["params"]) == windows + channels + dense + 2 * channels
    assert count(variables["batch_stats"]) == 2 * channels


def test_names_and_sizes():
    outputs = shapes()[1]["intermediates"]
    sizes = {name: outputs[name]["__call__"][0].shape[1:] for name in outputs if name.startswith(("conv", "pool"))}
    assert sizes == {
        "conv1": (55, 55, 64),
        "pool1": (27, 27, 64),
        "conv2": (27, 27, 192),
        "pool2": (13, 13, 192),
        "conv3": (13, 13, 384),
        "conv4": (13, 13, 256),
        "conv5": (13, 13, 256),
        "pool5": (6, 6, 256),
    }
    assert set(outputs) >= {f"relu{i}" for i in range(1, 8)} | {"avgpool", "fc6", "fc7", "fc8", "drop6", "drop7"}


@pytest.mark.parametrize(
    ("size", "dimensions"), [((63, 63, 3), 2), ((256, 320, 1), 2), ((224, 2), 1), ((63, 64, 65, 1), 3)]
)
def test_other_sizes(size, dimensions):
    assert shapes(size, width=2, hidden=4, dimensions=dimensions)[0].shape == (2, 1000)


def test_bfloat16_gradient_is_finite_and_dropout_acts_in_training_alone():
    overrides = {"dtype": jnp.bfloat16, "width": 4, "hidden": 8, "num_classes": 3}
    module, abstract = create("alexnet", **overrides), shapes((63, 63, 3), **overrides)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    params = values(abstract)
    x = np.random.default_rng(1).standard_normal((2, 63, 63, 3), np.float32)

    def run(params, train):
        logits = module.apply({"params": params}, x, train=train, rngs={"dropout": jax.random.key(2)})
        return logits.astype(jnp.float32).mean(), logits

    gradient, noisy = jax.jit(jax.grad(lambda p: run(p, True), has_aux=True))(params)
    calm = jax.jit(lambda p: run(p, False)[1])(params)
    assert noisy.dtype == calm.dtype == jnp.bfloat16
    assert (noisy != calm).any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("size", "message"),
    [((62, 62, 3), "pool5: pooling window 3 is larger"), ((6, 6, 3), "conv1: convolution: input \\(6, 6\\)")],
)
def test_too_small_an_image_names_the_layer(size, message):
    with pytest.raises(InputError, match=message):
        shapes(size)
