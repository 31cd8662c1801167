"""Receptive fields against the formula of row A10, published figures and the support of the input gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.analysis import summary
from jaxcnn.analysis.trace import trace
from jaxcnn.analysis.walk import walk
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.pool import avg_pool, max_pool
from jaxcnn.models import create

LENGTH = 156


class Apply(nn.Module):
    """Whatever `fn(x)` builds, in a compact call."""

    fn: object

    @nn.compact
    def __call__(self, x):
        return self.fn(x)


def conv(k, *, features=1, **options):
    return Conv(features, k, padding=options.pop("padding", 0), **options)


def transposed(k, stride, padding="VALID"):
    return nn.ConvTranspose(1, (k,), strides=(stride,), padding=padding)


def positive_variables(module, x):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(module.init, jax.random.key(0), x),
    )


def rows(fn, input):
    return summary(Apply(fn), input=input).layers


layer = st.tuples(st.sampled_from(["conv", "max", "avg"]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=30)
@given(st.lists(layer, min_size=1, max_size=5))
def test_stacks_follow_the_formula(layers):
    def build(x):
        for kind, k, s, d in layers:
            if kind == "conv":
                x = conv(k, strides=s, dilation=d, padding=k)(x)
            else:
                x = (max_pool if kind == "max" else avg_pool)(x, window=k, strides=s)
        return x

    # r_L = 1 + sum_l d_l (K_l - 1) prod_{i<l} S_i
    field = 1 + sum(
        (d if kind == "conv" else 1) * (k - 1) * np.prod([s for _, _, s, _ in layers[:i]], dtype=int)
        for i, (kind, k, _, d) in enumerate(layers)
    )
    last = rows(build, (2000, 2000, 1))[-1]
    assert last.receptive_field == field
    assert last.stride == np.prod([s for _, _, s, _ in layers])


def test_branches_give_the_largest():
    def inception(x):
        return jnp.concatenate([conv(1)(x), conv(3, padding=1)(conv(5, padding=2)(x)), max_pool(x, window=3, strides=1,
                               padding=1)], -1)  # fmt: skip

    assert rows(inception, (16, 16, 2))[-1].receptive_field == 7


def test_linear_without_stride_exponential_with():
    def stack(stride):
        def build(x):
            for _ in range(5):
                x = conv(3, strides=stride)(x)
            return x

        return [row.receptive_field for row in rows(build, (500, 500, 1))]

    assert stack(1) == [3, 5, 7, 9, 11]
    assert stack(2) == [2 ** (n + 2) - 1 for n in range(5)]


def test_vgg16_at_pool5_is_212():
    def vgg(x):
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                x = conv(3, padding=1)(x)
            x = max_pool(x, window=2)
        return x

    last = rows(vgg, (224, 224, 1))[-1]
    assert (last.kind, last.receptive_field, last.stride, last.output) == ("max_pool", 212, 32, (7, 7, 1))


@pytest.mark.parametrize(("strided", "field"), [("1x1", 483), ("3x3", 427)])
def test_resnet50_before_pooling(strided, field):
    """He et al. have the stride in the first 1x1 convolution: 11 + 8 (3 + 2 x 4 + 4 x 6 + 8 x 3) = 483.

    With the stride in the 3x3 convolution (torchvision), one of each stage sees the finer grid: 8 + 16 + 32 less.
    """

    def resnet(x):
        x = max_pool(conv(7, strides=2, padding=3)(x), window=3, strides=2, padding=1)
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                first, second = (stride, 1) if strided == "1x1" else (1, stride)
                shortcut = conv(1, strides=stride)(x) if not block else x
                x = conv(1)(conv(3, strides=second, padding=1)(conv(1, strides=first)(x))) + shortcut
        return x

    last = rows(resnet, (224, 224, 1))[-1]
    assert (last.kind, last.receptive_field, last.stride) == ("add", field, 32)


def test_lenet5():
    layers = summary(create("lenet5"), input=(28, 28, 1)).layers
    assert [row.receptive_field for row in layers] == [5, 5, 6, 14, 14, 16, *[32] * 5]
    assert [row.stride for row in layers] == [1, 1, 2, 2, 2, 4, *[None] * 5]


def test_identity_shortcut_with_zeros_keeps_the_stride():
    before = next(r for r in summary(create("cifar_resnet20"), input=(32, 32, 3)).layers[::-1] if r.stride)
    # 1 + 2 x 7 (3x3 at 1) + the strided stages: 2 (1 + 5 x 2) and 2 (2 + 5 x 4)
    assert (before.receptive_field, before.stride) == (1 + 14 + 22 + 44, 4)


def test_axes_that_differ_stand_apart():
    last = rows(lambda x: conv((3, 5), strides=(1, 2))(x), (16, 16, 1))[-1]
    assert (last.receptive_field, last.stride) == ((3, 5), (1, 2))
    assert rows(lambda x: conv((3, 5, 7))(x), (8, 8, 8, 1))[-1].receptive_field == (3, 5, 7)


def test_inputs_without_positions_have_none():
    result = summary(nn.Dense(3), input=(7,))
    assert result.receptive_field is None
    assert result.layers[0].stride is None


def test_dense_after_flattening_is_a_window_over_what_remains():
    assert (
        summary(Apply(lambda x: nn.Dense(2)(conv(3, padding=1)(x).reshape(1, -1))), input=(9, 9, 1))
        .layers[-1]
        .receptive_field
        == 9 + 2
    )


def test_normalising_over_positions_sees_them_all():
    assert summary(Apply(lambda x: nn.GroupNorm(1)(x)), input=(9, 9, 4)).receptive_field == 9


def test_scan_sees_as_far_as_its_steps():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return conv(3, padding=1)(x), None

    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)
    assert summary(Apply(lambda x: stack()(x, None)[0]), input=(32, 32, 1)).receptive_field == 13


def deep_unet(x, levels=3):
    """Valid convolutions, with the skip cut to what comes back."""
    x = conv(3)(conv(3)(x))
    if levels:
        below = transposed(2, 2)(deep_unet(avg_pool(x, window=2), levels - 1))
        cut = (x.shape[1] - below.shape[1]) // 2
        x = conv(3)(conv(3)(jnp.concatenate([below, x[:, cut : cut + below.shape[1]]], -1)))
    return x


CHAINS = {
    "strided": lambda x: conv(3, strides=2)(conv(5, strides=3, padding=2)(x)),
    "dilated": lambda x: conv(2, dilation=3)(conv(3, dilation=2, strides=2)(x)),
    "pooled": lambda x: conv(3)(avg_pool(conv(3)(x), window=3, strides=2, padding=1)),
    "uneven padding": lambda x: conv(3, padding=((3, 0),), strides=2)(x),
    "residual": lambda x: conv(3, padding=1)(x) + conv(5, padding=2)(conv(3, padding=1)(x)),
    "strided shortcut": lambda x: conv(3, strides=2, padding=1)(x) + x[:, ::2],
    "transposed 2": lambda x: transposed(2, 2)(x),
    "transposed 3": lambda x: transposed(3, 2)(x),
    "transposed with gaps": lambda x: transposed(4, 3)(conv(3, strides=2)(x)),
    "down, up, convolved": lambda x: conv(3)(transposed(2, 2)(conv(3)(avg_pool(x, window=2)))),
    "up, strided": lambda x: conv(3, strides=3)(transposed(4, 2, "SAME")(x)),
    "u-net": lambda x: conv(3, padding=1)(
        jnp.concatenate([transposed(2, 2)(conv(3, padding=1)(avg_pool(conv(3, padding=1)(x), window=2))), x], -1)
    ),
    "deep u-net": deep_unet,
    "repeated": lambda x: conv(3)(jnp.repeat(avg_pool(x, window=2), 3, axis=1)),
    "folded": lambda x: conv(3)(x.reshape(1, -1, 3, 1).sum(2)),
    "folded into channels": lambda x: conv(2)(x.reshape(1, -1, 3)),
    "flipped": lambda x: conv(3, padding=((2, 0),))(conv(3, strides=2)(x)[:, ::-1]),
    "joined with zeros": lambda x: conv(2)(jnp.concatenate([jnp.zeros((1, 3, 1)), x], 1)),
    "picked channels": lambda x: conv(3)(conv(3, features=4)(x)[..., jnp.array([2, 0])]),
    "rematerialised": lambda x: nn.remat(Conv)(1, 3)(conv(3)(x)),
    "along another axis": lambda x: x.transpose(0, 2, 1) @ jnp.ones((LENGTH, 7)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_theory_is_the_support_of_the_input_gradient(name):
    module, x = Apply(CHAINS[name]), jnp.ones((1, LENGTH, 1))
    (span,) = walk(trace(module, input=(LENGTH, 1), dtype=jnp.float32))[1][0]
    variables = positive_variables(module, x)
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda x: module.apply(variables, x)))(x)).squeeze((0, -3, -1))
    axis = (span.axis or 1) - 1
    seen = jacobian.reshape(*jacobian.shape[: axis + 1], -1, LENGTH).any(axis + 1)
    middle = len(seen) // 2
    for element in range(middle - 3, middle + 3) if span.axis else range(len(seen)):
        low, high = span.at(element) if span.axis else span.windows[0]
        support = np.flatnonzero(seen[element])
        expected = (support.min(), support.max()) if support.size else (np.inf, -np.inf)
        assert (low, high) == expected, element


@pytest.mark.parametrize("shape", [(32,), (32, 32), (12, 12, 12)])
def test_gradient_support_in_any_number_of_dimensions(shape):
    module = Apply(lambda x: conv(3)(conv(2, strides=2)(x)))
    x = jnp.ones((1, *shape, 1))
    variables = positive_variables(module, x)

    def centre(x):
        y = module.apply(variables, x)
        return y[(0, *(n // 2 for n in y.shape[1:-1]), 0)]

    support = np.argwhere(np.asarray(jax.jit(jax.grad(centre))(x))[0, ..., 0])
    assert set(np.ptp(support, 0) + 1) == {summary(module, input=x.shape[1:]).receptive_field}
