"""Modes of differentiation equal each other, and cost what theory says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcnn.analysis import differentiation
from jaxcnn.analysis.differentiation import MODES, differentiate, grow, measure, plot, two_layers
from jaxcnn.errors import InputError


def vectors(n, m):
    return [jax.random.normal(jax.random.key(i), (size,)) for i, size in enumerate((n, n, m))]


@pytest.mark.parametrize(("n", "m"), [(3, 5), (4, 1)])
def test_modes_agree(n, m):
    f, (x, v, u) = two_layers(n, m, width=8), vectors(n, m)
    found = jax.jit(lambda: {mode: differentiate(mode, f, x, tangent=v, cotangent=u) for mode in MODES})()
    jacobian = found["jacrev"]
    assert jacobian.shape == (m, n)
    for mode, expected in [("value", f(x)), ("jacfwd", jacobian), ("jvp", jacobian @ v), ("vjp", u @ jacobian)]:
        np.testing.assert_allclose(found[mode], expected, rtol=1e-5, atol=1e-6)
    hessian = jax.jit(jax.hessian(lambda x: f(x) @ u))(x)
    np.testing.assert_allclose(found["hvp"], hessian @ v, rtol=1e-5, atol=1e-6)


def test_two_layers_by_hand():
    """J = W2 diag(1 - tanh^2) W1."""
    f, (x, _, _) = two_layers(4, 3, width=5), vectors(4, 3)
    w1 = jax.random.normal(jax.random.split(jax.random.key(0))[0], (5, 4)) / 2
    w2 = jax.random.normal(jax.random.split(jax.random.key(0))[1], (3, 5)) / 5**0.5
    expected = w2 @ jnp.diag(1 - jnp.tanh(w1 @ x) ** 2) @ w1
    np.testing.assert_allclose(jax.jacfwd(f)(x), expected, rtol=1e-5, atol=1e-6)


def flops(costs, mode):
    return np.array([cost.flops for cost in costs if cost.mode == mode])


@pytest.mark.slow
def test_work_in_operations():
    """Forward, the Jacobian takes n products; in reverse, m; a product takes a few evaluations whatever n and m."""
    wide = grow([(64, 1), (256, 1)], function=lambda n, m: two_layers(n, m, width=32), runs=1)
    forward, reverse, value = (flops(wide, mode) for mode in ("jacfwd", "jacrev", "value"))
    assert (forward / value > 0.5 * np.array([64, 256])).all()
    assert (reverse / value < 4).all()
    tall = grow([(1, 64), (1, 256)], function=lambda n, m: two_layers(n, m, width=32), runs=1)
    forward, reverse, value = (flops(tall, mode) for mode in ("jacfwd", "jacrev", "value"))
    assert (reverse / value > 0.5 * np.array([64, 256])).all()
    assert (forward / value < 4).all()
    for costs in (wide, tall):
        for mode in ("jvp", "vjp", "hvp"):
            assert (flops(costs, mode) / flops(costs, "value") < 8).all()


def test_memory_of_whole_jacobians():
    def memory(n, m):
        return {cost.mode: cost.bytes for cost in grow([(n, m)], function=small, runs=1)}

    small = lambda n, m: two_layers(n, m, width=16)  # noqa: E731
    used = memory(128, 128)
    for mode in ("jacfwd", "jacrev"):
        assert used[mode] >= 4 * 128 * 128
    for mode in ("value", "jvp", "vjp", "hvp"):
        assert used[mode] < 4 * 128 * 128 / 4


def test_what_is_measured():
    costs = measure(two_layers(3, 2, width=4), jnp.ones(3), modes=["jvp", "vjp"], runs=2)
    assert [(cost.mode, cost.inputs, cost.outputs) for cost in costs] == [("jvp", 3, 2), ("vjp", 3, 2)]
    assert all(cost.seconds > 0 for cost in costs)


def test_the_picture(tmp_path):
    def costs(sizes):
        return [
            differentiation.Cost(mode, n, m, 1e-5 * (1 + i) * n**0.5, 1.0, 100 * n * m)
            for n, m in sizes
            for i, mode in enumerate(MODES)
        ]

    plot(costs([(1, 4), (10, 4)]), costs([(4, 1), (4, 10)]), tmp_path / "cost.png")
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.size == (1100, 800)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(jnp.sin, jnp.ones(3), modes=["jacrew"]), "did you mean 'jacrev'"),
        (lambda: measure(jnp.sin, jnp.ones(3), runs=0), "runs 0"),
        (lambda: measure(jnp.sum, jnp.ones(3)), "expected vectors"),
        (lambda: measure(jnp.sin, jnp.ones((3, 3))), "expected vectors"),
        (lambda: differentiate("jvp", jnp.sin, jnp.ones(3), tangent=jnp.ones(2), cotangent=jnp.ones(3)), "tangent"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
