"""Activations against closed forms and PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.errors import InputError
from jaxcnn.layers import Conv
from jaxcnn.layers.act import ACTIVATIONS, activation, maxout

X = np.linspace(-8, 8, 81)


def test_closed_forms(float64):
    erf = np.vectorize(math.erf)
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    expected = {
        "identity": X,
        "sigmoid": 1 / (1 + np.exp(-X)),
        "tanh": np.tanh(X),
        "scaled_tanh": 1.7159 * np.tanh(2 * X / 3),
        "relu": np.maximum(X, 0),
        "relu6": np.clip(X, 0, 6),
        "leaky_relu": np.where(X > 0, X, 0.01 * X),
        "leaky_relu_0.1": np.where(X > 0, X, 0.1 * X),
        "elu": np.where(X > 0, X, np.expm1(X)),
        "selu": scale * np.where(X > 0, X, alpha * np.expm1(X)),
        "gelu": X * 0.5 * (1 + erf(X / math.sqrt(2))),
    }
    assert set(expected) | {"maxout"} == set(ACTIVATIONS)
    for name, values in expected.items():
        np.testing.assert_allclose(activation(name)(jnp.asarray(X)), values, atol=1e-12, err_msg=name)


def test_scaled_tanh_keeps_plus_and_minus_one():
    np.testing.assert_allclose(activation("scaled_tanh")(jnp.array([-1.0, 1.0])), [-1, 1], atol=1e-4)


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_gradient_at_the_corner_is_zero(name):
    assert jax.grad(activation(name))(0.0) == 0


def test_maxout_takes_neighbouring_channels():
    x = jnp.arange(12.0).reshape(2, 6)[:, ::-1]
    np.testing.assert_array_equal(maxout(x), [[5, 3, 1], [11, 9, 7]])
    np.testing.assert_array_equal(maxout(x, pieces=3), [[5, 2], [11, 8]])


def test_a_maxout_layer_is_a_wider_layer_and_maxout():
    """Goodfellow et al. 2013: each unit is the maximum of its own affine maps; two make |x| and, in sum, any bend."""
    layer = Conv(6, 1)
    params = {"kernel": jnp.array([1.0, -1.0, 0.0, 2.0, -3.0, 1.0]).reshape(1, 1, 1, 6), "bias": jnp.zeros(6)}
    x = jnp.array([-2.0, 0.5]).reshape(1, 1, 2, 1)
    y = activation("maxout")(layer.apply({"params": params}, x))
    np.testing.assert_array_equal(y[0, 0], [[2, 0, 6], [0.5, 1, 0.5]])


def test_callables_pass_and_unknown_names_do_not():
    assert activation(jnp.sin) is jnp.sin
    with pytest.raises(InputError, match="did you mean 'relu'"):
        activation("rellu")
    with pytest.raises(InputError, match="5 channels"):
        maxout(jnp.zeros((1, 5)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtype_is_kept(name, strict_dtypes):
    assert activation(name)(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
