"""The same layers in one, two and three dimensions, values and input gradients against PyTorch's layer of each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.layers import (
    Conv,
    ConvTranspose,
    avg_pool,
    conv,
    global_avg_pool,
    l2_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
    norm,
    upsample_bilinear,
    upsample_nearest,
)

torch = pytest.importorskip("torch")
F = torch.nn.functional

SIZES, STRIDES, PADDING = (7, 6, 5), (2, 1, 3), (1, 0, 1)


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def rank(request, float64):
    return request.param


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def images(rank, channels=4):
    return normal(0, (2, *SIZES[:rank], channels))


def first(x):
    """Channels first, as a tensor that has a gradient."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1), requires_grad=True)


def last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_same(ours, theirs, x):
    """`ours(x)`, channels last, and its gradient are those of `theirs`, channels first."""
    tensor = first(x)
    reference = theirs(tensor)
    weights = normal(9, last(reference).shape)
    reference.backward(first(weights).detach())

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(ours, x)
        return y, *pullback(weights)

    y, gradient = both(x)
    np.testing.assert_allclose(y, last(reference), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradient, last(tensor.grad), rtol=1e-12, atol=1e-12)


def torch_kernel(kernel, order):
    rank = kernel.ndim - 2
    return torch.tensor(kernel).permute(*(rank + i for i in order), *range(rank))


def test_convolution(rank):
    kernel = normal(1, (*(3, 2, 3)[:rank], 2, 6))
    options = {"padding": PADDING[:rank], "groups": 2}

    def theirs(t):
        weight = torch_kernel(kernel, (1, 0))
        return getattr(F, f"conv{rank}d")(t, weight, stride=STRIDES[:rank], **options)

    assert_same(lambda x: conv(x, kernel, strides=STRIDES[:rank], **options), theirs, images(rank))


def test_transposed_convolution(rank):
    layer = ConvTranspose(3, 3, strides=2, padding=1, output_padding=(1, 0, 1)[:rank], param_dtype=jnp.float64)
    variables = jax.jit(layer.init)(jax.random.key(0), images(rank))
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (3,) * rank + (4, 3)

    def theirs(t):
        f = getattr(F, f"conv_transpose{rank}d")
        return f(t, torch_kernel(kernel, (0, 1)), stride=2, padding=1, output_padding=(1, 0, 1)[:rank])

    assert_same(lambda x: layer.apply(variables, x), theirs, images(rank))


@pytest.mark.parametrize("ours", [max_pool, avg_pool], ids=["max", "avg"])
def test_pooling(rank, ours):
    name = f"{'max' if ours is max_pool else 'avg'}_pool{rank}d"
    window, options = (3, 2, 3)[:rank], {"padding": PADDING[:rank], "ceil_mode": True}
    assert_same(
        lambda x: ours(x, window=window, strides=STRIDES[:rank], **options),
        lambda t: getattr(F, name)(t, window, STRIDES[:rank], **options),
        images(rank),
    )


def test_l2_pooling(rank):
    window = (3, 2, 3)[:rank]
    assert_same(
        lambda x: l2_pool(x, window=window, strides=STRIDES[:rank]),
        lambda t: getattr(F, f"lp_pool{rank}d")(t, 2.0, window if rank > 1 else 3, STRIDES[:rank]),
        images(rank),
    )


def test_global_average(rank):
    assert_same(global_avg_pool, lambda t: t.mean(tuple(range(2, rank + 2))), images(rank))


def test_maxima_go_back_to_where_they_were(rank):
    """Integers, so that windows have several maxima; the windows do not overlap, so that every one goes back."""
    x = np.random.default_rng(0).integers(-2, 3, (2, *SIZES[:rank], 4)).astype(np.float64)
    pooled = max_pool_with_indices(x, window=2, padding=PADDING[:rank])
    values, indices = getattr(F, f"max_pool{rank}d")(first(x), 2, padding=PADDING[:rank], return_indices=True)
    np.testing.assert_array_equal(pooled.values, last(values))
    np.testing.assert_array_equal(pooled.indices, last(indices))
    assert_same(
        lambda v: max_unpool(v, pooled.indices, size=SIZES[:rank]),
        lambda t: getattr(F, f"max_unpool{rank}d")(t, indices, 2, 2, PADDING[:rank], SIZES[:rank]),
        normal(1, pooled.values.shape),
    )


def test_nearest(rank):
    factor = (2, 3, 1)[:rank]
    assert_same(
        lambda x: upsample_nearest(x, factor=factor),
        lambda t: F.interpolate(t, scale_factor=factor, mode="nearest"),
        images(rank),
    )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(14, 18, 5), (9, 1, 11), (3, 8, 4)], ids=["whole", "odd", "smaller"])
def test_linear(rank, size, align_corners):
    assert_same(
        lambda x: upsample_bilinear(x, size=size[:rank], align_corners=align_corners),
        lambda t: F.interpolate(
            t, size[:rank], mode=("linear", "bilinear", "trilinear")[rank - 1], align_corners=align_corners
        ),
        images(rank),
    )


@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group"])
def test_norms(rank, name):
    options = {"groups": 2} if name == "group" else {}
    layer = norm(name, param_dtype=jnp.float64, **options)()
    x = images(rank)
    variables = jax.jit(partial(layer.init, train=True))(jax.random.key(0), x)
    theirs = {
        "batch": lambda t: F.batch_norm(t, None, None, training=True),
        "layer": lambda t: F.layer_norm(t, t.shape[1:]),
        "instance": F.instance_norm,
        "group": lambda t: F.group_norm(t, 2),
    }
    assert_same(lambda x: layer.apply(variables, x, train=True, mutable=["batch_stats"])[0], theirs[name], x)


def test_integer_kernel_sizes_and_paddings_are_for_every_axis(rank):
    layer = Conv(5, 3, strides=2, padding=1, param_dtype=jnp.float64)
    variables = jax.jit(layer.init)(jax.random.key(0), images(rank))
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (3,) * rank + (4, 5)
    weight = torch_kernel(kernel, (1, 0))
    assert_same(
        lambda x: layer.apply(variables, x),
        lambda t: getattr(F, f"conv{rank}d")(t, weight, stride=2, padding=1),
        images(rank),
    )
