"""Density networks: their parameters, and Bishop's inverse problem, where one Gaussian cannot be right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcnn.errors import InputError
from jaxcnn.losses import gaussian_nll, mixture_nll
from jaxcnn.models import create
from jaxcnn.models.density import GaussianParameters, MixtureParameters
from jaxcnn.tree import flatten


def shapes(name, size=(1,), **overrides):
    module, x = create(name, **overrides), jax.ShapeDtypeStruct((4, *size), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), x)


def test_one_gaussian_gives_a_mean_and_a_scale_for_each_output():
    outputs, variables = shapes("gaussian_density", (7,), outputs=3, depth=2, width=5)
    assert isinstance(outputs, GaussianParameters)
    assert (outputs.mean.shape, outputs.scale.shape) == ((4, 3), (4, 3))
    kernels = {path: leaf.shape for path, leaf in flatten(variables["params"]).items() if path.endswith("kernel")}
    assert kernels == {
        "dense1/kernel": (7, 5),
        "dense2/kernel": (5, 5),
        "mean/kernel": (5, 3),
        "scale/kernel": (5, 3),
    }
    assert set(variables) == {"params"}


def test_a_mixture_ends_in_outputs_plus_two_numbers_for_each_component():
    outputs, variables = shapes("mixture_density", (7,), outputs=3, components=4, width=5)
    assert isinstance(outputs, MixtureParameters)
    assert [x.shape for x in outputs] == [(4, 4), (4, 4, 3), (4, 4)]
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert total == (7 + 1) * 5 + (5 + 1) * (3 + 2) * 4


@pytest.mark.parametrize("name", ["gaussian_density", "mixture_density"])
def test_images_are_flattened(name):
    assert shapes(name, (4, 3, 2))[1] == shapes(name, (24,))[1]


def test_scales_are_positive_whatever_the_network_says():
    x = jnp.array([[-1e4], [0.0], [1e4]])
    for name in ("gaussian_density", "mixture_density"):
        module = create(name, floor=0.01, act="identity")
        outputs = module.init_with_output(jax.random.key(0), x, train=False)[0]
        scale = np.asarray(outputs[-1])
        assert np.isfinite(scale).all()
        assert scale.min() >= 0.01
        np.testing.assert_allclose(scale[1], np.log(2) + 0.01, rtol=1e-5)  # softplus(0) + floor


def inverse_problem(rng, n):
    """Bishop 1994, section 5: x = y + 0.3 sin(2 pi y) + noise, and y is asked for; the noise is normal here."""
    y = rng.uniform(0, 1, n)
    x = y + 0.3 * np.sin(2 * np.pi * y) + rng.normal(0, NOISE, n)
    return np.float32(x[:, None]), np.float32(y[:, None])


NOISE = 0.1


def least_losses():
    """(mixture, Gaussian): the entropy of p(y | x), and the mean of log(2 pi e Var[y | x]) / 2, on a grid."""
    y, x = np.linspace(0, 1, 801), np.linspace(-0.6, 1.6, 1101)
    centre = y + 0.3 * np.sin(2 * np.pi * y)
    joint = np.exp(-((x[:, None] - centre[None]) ** 2) / (2 * NOISE**2)) / np.sqrt(2 * np.pi * NOISE**2)
    marginal = np.trapezoid(joint, y)
    mean, square = (np.trapezoid(joint * v, y) / marginal for v in (y[None], y[None] ** 2))
    gaussian = np.trapezoid(marginal * np.log(2 * np.pi * np.e * (square - mean**2)) / 2, x)
    # H(y | x) = H(y) + H(x | y) - H(x), with H(y) = 0
    mixture = np.log(2 * np.pi * np.e * NOISE**2) / 2 + np.trapezoid(marginal * np.log(marginal), x)
    return mixture, gaussian


def fitted(name, nll, steps=1500):
    """Mean loss on 5000 new examples after `steps` of Adam on 2000."""
    rng = np.random.default_rng(0)
    x, y = inverse_problem(rng, 2000)
    new_x, new_y = inverse_problem(rng, 5000)
    module = create(name, depth=2)
    params = module.init(jax.random.key(0), x, train=False)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss(params, x, y):
        return nll(module.apply(params, x, train=False), y).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params, x, y), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), None, steps)[0][0]

    return float(jax.jit(loss)(train(params), new_x, new_y))


@pytest.mark.slow
def test_on_bishops_inverse_problem_a_mixture_is_right_and_one_gaussian_is_not():
    least_mixture, least_gaussian = least_losses()
    mixture, gaussian = fitted("mixture_density", mixture_nll), fitted("gaussian_density", gaussian_nll)
    assert mixture < gaussian - 0.3
    assert least_gaussian - 0.05 < gaussian < least_gaussian + 0.1
    assert least_mixture - 0.05 < mixture < least_mixture + 0.1


@pytest.mark.parametrize(("name", "nll"), [("gaussian_density", gaussian_nll), ("mixture_density", mixture_nll)])
def test_bfloat16_loss_and_gradient_are_finite(name, nll):
    module = create(name, outputs=2, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    params = module.init(jax.random.key(1), x, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def loss(params):
        outputs = module.apply(params, x, train=True)
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("bfloat16")}
        return nll(outputs, np.zeros((4, 2), np.float32)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("gaussian_density", outputs=0), "0 outputs"),
        (lambda: create("mixture_density", components=0), "0 components"),
        (lambda: create("gaussian_density", floor=0.0), r"floor 0\.0: expected a positive number"),
        (lambda: create("gaussian_density", num_classes=3), "unknown override of model 'gaussian_density'"),
        (
            lambda: shapes("mixture_density", ()),
            r"expected vectors \(b, d\) or images \(b, h, w, c\), got shape \(4,\)",
        ),
        (lambda: shapes("mixture_density", (0,)), r"got shape \(4, 0\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
