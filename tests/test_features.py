"""Named intermediates: the right ones, nothing past the deepest, and any Flax module."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.features import feature_names, features
from jaxcnn.models import create


class OwnNet(nn.Module):
    """A user's module: no `train`, functions that are no modules, one layer called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        same = nn.Conv(4, (3, 3), name="twice")
        x = same(same(x))
        return nn.Dense(3)(x.mean((1, 2)))


def own():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    return OwnNet(), OwnNet().init(jax.random.key(1), x), x


def vgg(size=32):
    x = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    module = create("vgg11", width=4, hidden=8, num_classes=3)
    return module, module.init(jax.random.key(1), x, train=False), x


def test_they_are_what_the_layers_return():
    module, variables, x = own()
    found = features(module, variables, x, names=("twice", "first"))
    assert list(found) == ["twice", "first"]
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    first = conv(x, variables["params"]["first"]["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(found["first"], first, atol=1e-5)
    pooled = nn.max_pool(nn.relu(first), (2, 2), (2, 2))
    again = conv(pooled, variables["params"]["twice"]["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(found["twice"], again, atol=1e-5)  # of the first call


def test_names_are_the_papers_and_in_order():
    assert feature_names(OwnNet(), input=(8, 8, 3)) == ["first", "twice", "Dense_0"]
    names = feature_names(create("vgg19"), input=(224, 224, 3))
    assert [n for n in names if n.startswith("relu4")] == ["relu4_1", "relu4_2", "relu4_3", "relu4_4"]
    assert names.index("relu4_4") < names.index("pool4") < names.index("conv5_1")
    names = feature_names(create("cifar_resnet20", depth=8, width=4), input=(32, 32, 3))
    assert {"stage3/block1", "stage3", "stage1/block1/conv2"} < set(names)


def test_nothing_past_the_deepest_is_computed_nor_has_to_fit():
    module, variables, x = vgg()

    def cost(name):
        run = jax.jit(lambda v, x: features(module, v, x, names=[name]))
        return run.lower(variables, x).compile().cost_analysis()["flops"]

    assert cost("conv1_1") < 0.5 * cost("relu3_1") < 0.4 * cost("relu5_2")
    eager = features(module, variables, x[:, :9, :10], names=["relu3_1"])  # too small for the five poolings
    assert eager["relu3_1"].shape == (1, 2, 2, 16)


def test_they_differentiate_with_respect_to_the_pixels():
    module, variables, x = vgg()
    gradient = jax.grad(lambda x: jnp.square(features(module, variables, x, names=["relu2_1"])["relu2_1"]).sum())(x)
    assert gradient.shape == x.shape
    assert jnp.abs(gradient).max() > 0


def test_a_stage_compiled_as_a_loop_still_has_its_blocks():
    x = jnp.ones((1, 8, 8, 3))
    module = create("cifar_resnet20", depth=20, width=4, scan=True)
    variables = module.init(jax.random.key(0), x, train=False)
    assert features(module, variables, x, names="stage2/block3")["stage2/block3"].shape == (1, 4, 4, 8)


def test_training_statistics_are_used_and_stay():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3)) + 5
    module = create("cifar_resnet20", depth=8, width=4)
    variables = module.init(jax.random.key(0), x, train=False)
    normalised = features(module, variables, x, names="bn1", train=True)["bn1"]
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-4)
    assert abs(features(module, variables, x, names="bn1")["bn1"].mean()) > 0.01


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no features"), (["relu4_9"], "unknown feature of VGG 'relu4_9': did you mean 'relu4"), (["fc9"], "'fc")],
)
def test_bad_names(names, message):
    module, variables, x = vgg()
    with pytest.raises(InputError, match=message):
        features(module, variables, x, names=names)
