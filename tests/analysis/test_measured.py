"""Measured receptive fields against the theoretical ones, and effective ones against their closed form."""

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.analysis import summary
from jaxcnn.analysis.measured import measured_field
from jaxcnn.errors import InputError
from jaxcnn.layers import Conv, avg_pool, max_pool
from jaxcnn.models import create


class Apply(nn.Module):
    """Whatever `fn(x)` builds, in a compact call."""

    fn: object

    @nn.compact
    def __call__(self, x):
        return self.fn(x)


def stack(x, layers, *, features=1, **options):
    for _ in range(layers):
        x = Conv(features, 3, **options)(x)
    return x


def row(module, input, layer):
    return next(row for row in summary(module, input=input).layers[::-1] if row.name.startswith(layer))


NETWORKS = [
    ("lenet5", {}, (28, 28, 1), "c3", 14),
    pytest.param("cifar_resnet20", {}, (40, 40, 3), "stage2/block1", 1 + 14 + 6, marks=pytest.mark.slow),
    ("vgg11", {"width": 8, "hidden": 8}, (64, 64, 3), "pool3", 30),
    pytest.param("mobilenet_v1", {}, (64, 64, 3), "conv_pw_4", 27, marks=pytest.mark.slow),
    pytest.param("vgg16", {"width": 16, "hidden": 8}, (224, 224, 3), "pool5", 212, marks=pytest.mark.slow),
    pytest.param("resnet18", {}, (160, 160, 3), "stage2/block2", 99, marks=pytest.mark.slow),
]


@pytest.mark.slow
def test_stacks_without_stride_and_with():
    for layers in (1, 4):
        found = measured_field(Apply(partial(stack, layers=layers)), input=(15, 19, 2), draws=2)
        assert found.size == found.theoretical_size == 1 + 2 * layers
        assert found.unit == (7, 9)
        assert found.measured == ((7 - layers, 7 + layers), (9 - layers, 9 + layers))
    for layers in (1, 3):
        found = measured_field(Apply(partial(stack, layers=layers, strides=2, padding=1)), input=(40, 40, 1), draws=2)
        assert found.measured == found.expected
        assert found.size == 2 ** (layers + 1) - 1


CHAINS = {
    "pooled": lambda x: Conv(1, 3)(max_pool(nn.relu(Conv(3, 3)(x)), window=3, strides=2, padding=1)),
    "depthwise, dilated": lambda x: Conv(2, 5, groups=2, dilation=2)(Conv(2, 2, padding=0)(x)),
    "branches, uneven": lambda x: Conv(1, 3)(x) + Conv(1, 3, padding=((2, 0), (0, 2)))(Conv(1, (1, 5))(x)),
    "transposed": lambda x: nn.ConvTranspose(1, (3, 3), strides=(2, 2))(avg_pool(x, window=2)),
    "normalised": lambda x: nn.GroupNorm(1)(x),
    "dense": lambda x: nn.Dense(3)(Conv(1, 3)(x).reshape(1, -1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_theory_is_measured(name):
    found = measured_field(Apply(CHAINS[name]), input=(22, 17, 2), draws=5)
    assert found.measured == found.expected


@pytest.mark.parametrize(("name", "overrides", "input", "layer", "field"), NETWORKS)
def test_networks(name, overrides, input, layer, field):
    found = measured_field(create(name, **overrides), input=input, layer=layer)
    assert found.measured == found.expected
    assert found.theoretical_size == field
    if layer:
        assert row(create(name, **overrides), input, layer).receptive_field == field


@pytest.mark.parametrize("input", [(30, 1), (9, 10, 11, 2)])
def test_any_number_of_axes(input):
    found = measured_field(Apply(partial(stack, layers=2, strides=2, padding=1)), input=input, draws=2)
    assert found.measured == found.expected
    assert found.size == 7
    assert found.map.shape == input[:-1]


def test_a_layer_that_sees_nothing():
    found = measured_field(Apply(lambda x: jnp.zeros_like(x) + 1), input=(5, 5, 1))
    assert found.measured == found.expected == ((math.inf, -math.inf),) * 2
    assert found.size == found.theoretical_size == found.effective_size == 0


def binomial(layers):
    """The distribution of the sum of so many draws from -1, 0, 1."""
    return np.polynomial.polynomial.polypow([1 / 3] * 3, layers)


def test_effective_field_of_equal_weights_is_binomial():
    layers = 6
    module = Apply(partial(stack, layers=layers, kernel_init=nn.initializers.ones, use_bias=False))
    found = measured_field(module, input=(21, 21, 1), draws=2)
    expected = np.zeros((21, 21))
    expected[4:17, 4:17] = np.outer(binomial(layers), binomial(layers))
    np.testing.assert_allclose(found.map, expected / expected.max(), rtol=1e-5, atol=1e-9)
    assert found.measured == found.expected == ((4, 16), (4, 16))
    assert found.effective_size == np.count_nonzero(expected > 0.0455 * expected.max()) ** 0.5


def test_the_effective_field_grows_as_the_root_of_the_depth():
    """Luo et al. 2016: of order sqrt(n) where the theoretical field is of order n, its share of order 1 / sqrt(n)."""
    sizes = {}
    for layers in (5, 20):
        module = Apply(partial(stack, layers=layers, kernel_init=nn.initializers.ones, use_bias=False))
        found = measured_field(module, input=(61, 61, 1), draws=1)
        sizes[layers] = found.effective_size
        # Gaussian of variance 2 n / 3 a layer: above 0.0455 of the largest within 2.486 deviations.
        disc = math.sqrt(math.pi * 2 * math.log(1 / 0.0455) * 2 * layers / 3)
        assert found.effective_size == pytest.approx(disc, rel=0.06)
    assert sizes[20] / sizes[5] == pytest.approx(2, rel=0.06)


@pytest.mark.slow
def test_chance_hides_nothing_from_many_draws():
    module, input = create("vanilla_cnn", width=4), (40, 40, 3)
    one, many = (measured_field(module, input=input, layer="pool2", draws=draws) for draws in (1, 20))
    assert np.count_nonzero(one.map) < np.count_nonzero(many.map) == 10 * 10
    assert many.measured == many.expected
    assert many.map.max() == 1
    assert 0 < many.effective_size <= 10


def test_with_given_variables_the_map_is_theirs():
    module = Apply(lambda x: Conv(1, 3, use_bias=False)(x))
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 2] = -2
    kernel[1, 1] = 1
    variables = {"params": {"Conv_0": {"kernel": kernel}}}
    found = measured_field(module, input=(7, 7, 1), variables=variables, draws=3)
    assert found.map[2, 4] == 1
    assert found.map[3, 3] == pytest.approx(0.5)
    assert np.count_nonzero(found.map) == 2
    assert found.measured == ((2, 3), (3, 4))
    assert found.expected == ((2, 4), (2, 4))


def test_seeds_repeat():
    module = Apply(partial(stack, layers=2))
    first, second, third = (measured_field(module, input=(9, 9, 1), draws=2, seed=seed).map for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != third).any()


class TwoOutputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (create("lenet5"), {"input": (28, 28, 1), "layer": "c7"}, "unknown feature"),
        (create("lenet5"), {"input": (0, 28, 1)}, "positive sizes"),
        (nn.Dense(3), {"input": (4,)}, "spatial axes"),
        (TwoOutputs(), {"input": (4, 4, 1)}, "several outputs"),
        (Apply(lambda x: jnp.sqrt(-jnp.abs(x))), {"input": (4, 4, 1), "draws": 1}, "gradient of Apply"),
        (create("lenet5"), {"input": (28, 28, 1), "draws": 0}, "draws 0"),
    ],
)
def test_bad_input(module, options, message):
    with pytest.raises(InputError, match=message):
        measured_field(module, **options)
