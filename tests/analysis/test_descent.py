"""Gradients of one sign and the shape of the loss, against closed forms; dead units (row A14)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcnn.analysis.descent import curvature, descend, descents, plot_descents, prepared, zigzag
from jaxcnn.analysis.signal import probe
from jaxcnn.errors import InputError
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.models import create

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def size(path):
    with Image.open(path) as picture:
        return picture.size


def variables_of(module, *shape, **keywords):
    return module.init(jax.random.key(0), jnp.zeros((1, *shape)), **keywords)


# Gradients of one sign


def test_inputs_of_one_sign_give_gradients_of_one_sign():
    positive = RNG.uniform(0.1, 1, (20, 1, 1, 6)).astype(np.float32)
    for act in ("sigmoid", "relu"):
        found = zigzag(create("mlp", depth=2, width=16, act=act), positive)
        assert [one.name for one in found] == ["dense1/kernel", "dense2/kernel", "dense3/kernel"]
        assert [one.inputs for one in found] == [6, 16, 16]
        assert [one.share for one in found] == [1, 1, 1]
        # Of a dead ReLU there is no gradient to count.
        assert (found[0].counted == 20 * 16) == (act == "sigmoid")


@pytest.mark.parametrize("n", [2, 3, 5])
def test_zero_centred_inputs_give_2_to_the_1_minus_n(n):
    """In the first layer, whose inputs are independent; all units of an example see the same, so there are b draws."""
    b, share = 400, 2.0 ** (1 - n)
    first, second = zigzag(create("mlp", depth=1, width=8, act="tanh"), noise(b, 1, 1, n))
    assert first.share == pytest.approx(share, abs=4 * math.sqrt(share / b))
    assert second.share < 0.1


def test_signs_are_those_of_the_jacobian():
    module = nn.Sequential([nn.Conv(3, (2, 2)), jnp.tanh, lambda x: x.reshape(len(x), -1), nn.Dense(2)])
    x, variables = noise(5, 3, 3, 1), variables_of(module, 3, 3, 1)
    found = zigzag(module, x, variables=variables, seed=4)
    keys, expected = jax.random.split(jax.random.key(4), 5), []
    for i in range(5):
        u = jax.random.normal(keys[i], (1, 2))
        jacobian = jax.jacobian(lambda p, i=i: module.apply({"params": p}, x[i : i + 1]))(variables["params"])
        gradient = np.einsum("ij,ijklmn->klmn", u, jacobian["layers_0"]["kernel"]).reshape(4, 3)
        expected += [abs(np.sign(column).sum()) == 4 for column in gradient.T]
    assert found[0].share == pytest.approx(np.mean(expected))
    assert found[0].counted == 15


def test_zigzag_refuses_what_has_no_weights():
    with pytest.raises(InputError, match="no parameters of two axes"):
        zigzag(BatchNorm(), noise(2, 3, 3, 1))
    with pytest.raises(InputError, match="a batch of examples"):
        zigzag(nn.Dense(2), np.zeros((0, 3), np.float32))


# The shape of the loss


def test_curvature_is_the_hessian():
    x = noise(30, 3)
    found = curvature(x)
    hessian = jax.hessian(lambda w: (jnp.square(x @ w) / 2).mean())(jnp.zeros(3))
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(hessian), rtol=1e-4)
    assert found.condition == pytest.approx(np.linalg.cond(hessian), rel=1e-4)
    assert found.largest_rate == pytest.approx(2 / found.eigenvalues[-1])
    assert curvature(np.ones((5, 2))).condition == math.inf
    assert curvature(np.zeros((5, 2))).largest_rate == math.inf


def test_condition_in_closed_form():
    """Independent columns of mean m and variance s^2: H = diag(s^2) + m m^T, and diag(s^2) once centred."""
    n, s, m = 200_000, np.array([1.0, 3.0]), np.array([2.0, 5.0])
    x = RNG.standard_normal((n, 2)) * s + m
    tables = prepared(x)
    expected = np.linalg.cond(np.diag(s**2) + np.outer(m, m))
    assert curvature(tables["raw"]).condition == pytest.approx(expected, rel=0.02)
    assert curvature(tables["centred"]).condition == pytest.approx(9, rel=0.02)
    assert curvature(tables["standardised"]).condition == pytest.approx(1, rel=0.02)
    constant = prepared(np.stack([x[:, 0], np.full(n, 7.0)], 1))["standardised"]
    assert not constant[:, 1].any()


def test_descent_diverges_from_the_largest_rate_on():
    x = noise(50, 2) + 1
    largest = curvature(x).largest_rate
    assert descend(x, target=(1, -1), learning_rate=0.99 * largest).arrived
    diverged = descend(x, target=(1, -1), learning_rate=1.01 * largest)
    assert not diverged.arrived
    assert np.linalg.norm(diverged.weights[-1]) > 100


def test_a_descent_is_its_closed_form():
    """w_t = (1 - (1 - eta H)^t) w*."""
    x, target = noise(40, 2), np.array([1.0, -2.0])
    found = descend(x, target=target, learning_rate=0.1)
    hessian = np.float64(x).T @ np.float64(x) / 40
    t = found.steps // 2
    expected = target - np.linalg.matrix_power(np.eye(2) - 0.1 * hessian, t) @ target
    np.testing.assert_allclose(found.weights[t], expected, rtol=1e-9)
    before, last = (np.linalg.norm(w - target) / np.linalg.norm(target) for w in found.weights[-2:])
    assert last <= 0.01 < before


def test_positive_inputs_zigzag_and_take_longer(tmp_path):
    inputs = np.random.default_rng(1).uniform(size=(200, 2))
    found = descents(inputs, batch=1, share=0.5)
    steps = np.diff(found["raw"].weights, axis=0)
    assert (steps[:, 0] * steps[:, 1] >= 0).all()  # never towards (1, -1) itself
    assert (np.diff(found["centred"].weights, axis=0).prod(1) < 0).any()
    assert found["raw"].steps > 3 * found["centred"].steps
    assert all(one.arrived for one in found.values())
    path = tmp_path / "zigzag.png"
    plot_descents(found, path, title="Descent by single examples: inputs in (0, 1), as they are and centred")
    assert size(path)[0] > 1000


def test_standardised_inputs_need_the_fewest_steps(tmp_path):
    found = descents(noise(100, 2) * np.array([1, 0.3]) + np.array([1.5, 0.7]))
    raw, centred, standardised = (one.steps for one in found.values())
    assert raw > centred > standardised
    path = tmp_path / "loss.png"
    plot_descents(found, path, title="The loss of a linear unit over its two weights")
    assert size(path)[0] > 1000


def test_descents_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="divides"):
        descend(noise(10, 2), target=(1, 1), learning_rate=0.1, batch=3)
    with pytest.raises(InputError, match="expected 2 weights"):
        descend(noise(10, 2), target=(1,), learning_rate=0.1)
    with pytest.raises(InputError, match="learning_rate inf"):
        descents(np.ones((4, 2)))
    with pytest.raises(InputError, match="expected \\(n, d\\)"):
        curvature(np.ones(4))
    with pytest.raises(InputError, match="n, 2"):
        plot_descents(descents(noise(9, 3), target=(1, 1, 1)), None, title="")  # pyright: ignore


# Dead units


def test_probe_counts_the_units_that_a_learning_rate_killed():
    """One large step of descent on the mean of |outputs|."""
    module = create("mlp", depth=1, width=32, num_classes=1)
    x = RNG.uniform(size=(50, 1, 1, 8)).astype(np.float32)
    variables = variables_of(module, 1, 1, 8, train=False)
    gradient = jax.grad(lambda v: jnp.abs(module.apply(v, x, train=False)).mean())(variables)
    before, after = (jax.tree.map(lambda v, g, rate=r: np.asarray(v - rate * g), variables, gradient) for r in (0, 10))

    def dead(variables):
        dense = variables["params"]["dense1"]
        return (x.reshape(50, 8) @ dense["kernel"] + dense["bias"] <= 0).all(0).mean()

    assert probe(module, x, variables=after).layers[1].dead == pytest.approx(dead(after))
    assert dead(after) > dead(before)
