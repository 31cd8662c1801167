"""Filters against NumPy and SciPy, and what convolution is: a matrix, commutative, any LTI system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, signal

from jaxcnn.analysis import filters
from jaxcnn.errors import InputError
from jaxcnn.layers import conv, conv_transpose
from jaxcnn.style.pictures import luminance, photograph, to_array


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(seed, shape):
    """Whole numbers, on which float32 makes no rounding errors."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@pytest.fixture(scope="module")
def temple():
    """(1, h, w, 3) in 0..1: a part of the photograph."""
    return to_array(photograph("china.jpg"))[:, 100:220, 200:360]


def test_the_kernels():
    assert filters.box(3, 3).tolist() == [[np.float32(1 / 9)] * 3] * 3
    assert filters.box(1, 4).tolist() == [[0.25] * 4]
    assert filters.vertical_edges().tolist() == [[-1, 1]]
    np.testing.assert_allclose(filters.sharpening(), np.array([[-1] * 3, [-1, 17, -1], [-1] * 3]) / 9, rtol=1e-6)
    assert filters.sharpening(2).sum() == pytest.approx(1, abs=1e-6)


def test_the_gaussian_is_its_formula():
    sigma, kernel = 1.5, filters.gaussian(1.5)
    assert kernel.shape == (11, 11)
    for y, x in [(0, 0), (0, 1), (2, -1), (5, 5)]:
        expected = np.exp(-(x**2 + y**2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        assert kernel[5 + y, 5 + x] == pytest.approx(expected, rel=1e-6)
    # Sampled densely enough, what lies beyond 3 s is all that is missing.
    assert filters.gaussian(4, size=65).sum() == pytest.approx(1, abs=1e-6)
    # Two blurs are one: variances add.
    twice = filters.full_convolution(filters.gaussian(2, size=17), filters.gaussian(1.5, size=17))
    np.testing.assert_allclose(twice, filters.gaussian(2.5, size=33), atol=1e-4)


@pytest.mark.parametrize("name", filters.FILTERS)
def test_filters_on_a_photograph(name, temple):
    kernel = filters.FILTERS[name]
    found = np.asarray(filters.filtered(temple, kernel))
    assert found.shape == temple.shape
    # SciPy centres an even window half a pixel earlier.
    origin = [-1 if k % 2 == 0 else 0 for k in kernel.shape]
    for c in range(3):
        expected = ndimage.correlate(np.asarray(temple)[0, ..., c], kernel, mode="nearest", origin=origin)
        np.testing.assert_allclose(found[0, ..., c], expected, atol=2e-5)


def test_what_they_do_to_a_photograph(temple):
    grey = luminance(temple)[..., :1]
    smooth, sharp = (filters.filtered(grey, filters.FILTERS[name]) for name in ("Gaussian, s = 3", "sharpening"))
    assert smooth.std() < grey.std() < sharp.std()
    across = filters.filtered(grey, filters.vertical_edges())
    np.testing.assert_allclose(across[:, :, :-1], np.diff(grey, axis=2), atol=1e-6)
    assert not across[:, :, -1].any()
    down = filters.filtered(grey, filters.vertical_edges().T)
    np.testing.assert_allclose(down[:, :-1], np.diff(grey, axis=1), atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(
    st.tuples(st.integers(3, 6), st.integers(3, 6)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 2), st.integers(1, 3), st.integers(0, 2),
)  # fmt: skip
def test_the_matrix_is_the_convolution(size, window, c, features, padding):
    x, kernel = whole(0, (1, *size, c)), whole(1, (*window, c, features))
    found = filters.matrix(kernel, size=size, padding=padding)
    y = np.asarray(conv(x, kernel, padding=padding))
    assert (found @ x.ravel()).tolist() == y.ravel().tolist()
    back = np.asarray(conv_transpose(y, kernel.swapaxes(2, 3), padding=padding))
    assert (found.T @ y.ravel()).tolist() == back.ravel().tolist()


def test_the_matrix_is_sparse_and_its_weights_are_shared():
    kernel = np.arange(1.0, 10).reshape(3, 3, 1, 1)
    found = filters.matrix(kernel, size=(10, 10))
    assert found.shape == (64, 100)
    assert found.nnz == 64 * 9
    values, counts = np.unique(found.data, return_counts=True)
    assert values.tolist() == list(range(1, 10))
    assert counts.tolist() == [64] * 9
    # Doubly block Toeplitz: blocks (8, 10) repeat along the diagonals, and each is Toeplitz itself.
    blocks = found.toarray().reshape(8, 8, 10, 10).transpose(0, 2, 1, 3)
    for i in range(8):
        for j in range(10):
            expected = blocks[0, j - i] if j >= i else blocks[i - j, 0]
            assert (blocks[i, j] == expected).all()
            assert all(len(set(np.diagonal(blocks[i, j], k))) == 1 for k in range(-7, 10))


def test_convolution_commutes_and_correlation_does_not():
    a, b = whole(0, (5, 7)), whole(1, (3, 4))
    convolved = filters.full_convolution(a, b)
    assert convolved.tolist() == filters.full_convolution(b, a).tolist()
    np.testing.assert_array_equal(convolved, signal.convolve2d(a, b).round())
    correlated = filters.full_correlation(a, b)
    np.testing.assert_array_equal(correlated, signal.correlate2d(a, b).round())
    reverse = filters.full_correlation(b, a)
    assert (correlated != reverse).any()
    assert correlated.tolist() == reverse[::-1, ::-1].tolist()


def test_convolution_is_associative():
    a, b, c = whole(0, (4, 4)), whole(1, (3, 2)), whole(2, (2, 3))
    left = filters.full_convolution(filters.full_convolution(a, b), c)
    assert left.tolist() == filters.full_convolution(a, filters.full_convolution(b, c)).tolist()


def zeros_around(system, margin):
    def run(x):
        x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        return system(x)[:, margin:-margin, margin:-margin]

    return run


def test_a_linear_shift_invariant_system_is_its_impulse_response():
    def chain(x):
        x = filters.filtered(x, filters.gaussian(1, size=5))
        return 2 * filters.filtered(x, filters.sharpening()) - filters.filtered(x, filters.vertical_edges())

    system, x = zeros_around(chain, 8), jnp.asarray(normal(0, (2, 12, 11, 1)))
    response = filters.impulse_response(system, size=(15, 15))
    np.testing.assert_allclose(filters.respond(response, x), system(x), atol=1e-5)
    # Of the impulse itself, and for an even size.
    assert filters.impulse_response(lambda x: x, size=(4, 6)).tolist()[2][3] == 1
    np.testing.assert_array_equal(filters.respond(filters.impulse_response(lambda x: x, size=(4, 6)), x), x)


def test_other_systems_are_not(temple):
    x = luminance(temple)[:, :20, :20, :1] - 0.5
    for system in (jax.nn.relu, lambda x: x * jnp.arange(x.shape[2], dtype=x.dtype).reshape(1, 1, -1, 1)):
        response = filters.impulse_response(system, size=(9, 9))
        error = jnp.abs(filters.respond(response, x) - system(x)).max()
        assert error > 0.1


def test_the_picture(tmp_path):
    filters.gallery(normal(0, (20, 30)) * 0.1 + 0.5, tmp_path / "filters.png", title="noise")
    with Image.open(tmp_path / "filters.png") as picture:
        assert picture.size == (1700, 600)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filters.box(0, 3), "box filter of 0 x 3"),
        (lambda: filters.gaussian(0), "sigma 0"),
        (lambda: filters.gaussian(1, size=4), "size 4"),
        (lambda: filters.filtered(jnp.ones((4, 4)), filters.box(1, 1)), "expected images"),
        (lambda: filters.matrix(np.ones((3, 3)), size=(5, 5)), "expected"),
        (lambda: filters.matrix(np.ones((3, 3, 1, 1)), size=(2, 5)), "larger than the image"),
        (lambda: filters.impulse_response(lambda x: x[:, 1:], size=(4, 4)), "same size"),
        (lambda: filters.full_convolution(np.ones(3), np.ones((1, 1))), "two arrays"),
        (lambda: filters.gallery(np.ones((3, 3, 3)), None), "grey"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
