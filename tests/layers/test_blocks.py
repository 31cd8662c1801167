"""Residual blocks and stages: structure, and loops and recomputation that change nothing but time and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.layers.blocks import (
    BasicBlock,
    Bottleneck,
    PreActivationBlock,
    PreActivationBottleneck,
    Stage,
    family_norm,
    pad_shortcut,
)
from jaxcnn.layers.conv import Conv, conv, loop_body
from jaxcnn.models import create
from jaxcnn.tree import flatten


def block(kind, **options):
    normalise = family_norm("batch", statistics="global", width=4, dtype=None)
    return partial(kind, conv=partial(Conv, use_bias=False), norm=normalise, **options)


def loss_gradient_and_statistics(module, variables, x):
    def loss(params):
        y, moved = module.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(y).mean(), moved

    (value, moved), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return {"value": value, "moved": moved, "gradient": gradient}


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {"scan": True}) for kind in (BasicBlock, PreActivationBottleneck)),
     *(pytest.param(kind, {"scan": True}, marks=pytest.mark.slow) for kind in (Bottleneck, PreActivationBlock)),
     (BasicBlock, {"scan": False, "remat": True}),
     (PreActivationBottleneck, {"remat": True})],
)  # fmt: skip
def test_loops_and_recomputation_change_nothing(float64, kind, options):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    stage = Stage(block(kind), 3, 4, 2)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), stage.init(jax.random.key(1), x, train=False))
    other = Stage(block(kind), 3, 4, 2, **options)
    again = other.init(jax.random.key(1), x, train=False)
    assert list(flatten(again)) == list(flatten(variables))
    expected = loss_gradient_and_statistics(stage, variables, x)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        loss_gradient_and_statistics(other, variables, x),
        expected,
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        other.apply(variables, x, train=False),
        stage.apply(variables, x, train=False),
    )
    moved = flatten(expected["moved"])
    assert all(
        (moved[path] != value).all() for path, value in flatten({"batch_stats": variables["batch_stats"]}).items()
    )


def test_a_loop_is_one_block_long():
    def convolutions(depth, scan):
        module = create("cifar_resnet20", depth=depth, width=4, scan=scan)
        x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)
        text = jax.jit(lambda v, x: module.apply(v, x, train=False)).lower(variables, x).as_text()
        return text.count("stablehlo.convolution")

    assert convolutions(26, True) == convolutions(14, True)
    assert convolutions(26, False) == convolutions(14, False) + 12


def test_recomputation_saves_memory():
    stage, x = block(BasicBlock), jnp.ones((8, 16, 16, 8))

    def temporaries(remat):
        module = Stage(stage, 8, 8, 1, remat=remat)
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))

        def loss(variables):
            return module.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

        return jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.7 * temporaries(False)


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), 1), ((3, 2), ((2, 0), (0, 1))), ((1, 1), 0), ((3,), "SAME")])
def test_convolutions_in_a_loop_have_the_same_gradients(float64, kernel, padding):
    rank = len(kernel)
    x = jax.random.normal(jax.random.key(0), (2, *(5, 6)[:rank], 3))
    w = jax.random.normal(jax.random.key(1), (*kernel, 3, 4))

    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sin(conv(x, w, padding=padding)).sum(), argnums=(0, 1))(x, w)

    with loop_body():
        inside = gradients(x, w)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), inside, gradients(x, w))


def test_the_stride_stands_in_the_3x3_convolution_and_in_v1_in_the_first():
    def steps(**options):
        jaxpr = jax.make_jaxpr(
            lambda x: Stage(block(Bottleneck, **options), 2, 4, 2).init_with_output(jax.random.key(0), x, train=False)[
                0
            ]
        )(jnp.zeros((1, 8, 8, 3)))
        found = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
        return [(e.invars[1].aval.shape[0], e.params["window_strides"][0]) for e in found]

    assert steps() == [(1, 1), (3, 2), (1, 1), (1, 2), (1, 1), (3, 1), (1, 1)]
    assert steps(v1=True) == [(1, 2), (3, 1), (1, 1), (1, 2), (1, 1), (3, 1), (1, 1)]


def test_nothing_follows_the_addition_of_a_pre_activation_block():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    module = block(PreActivationBlock)(4)
    variables = module.init(jax.random.key(1), x, train=False)
    still = jax.tree.map(jnp.zeros_like, variables["params"])
    out = module.apply({**variables, "params": still}, x, train=False)
    np.testing.assert_array_equal(out, x)  # negative numbers pass


def test_the_activation_may_come_before_the_addition():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    for act_first in (False, True):
        module = block(BasicBlock, act_first=act_first)(4)
        variables = module.init(jax.random.key(1), x, train=False)
        zeros = jax.tree.map(jnp.zeros_like, variables["params"])
        out = module.apply({**variables, "params": zeros}, x, train=False)
        np.testing.assert_array_equal(out, x if act_first else jnp.maximum(x, 0))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_option_a_in_any_number_of_dimensions(rank):
    x = jnp.arange(2 * 5**rank * 2.0).reshape(2, *(5,) * rank, 2)
    y = pad_shortcut(x, channels=6, stride=2)
    assert y.shape == (2, *(3,) * rank, 6)
    np.testing.assert_array_equal(y[..., 2:4], x[(slice(None), *(slice(None, None, 2),) * rank)])
    assert not y[..., :2].any()
    assert not y[..., 4:].any()
