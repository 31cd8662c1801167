"""Convolution against SciPy, PyTorch, plain XLA, and its size formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.signal import convolve as scipy_convolve
from scipy.signal import correlate

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import Conv, conv, convolve
from jaxcnn.layers.window import as_written, output_size

NHWC = ("NHWC", "HWIO", "NHWC")

# (h, w), channels, features, window, padding; folded on CPU, one of them with a width that 4 does not divide
NARROW = [
    ((9, 12), 1, 6, (5, 5), 2),
    ((9, 9), 6, 16, (5, 5), 0),
    ((8, 7), 3, 16, (3, 3), ((1, 1), (0, 2))),
    ((7, 6), 16, 3, (3, 2), "SAME"),
]
WIDE = [((8, 8), 16, 16, (3, 3), 1), ((8, 8), 4, 40, (3, 3), 1), ((8, 6), 3, 4, (3, 1), 0)]


def normal(seed, shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def case(size, channels, features, window, dtype=np.float64):
    return normal(0, (8, *size, channels), dtype), normal(1, (*window, channels, features), dtype)


def folded(size, channels, features, window, padding, **options):
    """The operands' shapes of the one convolution that is traced; folding widens the kernel."""
    x, kernel = case(size, channels, features, window)
    jaxpr = jax.make_jaxpr(lambda x, k: conv(x, k, padding=padding, **options))(x, kernel)
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated")
    return eqn.invars[1].aval.shape != kernel.shape


def loss_gradients(function, x, kernel):
    def loss(x, kernel):
        y = function(x, kernel)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)


def assert_close(actual, expected, rtol):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(3, 11), (2, 6, 7), (2, 5, 6, 4)], ids=["1d", "2d", "3d"])
def test_equals_scipy_in_every_rank(float64, shape):
    batch, *spatial = shape
    x = normal(0, (batch, *spatial, 2))
    kernel = normal(1, (*(3, 2, 2)[: len(spatial)], 2, 4))
    y = conv(x, kernel, padding="VALID")
    for b in range(batch):
        for k in range(4):
            expected = sum(correlate(x[b, ..., c], kernel[..., c, k], mode="valid") for c in range(2))
            np.testing.assert_allclose(y[b, ..., k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(11,), (6, 7), (5, 6, 4)], ids=["1d", "2d", "3d"])
def test_true_convolution_is_that_of_scipy_and_commutes(float64, shape):
    window = (3, 4, 2)[: len(shape)]
    a, b = normal(0, shape), normal(1, window)
    y = convolve(a.reshape(1, *shape, 1), b.reshape(*window, 1, 1), padding=[k - 1 for k in window])
    np.testing.assert_allclose(y[0, ..., 0], scipy_convolve(a, b), rtol=1e-12, atol=1e-12)
    swapped = convolve(b.reshape(1, *window, 1), a.reshape(*shape, 1, 1), padding=[n - 1 for n in shape])
    np.testing.assert_allclose(swapped, y, rtol=1e-12, atol=1e-12)


def test_true_convolution_takes_the_options_of_correlation(float64):
    x, kernel = normal(0, (2, 9, 10, 4)), normal(1, (3, 2, 2, 6))
    options = {"strides": (1, 2), "padding": ((0, 1), (2, 0)), "dilation": 2, "groups": 2}
    np.testing.assert_array_equal(convolve(x, kernel[::-1, ::-1], **options), conv(x, kernel, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2, "padding": 1},
        {"strides": (2, 3), "padding": ((0, 2), (1, 0))},
        {"dilation": 2, "padding": (2, 1)},
        {"dilation": (1, 2), "groups": 2, "padding": "SAME"},
        {"strides": 2, "dilation": 2, "groups": 4, "padding": 3},
        {"padding": "SAME"},
    ],
    ids=str,
)
def test_equals_torch(float64, options):
    torch = pytest.importorskip("torch")
    groups = options.get("groups", 1)
    x, kernel = normal(0, (2, 9, 10, 8)), normal(1, (3, 3, 8 // groups, 4))
    steps = {"stride": options.get("strides", 1), "dilation": options.get("dilation", 1), "groups": groups}
    planes = torch.tensor(x).permute(0, 3, 1, 2)
    padding = options["padding"]
    if padding == "SAME":
        steps["padding"] = "same"
    elif isinstance(padding, int):
        steps["padding"] = padding
    elif isinstance(padding[0], int):
        steps["padding"] = tuple(padding)
    else:
        (top, bottom), (left, right) = padding
        planes = torch.nn.functional.pad(planes, (left, right, top, bottom))
    expected = torch.nn.functional.conv2d(planes, torch.tensor(kernel).permute(3, 2, 0, 1), **steps)
    y = conv(x, kernel, **options)
    np.testing.assert_allclose(y, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("setting", [*NARROW, *WIDE], ids=str)
def test_value_and_gradients_equal_plain_xla(float64, setting, dtype, rtol):
    *shapes, padding = setting
    x, kernel = case(*shapes, dtype=dtype)
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)

    def ours(x, kernel):
        return conv(x, kernel, padding=padding)

    assert_close(ours(x, kernel), plain(x, kernel), rtol)
    for actual, expected in zip(loss_gradients(ours, x, kernel), loss_gradients(plain, x, kernel), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, rtol)


def test_strided_gradients_equal_plain_xla(float64):
    x, kernel = case((9, 8), 3, 16, (3, 3))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=NHWC)

    def ours(x, kernel):
        return conv(x, kernel, strides=2, padding=1)

    for actual, expected in zip(loss_gradients(ours, x, kernel), loss_gradients(plain, x, kernel), strict=True):
        assert_close(actual, expected, 1e-12)


def test_only_narrow_dense_convolutions_are_folded():
    assert all(folded(*setting) for setting in NARROW)
    assert not any(folded(*setting) for setting in WIDE)
    assert not folded(*NARROW[0], strides=2)
    assert not folded(*NARROW[0], dilation=2)
    with as_written():
        assert not any(folded(*setting) for setting in NARROW)
    assert folded(*NARROW[0])


def test_folded_is_differentiable_twice(float64):
    x, kernel = case((5, 6), 1, 6, (3, 3))

    def curvature(kernel):
        return jax.grad(lambda x: jnp.sum(conv(x, kernel, padding=1) ** 3))(x).sum()

    def once():
        return jax.grad(curvature)(kernel)

    with as_written():
        expected = once()
    assert_close(once(), expected, 1e-12)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices_equal_one(float64, mode):
    x, kernel = case((9, 12), 1, 6, (5, 5))

    def grads(x, kernel):
        return jax.grad(lambda x, k: jnp.sum(conv(x, k, padding=2) ** 2), argnums=(0, 1))(x, kernel)

    expected = jax.jit(grads)(x, kernel)
    if mode == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        actual = jax.jit(grads)(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), kernel)
    else:
        dx, dk = jax.pmap(grads, in_axes=(0, None))(x[:, None], kernel)
        actual = dx[:, 0], dk.sum(0)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-12)


def test_the_same_bits_twice():
    x, kernel = case((9, 12), 1, 6, (5, 5), np.float32)
    step = jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k, padding=2) ** 2), argnums=(0, 1)))
    for a, b in zip(step(x, kernel), step(x, kernel), strict=True):
        np.testing.assert_array_equal(a, b)


sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=60)
@given(size=sizes, kernel=st.integers(1, 5), stride=st.integers(1, 4), low=st.integers(0, 3), high=st.integers(0, 3))
def test_output_size_counts_the_windows_that_fit(size, kernel, stride, low, high):
    for dilation in (1, 2, 3):
        span = dilation * (kernel - 1) + 1
        starts = range(-low, size + high - span + 1, stride)
        out = output_size(size, kernel=kernel, stride=stride, padding=(low, high), dilation=dilation)
        assert max(out, 0) == len(starts)


@settings(deadline=None, max_examples=30)
@given(h=sizes, w=sizes, kernel=st.integers(1, 4), stride=st.integers(1, 3), pad=st.integers(0, 3), features=sizes)
def test_shapes_follow_output_size(h, w, kernel, stride, pad, features):
    expected = [output_size(n, kernel=kernel, stride=stride, padding=pad) for n in (h, w)]
    x, weights = jnp.zeros((2, h, w, 3)), jnp.zeros((kernel, kernel, 3, features))
    if min(expected) < 1:
        with pytest.raises(InputError, match="smaller than the window"):
            conv(x, weights, strides=stride, padding=pad)
    else:
        y = jax.eval_shape(lambda: conv(x, weights, strides=stride, padding=pad))
        assert y.shape == (2, *expected, features)


def test_module_parameters_and_value(float64):
    layer = Conv(8, (3, 3), padding=1, groups=2, bias_init=nn.initializers.normal(1.0))
    x = normal(0, (2, 5, 5, 4))
    params = layer.init(jax.random.key(0), x)["params"]
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        "kernel": ((3, 3, 2, 8), np.float32),
        "bias": ((8,), np.float32),
    }
    y = layer.apply({"params": params}, x)
    assert y.dtype == np.float64
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    np.testing.assert_allclose(y, conv(x, kernel, padding=1, groups=2) + bias.reshape(1, 1, 1, -1), rtol=1e-12)


def test_default_kernel_is_the_untruncated_kaiming_normal():
    kernel = Conv(256, (3, 3), use_bias=False).init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
    std = (2 / (9 * 64)) ** 0.5
    assert abs(float(kernel.std()) / std - 1) < 0.01
    assert float(jnp.abs(kernel).max()) > 3 * std  # a truncated one ends at about 2.3


def test_bfloat16_follows_float32(strict_dtypes):
    x = jnp.asarray(normal(0, (2, 9, 9, 1), np.float32))
    layer = Conv(6, (5, 5), padding=2, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    y, grads = jax.value_and_grad(lambda v: layer.apply(v, x).astype(jnp.float32).sum())(variables)
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    assert grads["params"]["kernel"].dtype == jnp.float32
    wide = Conv(6, (5, 5), padding=2).apply(variables, x)
    assert_close(layer.apply(variables, x).astype(jnp.float32), wide, 0.02)
    assert np.isfinite(float(y))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strides": 2, "padding": "SAME"}, "give the padding"),
        ({"padding": "FULL"}, "padding 'FULL'"),
        ({"padding": -1}, "at least 0"),
        ({"padding": (1, 1, 1)}, "2 such integers"),
        ({"padding": ((1, 1, 1), (1, 1, 1))}, "pairs"),
        ({"strides": 0}, "strides 0"),
        ({"strides": (1, 1, 1)}, "strides"),
        ({"dilation": (1, 0)}, "dilation"),
        ({"dilation": 3}, "smaller than the window"),
        ({"groups": 3}, "groups"),
    ],
    ids=str,
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        conv(jnp.zeros((2, 6, 6, 4)), jnp.zeros((3, 3, 4, 6)), **options)


def test_bad_shapes():
    kernel = jnp.zeros((3, 3, 4, 6))
    with pytest.raises(InputError, match="do not fit"):
        conv(jnp.zeros((6, 6, 4)), kernel)
    with pytest.raises(InputError, match="images are"):
        conv(jnp.zeros((2, 4, 6, 6)), kernel)
    with pytest.raises(InputError, match="padded by"):
        conv(jnp.zeros((2, 6, 2, 4)), kernel)
    with pytest.raises(InputError, match="do not fit"):
        Conv(6, (3,)).init(jax.random.key(0), jnp.zeros((2, 6, 6, 4)))
    with pytest.raises(InputError, match="3 groups"):
        Conv(6, (3, 3), groups=3).init(jax.random.key(0), jnp.zeros((2, 6, 6, 4)))
    with pytest.raises(InputError, match="uint8"):
        Conv(6, (3, 3)).init(jax.random.key(0), jnp.zeros((2, 6, 6, 4), jnp.uint8))


def test_depthwise_convolutions_take_their_own_form_and_give_the_same(float64):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 5))

    def both(x, kernel):
        return jax.value_and_grad(
            lambda x, k: jnp.sin(conv(x, k, strides=2, padding=1, groups=5)).sum(), argnums=(0, 1)
        )(x, kernel)

    assert "conv_general_dilated" not in str(jax.make_jaxpr(both)(x, kernel))
    faster = both(x, kernel)
    with as_written():
        assert "conv_general_dilated" in str(jax.make_jaxpr(lambda *a: both(*a))(x, kernel))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), faster, both(x, kernel))
