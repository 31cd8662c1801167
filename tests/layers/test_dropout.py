"""Dropout and its kin: moments in closed form, and the same noise on any number of devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import AlphaDropout, Dropout, StochasticDepth, UniformDropout
from jaxcnn.types import DATA_AXIS

KEY = jax.random.key(7)
RATE = 0.3


def drop(x, key=KEY):
    return Dropout(RATE).apply({}, x, train=True, rngs={"dropout": key})


jitted_drop = jax.jit(drop)

LAYERS = [Dropout(RATE), AlphaDropout(RATE), StochasticDepth(RATE), UniformDropout(0.5)]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)


def noise(layer, x, key=KEY):
    return layer.apply({}, x, train=True, rngs={"dropout": key})


def test_mean_and_variance():
    y = np.asarray(jitted_drop(jnp.full((64, 2000), 2.0)))
    kept = 1 - RATE
    assert set(np.unique(y)) == {0, np.float32(2 / kept)}
    deviation = 2 * np.sqrt(RATE / kept)  # var of x * Bernoulli(kept) / kept
    assert y.mean() == pytest.approx(2, abs=4 * deviation / np.sqrt(y.size))
    assert y.std() == pytest.approx(deviation, rel=0.01)


def test_alpha_dropout_keeps_mean_and_variance():
    x = jax.random.normal(jax.random.key(0), (64, 4000))
    y = np.asarray(jax.jit(partial(noise, AlphaDropout(RATE)))(x))
    assert y.mean() == pytest.approx(0, abs=0.01)
    assert y.std() == pytest.approx(1, rel=0.01)


def test_alpha_dropout_takes_two_affine_values():
    """E y = 0 and E y^2 = 1 to the digits for x of mean 0 and variance 1, from what x = -1, 0 and 1 become."""
    y = np.asarray(noise(AlphaDropout(RATE), jnp.tile(jnp.array([-1.0, 0.0, 1.0]), (8, 40))), np.float64)
    dropped = np.intersect1d(*(np.unique(y[:, i::3]) for i in (0, 2)))
    assert dropped.size == 1
    low, b, high = (np.setdiff1d(np.unique(y[:, i::3]), dropped).item() for i in range(3))
    assert high - b == pytest.approx(b - low, rel=1e-5)
    kept = 1 - RATE
    assert kept * b + RATE * dropped.item() == pytest.approx(0, abs=1e-6)
    assert kept * ((high - b) ** 2 + b**2) + RATE * dropped.item() ** 2 == pytest.approx(1, rel=1e-6)
    assert (dropped.item() - b) / (high - b) == pytest.approx(float(jax.nn.selu(-1e9)), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_uniform_dropout_moves_the_variance_as_published(beta):
    x = jax.random.normal(jax.random.key(0), (64, 4000))
    y = np.asarray(jax.jit(partial(noise, UniformDropout(beta)))(x))
    assert np.asarray(x).var() / y.var() == pytest.approx(3 / (3 + beta**2), rel=0.02)
    factor = y / np.asarray(x)
    assert factor.mean() == pytest.approx(1, abs=0.01)
    assert 1 - beta - 1e-5 <= factor.min() < 1 - 0.99 * beta
    assert 1 + 0.99 * beta < factor.max() <= 1 + beta + 1e-5


def test_stochastic_depth_drops_whole_examples():
    y = np.asarray(jax.jit(partial(noise, StochasticDepth(RATE)))(jnp.full((4000, 3, 2), 2.0)))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert set(np.unique(y)) == {0, np.float32(2 / (1 - RATE))}
    assert (y[:, 0, 0] == 0).mean() == pytest.approx(RATE, abs=4 * np.sqrt(RATE * (1 - RATE) / 4000))


def test_layers_of_one_model_draw_apart():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(RATE)(x, train=True), Dropout(RATE)(x, train=True)

    a, b = Two().apply({}, jnp.ones((4, 50)), rngs={"dropout": KEY})
    assert not np.array_equal(a, b)


def test_noise_is_the_same_on_one_device_eight_and_under_pmap():
    x = jnp.ones((32, 4, 5))

    def drop(x):
        """(b, layers, h, c)"""
        return jnp.stack([noise(layer, x) for layer in LAYERS], axis=1)

    jitted_drop = jax.jit(drop)
    mesh = jax.make_mesh((8,), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    alone = drop(x)
    sharded = jitted_drop(jax.device_put(x, NamedSharding(mesh, P(DATA_AXIS))))
    assert len(sharded.sharding.device_set) == 8
    with jax.set_mesh(mesh):
        manual = jax.jit(jax.shard_map(drop, in_specs=P(DATA_AXIS), out_specs=P(DATA_AXIS)))(x)
    pmapped = jax.pmap(drop, axis_name=DATA_AXIS)(x.reshape(8, 4, 4, 5)).reshape(alone.shape)
    for other in (jitted_drop(x), sharded, manual, pmapped):
        np.testing.assert_allclose(alone, other, rtol=1e-6)


def test_a_mask_depends_on_the_position_of_the_example_alone():
    large = jitted_drop(jnp.ones((16, 50)))
    np.testing.assert_array_equal(jitted_drop(jnp.ones((4, 50))), large[:4])
    assert len(np.unique(np.asarray(large), axis=0)) == 16
    assert not np.array_equal(jitted_drop(jnp.ones((16, 50)), key=jax.random.fold_in(KEY, 1)), large)


def test_masks_do_not_depend_on_dtype(float64):
    with jax.enable_x64(False):
        reference = np.asarray(jitted_drop(jnp.ones((4, 50)))) > 0
    for dtype in (jnp.float64, jnp.bfloat16):
        y = jitted_drop(jnp.ones((4, 50), dtype))
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32) > 0, reference)


@every_layer
def test_identity_without_training_or_rate(layer, strict_dtypes):
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(layer.apply({}, x, train=False), x)
    np.testing.assert_array_equal(type(layer)(0.0).apply({}, x, train=True), x)
    assert jax.eval_shape(partial(noise, layer), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@every_layer
def test_any_number_of_axes(layer, rank):
    x = jnp.ones((2, *(3, 4, 5)[:rank], 6))
    assert jax.eval_shape(partial(noise, layer), x).shape == x.shape


def test_gradient_is_the_mask():
    x = jnp.arange(80.0).reshape(8, 10)
    grad = jax.jit(jax.grad(lambda x: drop(x).sum()))(x)
    np.testing.assert_allclose(grad * x, jitted_drop(x), rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 50])
@pytest.mark.parametrize("layer", [Dropout, AlphaDropout, StochasticDepth])
def test_a_rate_outside_the_range_is_refused(layer, rate):
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        layer(rate)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_outside_the_range_is_refused(beta):
    with pytest.raises(InputError, match=r"must be in \[0, 1\]"):
        UniformDropout(beta)
