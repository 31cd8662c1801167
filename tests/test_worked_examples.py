"""Examples that can be checked by hand, through jaxcnn's own layers and models (row A16)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.layers import BatchNorm, Conv, conv, convolve
from jaxcnn.models import create

IMAGE = np.array(
    [[3, 3, 2, 1, 0], [0, 0, 1, 3, 1], [3, 1, 2, 2, 3], [2, 0, 0, 2, 2], [2, 0, 0, 0, 1]], np.float32
).reshape(1, 5, 5, 1)
KERNEL = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2]], np.float32).reshape(3, 3, 1, 1)
BATCH = np.array([[0.5, 2.4, -2, -0.3], [2.3, 1.7, 0.3, -2], [1.2, 0.6, -0.1, -1.2]], np.float32)


def test_gradients_of_x_plus_y_times_z():
    x, y, z = -2.0, 5.0, -4.0
    value, gradients = jax.value_and_grad(lambda x, y, z: (x + y) * z, argnums=(0, 1, 2))(x, y, z)
    assert (value, *gradients) == (-12, -4, -4, 3)


def test_the_same_as_two_convolutions():
    def f(pair, z):
        q = conv(pair, jnp.ones((2, 1, 1)))
        return conv(q, z)[0, 0, 0]

    pair, z = jnp.array([-2.0, 5.0]).reshape(1, 2, 1), jnp.array(-4.0).reshape(1, 1, 1)
    by_pair, by_z = jax.grad(f, argnums=(0, 1))(pair, z)
    assert by_pair.ravel().tolist() == [-4, -4]
    assert by_z.ravel().tolist() == [3]


@pytest.mark.parametrize("gain", [1.5, 0.5])
def test_deep_linear_product_explodes_or_vanishes(gain):
    layers = 20
    module = create("mlp", depth=layers - 1, width=2, num_classes=2, act="identity")
    x = jnp.array([1.0, -3.0]).reshape(1, 1, 1, 2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, train=False)
    variables = jax.tree.map(lambda leaf: gain * jnp.eye(2) if leaf.ndim == 2 else jnp.zeros(leaf.shape), shapes)

    def last(x):
        return module.apply(variables, x, train=False)

    # 3^20 has more digits than float32.
    np.testing.assert_allclose(last(x), gain**layers * np.array([[1.0, -3.0]]), rtol=1e-6)
    gradient = jax.grad(lambda x: last(x)[0, 0])(x)
    np.testing.assert_allclose(gradient.ravel(), [gain**layers, 0], rtol=1e-6)


@pytest.mark.parametrize(("gain", "product"), [(1.5, 57.6650390625), (0.5, 0.0009765625)])
def test_ten_factors_are_exact(gain, product):
    y = jnp.ones((1, 1, 1))
    for _ in range(10):
        y = conv(y, jnp.array(gain).reshape(1, 1, 1))
    assert y.item() == gain**10 == product


def of_sum(probabilities, n):
    """The distribution of the sum of n independent draws: n - 1 convolutions, by squaring."""
    total, power = np.ones(1), np.asarray(probabilities)
    while n:
        if n % 2:
            total = added(total, power)
        n //= 2
        power = added(power, power) if n else power
    return total


def added(p, q):
    full = convolve(jnp.asarray(p)[None, :, None], jnp.asarray(q)[:, None, None], padding=len(q) - 1)
    return np.asarray(full)[0, :, 0]


def moments(probabilities, values):
    mean = probabilities @ values
    return mean, np.sqrt(probabilities @ (values - mean) ** 2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("n", "mean", "std"), [(1, 0.5, 0.5), (100, 50, 5), (10_000, 5_000, 50)])
def test_sums_of_coin_tosses(n, mean, std):
    distribution = of_sum([0.5, 0.5], n)
    assert len(distribution) == n + 1
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    assert moments(distribution, np.arange(n + 1)) == pytest.approx((mean, std), rel=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [1, 7, 512])
def test_variance_of_a_sum_of_products(n):
    """w in {-1, 0, 1} with 1/4, 1/2, 1/4 and x in {-2, 2}: variances 1/2 and 4, products in {-2, 0, 2}."""
    distribution = of_sum([0.25, 0.5, 0.25], n)
    mean, std = moments(distribution, 2 * (np.arange(2 * n + 1.0) - n))
    assert mean == pytest.approx(0, abs=1e-9)
    assert std**2 == pytest.approx(n * 0.5 * 4, rel=1e-9)


def test_variance_of_a_layers_sums():
    """n = K K C = 27 products of Var w = 2 / 27 and Var x = 9; 160,000 sums of 64 filters."""
    module = Conv(64, 3, padding=0)
    x = 3 * jax.random.normal(jax.random.key(0), (100, 7, 7, 3))
    y, _ = module.init_with_output(jax.random.key(1), x)
    assert float(y.var()) == pytest.approx(27 * (2 / 27) * 9, rel=0.1)


def test_correlation_and_convolution_of_an_image():
    correlated = conv(IMAGE, KERNEL)[0, ..., 0]
    assert correlated.tolist() == [[12, 12, 17], [10, 17, 19], [9, 6, 14]]
    convolved = convolve(IMAGE, KERNEL)[0, ..., 0]
    assert convolved.tolist() == [[18, 20, 19], [10, 9, 17], [11, 8, 14]]


def test_the_layer_correlates():
    variables = {"params": {"kernel": KERNEL, "bias": np.array([1.0], np.float32)}}
    y = Conv(1, 3, padding=0).apply(variables, IMAGE)
    assert np.asarray(y)[0, ..., 0].tolist() == [[13, 13, 18], [11, 18, 20], [10, 7, 15]]


def test_batch_normalisation_of_a_matrix():
    module = BatchNorm(momentum=0.0, epsilon=0.0)
    variables = module.init(jax.random.key(0), BATCH, train=True)
    y, updates = module.apply(variables, BATCH, train=True, mutable=["batch_stats"])
    mean, var = updates["batch_stats"]["mean"], updates["batch_stats"]["var"]
    assert np.round(mean, 3).tolist() == pytest.approx([1.333, 1.567, -0.6, -1.167])
    assert np.round(var, 3).tolist() == pytest.approx([0.549, 0.549, 1.007, 0.482])
    n = len(BATCH)
    assert np.round(var * n / (n - 1), 3).tolist() == pytest.approx([0.823, 0.823, 1.510, 0.723])
    np.testing.assert_allclose(y, (BATCH - BATCH.mean(0)) / BATCH.std(0), rtol=1e-5)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-5)
