"""Initialisers: variances and bounds in closed form, fans, and the identity convolution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcnn.errors import InputError
from jaxcnn.layers.init import INITIALIZERS, TRUNCATED_STD, fans, initializer

SHAPE = (3, 3, 64, 96)
FAN_IN, FAN_OUT = 9 * 64, 9 * 96
COUNT = math.prod(SHAPE)


def draw(name, shape=SHAPE, **options):
    return np.asarray(initializer(name, **options)(jax.random.key(3), shape, jnp.float32))


VARIANCES = {
    "normal": 0.01**2,
    "standard": 1 / (3 * FAN_IN),
    "xavier_normal": 2 / (FAN_IN + FAN_OUT),
    "xavier_uniform": 2 / (FAN_IN + FAN_OUT),
    "lecun_normal": 1 / FAN_IN,
    "kaiming_normal": 2 / FAN_IN,
    "kaiming_uniform": 2 / FAN_IN,
}


@pytest.mark.parametrize("name", VARIANCES)
def test_variance_is_the_published_one(name):
    w = draw(name)
    variance = VARIANCES[name]
    assert abs(w.mean()) < 4 * math.sqrt(variance / COUNT)
    assert w.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / COUNT))  # a normal's, the widest


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("standard", 1 / math.sqrt(FAN_IN)),
        ("xavier_uniform", math.sqrt(6 / (FAN_IN + FAN_OUT))),
        ("kaiming_uniform", math.sqrt(6 / FAN_IN)),
    ],
)
def test_uniform_bounds(name, bound):
    w = np.abs(draw(name))
    assert 0.999 * bound < w.max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ["normal", "xavier_normal", "lecun_normal", "kaiming_normal"])
def test_normals_are_truncated_only_on_demand_and_keep_their_variance(name):
    std = math.sqrt(VARIANCES[name])
    full, cut = draw(name), draw(name, truncated=True)
    assert np.abs(full).max() > 3.5 * std
    assert np.abs(cut).max() <= 2 * std / TRUNCATED_STD * (1 + 1e-6)
    assert cut.var() == pytest.approx(std**2, rel=0.03)


@pytest.mark.parametrize(("name", "theirs"), [("xavier_normal", "glorot_normal"), ("kaiming_normal", "he_normal")])
def test_truncated_normals_are_those_of_jax(name, theirs):
    reference = getattr(jax.nn.initializers, theirs)()(jax.random.key(3), SHAPE, jnp.float32)
    np.testing.assert_allclose(draw(name, truncated=True), reference, rtol=1e-5)


def test_kaiming_mode_and_normal_std():
    assert draw("kaiming_normal", mode="fan_out").var() == pytest.approx(2 / FAN_OUT, rel=0.03)
    assert draw("normal", std=0.5).std() == pytest.approx(0.5, rel=0.02)


def test_zeros_and_constant():
    assert not draw("zeros").any()
    assert (draw("constant", (5,), value=0.01) == np.float32(0.01)).all()


@pytest.mark.parametrize("shape", [(3, 3, 4, 7), (1, 1, 12, 5), (6, 6)])
def test_orthogonal_rows_or_columns(shape):
    w = draw("orthogonal", shape, scale=2.0).reshape(-1, shape[-1])
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [(3, 3), (5,), (3, 1, 3)])
def test_dirac_is_the_identity_convolution(window, groups):
    rank, channels = len(window), 4
    x = jax.random.normal(jax.random.key(0), (2, *(6,) * rank, channels))
    kernel = draw("dirac", (*window, channels // groups, channels), groups=groups)
    spatial = "DHW"[-rank:]
    y = lax.conv_general_dilated(
        x,
        kernel,
        (1,) * rank,
        "SAME",
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
    )
    np.testing.assert_array_equal(y, x)


def test_dirac_with_more_outputs_leaves_the_others_zero():
    kernel = draw("dirac", (3, 3, 2, 5))
    np.testing.assert_array_equal(kernel[1, 1], np.eye(2, 5))
    assert kernel.sum() == 2


def test_fans_of_dense_and_convolution_kernels():
    assert fans((20, 30)) == (20, 30)
    assert fans((5, 5, 3, 8)) == (75, 200)
    assert fans((5, 5, 3, 8)).fan_avg == 137.5


def test_fans_of_a_grouped_convolution_count_connections():
    # 12 inputs, 8 outputs, 4 groups: every output sees 3 inputs, every input feeds 2 outputs.
    assert fans((3, 3, 3, 8), groups=4) == (27, 18)
    # A depthwise convolution connects each unit to K*K others both ways.
    assert fans((3, 3, 1, 16), groups=16) == (9, 9)


def test_fans_are_averages_where_units_are_partly_connected():
    table = np.zeros((6, 16), bool)  # LeNet-5's C3: six maps see 3, nine see 4, one sees all 6
    for output, count in enumerate([3] * 6 + [4] * 9 + [6]):
        table[:count, output] = True
    assert table.sum() == 60
    assert fans((5, 5, 6, 16), connections=table) == (25 * 60 / 16, 25 * 60 / 6)
    w = draw("kaiming_normal", (5, 5, 6, 16), connections=table)
    assert w.var() == pytest.approx(2 / (25 * 60 / 16), rel=0.15)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: initializer("kaiming_norml"), "did you mean 'kaiming_normal'"),
        (lambda: initializer("normal", sdt=0.1), "did you mean 'std'"),
        (lambda: initializer("xavier_normal", mode="fan_in"), "unknown option"),
        (lambda: draw("kaiming_normal", (7,)), "has no fans"),
        (lambda: fans((3, 3, 4, 6), groups=4), "groups=4 does not divide 6"),
        (lambda: fans((3, 3, 4, 6), connections=np.ones((6, 4))), "must have shape"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_dtype_is_the_one_asked_for(name, strict_dtypes, float64):
    init = initializer(name, **({"value": 0.1} if name == "constant" else {}))
    for dtype in (jnp.float32, jnp.float64):
        assert jax.eval_shape(lambda key, d=dtype: init(key, (3, 3, 4, 4), d), jax.random.key(1)).dtype == dtype
