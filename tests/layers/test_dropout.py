"""Dropout: moments in closed form, and the same mask on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import Dropout
from jaxcnn.types import DATA_AXIS

KEY = jax.random.key(7)
RATE = 0.3


def drop(x, key=KEY):
    return Dropout(RATE).apply({}, x, train=True, rngs={"dropout": key})


jitted_drop = jax.jit(drop)


def test_mean_and_variance():
    y = np.asarray(jitted_drop(jnp.full((64, 2000), 2.0)))
    kept = 1 - RATE
    assert set(np.unique(y)) == {0, np.float32(2 / kept)}
    deviation = 2 * np.sqrt(RATE / kept)  # var of x * Bernoulli(kept) / kept
    assert y.mean() == pytest.approx(2, abs=4 * deviation / np.sqrt(y.size))
    assert y.std() == pytest.approx(deviation, rel=0.01)


def test_masks_are_the_same_on_one_device_eight_and_under_pmap():
    x = jnp.ones((32, 4, 5))
    mesh = jax.make_mesh((8,), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    alone = drop(x)
    sharded = jitted_drop(jax.device_put(x, NamedSharding(mesh, P(DATA_AXIS))))
    assert len(sharded.sharding.device_set) == 8
    with jax.set_mesh(mesh):
        manual = jax.jit(jax.shard_map(drop, in_specs=P(DATA_AXIS), out_specs=P(DATA_AXIS)))(x)
    pmapped = jax.pmap(drop, axis_name=DATA_AXIS)(x.reshape(8, 4, 4, 5)).reshape(x.shape)
    for other in (jitted_drop(x), sharded, manual, pmapped):
        np.testing.assert_array_equal(alone, other)


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


def test_identity_without_training_or_rate(strict_dtypes):
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(Dropout(RATE).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)
    assert jax.eval_shape(drop, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gradient_is_the_mask():
    x = jnp.arange(80.0).reshape(8, 10)
    grad = jax.jit(jax.grad(lambda x: drop(x).sum()))(x)
    np.testing.assert_allclose(grad * x, jitted_drop(x), rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 50])
def test_a_rate_outside_the_range_is_refused(rate):
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        Dropout(rate)
