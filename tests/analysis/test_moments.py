"""Moment maps against closed forms and published fixed points (rows A1, A2, A22)."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad

from jaxcnn.analysis.moments import Moments, gains, gaussian_moments, iterate, moment_map
from jaxcnn.errors import InputError


def test_relu_halves_the_second_moment_and_keeps_a_third_of_the_variance():
    found = gaussian_moments("relu", Moments(0, 1))
    assert found.mean == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-6)
    assert found.second == pytest.approx(0.5, rel=1e-6)
    assert found.variance == pytest.approx(0.5 - 1 / (2 * math.pi), rel=1e-6)  # 0.341
    assert gains("relu", 7.0) == pytest.approx((0.5, 0.5), rel=1e-6)


def test_one_relu_layer_of_512_inputs_and_unit_weights():
    found = gaussian_moments("relu", Moments(0, 512))
    assert (found.mean, math.sqrt(found.second), math.sqrt(found.variance)) == pytest.approx(
        (9.027, 16.0, 13.21), abs=5e-3
    )


@pytest.mark.parametrize("mean", [-0.7, 0.0, 1.3])
@pytest.mark.parametrize("act", ["tanh", "selu", "gelu", "sigmoid"])
def test_integrals_are_those_of_adaptive_quadrature(act, mean):
    import jax
    import jax.numpy as jnp

    from jaxcnn.layers.act import activation

    def value(z):
        with jax.enable_x64(True):
            return float(activation(act)(jnp.float64(z)))

    def expectation(power):
        density = lambda u: math.exp(-u * u / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        kink = -mean / 0.8
        return quad(lambda u: value(mean + 0.8 * u) ** power * density(u), -9, 9, points=[kink], limit=200)[0]

    found = gaussian_moments(act, Moments(mean, 0.64))
    assert found.mean == pytest.approx(expectation(1), abs=1e-7)
    assert found.second == pytest.approx(expectation(2), abs=1e-7)


def test_the_gain_of_tanh_depends_on_the_variance():
    assert gains("tanh", 1.0)[0] == pytest.approx(0.394, abs=5e-4)
    assert gains("tanh", 1e-6) == pytest.approx((1, 1), abs=1e-5)


def test_selu_has_an_attracting_fixed_point_at_mean_0_and_variance_1():
    for start in (Moments(0.0, 1.0), Moments(0.3, 0.5), Moments(-0.5, 2.0)):
        end = iterate(moment_map("selu", gain=1.0), start, steps=60)[-1]
        assert end == pytest.approx((0, 1), abs=1e-5)


def test_relu_keeps_any_second_moment_at_gain_2_and_loses_it_at_gain_1():
    for start in (Moments(0.0, 1.0), Moments(1.0, 3.0)):
        path = iterate(moment_map("relu", gain=2.0), start, steps=20)
        assert path[-1].second == pytest.approx(path[0].second, rel=1e-5)
        halved = iterate(moment_map("relu", gain=1.0), start, steps=100)[-1]
        assert math.sqrt(halved.second / start.second) == pytest.approx(2.0**-50, rel=1e-4)


def test_tanh_at_gain_1_falls_slowly_towards_0():
    path = iterate(moment_map("tanh", gain=1.0), Moments(0.0, 1.0), steps=100)
    assert 0.04 < math.sqrt(path[-1].variance) < 0.08
    assert all(a.variance > b.variance for a, b in itertools.pairwise(path))


def test_the_picture_of_a_fixed_point():
    path = iterate(math.cos, 1.0, steps=60)
    assert len(path) == 61
    assert path[-1] == pytest.approx(0.739085, abs=1e-6)


def test_what_cannot_be():
    with pytest.raises(InputError, match="did you mean 'relu'"):
        gaussian_moments("rellu", Moments(0, 1))
    with pytest.raises(InputError, match="variance of at least 0"):
        gaussian_moments("relu", Moments(0, -1))
    with pytest.raises(InputError, match="gain -1"):
        moment_map("relu", gain=-1)
    with pytest.raises(InputError, match="variance 0"):
        gains("relu", 0)
    with pytest.raises(InputError, match="steps -1"):
        iterate(np.cos, 1.0, steps=-1)
