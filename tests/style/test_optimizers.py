"""Adam and L-BFGS by ask and tell, against SciPy and Optax, and on values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from jaxcnn.errors import InputError
from jaxcnn.style import optimizers

SHAPE = (8, 8, 3)
CONDITION = 1e3


def quadratic(seed):
    """1/2 (x - m)^T A (x - m) of pictures (k, 8, 8, 3), eigenvalues 1e-3 to 1; and m."""
    rng, n = np.random.default_rng(seed), int(np.prod(SHAPE))
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    a = jnp.asarray(q * np.geomspace(1 / CONDITION, 1, n) @ q.T)
    least = jnp.asarray(rng.uniform(size=n))

    def value(x):
        off = x.reshape(len(x), -1) - least.reshape(1, -1)
        return 0.5 * (off @ a * off).sum(1)

    return value, least.reshape(1, *SHAPE)


def rosenbrock(x):
    """Of the first two coordinates; the others are to be 0."""
    flat = x.reshape(len(x), -1)
    valley = 100 * (flat[:, 1] - flat[:, 0] ** 2) ** 2 + (1 - flat[:, 0]) ** 2
    return valley + (flat[:, 2:] ** 2).sum(1)


def evaluated(function):
    """(value (k,), gradient) of pictures by one program; `function` sees each by itself."""
    return jax.jit(lambda x: (function(x), jax.grad(lambda x: function(x).sum())(x)))


def states(optimizer, function, x, steps):
    """The state after each evaluation, and which pictures moved."""
    evaluate, tell = evaluated(function), jax.jit(optimizer.tell)
    state = optimizer.init(x)
    for _ in range(steps):
        state, kept = tell(state, *evaluate(state.point))
        yield state, np.asarray(kept)


def lbfgs():
    return optimizers.make("lbfgs", learning_rate=0.02)


def start(seed, count=1):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *SHAPE)))


def test_lbfgs_minimises_a_quadratic_as_fast_as_scipy(float64):
    """By evaluations, each one value and gradient; SciPy's is L-BFGS-B with the same memory."""
    value, _ = quadratic(0)
    x = start(9)
    goal = 1e-8 * float(value(x)[0])
    evaluate, seen = evaluated(value), []

    def flat(x):
        found, grad = evaluate(jnp.asarray(x.reshape(1, *SHAPE)))
        seen.append(float(found[0]))
        return seen[-1], np.asarray(grad, np.float64).ravel()

    minimize(flat, np.asarray(x).ravel(), jac=True, method="L-BFGS-B", options={"maxcor": 10, "ftol": 0, "gtol": 1e-12})
    theirs = next(i for i, found in enumerate(seen) if found < goal)
    ours = next(i for i, (state, _) in enumerate(states(lbfgs(), value, x, 1000)) if state.value[0] < goal)
    assert ours <= 1.2 * theirs + 10


def test_lbfgs_finds_the_minimum_in_float32():
    value, least = quadratic(0)
    *_, (state, _) = states(lbfgs(), value, start(9).astype(jnp.float32), 400)
    assert state.x.dtype == jnp.float32
    assert np.abs(state.x - least).max() < 1e-2
    assert state.value[0] < 1e-7


def test_lbfgs_goes_through_the_valley_of_rosenbrock(float64):
    x = start(0).at[0, 0, 0, :2].set(jnp.asarray([-1.2, 1.0]))
    values = [float(state.value[0]) for state, _ in states(lbfgs(), rosenbrock, x, 150)]
    assert values[-1] < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["quadratic", "rosenbrock", "kinks", "quartic"])
def test_values_of_lbfgs_never_rise(function, dtype, float64):
    """Also where rounding is all that is left, and where gradients jump."""
    value = {
        "quadratic": quadratic(0)[0],
        "rosenbrock": rosenbrock,
        "kinks": lambda x: jnp.abs(x - 0.3).sum((1, 2, 3)) + jnp.maximum(x, 0.5).sum((1, 2, 3)),
        "quartic": lambda x: 1e6 * (x**4).sum((1, 2, 3)),
    }[function]
    values = []
    for state, _ in states(lbfgs(), value, start(1).astype(dtype), 150):
        values.append(float(state.value[0]))
    assert (np.diff(values) <= 0).all()
    assert values[-1] < 0.6 * values[0]
    np.testing.assert_allclose(value(state.x), values[-1:], rtol=1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_pictures_of_a_batch_do_not_know_of_each_other(name, float64):
    optimizer = optimizers.make(name, learning_rate=0.02)
    value, _ = quadratic(0)
    scales = jnp.asarray([1.0, 300.0])
    x = start(3, count=2)
    pair = states(optimizer, lambda x: scales * value(x), x, 60)
    first, second = (
        states(optimizer, lambda x, scale=scale: scale * value(x), x[i : i + 1], 60)
        for i, scale in enumerate((1.0, 300.0))
    )
    for (both, _), (one, _), (other, _) in zip(pair, first, second, strict=True):
        np.testing.assert_allclose(both.x, jnp.concatenate([one.x, other.x]), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(both.point, jnp.concatenate([one.point, other.point]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_state_that_was_taken_apart_goes_on_to_the_same_bits(name):
    """Leaves through host memory, in the middle of a line search too."""
    optimizer = optimizers.make(name, learning_rate=0.02)
    evaluate, tell = evaluated(rosenbrock), jax.jit(optimizer.tell)
    state = other = optimizer.init(start(0).astype(jnp.float32))
    for _ in range(40):
        leaves, structure = jax.tree.flatten(other)
        other = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
        (state, _), (other, _) = (tell(each, *evaluate(each.point)) for each in (state, other))
        jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["value", "grad"])
def test_a_point_that_is_not_finite_is_never_kept_and_lbfgs_goes_around_it(bad, where, float64):
    """Nothing is to be had where any pixel exceeds 0.81; the minimum is at 0.8, with slopes towards the edge."""
    scales = jnp.asarray(np.geomspace(1, 100, 3).reshape(1, 1, 1, 3))
    evaluate = evaluated(lambda x: (scales * jnp.square(x - 0.8)).sum((1, 2, 3)))
    optimizer = lbfgs()
    tell = jax.jit(optimizer.tell)
    state = optimizer.init(0.5 * start(4))
    refused = 0
    for _ in range(100):
        value, grad = evaluate(state.point)
        beyond = bool((state.point > 0.81).any())
        if beyond:
            value, grad = (value + bad, grad) if where == "value" else (value, grad.at[0, 3, 3, 1].set(bad))
        state, kept = tell(state, value, grad)
        refused += beyond
        assert not (beyond and kept.any())
        assert all(np.isfinite(leaf).all() for leaf in (state.value, state.x, state.point))
        assert (state.x <= 0.81).all()
    assert refused > 0
    assert state.value < 1e-6


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_first_value_that_is_not_finite_leaves_the_picture_where_it_is(name, bad):
    optimizer, x = optimizers.make(name, learning_rate=0.02), start(0).astype(jnp.float32)
    state, tell = optimizer.init(x), jax.jit(optimizer.tell)
    for _ in range(50):
        state, kept = tell(state, jnp.full(1, bad), jnp.ones_like(x))
        assert not kept.any()
        np.testing.assert_array_equal(state.x, x)
        np.testing.assert_array_equal(state.point, x)
    state, kept = tell(state, *evaluated(rosenbrock)(state.point))
    assert kept.all()
    assert np.isfinite(state.point).all()
    assert (state.point != x).any()


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_picture_that_is_not_finite_does_not_hold_up_the_others(name, float64):
    optimizer = optimizers.make(name, learning_rate=0.02)
    value, _ = quadratic(0)
    x = start(3, count=2)
    alone = [state.x for state, _ in states(optimizer, value, x[:1], 20)]
    spoilt = states(optimizer, lambda x: value(x) * jnp.asarray([1.0, jnp.nan]), x, 20)
    for expected, (state, kept) in zip(alone, spoilt, strict=True):
        assert kept.tolist() == [True, False] or (name == "lbfgs" and not kept[1])
        np.testing.assert_allclose(state.x[:1], expected, rtol=1e-9)
        np.testing.assert_array_equal(state.x[1], x[1])


def test_adam_takes_the_steps_of_optax(float64):
    value, _ = quadratic(0)
    x, transform, evaluate = start(0), optax.adam(0.02), evaluated(value)
    inner = transform.init(x)
    for state, kept in states(optimizers.make("adam", learning_rate=0.02), value, x, 20):
        found, grad = evaluate(x)
        np.testing.assert_allclose(state.x, x, rtol=1e-12)
        np.testing.assert_allclose(state.value, found, rtol=1e-12)
        updates, inner = transform.update(grad, inner)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(state.point, x, rtol=1e-12)
        assert kept.all()


def test_adam_passes_over_what_is_not_finite():
    """As if the evaluation had not been."""
    optimizer, x = optimizers.make("adam", learning_rate=0.02), start(0).astype(jnp.float32)
    evaluate, tell = evaluated(rosenbrock), jax.jit(optimizer.tell)
    state, _ = tell(optimizer.init(x), *evaluate(x))
    value, grad = evaluate(state.point)
    same, kept = tell(state, value, grad.at[0, 0, 0, 0].set(jnp.nan))
    assert not kept.any()
    jax.tree.map(np.testing.assert_array_equal, same, state)


def larger(leaf):
    return jax.image.resize(leaf, (len(leaf), 13, 11, 3), "cubic")


def test_adam_goes_on_at_another_size_with_its_moments_and_its_count():
    optimizer = optimizers.make("adam", learning_rate=0.02)
    *_, (state, _) = states(optimizer, rosenbrock, start(0, count=2).astype(jnp.float32), 7)
    grown = optimizer.resized(state, larger(state.x), larger)
    (before, *_), (after, *_) = state.inner, grown.inner
    assert after.count == before.count == 7
    np.testing.assert_allclose(after.mu, larger(before.mu))
    assert after.nu.shape == (2, 13, 11, 3)
    assert (larger(before.nu) < 0).any()  # cubic overshoots, and roots of that are NaN
    np.testing.assert_allclose(after.nu, np.maximum(larger(before.nu), 0))
    assert np.isinf(grown.value).all()
    np.testing.assert_array_equal(grown.point, grown.x)
    state, kept = optimizer.tell(grown, *evaluated(rosenbrock)(grown.point))
    assert kept.all()
    assert np.isfinite(state.point).all()


def test_lbfgs_begins_anew_at_another_size():
    optimizer = lbfgs()
    *_, (state, _) = states(optimizer, rosenbrock, start(0).astype(jnp.float32), 7)
    grown, anew = optimizer.resized(state, larger(state.x), larger), optimizer.init(larger(state.x))
    jax.tree.map(np.testing.assert_array_equal, grown, anew)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e9])
def test_the_first_step_of_lbfgs_is_of_a_hundredth_whatever_the_scale_of_the_gradient(factor, float64):
    x, (value, _) = start(0), quadratic(0)
    ((state, _),) = states(lbfgs(), lambda x: factor * value(x), x, 1)
    np.testing.assert_allclose(np.sqrt(np.square(state.point - x).mean()), 0.01, rtol=1e-6)


def test_at_a_minimum_nothing_moves():
    value, least = quadratic(0)
    for name in optimizers.OPTIMIZERS:
        for state, _ in states(optimizers.make(name, learning_rate=0.02), value, least, 5):
            np.testing.assert_allclose(state.x, least, atol=1e-6)
            assert np.isfinite(state.point).all()


def test_another_name_is_refused():
    with pytest.raises(InputError, match="unknown optimizer 'lbgfs': did you mean 'lbfgs'"):
        optimizers.make("lbgfs", learning_rate=0.1)
