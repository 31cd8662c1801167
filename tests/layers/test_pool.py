"""Pooling against PyTorch (values and, with many ties, gradients) and against a window-by-window NumPy form."""

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
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool
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


@pytest.mark.parametrize("window", [2, 4])
def test_nan_is_not_swallowed(window):
    x = np.zeros((1, 4, 4, 1), np.float32)
    for position in itertools.product(range(window), repeat=2):
        bad = x.copy()
        bad[0, position[0], position[1], 0] = np.nan
        assert np.isnan(max_pool(jnp.asarray(bad), window=window)[0, 0, 0, 0])


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


@pytest.mark.parametrize("f", [max_pool, avg_pool])
@pytest.mark.parametrize("window", [2, 4])
def test_dtypes(f, window, strict_dtypes):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    y = f(x.astype(jnp.bfloat16), window=window)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), f(x, window=window), atol=0.02)
    assert jax.eval_shape(lambda x: f(x, window=window), x).shape == y.shape


@pytest.mark.parametrize("f", [max_pool, avg_pool])
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
        ({"window": 2, "padding": (1, 1)}, "2 pairs"),
        ({"window": 9}, "larger than the padded axis of 8"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        max_pool(jnp.zeros((1, 8, 8, 1)), **options)


def test_an_image_without_a_batch_axis_is_refused():
    with pytest.raises(InputError, match="got shape"):
        max_pool(jnp.zeros((8, 8)), window=2)
