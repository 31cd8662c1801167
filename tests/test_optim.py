"""Schedules at their points, optimisers against PyTorch and closed forms, averages against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.errors import InputError
from jaxcnn.optim import SCHEDULES, debias, ema, ema_start, make_optimizer, make_schedule, optimizers

# --- schedules


def rate(schedule, step):
    return float(jax.jit(schedule)(jnp.int32(step)))


def same(value):
    return float(np.float32(value))


def test_the_papers_steps_fall_at_exactly_32k_and_48k_of_64k():
    schedule = make_schedule("steps", learning_rate=0.1, steps=64000)
    for step, expected in [
        (0, 0.1),
        (31999, 0.1),
        (32000, 0.01),
        (47999, 0.01),
        (48000, 0.001),
        (63999, 0.001),
    ]:
        assert rate(schedule, step) == pytest.approx(expected, rel=1e-7)
    assert rate(schedule, 31999) == same(0.1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_every_schedule_is_finite_within_bounds_and_the_same_traced_or_not(name, steps):
    schedule = make_schedule(name, learning_rate=0.3, steps=steps, warmup=0.1)
    every = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps + 3)))
    assert (every >= 0).all()
    assert (every <= same(0.3)).all()
    for step in {0, steps // 2, steps - 1, steps + 2}:
        assert float(schedule(step)) == pytest.approx(every[step], rel=1e-6, abs=1e-7)
    np.testing.assert_array_equal(every[steps], every[steps + 2])


def test_constant_is_constant():
    schedule = make_schedule("constant", learning_rate=0.7, steps=10)
    assert {rate(schedule, step) for step in range(12)} == {same(0.7)}


def test_cosine_starts_high_is_half_in_the_middle_and_ends_at_its_final_fraction():
    schedule = make_schedule("cosine", learning_rate=0.4, steps=100, final=0.1)
    assert rate(schedule, 0) == same(0.4)
    assert rate(schedule, 50) == pytest.approx(0.4 * 0.55, rel=1e-6)
    assert rate(schedule, 100) == pytest.approx(0.04, rel=1e-7)


def test_cyclic_reaches_low_and_peak_exactly_in_every_cycle():
    schedule = make_schedule("cyclic", learning_rate=0.3, steps=60, cycles=3, low=0.2)
    for cycle in range(3):
        assert rate(schedule, 20 * cycle) == same(0.2 * 0.3)
        assert rate(schedule, 20 * cycle + 10) == same(0.3)
        assert rate(schedule, 20 * cycle + 5) == pytest.approx(0.18, rel=1e-6)
    assert rate(schedule, 60) == same(0.2 * 0.3)


fractions = st.floats(0, 1, width=16, allow_subnormal=False)


@given(st.sampled_from([1, 2, 1000]), fractions, fractions, fractions)
@settings(max_examples=12, deadline=None)
def test_triangle_interpolates_linearly(steps, start, peak, end):
    schedule = make_schedule("triangle", learning_rate=0.5, steps=steps, start=start, peak=peak, end=end)
    top = round(peak * steps)
    if top < steps:
        assert float(schedule(top)) == 0.5
        assert float(schedule(steps)) == same(0.5 * end)
    if 0 < top < steps:
        expected = np.interp(range(steps), [0, top, steps], [start * 0.5, 0.5, end * 0.5])
        np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(steps)), expected, atol=1e-6)


def test_warm_up_is_linear_and_moves_no_later_point():
    plain = make_schedule("steps", learning_rate=0.1, steps=1000)
    warm = make_schedule("steps", learning_rate=0.1, steps=1000, warmup=0.009)
    np.testing.assert_allclose([warm(i) for i in range(9)], [0.1 * (i + 1) / 10 for i in range(9)], rtol=1e-6)
    for step in (9, 499, 500, 999):
        assert rate(warm, step) == rate(plain, step)


def test_schedules_are_float64_where_it_is_enabled(float64):
    assert make_schedule("cosine", learning_rate=0.1, steps=10)(jnp.int32(3)).dtype == jnp.float64
    assert float(make_schedule("triangle", learning_rate=0.1, steps=100)(23)) == 0.1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.usefixtures("strict_dtypes")
def test_schedules_promote_nothing_silently(name):
    make_schedule(name, learning_rate=0.1, steps=10, warmup=0.2)(jnp.int32(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
        ({"steps": 0}, "0 steps"),
        ({"warmup": 1.5}, "warmup is 1.5.*from 0 to 1"),
        ({"name": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"boundaries": (0.5, 0.5)}, "increasing"),
        ({"boundaries": (0.5, 32000)}, "a boundary is 32000"),
        ({"factr": 0.1}, "'factr': did you mean 'factor'"),
        ({"name": "constant", "factor": 0.1}, "it has none"),
        ({"name": "cyclic", "cycles": 0}, "cycles is 0"),
        ({"name": "cyclic", "low": 1.1}, "low is 1.1"),
        ({"name": "triangle", "peak": -0.1}, "peak is -0.1"),
        ({"name": "cosine", "final": 2}, "final is 2"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_schedule(**{"name": "steps", "learning_rate": 0.1, "steps": 10, **arguments})


# --- optimisers

STEPS = 12


def loss(w, x):
    """Not quadratic, with a coupled gradient: a trajectory shows every error."""
    return (w**4 / 4).sum() + ((w * x).sum() - 1) ** 2


def ours(w, xs, name, learning_rate, **options):
    tx = make_optimizer(name, schedule=learning_rate, decay_mask="", **options)
    parameters, trajectory = {"w": jnp.asarray(w)}, []
    state = tx.init(parameters)
    for x in xs:
        gradients = jax.grad(lambda p, x=x: loss(p["w"], x))(parameters)
        updates, state = tx.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        trajectory.append(np.asarray(parameters["w"]))
    return np.stack(trajectory)


def theirs(torch, w, xs, make, learning_rate):
    parameter = torch.nn.Parameter(torch.tensor(w))
    optimizer, trajectory = make([parameter]), []
    for step, x in enumerate(xs):
        optimizer.param_groups[0]["lr"] = float(learning_rate(step))
        optimizer.zero_grad()
        loss(parameter, torch.tensor(x)).backward()
        optimizer.step()
        trajectory.append(parameter.detach().numpy().copy())
    return np.stack(trajectory)


@pytest.mark.parametrize(
    ("name", "torch_name", "options", "torch_options"),
    [
        ("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.05}, {"momentum": 0.9, "weight_decay": 0.05}),
        (
            "sgd",
            "SGD",
            {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
            {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
        ),
        ("adam", "Adam", {"weight_decay": 0.05}, {"weight_decay": 0.05}),
        ("adamw", "AdamW", {"weight_decay": 0.05}, {"weight_decay": 0.05}),
        ("adamw", "AdamW", {}, {"weight_decay": 0.0}),
        (
            "rmsprop",
            "RMSprop",
            {"decay": 0.9, "eps": 1e-8, "eps_in_sqrt": False, "weight_decay": 0.05},
            {"alpha": 0.9, "eps": 1e-8, "weight_decay": 0.05},
        ),
    ],
)
def test_trajectories_equal_pytorch_in_float64(float64, name, torch_name, options, torch_options):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w, xs = rng.normal(size=5), rng.normal(size=(STEPS, 5))
    schedule = make_schedule("triangle", learning_rate=0.02, steps=STEPS)
    expected = theirs(torch, w, xs, lambda p: getattr(torch.optim, torch_name)(p, **torch_options), schedule)
    np.testing.assert_allclose(ours(w, xs, name, schedule, **options), expected, rtol=1e-12, atol=1e-14)


def quadratic(tx, w, steps):
    """Minimise w^2 / 2, whose gradient is w."""
    state, trajectory = tx.init({"kernel": w}), [w]
    for _ in range(steps):
        updates, state = tx.update({"kernel": w}, state, {"kernel": w})
        w = w + updates["kernel"]
        trajectory.append(w)
    return np.asarray(trajectory)


def test_sgd_with_decay_shrinks_as_in_the_closed_form(float64):
    tx = make_optimizer("sgd", schedule=optax.constant_schedule(0.1), weight_decay=0.5)
    np.testing.assert_allclose(quadratic(tx, jnp.float64(3.0), 6), 3 * (1 - 0.1 * 1.5) ** np.arange(7))


def test_momentum_follows_its_second_order_recurrence(float64):
    tx = make_optimizer("sgd", schedule=optax.constant_schedule(0.1), momentum=0.9)
    w = quadratic(tx, jnp.float64(1.0), 20)
    np.testing.assert_allclose(w[2:], (1 + 0.9 - 0.1) * w[1:-1] - 0.9 * w[:-2], atol=1e-14)


def zero_gradient_step(name, parameters, **options):
    tx = make_optimizer(name, schedule=optax.constant_schedule(0.1), **options)
    step = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])
    return step(parameters)


PARAMETERS = {
    "conv1": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)},
    "norm": {"scale": jnp.full(2, 2.0)},
}


@pytest.mark.parametrize("name", ["sgd", "adamw", "adadelta", "lars", "adafactor"])
def test_decay_moves_what_the_mask_finds_and_nothing_else(name):
    updates = zero_gradient_step(name, PARAMETERS, weight_decay=0.5)
    assert (updates["conv1"]["kernel"] < 0).all()
    np.testing.assert_array_equal(updates["conv1"]["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    updates = zero_gradient_step(name, PARAMETERS, weight_decay=0.5, decay_mask=r"^conv1/|scale$")
    assert all((leaf < 0).all() for leaf in jax.tree.leaves(updates))


def test_no_decay_is_asked_for_where_optax_would_decay_by_default():
    for name in ("adamw", "lion"):
        for leaf in jax.tree.leaves(zero_gradient_step(name, PARAMETERS)):
            np.testing.assert_array_equal(leaf, 0)


def test_clipping_bounds_the_gradient_before_the_decay():
    tx = make_optimizer("sgd", schedule=optax.constant_schedule(1.0), clip_norm=0.5, weight_decay=1.0)
    parameters = {"kernel": jnp.full(4, 3.0)}
    updates, _ = tx.update({"kernel": jnp.full(4, 100.0)}, tx.init(parameters), parameters)
    np.testing.assert_allclose(updates["kernel"], -(0.25 + 3.0), rtol=1e-6)


def test_a_mask_that_finds_nothing_is_an_error_at_init():
    for name in ("sgd", "adamw"):
        tx = make_optimizer(name, schedule=optax.constant_schedule(0.1), weight_decay=0.1, decay_mask="kernl$")
        with pytest.raises(InputError, match=r"'kernl\$' finds no parameter among conv1/bias"):
            tx.init(PARAMETERS)
        make_optimizer(name, schedule=optax.constant_schedule(0.1), decay_mask="kernl$").init(PARAMETERS)


def test_integers_are_never_decayed():
    tx = make_optimizer("sgd", schedule=optax.constant_schedule(0.1), weight_decay=0.1)
    with pytest.raises(InputError, match="finds no parameter"):
        tx.init({"kernel": jnp.ones(2, jnp.int32)})


USABLE = set(optimizers()) - {"lbfgs", "noisy_sgd", "optimistic_adam", "rprop", "sm3"}


@pytest.mark.parametrize("name", sorted(USABLE))
def test_every_other_optimiser_of_optax_takes_a_step(name):
    tx = make_optimizer(name, schedule=make_schedule("cosine", learning_rate=0.01, steps=5))
    parameters = jax.eval_shape(lambda: PARAMETERS)
    shapes = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[0], parameters)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, parameters)


def test_the_common_optimisers_are_there():
    assert {"sgd", "adam", "adamw", "adagrad", "rmsprop", "lamb", "lars", "lion", "lbfgs"} <= set(optimizers())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, "unknown optimizer 'adamm': did you mean 'adam'"),
        ("scale_by_rprop", {}, "unknown optimizer"),
        ("lbfgs", {}, "'lbfgs'.* failed on a trial update: .*value.*only gradients and parameters"),
        ("rprop", {}, "'rprop'.*takes a learning-rate schedule"),
        ("sgd", {"momentun": 0.9}, "did you mean 'momentum'.*known: momentum, nesterov"),
        ("sgd", {"momentum": "high"}, "'momentum': 'high'"),
        ("adamw", {"mask": None}, "option of optimizer 'adamw' 'mask'"),
        ("sgd", {"weight_decay": -1.0}, "weight_decay is -1.0"),
        ("sgd", {"weight_decay": 0.1, "decay_mask": "("}, "no regular expression"),
        ("sgd", {"clip_norm": 0.0}, "clip_norm is 0"),
        ("sgd", {"clip_norm": float("nan")}, "clip_norm is nan"),
        ("novograd", {"weight_decay": 0.1}, "takes no mask"),
    ],
)
def test_bad_optimisers_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(name, schedule=optax.constant_schedule(0.1), **options)


# --- averages of weights


@pytest.mark.usefixtures("strict_dtypes")
def test_ema_follows_its_formula_over_a_whole_state():
    first = {"params": {"w": jnp.float32(1)}, "batch_stats": {"mean": jnp.float32(-4), "n": jnp.int32(1)}}
    second = {"params": {"w": jnp.float32(3)}, "batch_stats": {"mean": jnp.float32(8), "n": jnp.int32(2)}}
    average = jax.jit(ema, static_argnums=2)(ema_start(first), second, 0.75)
    expected = {"params": {"w": 1.5}, "batch_stats": {"mean": -1.0, "n": 2}}
    assert jax.tree.map(float, average) == expected


@pytest.mark.usefixtures("strict_dtypes")
def test_a_bfloat16_value_is_averaged_in_float32_and_arrives():
    average = ema_start(jnp.bfloat16(0.0))
    assert average.dtype == jnp.float32
    average = jax.lax.fori_loop(0, 20000, lambda _, a: ema(a, jnp.bfloat16(2.0), 0.999), average)
    assert average.dtype == jnp.float32
    assert float(average) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.usefixtures("strict_dtypes")
def test_the_two_forms_of_the_average_are_equal_at_step_1_and_not_after():
    values, decay = [jnp.float32(v) for v in (5.0, 1.0, 2.0)], 0.9999
    ours, zero = ema_start(values[0]), ema(jnp.zeros(()), values[0], decay)
    np.testing.assert_allclose(debias(zero, decay, jnp.int32(1)), ours, rtol=1e-6)
    for t, value in enumerate(values[1:], start=2):
        ours, zero = ema(ours, value, decay), ema(zero, value, decay)
        corrected = float(debias(zero, decay, t))
        assert corrected < float(ours) - 1
        weights = decay ** np.arange(t)[::-1]
        assert corrected == pytest.approx(np.average(values[:t], weights=weights), rel=1e-5)


def test_the_start_is_a_copy_so_that_the_value_can_be_donated():
    value = jnp.ones(3)
    average = ema_start(value)
    value.delete()
    np.testing.assert_array_equal(average, 1)


def test_bad_decays_are_refused():
    with pytest.raises(InputError, match=r"decay is 1\.5"):
        ema(jnp.zeros(()), jnp.zeros(()), 1.5)
    with pytest.raises(InputError, match="decay is 1"):
        debias(jnp.zeros(()), 1.0, 3)
