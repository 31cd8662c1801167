"""Alrao against SGD, its distribution against the log-uniform one, copies against the paper's updates by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxcnn.alrao import AveragedClassifiers, alrao, averaged_cross_entropy
from jaxcnn.errors import InputError
from jaxcnn.losses import cross_entropy
from jaxcnn.optim import make_optimizer, make_schedule
from jaxcnn.train.loop import fit

LAYERS = {
    "conv": {"kernel": (3, 3, 2, 8), "bias": (8,)},
    "bn": {"scale": (8,), "bias": (8,)},
    "stage": {"dense": {"kernel": (8, 5), "bias": (5,)}},
}


def ones(shapes=LAYERS) -> Any:
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


def gradients(parameters, seed=0) -> Any:
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def one_update(optimizer, updates, parameters=None) -> Any:
    return optimizer.update(updates, optimizer.init(updates), parameters)[0]


def rates(**options) -> Any:
    """Minus the update by gradients of 1."""
    return jax.tree.map(lambda x: -np.asarray(x), one_update(alrao(**options), ones()))


@pytest.mark.parametrize("scheduled", [False, True])
def test_with_one_rate_it_is_sgd(scheduled):
    schedule = optax.linear_schedule(1.0, 0.25, 4)
    ours = alrao(schedule if scheduled else 1.0, low=0.5, high=0.5)
    sgd = optax.sgd((lambda step: 0.5 * schedule(step)) if scheduled else 0.5)
    parameters, a, b = ones(), ours.init(ones()), sgd.init(ones())
    for step in range(5):
        given = gradients(parameters, step)
        moved, a = jax.jit(ours.update)(given, a, parameters)
        expected, b = jax.jit(sgd.update)(given, b, parameters)
        jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_every_unit_moves_at_a_constant_ratio_to_sgd_and_shares_it_with_its_bias():
    optimizer, parameters = alrao(low=1e-3, high=10.0, seed=3), ones()
    state, ratios = optimizer.init(parameters), []
    for step in range(3):
        given = gradients(parameters, step)
        moved, state = optimizer.update(given, state, parameters)
        ratios.append(jax.tree.map(lambda u, g: -np.asarray(u / g), moved, given))
    for layer in (lambda r: r["conv"], lambda r: r["bn"], lambda r: r["stage"]["dense"]):
        one = layer(ratios[0])["bias"]
        assert len(set(one.tolist())) == len(one)
        for ratio in ratios:
            for values in layer(ratio).values():
                np.testing.assert_allclose(values, np.broadcast_to(one, values.shape), rtol=1e-5)
    assert not np.allclose(ratios[0]["conv"]["bias"], ratios[0]["bn"]["bias"])


def test_rates_are_log_uniform():
    wide = -np.asarray(one_update(alrao(low=1e-4, high=10.0), {"dense": {"bias": jnp.ones(20_000)}})["dense"]["bias"])
    assert wide.min() >= 1e-4
    assert wide.max() <= 10
    assert stats.kstest(wide, stats.loguniform(1e-4, 10).cdf).pvalue > 0.01


def test_rates_follow_from_the_seed_and_the_path_alone():
    first, again, other = rates(seed=1), rates(seed=1), rates(seed=2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.allclose(first["conv"]["bias"], other["conv"]["bias"])
    assert not np.allclose(first["conv"]["bias"], first["bn"]["bias"])
    alone = one_update(alrao(seed=1), {"stage": {"dense": {"bias": jnp.ones(5)}}})
    np.testing.assert_array_equal(-alone["stage"]["dense"]["bias"], first["stage"]["dense"]["bias"])


def test_trees_of_lists_tuples_scalars_and_complex_and_half_precision_leaves():
    tree = {
        "list": [jnp.ones((2, 3)), (jnp.ones(4), jnp.float32(1))],
        "complex": {"kernel": jnp.full((2, 3), 1 + 2j), "bias": jnp.full(3, 1j)},
        "half": jnp.ones(3, jnp.bfloat16),
        "nothing": None,
    }
    moved = one_update(alrao(low=0.1, high=1.0), tree)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), moved) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    bias: Any = moved["complex"]["bias"]
    np.testing.assert_array_equal(bias.real, 0)
    np.testing.assert_allclose(moved["complex"]["kernel"], np.broadcast_to(bias / 1j * (1 + 2j), (2, 3)), rtol=1e-6)
    assert 0.1 <= -float(moved["list"][1][1]) <= 1
    bare = one_update(alrao(low=0.1, high=1.0), jnp.ones(3))
    assert bare.shape == (3,)


def test_by_name_with_a_schedule_decay_and_frozen_parts():
    schedule = make_schedule("cosine", learning_rate=2.0, steps=4, warmup=0.5)
    options = {"low": 1e-3, "high": 10.0, "seed": 5}
    made = make_optimizer("alrao", schedule=schedule, weight_decay=0.1, freeze="^bn/", **options)
    expected, rate = rates(**options), float(np.asarray(schedule(0)))
    moved = one_update(made, ones(), ones())
    np.testing.assert_array_equal(moved["bn"]["scale"], 0)
    np.testing.assert_allclose(-moved["conv"]["bias"], rate * expected["conv"]["bias"], rtol=1e-5)
    np.testing.assert_allclose(-moved["conv"]["kernel"], 1.1 * rate * expected["conv"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"low": 1.0, "high": 0.1},
        {"low": 0.0},
        {"low": -1.0},
        {"high": float("inf")},
        {"low": float("nan")},
        {"low": "small"},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_bad_input(options):
    with pytest.raises(InputError, match="expected"):
        alrao(**options)
    with pytest.raises(InputError, match="expected"):
        make_optimizer("alrao", schedule=optax.constant_schedule(1.0), **options)


# --- copies of the output layer


HEAD: Any = AveragedClassifiers(3, copies=4)
BATCH = {"label": jnp.array([0, 2, 1, 1, 0])}


def features(seed=0):
    return jax.random.normal(jax.random.key(seed), (5, 6))


def head() -> Any:
    """Parameters of copies that differ in weight."""
    parameters = HEAD.init(jax.random.key(1), features(), train=False)["params"]
    return parameters | {"copies_log_weights": jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))}


def loss(parameters, x):
    return averaged_cross_entropy(HEAD.apply({"params": parameters}, x, train=True), BATCH).mean()


def test_logits_are_the_logarithm_of_the_mean_probability():
    parameters, x = head(), features()
    each = [jax.nn.softmax(x @ parameters["copies_kernel"][j] + parameters["copies_bias"][j][None]) for j in range(4)]
    expected = sum(weight * one for weight, one in zip([0.1, 0.2, 0.3, 0.4], each, strict=True))
    logits = HEAD.apply({"params": parameters}, x, train=False)
    np.testing.assert_allclose(jnp.exp(logits), expected, rtol=1e-5)
    np.testing.assert_array_equal(HEAD.apply({"params": parameters}, x, train=True).logits, logits)
    assert float(loss(parameters, x)) == pytest.approx(float(cross_entropy(logits, BATCH["label"]).mean()), rel=1e-6)


def test_features_learn_by_the_average_and_copies_each_by_their_own_loss():
    parameters, x = head(), features()

    def average(x):
        return cross_entropy(HEAD.apply({"params": parameters}, x, train=False), BATCH["label"]).mean()

    def alone(kernel, bias):
        return cross_entropy(x @ kernel + bias[None], BATCH["label"]).mean()

    found, by_features = jax.grad(loss, argnums=(0, 1))(parameters, x)
    np.testing.assert_allclose(by_features, jax.grad(average)(x), rtol=1e-4, atol=1e-7)
    for j in range(4):
        kernel, bias = (parameters[name][j] for name in ("copies_kernel", "copies_bias"))
        expected = jax.grad(alone, argnums=(0, 1))(kernel, bias)
        np.testing.assert_allclose(found["copies_kernel"][j], expected[0], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found["copies_bias"][j], expected[1], rtol=1e-4, atol=1e-7)
        assert float(found["copies_log_weights"][j]) == pytest.approx(float(alone(kernel, bias)), rel=1e-5)


def test_copies_have_rates_spread_evenly_in_logarithm():
    parameters = head()
    updates = one_update(alrao(low=1e-3, high=1.0), jax.tree.map(jnp.ones_like, parameters), parameters)
    np.testing.assert_allclose(-updates["copies_bias"][:, 0], [1e-3, 1e-2, 1e-1, 1], rtol=1e-5)
    assert np.unique(np.reshape(updates["copies_kernel"], (4, -1)), axis=1).shape == (4, 1)


def test_weights_follow_bayes_rule_and_the_switch():
    losses, weights = np.array([[2.0, 1.0, 0.5], [0.1, 3.0, 0.2], [700.0, 1.0, 0.3]]), np.full(3, 1 / 3)
    optimizer = alrao()
    parameters: Any = {"copies_log_weights": jnp.log(jnp.full(3, 1 / 3))}
    state = optimizer.init(parameters)
    for t, given in enumerate(losses, 1):
        weights = weights * np.exp(-given)
        weights = (1 - 1 / (t + 1)) * weights / weights.sum() + 1 / (t + 1) / 3
        updates, state = optimizer.update({"copies_log_weights": jnp.float32(given)}, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        np.testing.assert_allclose(np.exp(parameters["copies_log_weights"]), weights, rtol=1e-5)
    with pytest.raises(InputError, match="give `update` the parameters"):
        optimizer.update({"copies_log_weights": jnp.zeros(3)}, state)


@pytest.mark.parametrize(("module", "shape"), [(AveragedClassifiers(3, copies=1), (2, 6)), (HEAD, (2, 4, 4, 6))])
def test_features_and_copies_that_cannot_be(module, shape):
    with pytest.raises(InputError, match="expected at least 2, and features"):
        module.init(jax.random.key(0), jnp.ones(shape), train=False)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.tanh(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return AveragedClassifiers(10, copies=5)(x, train=train)


def test_digits_are_learned_at_all_rates_at_once():
    from jaxcnn.data.sources import load

    data = load("digits", image_size=(8, 8))
    train, test = (((split.images / 255).astype(np.float32) - 0.3, split.labels) for split in (data.train, data.test))
    result = fit(
        Net(), train, optimizer=alrao(low=1e-4, high=10.0), loss_fn=averaged_cross_entropy, steps=150, batch_size=64,
        test=test, quiet=True,
    )  # fmt: skip
    assert result.test is not None
    assert result.test["accuracy"] > 0.9
