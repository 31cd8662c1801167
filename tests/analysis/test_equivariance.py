"""Convolution commutes with translation and with nothing else; pooling adds invariance."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxcnn.analysis.equivariance import (
    compare,
    equivariance,
    invariance,
    rotation,
    scaling,
    table,
    translation,
    wrapped,
)
from jaxcnn.errors import InputError
from jaxcnn.layers import Conv, conv, global_avg_pool, max_pool
from jaxcnn.models import create
from jaxcnn.style.pictures import luminance, photograph, to_array

SYMMETRIC = jnp.array([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).reshape(3, 3, 1, 1)
ASYMMETRIC = jnp.array([[0.0, 1, 2], [2, 2, 0], [0, 1, 2]]).reshape(3, 3, 1, 1)


def whole(seed, shape):
    """Whole numbers, on which float32 makes no rounding errors."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), jnp.float32)


def periodic(kernel):
    return wrapped(partial(conv, kernel=kernel), margin=1)


def padded(kernel):
    return partial(conv, kernel=kernel, padding=1)


@pytest.fixture(scope="module")
def temple():
    """(1, 96, 96, 1) in 0..1: a part of the photograph, grey."""
    return luminance(to_array(photograph("china.jpg"))[:, 100:196, 200:296])[..., :1]


@settings(deadline=None, max_examples=10)
@given(st.integers(-9, 9), st.integers(-9, 9))
def test_convolution_commutes_with_translation_exactly(rows, columns):
    x, kernel = whole(0, (2, 8, 8, 3)), whole(1, (3, 3, 3, 4))
    assert equivariance(periodic(kernel), x, translation(rows, columns)) == 0


def test_without_its_borders_a_padded_convolution_does_too():
    x = whole(0, (1, 16, 16, 1))
    shift = translation(2, 0)
    assert equivariance(padded(ASYMMETRIC), x, shift) > 0.1
    assert equivariance(padded(ASYMMETRIC), x, shift, crop=2) > 0  # what came in from the other side
    assert equivariance(padded(ASYMMETRIC), x, shift, crop=3) == 0


def test_rotation_needs_a_symmetric_kernel(temple):
    x = whole(0, (1, 9, 12, 1))
    for quarters in (1, 2, 3):
        assert equivariance(padded(SYMMETRIC), x, rotation(quarters)) == 0
        assert equivariance(padded(ASYMMETRIC), x, rotation(quarters)) > 0.3
    assert equivariance(padded(ASYMMETRIC), x, rotation(4)) == 0
    edges = partial(conv, kernel=jnp.array([-1.0, 0, 1]).reshape(1, 3, 1, 1), padding=(0, 1))
    assert equivariance(edges, temple, rotation(), crop=2) > 1


def test_scaling_fails_on_a_photograph(temple):
    """Slopes are half as steep in an image twice as large: where it is smooth, T(f(x)) = 2 f(T(x))."""
    edges = partial(conv, kernel=jnp.array([-1.0, 0, 1]).reshape(1, 3, 1, 1), padding=(0, 1))
    assert equivariance(edges, temple, scaling(2), crop=2) > 0.4
    ramp = jnp.broadcast_to(jnp.arange(12.0).reshape(1, 1, -1, 1), (1, 12, 12, 1))
    assert equivariance(edges, ramp, scaling(2), crop=4) == pytest.approx(1)
    assert equivariance(lambda x: x, temple, scaling(2)) == 0
    assert equivariance(lambda x: 3 * x, temple, scaling(2)) < 1e-6


def test_a_stride_divides_the_shift(temple):
    pooled = partial(max_pool, window=2)
    assert equivariance(pooled, temple, translation(4, 2, stride=2)) == 0
    with pytest.raises(InputError, match="stride divides"):
        equivariance(pooled, temple, translation(1, 0, stride=2))
    assert invariance(pooled, temple, translation(1, 0, stride=2)) > 0
    with pytest.raises(InputError, match="size of the output"):
        invariance(pooled, temple, scaling())


def edges(x):
    """Rectified differences to the left and to the right, up and down: four maps."""
    kernel = np.zeros((3, 3, 1, 4), np.float32)
    for i, (axis, sign) in enumerate([(0, 1), (0, -1), (1, 1), (1, -1)]):
        taps = sign * np.array([-1, 0, 1], np.float32)
        kernel[(slice(None), 1) if axis == 0 else (1, slice(None))][..., 0, i] = taps
    return jax.nn.relu(wrapped(partial(conv, kernel=kernel), margin=1)(x))


def test_what_pooling_adds(temple):
    """A shift by one pixel changes less, the larger the window; all positions together do not change at all."""
    windows = (1, 2, 4, 8, 16)
    changes = [invariance(lambda x, k=k: max_pool(edges(x), window=k), temple, translation(0, 1)) for k in windows]
    assert all(after < 0.85 * before for before, after in itertools.pairwise(changes))
    assert changes[0] > 0.7
    assert changes[-1] < 0.2
    everything = lambda x: global_avg_pool(edges(x))  # noqa: E731
    assert invariance(everything, temple, translation(3, 5)) < 1e-6
    # Neither is it for turned images: the maps change places.
    assert invariance(everything, temple, rotation()) > 0.02


def test_outputs_without_positions():
    """T is the identity on them: equivariance is invariance."""
    f, x = lambda x: x[:, 0, 0], whole(0, (3, 4, 4, 2))
    assert equivariance(f, x, translation(1, 0)) == invariance(f, x, translation(1, 0)) > 0


@pytest.mark.slow
def test_modules_and_models():
    module, x = Conv(4, 3), jax.random.normal(jax.random.key(0), (1, 12, 12, 2))
    function = partial(module.apply, module.init(jax.random.key(1), x))
    assert equivariance(function, x, translation(1, 1), crop=2) < 1e-6
    net = create("vanilla_cnn", width=4, stages=2, fully_convolutional=True, hidden=8)
    variables = net.init(jax.random.key(1), x, train=False)
    logits = partial(net.apply, variables, train=False)
    assert 0 < invariance(logits, x, translation(1, 0)) < 2


def test_the_table(temple):
    functions = {"edges": edges, "edges, pooled": lambda x: max_pool(edges(x), window=2)}
    shifts = [translation(0, 2, stride=1), rotation(), scaling()]
    found = compare({"edges": edges}, temple, shifts)
    assert [(row.function, row.transformation) for row in found] == [
        ("edges", "translation by (0, 2)"),
        ("edges", "rotation by 90 degrees"),
        ("edges", "scaling by 2"),
    ]
    assert found[0].equivariance == 0
    assert found[1].equivariance > 0.5
    assert found[2].invariance is None
    found += compare(functions, temple, [translation(0, 1, stride=2)])
    assert found[-1].equivariance is None
    console = Console(width=100, record=True)
    console.print(table(found))
    text = console.export_text()
    assert "edges, pooled" in text
    assert "rotation by 90 degrees" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equivariance(lambda x: x, jnp.ones((3, 3)), rotation()), "expected images"),
        (lambda: invariance(lambda x: x, jnp.ones((1, 4, 4, 1)), rotation(), crop=2), "crop 2"),
        (lambda: invariance(lambda x: x, jnp.ones((1, 4, 4, 1)), rotation(), crop=-1), "crop -1"),
        (lambda: translation(1, 0, stride=0), "stride 0"),
        (lambda: equivariance(partial(conv, kernel=SYMMETRIC), jnp.ones((1, 8, 8, 1)), scaling()), "pad"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
