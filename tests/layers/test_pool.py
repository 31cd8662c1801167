"""Pooling against PyTorch (values and, with many ties, gradients) and against NumPy, window by window."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcnn.errors import InputError
from jaxcnn.layers import pool
from jaxcnn.layers.pool import (
    avg_pool,
    global_avg_pool,
    l2_pool,
    max_pool,
    max_pool_with_indices,
    weighted_avg_pool,
)
from jaxcnn.layers.window import as_written
from jaxcnn.types import DATA_AXIS

# window, strides, padding, ceil_mode; sizes 9 x 10, so that some windows are cut off or reach beyond
GEOMETRIES = [
    (2, 2, 0, False),
    (2, 2, 0, True),
    (3, 2, 1, False),
    (3, 2, 1, True),
    (3, 1, 1, False),
    (2, 3, 0, False),
    (5, 3, 2, True),
    (4, 4, 0, False),
]


def tied(shape):
    """Small integers after ReLU: about half of the windows have their maximum more than once."""
    return np.maximum(np.random.default_rng(0).integers(-3, 3, shape), 0).astype(np.float64)


def value_and_pullback(f, x):
    weights = np.random.default_rng(1).normal(size=jax.eval_shape(f, x).shape)

    @jax.jit
    def both(x, weights):
        y, pullback = jax.vjp(f, x)
        return y, *pullback(weights)

    return *map(np.asarray, both(x, weights.astype(x.dtype))), weights


def torch_reference(f, x, weights, rank=2):
    torch = pytest.importorskip("torch")
    back = (0, *range(2, rank + 2), 1)
    tensor = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    y = f(torch.nn.functional, tensor)
    y.backward(torch.tensor(np.moveaxis(weights, -1, 1)))
    return y.detach().numpy().transpose(back), tensor.grad.numpy().transpose(back)


@pytest.mark.parametrize(("window", "strides", "padding", "ceil_mode"), GEOMETRIES)
def test_max_pool_and_its_gradient_match_torch_with_ties(window, strides, padding, ceil_mode, float64):
    x = tied((2, 9, 10, 3))
    options = {"padding": padding, "ceil_mode": ceil_mode}
    y, grad, weights = value_and_pullback(lambda x: max_pool(x, window=window, strides=strides, **options), x)
    reference = torch_reference(lambda F, t: F.max_pool2d(t, window, strides, **options), x, weights)
    np.testing.assert_array_equal(y, reference[0])
    np.testing.assert_allclose(grad, reference[1], atol=1e-15)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("window", "strides", "padding", "ceil_mode"), GEOMETRIES)
def test_avg_pool_matches_torch(window, strides, padding, ceil_mode, count_include_pad, float64):
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 3))
    options = {"padding": padding, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    y, grad, weights = value_and_pullback(lambda x: avg_pool(x, window=window, strides=strides, **options), x)
    reference = torch_reference(lambda F, t: F.avg_pool2d(t, window, strides, **options), x, weights)
    np.testing.assert_allclose(y, reference[0], atol=1e-14)
    np.testing.assert_allclose(grad, reference[1], atol=1e-14)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_match_torch(rank, float64):
    x = tied((2, *(6, 7, 5)[:rank], 3))
    for ours, theirs in ((max_pool, "max_pool"), (avg_pool, "avg_pool")):
        y, grad, weights = value_and_pullback(lambda x, f=ours: f(x, window=2, padding=1), x)
        reference = torch_reference(lambda F, t, f=theirs: getattr(F, f"{f}{rank}d")(t, 2, padding=1), x, weights, rank)
        np.testing.assert_allclose(y, reference[0], atol=1e-15)
        np.testing.assert_allclose(grad, reference[1], atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_windows_one_by_one(data):
    geometry = []
    for _ in range(2):
        window = data.draw(st.integers(1, 4))
        low, high = data.draw(st.tuples(*[st.integers(0, window - 1)] * 2))
        geometry.append((window, data.draw(st.integers(1, 4)), low, high, data.draw(st.integers(window, 9))))
    windows, strides, lows, highs, sizes = zip(*geometry, strict=True)
    x = np.random.default_rng(0).normal(size=(2, *sizes, 2)).astype(np.float32)
    padding = tuple(zip(lows, highs, strict=True))
    filled = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    outs = [(n + a + b - k) // s + 1 for k, s, a, b, n in geometry]
    expected = np.empty((2, *outs, 2), np.float32)
    for i, j in itertools.product(*map(range, outs)):
        top, left = i * strides[0], j * strides[1]
        expected[:, i, j] = filled[:, top : top + windows[0], left : left + windows[1]].max((1, 2))
    y = jax.jit(lambda x: max_pool(x, window=windows, strides=strides, padding=padding))(x)
    np.testing.assert_array_equal(y, expected)


def test_folded_and_reduced_maxima_agree(monkeypatch):
    x = tied((2, 9, 10, 3)).astype(np.float32)

    def run():
        return value_and_pullback(lambda x: max_pool(x, window=3, strides=2, padding=1, ceil_mode=True), x)[:2]

    folded = run()
    monkeypatch.setattr(pool, "FOLD_LIMIT", 0)
    for ours, other in zip(folded, run(), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("f", [max_pool, l2_pool, weighted_avg_pool])
@pytest.mark.parametrize("window", [2, 4])
def test_nan_is_not_swallowed(f, window):
    x = np.zeros((1, 4, 4, 1), np.float32)
    for position in itertools.product(range(window), repeat=2):
        bad = x.copy()
        bad[0, position[0], position[1], 0] = np.nan
        assert np.isnan(f(jnp.asarray(bad), window=window)[0, 0, 0, 0])


def test_padding_never_wins_and_strides_default_to_the_window():
    x = jnp.full((1, 4, 4, 1), -5.0)
    y = max_pool(x, window=2, padding=1)
    assert y.shape == (1, 3, 3, 1)
    assert (y == -5).all()
    assert max_pool(x, window=2, padding="VALID").shape == (1, 2, 2, 1)


def test_ceil_mode_sizes_of_squeezenet():
    # 3x3 / 2 on 111: floor gives 55; on 54 the paper's 27 needs ceil (floor gives 26).
    assert max_pool(jnp.zeros((1, 54, 54, 1)), window=3, strides=2, ceil_mode=True).shape[1:3] == (27, 27)
    assert max_pool(jnp.zeros((1, 54, 54, 1)), window=3, strides=2).shape[1:3] == (26, 26)


def test_global_average():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(global_avg_pool(jnp.asarray(x)), x.mean((1, 2, 3)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("window", "strides", "padding", "ceil_mode"), GEOMETRIES)
def test_l2_pool_is_the_norm_of_every_window(window, strides, padding, ceil_mode, float64):
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 3))
    geometry = {"window": window, "strides": strides, "padding": padding, "ceil_mode": ceil_mode}
    y = l2_pool(x, **geometry)
    expected = np.empty(y.shape)
    filled = np.pad(x, ((0, 0), (padding, padding + strides), (padding, padding + strides), (0, 0)))
    for i, j in itertools.product(*map(range, y.shape[1:3])):
        part = filled[:, i * strides :, j * strides :][:, :window, :window]
        expected[:, i, j] = np.linalg.norm(part.reshape(2, -1, 3), axis=1)
    np.testing.assert_allclose(y, expected, rtol=1e-13)


def test_l2_pool_has_a_finite_gradient_at_zero():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(-3.0)
    grad = jax.grad(lambda x: l2_pool(x, window=2).sum())(x)[0, ..., 0]
    np.testing.assert_allclose(grad, np.zeros((4, 4)) - np.eye(4)[:1].T @ np.eye(4)[:1])


@pytest.mark.parametrize(("window", "strides", "padding", "ceil_mode"), GEOMETRIES)
def test_wide_weights_are_the_plain_average_of_the_image(window, strides, padding, ceil_mode, float64):
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 3))
    geometry = {"window": window, "strides": strides, "padding": padding, "ceil_mode": ceil_mode}
    plain = avg_pool(x, count_include_pad=False, **geometry)
    np.testing.assert_allclose(weighted_avg_pool(x, sigma=1e6, **geometry), plain, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 5),
    stride=st.integers(1, 4),
    pad=st.integers(0, 4),
    size=st.integers(5, 12),
    ceil_mode=st.booleans(),
    sigma=st.floats(0.2, 9),
)
def test_a_weighted_average_of_a_constant_is_the_constant(window, stride, pad, size, ceil_mode, sigma):
    x = jnp.full((1, size, 2), 3.5)
    geometry = {"window": window, "strides": stride, "padding": min(pad, window - 1), "ceil_mode": ceil_mode}
    y = weighted_avg_pool(x, sigma=sigma, **geometry)
    assert y.shape == avg_pool(x, **geometry).shape
    np.testing.assert_allclose(y, 3.5, rtol=1e-5)


def test_weights_fall_with_the_distance_to_the_centre(float64):
    h, w = np.mgrid[-1:2, -2:2] + np.array([0, 0.5]).reshape(2, 1, 1)
    expected = np.exp(-(h**2 + w**2) / (2 * 0.8**2))
    weights = jax.grad(lambda x: weighted_avg_pool(x, window=(3, 4), sigma=0.8).sum())(jnp.zeros((1, 3, 4, 1)))
    np.testing.assert_allclose(weights[0, ..., 0], expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize(("window", "strides", "padding", "ceil_mode"), GEOMETRIES)
def test_indices_say_where_the_maxima_are(window, strides, padding, ceil_mode):
    """With many ties; those of overlapping windows too, and the gradient is that of the values alone."""
    x = tied((2, 9, 10, 3)).astype(np.float32)
    geometry = {"window": window, "strides": strides, "padding": padding, "ceil_mode": ceil_mode}
    values, indices = jax.jit(lambda x: max_pool_with_indices(x, **geometry))(x)
    assert indices.dtype == np.int32
    assert values.shape == indices.shape
    np.testing.assert_array_equal(values, max_pool(x, **geometry))
    flat = x.reshape(2, 90, 3)
    np.testing.assert_array_equal(np.take_along_axis(flat, indices.reshape(2, -1, 3), 1), values.reshape(2, -1, 3))

    def loss(x):
        pooled = max_pool_with_indices(x, **geometry)
        return jnp.sum(pooled.values * pooled.indices)

    grad = jax.jit(jax.grad(loss))(x)
    expected = np.zeros((2, 90, 3))
    b, _, c = np.indices(indices.reshape(2, -1, 3).shape)
    np.add.at(expected, (b, indices.reshape(2, -1, 3), c), indices.reshape(2, -1, 3))
    np.testing.assert_allclose(grad.reshape(2, 90, 3), expected)


def test_indices_of_nan_and_infinity():
    orders = np.array(list(itertools.permutations([np.nan, np.inf, -np.inf, 0.0])), np.float32)
    pooled = max_pool_with_indices(orders.reshape(-1, 2, 2, 1), window=2)
    np.testing.assert_array_equal(pooled.indices.ravel(), np.isnan(orders).argmax(1))
    lowest = max_pool_with_indices(jnp.full((1, 2, 2, 1), -jnp.inf), window=2, strides=1, padding=1)
    np.testing.assert_array_equal(lowest.indices[0, :, :, 0], [[0, 0, 1], [0, 0, 1], [2, 2, 3]])


@pytest.mark.parametrize("f", [max_pool, avg_pool, l2_pool])
def test_as_written_a_pooling_is_one_window_operation(f):
    with as_written():
        jaxpr = jax.make_jaxpr(lambda x: f(x, window=2))(jnp.zeros((1, 4, 4, 1)))
    assert sum("reduce_window" in str(eqn.primitive) for eqn in jaxpr.eqns) == 1


@pytest.mark.parametrize("f", [max_pool, avg_pool, l2_pool, weighted_avg_pool])
@pytest.mark.parametrize("window", [2, 4])
def test_dtypes(f, window, strict_dtypes):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    y = f(x.astype(jnp.bfloat16), window=window)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), f(x, window=window), rtol=0.01, atol=0.02)
    assert jax.eval_shape(lambda x: f(x, window=window), x).shape == y.shape


@pytest.mark.parametrize("f", [max_pool, avg_pool, l2_pool])
def test_devices_give_the_same(f):
    x = jnp.asarray(tied((16, 8, 8, 3)), jnp.float32)

    def both(x):
        return jax.value_and_grad(lambda x: jnp.sum(f(x, window=2) ** 2))(x)

    mesh = jax.make_mesh((8,), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    value, grad = jax.jit(both)(x)
    sharded_value, sharded_grad = jax.jit(both)(jax.device_put(x, NamedSharding(mesh, P(DATA_AXIS))))
    np.testing.assert_allclose(value, sharded_value, rtol=1e-6)
    np.testing.assert_array_equal(grad, sharded_grad)
    per_device = jax.pmap(both, axis_name=DATA_AXIS)(x.reshape(8, 2, 8, 8, 3))[1]
    np.testing.assert_array_equal(grad, per_device.reshape(x.shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window 0"),
        ({"window": (2, 2, 2)}, "expected a positive integer or 2"),
        ({"window": 2, "strides": 0}, "strides 0"),
        ({"window": 2, "padding": 2}, "less than the window"),
        ({"window": 2, "padding": -1}, "at least 0"),
        ({"window": 2, "padding": "SAME"}, "expected 'VALID'"),
        ({"window": 2, "padding": (1, 1, 1)}, "2 such integers or pairs"),
        ({"window": 9}, "larger than the padded axis of 8"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        max_pool(jnp.zeros((1, 8, 8, 1)), **options)


@pytest.mark.parametrize(("sigma", "message"), [(0, "must be positive"), (float("nan"), "must be"), (0.01, "vanish")])
def test_bad_sigma(sigma, message):
    with pytest.raises(InputError, match=message):
        weighted_avg_pool(jnp.zeros((1, 8, 8, 1)), window=2, sigma=sigma)


def test_an_image_without_a_batch_axis_is_refused():
    with pytest.raises(InputError, match="got shape"):
        max_pool(jnp.zeros((8, 8)), window=2)
