"""Adaptive pooling against its definition, window by window."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.errors import InputError
from jaxcnn.layers.adaptive import adaptive_avg_pool, adaptive_max_pool
from jaxcnn.layers.pool import avg_pool, max_pool


def reference(x, size, reduce):
    """Window i of m over n elements is floor(i n / m) .. ceil((i + 1) n / m)."""
    out = np.empty((x.shape[0], *size, x.shape[-1]), x.dtype)
    for index in itertools.product(*map(range, size)):
        window = tuple(
            slice(math.floor(i * n / m), math.ceil((i + 1) * n / m))
            for i, n, m in zip(index, x.shape[1:-1], size, strict=True)
        )
        out[(slice(None), *index)] = reduce(x[(slice(None), *window)], axis=tuple(range(1, x.ndim - 1)))
    return out


@settings(max_examples=8, deadline=None)
@given(axes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_equals_the_mean_and_the_maximum_of_each_window(axes, seed):
    spatial, size = zip(*axes, strict=True)
    x = np.random.default_rng(seed).standard_normal((2, *spatial, 3)).astype(np.float32)
    both = jax.jit(lambda x: (adaptive_avg_pool(x, size=size), adaptive_max_pool(x, size=size)))
    mean, maximum = both(x)
    np.testing.assert_allclose(mean, reference(x, size, np.mean), atol=1e-6)
    np.testing.assert_array_equal(maximum, reference(x, size, np.max))


def test_is_plain_pooling_where_the_size_divides_and_the_identity_where_it_is_equal():
    x = np.zeros((2, 14, 21, 3), np.float32)
    for adaptive, pool in ((adaptive_avg_pool, avg_pool), (adaptive_max_pool, max_pool)):
        plain = jax.make_jaxpr(partial(pool, window=(2, 3)))(x)
        assert str(jax.make_jaxpr(partial(adaptive, size=7))(x)) == str(plain)
    assert not jax.make_jaxpr(lambda x: adaptive_avg_pool(x, size=(14, 21)))(x).eqns


def test_small_maps_repeat_their_elements():
    x = jnp.arange(2.0).reshape(1, 2, 1)
    np.testing.assert_array_equal(adaptive_avg_pool(x, size=4).ravel(), [0, 0, 1, 1])
    np.testing.assert_array_equal(adaptive_avg_pool(x, size=3).ravel(), [0, 0.5, 1])


def test_keeps_the_dtype_and_has_a_gradient():
    x = jax.ShapeDtypeStruct((1, 5, 5, 2), jnp.bfloat16)
    assert jax.eval_shape(partial(adaptive_avg_pool, size=3), x).dtype == jnp.bfloat16
    gradient = jax.jit(jax.grad(lambda x: adaptive_max_pool(x, size=3).sum()))(jnp.zeros((1, 5, 5, 2)))
    assert gradient.sum() == 3 * 3 * 2  # each window passes on all of its gradient


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 3), 1, "needs \\(b, \\*spatial, c\\)"),
        ((2, 0, 4, 3), 1, "needs \\(b, \\*spatial, c\\)"),
        ((2, 4, 4, 3), 0, "adaptive pooling size 0"),
        ((2, 4, 4, 3), (2, 2, 2), "expected a positive integer or 2 of them"),
    ],
)
def test_bad_input(shape, size, message):
    with pytest.raises(InputError, match=message):
        adaptive_avg_pool(jnp.zeros(shape), size=size)
