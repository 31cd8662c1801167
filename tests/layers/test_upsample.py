"""Up-sampling: the transposed convolution as the transpose of `conv`, interpolation of linear functions, unpooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import conv
from jaxcnn.layers.pool import max_pool_with_indices
from jaxcnn.layers.upsample import ConvTranspose, conv_transpose, max_unpool, upsample_bilinear, upsample_nearest
from jaxcnn.layers.window import as_written
from jaxcnn.types import DATA_AXIS


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


# size of the convolution's input, window, options; with an output_padding where the stride leaves rows unused
TRANSPOSES = [
    ((9,), (3,), {"strides": 2, "padding": 1}, 0),
    ((10,), (3,), {"strides": 2, "padding": 1}, 1),
    ((6, 4), (2, 2), {"strides": 2}, 0),
    ((7, 4), (2, 2), {"strides": 2}, (1, 0)),
    ((9, 8), (3, 2), {"strides": (3, 1), "padding": ((0, 2), (1, 0))}, (2, 0)),
    ((9, 9), (3, 3), {"dilation": (2, 3), "padding": (1, 5)}, 0),
    ((5, 6), (1, 1), {"padding": 2}, 0),
    ((4, 6, 3), (2, 3, 1), {"strides": (2, 3, 1)}, 0),
    ((5, 6, 4), (2, 3, 2), {"strides": 2, "padding": 1, "dilation": 2}, (0, 1, 1)),
]


@pytest.mark.parametrize(("sizes", "window", "options", "extra"), TRANSPOSES, ids=str)
def test_it_is_the_gradient_of_the_convolution(sizes, window, options, extra, float64):
    kernel = normal(0, (*window, 3, 4))  # 3 channels to 4 features; the convolution goes the other way

    @jax.jit
    def both(y):
        _, pullback = jax.vjp(lambda x: conv(x, kernel.swapaxes(-1, -2), **options), y)
        return pullback

    pullback = both(np.zeros((2, *sizes, 4)))
    x = normal(1, jax.eval_shape(lambda x: conv(x, kernel.swapaxes(-1, -2), **options), np.zeros((2, *sizes, 4))).shape)
    (expected,) = pullback(x)
    y = jax.jit(lambda x: conv_transpose(x, kernel, output_padding=extra, **options))(x)
    assert y.shape == (2, *sizes, 4)
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 2)], ids=["1d", "2d", "3d"])
def test_windows_that_do_not_overlap_are_one_product(sizes, float64):
    rank = len(sizes)
    x, kernel = normal(0, (2, *sizes, 3)), normal(1, (*(2, 3, 2)[:rank], 3, 4))

    def traced():
        def loss(x, kernel):
            return jnp.sum(conv_transpose(x, kernel, strides=kernel.shape[:rank]) ** 3)

        run = jax.value_and_grad(loss, argnums=(0, 1))
        return str(jax.make_jaxpr(run)(x, kernel)), jax.jit(run)(x, kernel)

    fast, tiles = traced()
    with as_written():
        plain, convolution = traced()
    assert "conv_general_dilated" not in fast
    assert "conv_general_dilated" in plain
    for a, b in zip(jax.tree.leaves(tiles), jax.tree.leaves(convolution), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_module():
    layer = ConvTranspose(6, 2, strides=2, dtype=jnp.bfloat16, bias_init=jax.nn.initializers.ones)
    x = normal(0, (2, 4, 5, 3)).astype(np.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = variables["params"]
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == {
        "kernel": ((2, 2, 3, 6), np.float32),
        "bias": ((6,), np.float32),
    }
    y = layer.apply(variables, x)
    assert (y.shape, y.dtype) == ((2, 8, 10, 6), jnp.bfloat16)
    expected = conv_transpose(jnp.asarray(x), params["kernel"], strides=2) + 1
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.1)
    gradient = jax.grad(lambda v: layer.apply(v, x).astype(jnp.float32).sum())(variables)["params"]
    assert gradient["kernel"].dtype == np.float32
    assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.isfinite(g).all()), gradient))
    bare = ConvTranspose(6, 2, use_bias=False)
    assert jax.eval_shape(bare.init, jax.random.key(0), x)["params"].keys() == {"kernel"}


def test_nearest_repeats():
    x = jnp.array([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
    expected = [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4], [3, 3, 3, 4, 4, 4]]
    np.testing.assert_array_equal(upsample_nearest(x, factor=(2, 3))[0, :, :, 0], expected)


def test_linear_functions_stay_linear_between_the_ends():
    h, w = np.mgrid[:5, :4]
    x = (2.0 * h - 3.0 * w).reshape(1, 5, 4, 1).astype(np.float32)
    h, w = np.mgrid[:13, :7]
    aligned = upsample_bilinear(x, size=(13, 7), align_corners=True)[0, :, :, 0]
    np.testing.assert_allclose(aligned, 2 * h * 4 / 12 - 3 * w * 3 / 6, atol=1e-5)
    h, w = np.mgrid[:10, :8]
    twice = upsample_bilinear(x, factor=2)[0, :, :, 0]
    inner = (2 * (h / 2 - 0.25) - 3 * (w / 2 - 0.25))[1:-1, 1:-1]
    np.testing.assert_allclose(twice[1:-1, 1:-1], inner, atol=1e-5)
    np.testing.assert_allclose([twice[0, 0], twice[-1, -1]], [x[0, 0, 0, 0], x[0, -1, -1, 0]], atol=1e-6)


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_same_size_changes_nothing(align_corners):
    x = normal(0, (2, 5, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(upsample_bilinear(x, size=(5, 3), align_corners=align_corners), x)
    np.testing.assert_array_equal(upsample_nearest(x, factor=1), x)


def test_unpooling_puts_maxima_back_and_zeros_elsewhere():
    x = normal(0, (2, 7, 6, 3)).astype(np.float32)
    pooled = max_pool_with_indices(x, window=2)
    y = np.asarray(max_unpool(*pooled, size=(7, 6)))
    np.testing.assert_array_equal(y[y != 0], x[y != 0])
    assert np.count_nonzero(y) == pooled.values.size
    again = max_pool_with_indices(np.where(y == 0, -np.inf, y), window=2)
    for a, b in zip(again, pooled, strict=True):
        np.testing.assert_array_equal(a, b)


def test_unpooling_of_overlapping_windows_writes_a_shared_maximum_once():
    x = np.array([0, 1, 5, 2, 3], np.float32).reshape(1, 5, 1)
    pooled = max_pool_with_indices(x, window=3, strides=1)
    np.testing.assert_array_equal(pooled.indices[0, :, 0], [2, 2, 2])
    np.testing.assert_array_equal(max_unpool(*pooled, size=5)[0, :, 0], [0, 0, 5, 0, 0])


def test_indices_beyond_the_size_are_left_out():
    values, indices = jnp.ones((1, 3, 1)), jnp.array([0, 3, 4]).reshape(1, 3, 1)
    np.testing.assert_array_equal(max_unpool(values, indices, size=4)[0, :, 0], [1, 0, 0, 1])


def test_eight_devices_equal_one(float64):
    """The batch divided over a mesh, with the gradient."""
    x, kernel = normal(0, (8, 4, 4, 3)), normal(1, (3, 3, 3, 2))

    def loss(x):
        pooled = max_pool_with_indices(x, window=2)
        back = max_unpool(pooled.values**2, pooled.indices, size=(4, 4))
        return jnp.sum(upsample_bilinear(conv_transpose(back, kernel, strides=2), factor=2) ** 2)

    mesh = jax.make_mesh((8,), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    run = jax.jit(jax.value_and_grad(loss))
    for a, b in zip(run(jax.device_put(x, NamedSharding(mesh, P(DATA_AXIS)))), run(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: conv_transpose(x, jnp.ones((2, 2, 3, 4), x.dtype), strides=2),
        lambda x: conv_transpose(x, jnp.ones((3, 3, 3, 4), x.dtype), strides=2),
        lambda x: upsample_nearest(x, factor=2),
        lambda x: upsample_bilinear(x, factor=2),
        lambda x: max_unpool(x, jnp.zeros(x.shape, jnp.int32), size=8),
    ],
    ids=["tiles", "conv_transpose", "nearest", "bilinear", "unpool"],
)
def test_dtype_is_kept(f, strict_dtypes):
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(f, jnp.ones((2, 4, 4, 3), dtype)).dtype == dtype


X, KERNEL = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: conv_transpose(X[0], KERNEL), "do not fit"),
        (lambda: conv_transpose(X, KERNEL[:, :, :2]), "do not fit"),
        (lambda: conv_transpose(X, KERNEL, strides=0), "strides 0"),
        (lambda: conv_transpose(X, KERNEL, dilation=(1, 0)), "dilation"),
        (lambda: conv_transpose(X, KERNEL, padding="SAME"), "padding 'SAME'"),
        (lambda: conv_transpose(X, KERNEL, strides=2, output_padding=2), "output_padding 2"),
        (lambda: conv_transpose(X, KERNEL, output_padding=-1), "output_padding -1"),
        (lambda: conv_transpose(X, KERNEL, strides=2, output_padding=(1, 1, 1)), "each of 2 axes"),
        (lambda: conv_transpose(X, KERNEL, padding=3), "crops all"),
        (lambda: ConvTranspose(2, 3).init(jax.random.key(0), X.astype(jnp.uint8)), "uint8"),
        (lambda: ConvTranspose(2, (3,), name="up1").init(jax.random.key(0), X), "do not fit"),
        (lambda: upsample_nearest(X, factor=0), "factor 0"),
        (lambda: upsample_nearest(X[0, 0], factor=2), "got shape"),
        (lambda: upsample_bilinear(X), "either factor or size"),
        (lambda: upsample_bilinear(X, factor=2, size=8), "either factor or size"),
        (lambda: upsample_bilinear(X, size=(8, 8, 8)), "size"),
        (lambda: max_unpool(X, X, size=8), "float32"),
        (lambda: max_unpool(X, jnp.zeros((1, 4, 4, 1), jnp.int32), size=8), "same shape"),
        (lambda: max_unpool(X, jnp.zeros(X.shape, jnp.int32), size=0), "size 0"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act()
