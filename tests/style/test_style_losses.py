"""The losses of style transfer against NumPy in float64, closed forms, and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.linalg import sqrtm

from jaxcnn.style.losses import (
    Moments,
    content_loss,
    covariance,
    gram_loss,
    moments,
    normalised,
    total_variation,
    wasserstein_loss,
    weighted_sums,
)

STYLE = {"gram": gram_loss, "wasserstein": wasserstein_loss}
ONE_SIZE, OTHER_SIZE, CHANNELS = (9, 7), (6, 13), 5


def features(seed, *, batch=2, size=ONE_SIZE, channels=CHANNELS, scale=3.0):
    """Non-negative and correlated, as what follows a ReLU."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels))
    return np.maximum(scale * rng.normal(size=(batch, *size, channels)) @ mixing + 0.5, 0)


def maps(seed, *, regions=3, size=ONE_SIZE):
    return np.random.default_rng(seed).uniform(size=(regions, *size))


def reference_moments(f, weights=None):
    """Location by location, as the equation has it."""
    weights = np.ones((1, *f.shape[1:3])) if weights is None else weights
    shape = (len(f), len(weights))
    mean, gram = np.zeros((*shape, f.shape[-1])), np.zeros((*shape, f.shape[-1], f.shape[-1]))
    for b, r in np.ndindex(*shape):
        for y, x in np.ndindex(*f.shape[1:3]):
            mean[b, r] += weights[r, y, x] * f[b, y, x] / weights[r].sum()
            gram[b, r] += weights[r, y, x] * np.outer(f[b, y, x], f[b, y, x]) / weights[r].sum()
    return mean, gram


def reference_gram(found, target):
    n = found[1].shape[-1]
    return ((found[1] - target[1]) ** 2).sum((-2, -1)) / (4 * n**2)


def reference_wasserstein(found, target):
    distances = np.zeros(found[0].shape[:2])
    for b, r in np.ndindex(*distances.shape):
        (m, g), (m2, g2) = ((each[0][b, r], each[1][b, r]) for each in (found, target))
        c, c2 = g - np.outer(m, m), g2 - np.outer(m2, m2)
        root = sqrtm(c2)
        distances[b, r] = ((m - m2) ** 2).sum() + np.trace(c + c2 - 2 * sqrtm(root @ c @ root)).real
    return distances


REFERENCES = {"gram": reference_gram, "wasserstein": reference_wasserstein}


def gaussian(mean, covariance):
    """Moments of one example and region."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    return Moments(jnp.asarray(mean[None, None]), jnp.asarray((covariance + np.outer(mean, mean))[None, None]))


def positive_definite(seed, channels=4):
    x = np.random.default_rng(seed).normal(size=(3 * channels, channels))
    return x.T @ x / len(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_loss_is_that_of_numpy(dtype, float64):
    """To 1e-6 for features in float32 too, but for what is left of Wasserstein's traces."""
    found, target = features(0).astype(dtype), features(1, size=OTHER_SIZE).astype(dtype)
    same_size, image = features(2).astype(dtype), features(3, channels=3, scale=0.3).astype(dtype)
    f, t, s, x = (each.astype(np.float64) for each in (found, target, same_size, image))
    rtol = 1e-6 if dtype == np.float32 else 1e-10

    np.testing.assert_allclose(content_loss(found, same_size), 0.5 * ((f - s) ** 2).sum((1, 2, 3)), rtol=rtol)
    weights = maps(0, regions=1)[0]
    weighted = 0.5 * (weights[:, :, None] * (f - s) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(content_loss(found, same_size, jnp.asarray(weights)), weighted, rtol=rtol)
    down, across = np.diff(x, axis=1), np.diff(x, axis=2)
    variation = (down**2).sum((1, 2, 3)) + (across**2).sum((1, 2, 3))
    np.testing.assert_allclose(total_variation(jnp.asarray(image)), variation, rtol=rtol)

    ours, theirs = moments(jnp.asarray(found)), moments(jnp.asarray(target))
    for name, loss in STYLE.items():
        expected = REFERENCES[name](reference_moments(f), reference_moments(t))
        assert loss(ours, theirs).dtype == dtype
        np.testing.assert_allclose(loss(ours, theirs), expected, rtol=rtol * (1 if name == "gram" else 10))


@pytest.mark.parametrize("regions", [None, 1, 3])
def test_moments_are_those_of_numpy(regions, float64):
    f = features(0)
    weights = None if regions is None else maps(1, regions=regions)
    ours = moments(jnp.asarray(f), None if weights is None else jnp.asarray(weights))
    for one, expected in zip(ours, reference_moments(f, weights), strict=True):
        assert one.shape[:2] == (2, regions or 1)
        np.testing.assert_allclose(one, expected, rtol=1e-10)


@pytest.mark.parametrize("name", STYLE)
def test_losses_of_regions_are_those_of_numpy(name, float64):
    """Every region of every example by itself; one target serves the batch."""
    f, t = features(0), features(1, batch=1, size=OTHER_SIZE)
    here, there = maps(1), maps(2, size=OTHER_SIZE)
    found = STYLE[name](moments(jnp.asarray(f), jnp.asarray(here)), moments(jnp.asarray(t), jnp.asarray(there)))
    target = [np.repeat(each, 2, 0) for each in reference_moments(t, there)]
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, REFERENCES[name](reference_moments(f, here), target), rtol=1e-9)


def test_a_region_of_zeros_and_ones_is_that_part_of_the_map_alone(float64):
    f = features(0)
    mask = np.zeros((1, *ONE_SIZE))
    mask[:, 2:5, 3:] = 1
    part, alone = moments(jnp.asarray(f), jnp.asarray(mask)), moments(jnp.asarray(f[:, 2:5, 3:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), part, alone)


def test_gram_is_equation_4_where_both_images_have_as_many_locations(float64):
    """E = 1 / (4 N^2 M^2) sum (G - A)^2 with G = F F^T, F of N filters by M locations."""
    f, a = features(0), features(1)
    n, m = CHANNELS, ONE_SIZE[0] * ONE_SIZE[1]
    for b, loss in enumerate(gram_loss(moments(jnp.asarray(f)), moments(jnp.asarray(a)))):
        big_f, big_a = f[b].reshape(m, n).T, a[b].reshape(m, n).T
        squares = (big_f @ big_f.T - big_a @ big_a.T) ** 2
        np.testing.assert_allclose(loss, [squares.sum() / (4 * n**2 * m**2)], rtol=1e-12)


def test_scaled_features_scale_the_losses_by_their_powers(float64):
    f, t = jnp.asarray(features(0)), jnp.asarray(features(1))
    for loss, power in ((gram_loss, 4), (wasserstein_loss, 2)):
        once, scaled = loss(moments(f), moments(t)), loss(moments(3 * f), moments(3 * t))
        np.testing.assert_allclose(scaled, 3**power * once, rtol=1e-9)
    np.testing.assert_allclose(content_loss(3 * f, 3 * t), 9 * content_loss(f, t), rtol=1e-12)


def test_gradients_are_finite_differences(float64):
    f, target, weights = jnp.asarray(features(0)), jnp.asarray(features(1)), jnp.asarray(maps(0))
    style = moments(jnp.asarray(features(2, size=OTHER_SIZE)), jnp.asarray(maps(1, size=OTHER_SIZE)))
    losses = [
        lambda f: content_loss(f, target, weights[0]),
        total_variation,
        lambda f: gram_loss(moments(f, weights), style),
        lambda f: wasserstein_loss(moments(f, weights), style),
        lambda f: wasserstein_loss(moments(f), style),
    ]
    for loss in losses:
        check_grads(jax.jit(loss), (f,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_content_loss_has_the_paper_s_derivative(float64):
    """Equation 2: F - P."""
    f, p = jnp.asarray(features(0)), jnp.asarray(features(1))
    np.testing.assert_allclose(jax.grad(lambda f: content_loss(f, p).sum())(f), f - p, rtol=1e-12)


def test_gram_loss_has_the_paper_s_derivative(float64):
    """Equation 6: 1 / (N^2 M^2) F^T (G - A), for M locations on both sides."""
    f, a = features(0, batch=1), features(1, batch=1)
    n, m = CHANNELS, ONE_SIZE[0] * ONE_SIZE[1]
    found = jax.grad(lambda f: gram_loss(moments(f), moments(jnp.asarray(a))).sum())(jnp.asarray(f))
    big_f, big_a = f.reshape(m, n), a.reshape(m, n)
    expected = big_f @ (big_f.T @ big_f - big_a.T @ big_a) / (n**2 * m**2)
    np.testing.assert_allclose(found.reshape(m, n), expected, rtol=1e-10)


def test_wasserstein_of_equal_covariances_is_the_distance_of_the_means(float64):
    c = positive_definite(0)
    found = wasserstein_loss(gaussian([1, 2, 3, 4], c), gaussian([1, 0, 3, 7], c))
    np.testing.assert_allclose(found, [[13]], rtol=1e-9)


def test_wasserstein_of_diagonal_covariances_is_the_distance_of_the_deviations(float64):
    a, b = np.array([0.1, 2, 30]), np.array([4.0, 0.5, 1])
    found = wasserstein_loss(gaussian(np.zeros(3), np.diag(a)), gaussian(np.zeros(3), np.diag(b)))
    np.testing.assert_allclose(found, [[((np.sqrt(a) - np.sqrt(b)) ** 2).sum()]], rtol=1e-12)


def test_wasserstein_is_symmetric_and_0_for_equal_moments(float64):
    one, other = gaussian([1, 2, 3, 4], positive_definite(1)), gaussian([0, 1, 0, 1], positive_definite(2))
    np.testing.assert_allclose(wasserstein_loss(one, other), wasserstein_loss(other, one), rtol=1e-10)
    np.testing.assert_allclose(wasserstein_loss(one, one), 0, atol=1e-12)


def test_wasserstein_of_covariances_on_different_planes(float64):
    """Both of rank 1 and at right angles nothing is saved by moving: the traces remain."""
    u, v = np.array([3.0, 4, 0]), np.array([0, 0, 2.0])
    found = wasserstein_loss(gaussian(np.zeros(3), np.outer(u, u)), gaussian(np.zeros(3), np.outer(v, v)))
    np.testing.assert_allclose(found, [[29]], rtol=1e-9)


@jax.jit
def wasserstein_and_grad(f, target):
    return jax.value_and_grad(lambda f: wasserstein_loss(moments(f), target).sum())(f)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wasserstein_of_covariances_without_full_rank_has_finite_gradients(dtype, float64):
    """As at relu5_1 of a small picture, where filters never answer, and on plain ground."""
    few = features(0, size=(2, 3), channels=12)
    dead = few * (np.arange(12) < 3)
    one = np.broadcast_to(few[:, :1, :1], few.shape)
    cases = [few, dead, one, np.full_like(few, 0.7), np.zeros_like(few)]
    targets = [features(1, channels=12), features(1, size=(1, 4), channels=12), *cases]
    for f, target in itertools.product(cases, targets):
        target = reference_moments(target)
        size = np.abs(f).max() + np.sqrt(np.abs(target[1]).max())
        value, grad = wasserstein_and_grad(jnp.asarray(f.astype(dtype)), Moments(*(t.astype(dtype) for t in target)))
        assert value >= -100 * jnp.finfo(dtype).eps * size**2
        assert np.abs(grad).max() <= 10 * size


def test_wasserstein_falls_along_its_gradient_from_a_covariance_without_full_rank(float64):
    f, target = features(0, size=(2, 3), channels=12), Moments(*reference_moments(features(1, channels=12)))
    value, grad = wasserstein_and_grad(f, target)
    after, _ = wasserstein_and_grad(f - 1e-4 * grad, target)
    np.testing.assert_allclose(value - after, 1e-4 * (grad**2).sum(), rtol=1e-2)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_wasserstein_keeps_its_digits_in_float32(power, float64):
    """Of features whose variances fall as theirs do in a deep layer, i^-power: from themselves, and from others."""
    n, rng = 48, np.random.default_rng(0)
    samples = rng.normal(size=(2, 1, 40, 40, n)) * np.arange(1, n + 1) ** (-power / 2)
    one, other = 1 + samples @ np.linalg.qr(rng.normal(size=(2, 1, 1, n, n)))[0]
    variance = one.var((0, 1, 2)).sum()
    for f, target in ((one, one), (one, other)):
        found = []
        for dtype in (np.float32, np.float64):
            found.append(wasserstein_and_grad(f.astype(dtype), moments(jnp.asarray(target.astype(dtype)))))
        (value, grad), (exact, exact_grad) = found
        assert value.dtype == np.float32
        assert abs(value - exact) <= 1e-4 * variance
        largest = 2 * np.sqrt(variance) / f[0, ..., 0].size  # of what a location pulls as far as the features deviate
        assert np.linalg.norm(grad - exact_grad, axis=-1).max() <= 0.03 * largest


def test_covariance_is_numpy_s(float64):
    f = features(0)
    expected = [np.cov(one.reshape(-1, CHANNELS).T, ddof=0) for one in f]
    np.testing.assert_allclose(covariance(moments(jnp.asarray(f)))[:, 0], expected, rtol=1e-9, atol=1e-12)


def test_total_variation_of_a_ramp_and_of_a_step(float64):
    ramp = np.broadcast_to(np.arange(6.0).reshape(1, 1, 6, 1), (1, 4, 6, 3))
    np.testing.assert_allclose(total_variation(jnp.asarray(ramp)), [4 * 5 * 3])
    assert total_variation(jnp.ones((2, 1, 1, 3))).tolist() == [0, 0]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.lists(st.integers(0, 8), max_size=3), st.lists(st.integers(0, 6), max_size=3))
def test_sums_over_tiles_are_those_of_the_image(seed, rows, columns):
    """Cut anywhere, into strips of no pixel too."""
    with jax.enable_x64(True):
        f, weights = features(seed), maps(seed)
        sums, total = Moments(np.zeros((2, 3, 5)), np.zeros((2, 3, 5, 5))), np.zeros(3)
        rows, columns = sorted({0, *rows, 9}), sorted({0, *columns, 7})
        for top, bottom in itertools.pairwise(rows):
            for left, right in itertools.pairwise(columns):
                here = np.zeros_like(weights)
                here[:, top:bottom, left:right] = weights[:, top:bottom, left:right]
                sums = jax.tree.map(jnp.add, sums, weighted_sums(jnp.asarray(f), jnp.asarray(here)))
                total += here.sum((1, 2))
        whole = moments(jnp.asarray(f), jnp.asarray(weights))
        found = normalised(sums, jnp.asarray(total))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, whole)
