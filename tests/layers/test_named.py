"""Names of functions inside a network, and errors that begin with the path of the layer."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers import Conv, ConvTranspose, Lambda, max_pool


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Conv(4, 3, padding=1, name="conv1")(x)
        x = Lambda(nn.relu, name="relu1")(x)
        x = Lambda(partial(max_pool, window=2), name="pool1")(x)
        return ConvTranspose(4, 2, strides=2, name="up1")(x)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="block1")(x)


def initialise(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)


IMAGES = jnp.zeros((2, 8, 8, 3))


def test_a_named_function_has_no_parameters_and_is_that_function():
    x = jnp.arange(-4.0, 4.0).reshape(2, 4)
    layer = Lambda(nn.relu, name="relu1")
    assert layer.init(jax.random.key(0), x) == {}
    np.testing.assert_array_equal(layer.apply({}, x), nn.relu(x))


def test_its_output_is_an_intermediate_of_that_name():
    variables = Network().init(jax.random.key(0), IMAGES)
    _, state = Network().apply(variables, IMAGES, capture_intermediates=True)
    block = state["intermediates"]["block1"]
    assert {name: value["__call__"][0].shape for name, value in block.items() if name != "__call__"} == {
        "conv1": (2, 8, 8, 4),
        "relu1": (2, 8, 8, 4),
        "pool1": (2, 4, 4, 4),
        "up1": (2, 8, 8, 4),
    }


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8), r"^block1/conv1: convolution: input \(2, 8\)"),
        ((2, 1, 8, 3), r"^block1/pool1: pooling window 2 is larger than the padded axis of 1"),
    ],
)
def test_an_error_begins_with_the_path_of_the_layer(shape, message):
    with pytest.raises(InputError, match=message):
        initialise(Network(), jnp.zeros(shape))


def test_without_a_path_the_error_stands_alone():
    with pytest.raises(InputError, match=r"^pooling window 2"):
        initialise(Lambda(partial(max_pool, window=2)), jnp.zeros((1, 1, 1)))


@pytest.mark.parametrize(
    ("name", "layer"), [("conv1", Conv(4, 3, padding=1)), ("up1", ConvTranspose(4, 2, strides=2))], ids=["conv", "up"]
)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 3), (2, 8, 8, 8, 3)], ids=["channels", "1d", "3d"])
def test_parameters_of_another_input_are_refused(name, layer, shape):
    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer.copy(name=name)(x)

    variables = initialise(Holder(), IMAGES)
    with pytest.raises(InputError, match=f"^{name}: the parameters belong to an input of another shape: .*kernel"):
        jax.eval_shape(Holder().apply, variables, jnp.zeros(shape))
