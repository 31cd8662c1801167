"""The self-normalising network: the fixed point of SELU's map of moments, and what depth does to activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.models import create
from jaxcnn.tree import flatten

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017


def selu_moments(mean, variance):
    """Mean and variance of selu(z) for z ~ N(mean, variance): the map of the paper, in terms of normal integrals."""
    s = np.sqrt(variance)

    def tail(k):  # E[exp(k z); z < 0]
        return np.exp(k * mean + k**2 * variance / 2) * stats.norm.cdf(-(mean + k * variance) / s)

    positive, density = stats.norm.cdf(mean / s), s * stats.norm.pdf(mean / s)
    first = SCALE * (mean * positive + density + ALPHA * (tail(1) - tail(0)))
    squares = (mean**2 + variance) * positive + mean * density + ALPHA**2 * (tail(2) - 2 * tail(1) + tail(0))
    return first, SCALE**2 * squares - first**2


def activations(variables, module, x, **call):
    found = module.apply(variables, x, capture_intermediates=True, mutable=["intermediates"], **call)[1]
    return {
        name: np.asarray(value["__call__"][0]) for name, value in found["intermediates"].items() if name != "__call__"
    }


def test_mean_0_and_variance_1_are_a_fixed_point_of_selu():
    np.testing.assert_allclose(selu_moments(0.0, 1.0), (0, 1), atol=1e-12)


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.3, 0.7), (-0.5, 2.0)])
def test_the_activation_has_the_moments_of_the_closed_form(mean, variance):
    z = np.linspace(-12, 12, 200_001)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    y = np.asarray(activation("selu")(jnp.asarray(mean + np.sqrt(variance) * z, jnp.float32)), np.float64)
    first = (weight * y).sum()
    np.testing.assert_allclose((first, (weight * y**2).sum() - first**2), selu_moments(mean, variance), atol=1e-4)


def test_the_fixed_point_attracts_with_the_papers_slopes():
    """Klambauer et al. 2017: the Jacobian at (0, 1) is [[0, 0.088834], [0, 0.782648]], for weights of norm 1."""
    h = 1e-5
    slopes = (np.array(selu_moments(0.0, 1 + h)) - np.array(selu_moments(0.0, 1 - h))) / (2 * h)
    np.testing.assert_allclose(slopes, (0.088834, 0.782648), atol=1e-6)
    for variance in (0.8, 1.5):
        moments = (0.1, variance)
        for _ in range(100):
            moments = selu_moments(0.0, moments[1] + moments[0] ** 2)  # norm 1 keeps the second moment
        np.testing.assert_allclose(moments, (0, 1), atol=1e-6)


def test_32_layers_of_selu_keep_mean_0_and_variance_1_and_others_do_not():
    x = jax.random.normal(jax.random.key(0), (512, 64))
    last = {}
    for act in ("selu", "relu", "tanh"):
        module = create("snn", depth=32, act=act)
        variables = module.init(jax.random.key(1), x, train=False)
        found = activations(variables, module, x, train=False)
        last[act] = [(found[f"act{i}"].mean(), found[f"act{i}"].var()) for i in range(1, 33)]
    means, variances = np.array(last["selu"]).T
    assert np.abs(means).max() < 0.15
    assert variances.min() > 0.75
    assert variances.max() < 1.3
    # ReLU halves the second moment in each layer; tanh shrinks it like 1 / (2 layers).
    assert last["relu"][-1][1] < 1e-8
    assert last["tanh"][-1][1] < 0.05


def test_alpha_dropout_keeps_both_moments_and_acts_in_training_alone():
    x = jax.random.normal(jax.random.key(0), (512, 64))
    module = create("snn", depth=8, dropout=0.1)
    variables = module.init(jax.random.key(1), x, train=False)
    trained = activations(variables, module, x, train=True, rngs={"dropout": jax.random.key(2)})
    assert abs(trained["dropout8"].mean()) < 0.15
    assert 0.8 < trained["dropout8"].var() < 1.25
    assert (trained["dropout8"] != trained["act8"]).any()
    evaluated = activations(variables, module, x, train=False)
    np.testing.assert_array_equal(evaluated["dropout8"], evaluated["act8"])


def test_hidden_layers_and_parameters():
    def params(size=(28, 28, 1), **overrides):
        module, x = create("snn", **overrides), jax.ShapeDtypeStruct((2, *size), jnp.float32)
        return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)["params"]

    total = sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert total == 785 * 256 + 7 * 257 * 256 + 257 * 10
    small = params((5,), depth=2, width=3, num_classes=4)
    assert {name: layer["kernel"].shape for name, layer in small.items()} == {
        "dense1": (5, 3),
        "dense2": (3, 3),
        "dense3": (3, 4),
    }
    assert params((5,)) == params((5, 1, 1))


def test_weights_have_variance_1_over_fan_in_and_biases_are_0():
    params = flatten(create("snn", depth=1).init(jax.random.key(0), jnp.ones((1, 400)), train=False)["params"])
    np.testing.assert_allclose(params["dense1/kernel"].var(), 1 / 400, rtol=0.03)
    assert not params["dense1/bias"].any()


def test_bfloat16_forward_and_gradient_are_finite():
    module = create("snn", depth=3, width=8, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 6))
    params = module.init(jax.random.key(1), x, train=False)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def loss(params):
        out = module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
        assert jax.tree.leaves(out)[0].dtype == jnp.bfloat16
        return jnp.float32(out).mean()

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_bad_input():
    with pytest.raises(InputError, match="expected images"):
        create("snn").init(jax.random.key(0), jnp.ones(4), train=False)
    with pytest.raises(InputError, match=r"dropout rate 1\.0"):
        create("snn", dropout=1.0).init(jax.random.key(0), jnp.ones((2, 4)), train=False)
