"""Depthwise convolution by shifted images against XLA's grouped convolution."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcnn.layers.depthwise import depthwise


def grouped(x, kernel, *, steps, pads, holes):
    last = x.ndim - 1
    spatial = range(1, last)
    dimensions = lax.ConvDimensionNumbers((0, last, *spatial), (last, last - 1, *range(last - 1)), (0, last, *spatial))
    return lax.conv_general_dilated(
        x, kernel, steps, pads, rhs_dilation=holes, dimension_numbers=dimensions, feature_group_count=x.shape[-1]
    )


def case(batch, spatial, channels, window, dtype: Any = np.float64):
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(batch, *spatial, channels)), draw(size=(*window, 1, channels))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def gradients(function, x, kernel, options):
    """dx and dkernel of a loss whose own gradient differs everywhere."""

    def loss(x, kernel):
        y = function(x, kernel, **options)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.grad(loss, argnums=(0, 1))(x, kernel)


def assert_same(x, kernel, **options):
    @jax.jit
    def both(x, kernel):
        return [(f(x, kernel, **options), *gradients(f, x, kernel, options)) for f in (depthwise, grouped)]

    for actual, expected in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-11)


# batch, spatial, window, steps, pads, holes
CASES = {
    "3x3": (2, (7, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "3x3 by 2, even": (8, (8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "3x3 by 2, odd": (3, (7, 9), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "TensorFlow's padding": (2, (8, 6), (3, 3), (2, 2), ((0, 1), (0, 1)), (1, 1)),
    "dilated": (2, (9, 8), (3, 2), (1, 1), ((2, 2), (0, 3)), (2, 3)),
    "dilated by 2": (2, (11, 9), (3, 3), (2, 2), ((2, 2), (2, 1)), (2, 3)),
    "window less than stride": (2, (7, 8), (1, 2), (2, 3), ((0, 0), (0, 0)), (1, 1)),
    "more padding than window": (2, (4, 5), (2, 3), (1, 2), ((3, 0), (4, 5)), (1, 1)),
    "rows never seen": (2, (9, 10), (2, 2), (3, 4), ((0, 0), (1, 0)), (1, 1)),
    "1d": (4, (11,), (5,), (2,), ((2, 1),), (1,)),
    "3d": (2, (4, 5, 6), (3, 2, 3), (1, 2, 2), ((1, 1), (0, 1), (1, 1)), (1, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_grouped_convolution_and_its_gradients(float64, name):
    batch, spatial, window, steps, pads, holes = CASES[name]
    x, kernel = case(batch, spatial, 3, window)
    assert_same(x, kernel, steps=steps, pads=pads, holes=holes)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_equals_it_for_any_window(data):
    def whole(low, high):
        return data.draw(st.integers(low, high))

    k, s, d, before, after = whole(1, 4), whole(1, 3), whole(1, 2), whole(0, 4), whole(0, 4)
    size = whole(max(1, d * (k - 1) + 1 - before - after), 9)
    with jax.enable_x64(True):
        x, kernel = case(whole(1, 4), (size,), 2, (k,))
        assert_same(x, kernel, steps=(s,), pads=((before, after),), holes=(d,))


def test_half_precision_is_summed_in_float32():
    options = {"steps": (1, 1), "pads": ((1, 1), (1, 1)), "holes": (1, 1)}
    x, kernel = case(2, (6, 6), 4, (3, 3), jnp.bfloat16)
    y = jax.jit(partial(depthwise, **options))(x, kernel)
    assert y.dtype == jnp.bfloat16
    exact = grouped(x.astype(jnp.float32), kernel.astype(jnp.float32), **options)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    slopes = jax.eval_shape(partial(gradients, depthwise, options=options), x, kernel)
    assert [g.dtype for g in slopes] == [jnp.bfloat16] * 2


def test_differentiable_twice_and_mapped(float64):
    options = {"steps": (2,), "pads": ((1, 1),), "holes": (1,)}
    x, kernel = case(2, (5,), 2, (3,))

    def slopes(function):
        def penalty(x, kernel):
            return sum(jnp.square(g).sum() for g in gradients(function, x, kernel, options))

        return jax.jit(jax.grad(penalty, (0, 1)))(x, kernel)

    for actual, expected in zip(slopes(depthwise), slopes(grouped), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
    many = jnp.stack([x, 2 * x])
    mapped = jax.jit(jax.vmap(lambda x: depthwise(x, kernel, **options)))(many)
    np.testing.assert_allclose(mapped[1], 2 * grouped(x, kernel, **options), rtol=1e-12)


def test_an_infinite_input_spoils_no_other_position():
    options = {"steps": (1,), "pads": ((1, 1),), "holes": (1,)}
    x, kernel = case(1, (9,), 2, (3,), np.float32)
    x = x.at[0, 4, 0].set(jnp.inf)
    y = jax.jit(partial(depthwise, **options))(x, kernel)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(grouped(x, kernel, **options)))


def test_the_weight_gradient_of_a_divided_batch_moves_no_images():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    options = {"steps": (1, 1), "pads": ((1, 1), (1, 1)), "holes": (1, 1)}
    x, kernel = case(16, (6, 6), 4, (3, 3), np.float32)
    images = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(x, images)
    kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    grad = jax.jit(jax.grad(lambda k, x: jnp.sin(depthwise(x, k, **options)).sum()))
    program = grad.lower(kernel, x).compile().as_text() or ""
    assert "all-reduce" in program
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in program]
