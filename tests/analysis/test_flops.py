"""Operation counts against row A9's worked example, arithmetic by hand, and XLA's own count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxcnn.analysis import summary
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.pool import avg_pool, max_pool
from jaxcnn.layers.window import as_written
from jaxcnn.models import create


class Apply(nn.Module):
    fn: object

    @nn.compact
    def __call__(self, x):
        return self.fn(x)


def counts(fn, input):
    result = summary(Apply(fn), input=input)
    return result.macs, result.flops


def test_worked_example():
    """16 kernels of 5x5 with padding 2 over 8 maps of 32x32."""
    result = summary(Conv(16, (5, 5), padding=2), input=(32, 32, 8))
    (row,) = result.layers
    assert row.parameters == result.parameters == 3_216
    assert row.output == (32, 32, 16)
    assert (row.activation_bytes, result.activation_bytes) == (64 * 1024, 64 * 1024)
    assert (row.macs, row.flops) == (result.macs, result.flops) == (3_276_800, 6_553_600)


@pytest.mark.parametrize(
    ("options", "output"), [({"padding": 0}, (4, 7)), ({"padding": 1}, (6, 9)), ({"padding": 1, "strides": 2}, (3, 5))]
)
def test_sizes_of_the_worked_example(options, output):
    assert summary(Conv(1, (3, 3), **options), input=(6, 9, 1)).layers[0].output == (*output, 1)


def test_grouped_and_transposed_convolutions_and_products():
    # outputs x taps x channels of a group
    assert counts(Conv(8, (3, 3), padding=1, groups=4, use_bias=False), (6, 5, 8)) == (30 * 8 * 9 * 2, 30 * 8 * 9 * 4)
    # inputs x taps x features: the holes between them are not multiplied
    assert counts(nn.ConvTranspose(6, (2, 2), strides=(2, 2)), (5, 7, 4))[0] == 5 * 7 * 4 * 4 * 6
    # b x m x n x k
    assert counts(lambda x: jnp.einsum("bic,bjc->bij", x, x), (9, 3))[0] == 9 * 9 * 3
    assert counts(lambda x: jnp.einsum("bic,bic->bi", x, x), (9, 3))[0] == 9 * 3


def test_other_operations():
    assert counts(lambda x: nn.tanh(x) * 2, (4, 3)) == (0, 24)
    assert counts(lambda x: x.reshape(1, -1)[:, ::2].T, (4, 3)) == (0, 0)
    assert counts(lambda x: x.sum(1), (4, 3)) == (0, 9)
    assert counts(lambda x: max_pool(x, window=3), (9, 9, 2)) == (0, 9 * 2 * 8)
    assert counts(lambda x: jnp.argmax(x, -1) + 1, (4, 3)) == (0, 8)


def test_a_bias_is_free_and_a_residual_is_not():
    assert counts(nn.Dense(5), (7,)) == (35, 70)
    assert counts(lambda x: nn.Dense(7)(x) + x, (7,)) == (49, 98 + 7)
    assert counts(lambda x: nn.Dense(5)(x) + 1, (7,)) == (35, 70 + 5)


def test_loops_and_branches():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((3, 3)), None), x, None, length=5)[0]

    def looped(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ jnp.ones((3, 3)), x)

    def branched(x):
        return jax.lax.cond(x.sum() > 0, lambda c: c @ jnp.ones((3, 3)), lambda c: c, x)

    assert counts(scanned, (3,))[0] == 45
    assert counts(looped, (3,))[0] == 9
    assert counts(branched, (3,))[0] == 9


NETS = {
    "lenet5": (create("lenet5", padding=0), (32, 32, 1)),
    "strided": (lambda x: nn.relu(Conv(16, (5, 5), strides=2, padding=0)(Conv(8, (3, 3), padding=0)(x))), (33, 33, 3)),
    "grouped": (lambda x: Conv(32, (3, 3), padding=0, groups=4)(Conv(32, (3, 3), padding=0)(x)), (20, 20, 3)),
    "dilated": (lambda x: nn.softmax(nn.Dense(9)(Conv(16, 3, padding=0, dilation=3)(x).mean((1, 2)))), (20, 20, 4)),
    "valid in Flax": (
        lambda x: nn.Dense(10)(nn.avg_pool(nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
                               .reshape(1, -1)),
        (18, 18, 8),
    ),
    "1-D": (lambda x: avg_pool(nn.relu(Conv(16, 9, padding=0)(x)), window=4), (100, 4)),
    "3-D": (lambda x: nn.Dense(5)(max_pool(nn.tanh(Conv(8, 3, padding=0)(x)), window=2)), (12, 12, 12, 3)),
    "transposed": (lambda x: nn.ConvTranspose(8, (2, 2), strides=(2, 2), use_bias=False)(x), (12, 12, 16)),
    "attention": (lambda x: nn.MultiHeadDotProductAttention(4)(x, x), (50, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_agrees_with_xla_on_valid_convolutions(name):
    fn, input = NETS[name]
    module, options = (fn, {"train": False}) if isinstance(fn, nn.Module) else (Apply(fn), {})
    x = jax.ShapeDtypeStruct((1, *input), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **options), x)
    with as_written():
        lowered = jax.jit(lambda variables, x: module.apply(variables, x, **options)).lower(variables, x)
    assert summary(module, input=input).flops == pytest.approx(lowered.cost_analysis()["flops"], rel=0.02)


def test_padded_taps_count_here_and_not_in_xla():
    module, x = Conv(4, (3, 3), padding=1, use_bias=False), jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with as_written():
        theirs = jax.jit(module.apply).lower(variables, x).cost_analysis()["flops"]
    # 4 x 3 - 2 taps of a row or column lie on the image
    assert (summary(module, input=(4, 4, 2)).flops, theirs) == (2 * 8 * (4 * 3) ** 2, 2 * 8 * (4 * 3 - 2) ** 2)


@pytest.mark.parametrize(("name", "macs"), [("lenet5", 416_520), ("resnet18", 1_814_073_344)])
def test_published_totals(name, macs):
    """LeNet-5: 28^2 6 25 + 10^2 16 150 + 400 120 + 120 84 + 84 10. ResNet-18: 1.81 G (He et al. 2016: 1.8)."""
    assert summary(create(name), input=(28, 28, 1) if name == "lenet5" else (224, 224, 3)).macs == macs
