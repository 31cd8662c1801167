"""Negative log likelihoods of predicted densities against SciPy, closed forms and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxcnn.errors import InputError
from jaxcnn.losses import gaussian, gaussian_nll, mixture, mixture_nll, mse
from jaxcnn.models.density import GaussianParameters, MixtureParameters

B, K, D = 5, 3, 2


@pytest.fixture
def targets():
    return np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)


@pytest.fixture
def one():
    rng = np.random.default_rng(1)
    return GaussianParameters(*(jnp.float32(x) for x in (rng.normal(size=(B, D)), rng.uniform(0.2, 3, (B, D)))))


@pytest.fixture
def several():
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(B, K)) * 3, rng.normal(size=(B, K, D)), rng.uniform(0.2, 3, (B, K))
    return MixtureParameters(*(jnp.float32(x) for x in draws))


@pytest.mark.usefixtures("strict_dtypes")
def test_gaussian_nll_is_scipys(one, targets):
    expected = -stats.norm.logpdf(targets, one.mean, one.scale).sum(1)
    np.testing.assert_allclose(gaussian_nll(one, targets), expected, rtol=1e-5)


@pytest.mark.usefixtures("strict_dtypes")
def test_mixture_nll_is_scipys(several, targets):
    log_density = stats.norm.logpdf(targets[:, None], several.means, several.scales[:, :, None]).sum(2)
    expected = -special.logsumexp(special.log_softmax(several.logits, 1) + log_density, axis=1)
    np.testing.assert_allclose(mixture_nll(several, targets), expected, rtol=1e-5)


def test_with_a_fixed_scale_it_is_the_squared_error_up_to_constants(one, targets):
    s = 0.7
    nll = gaussian_nll(one._replace(scale=np.full((B, D), s)), targets)
    expected = D * mse(one.mean, targets) / (2 * s**2) + D / 2 * np.log(2 * np.pi * s**2)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_a_mixture_of_equal_components_is_one_gaussian(one, targets):
    scale = jnp.repeat(one.scale[:, :1], D, axis=1)
    logits = jnp.float32(np.random.default_rng(3).normal(size=(B, K)))
    same = MixtureParameters(logits, jnp.repeat(one.mean[:, None], K, axis=1), jnp.repeat(one.scale[:, :1], K, axis=1))
    np.testing.assert_allclose(mixture_nll(same, targets), gaussian_nll(one._replace(scale=scale), targets), rtol=1e-5)


def test_the_order_of_components_and_a_shift_of_the_logits_do_not_matter(several, targets):
    expected = mixture_nll(several, targets)
    turned = MixtureParameters(*(x[:, ::-1] for x in several))
    np.testing.assert_allclose(mixture_nll(turned, targets), expected, rtol=1e-5)
    np.testing.assert_allclose(mixture_nll(several._replace(logits=several.logits + 10), targets), expected, rtol=1e-5)


def test_the_density_of_a_mixture_integrates_to_1(several):
    grid = np.linspace(-40, 40, 8001, dtype=np.float32)
    first = MixtureParameters(several.logits[:1], several.means[:1, :, :1], several.scales[:1])
    everywhere = MixtureParameters(*(jnp.repeat(x, len(grid), axis=0) for x in first))
    density = np.exp(-np.asarray(mixture_nll(everywhere, grid[:, None])))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-4)


def test_gradients_are_those_of_the_papers(several, targets, float64):
    """Bishop 1994, section 3: by the posterior weight of each component."""
    several, targets = MixtureParameters(*(jnp.float64(x) for x in several)), targets.astype(np.float64)
    g = jax.grad(lambda p: mixture_nll(p, targets).sum())(several)
    log_density = stats.norm.logpdf(targets[:, None], several.means, several.scales[:, :, None]).sum(2)
    posterior = special.softmax(several.logits + log_density, 1)
    apart = several.means - targets[:, None]
    np.testing.assert_allclose(g.logits, special.softmax(several.logits, 1) - posterior, rtol=1e-10)
    np.testing.assert_allclose(g.means, posterior[..., None] * apart / several.scales[..., None] ** 2, rtol=1e-10)
    in_scale = posterior * (D / several.scales - (apart**2).sum(2) / several.scales**3)
    np.testing.assert_allclose(g.scales, in_scale, rtol=1e-10)


def test_far_targets_and_extreme_logits_stay_finite():
    far = MixtureParameters(jnp.array([[2e4, -2e4]]), jnp.zeros((1, 2, 1)), jnp.full((1, 2), 1e-3))
    loss, gradient = jax.value_and_grad(lambda p: mixture_nll(p, np.full((1, 1), 1e3)).sum())(far)
    np.testing.assert_allclose(loss, 1e12 / 2, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_bfloat16_is_reduced_in_float32_and_float64_stays(one, several, targets, float64):
    for loss, parameters in ((gaussian_nll, one), (mixture_nll, several)):
        small = type(parameters)(*(jnp.asarray(x, jnp.bfloat16) for x in parameters))
        wide = type(parameters)(*(jnp.float64(x) for x in parameters))
        assert loss(small, targets).dtype == jnp.float32
        assert loss(wide, targets.astype(np.float64)).dtype == jnp.float64


def test_the_trainers_losses_read_the_label_of_the_batch(one, several, targets):
    batch = {"label": targets, "image": None}
    np.testing.assert_array_equal(gaussian()(one, batch), gaussian_nll(one, targets))
    np.testing.assert_array_equal(mixture()(several, batch), mixture_nll(several, targets))


def test_shapes_that_do_not_belong_together_are_refused(one, several, targets):
    with pytest.raises(InputError, match=r"targets \(5,\).*expected \(b, d\)"):
        gaussian_nll(one, targets[:, 0])
    with pytest.raises(InputError, match=r"a scale \(5, 1\)"):
        gaussian_nll(one._replace(scale=one.scale[:, :1]), targets)
    with pytest.raises(InputError, match=r"targets \(5, 1\).*means \(5, 3, 2\)"):
        mixture_nll(several, targets[:, :1])
    with pytest.raises(InputError, match="expected"):
        mixture_nll(several._replace(scales=np.ones((B, K, D))), targets)
