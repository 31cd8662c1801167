"""Many seeds in one program or one after another: each is its own run of `fit`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxcnn import parallel
from jaxcnn.data.loader import gather
from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.seeds import SeedsResult, fit_seeds
from jaxcnn.spread import spread
from jaxcnn.train import fit
from jaxcnn.train.log import TIMINGS
from jaxcnn.tree import flatten

RNG = np.random.default_rng(0)
SEEDS = (3, 0, 7, 2**32 - 1)


def examples(n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, 4, n).astype(np.int32)
    return 50 * labels[:, None, None, None] + RNG.integers(0, 60, (n, 6, 6, 1)).astype(np.float32), labels


TRAIN, TEST = examples(90), examples(37)


class Net(nn.Module):
    """Convolution, BatchNorm and dropout: state of every kind."""

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm(name="bn")(nn.Conv(4, (3, 3))(x), train=train)
        x = Dropout(0.2)(nn.relu(x), train=train)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def prepare(batch, key):
    batch = gather(batch)
    noise = jax.random.normal(key, batch["image"].shape)
    return {**batch, "image": batch["image"] / 255 + 0.1 * noise}


def prepare_eval(batch):
    return {**batch, "image": batch["image"] / 255}


def optimizer() -> optax.GradientTransformation:
    return optax.sgd(optax.cosine_decay_schedule(0.05, 13), momentum=0.9)


OPTIONS = {
    "steps": 13,
    "batch_size": 16,
    "test": TEST,
    "prepare": prepare,
    "prepare_eval": prepare_eval,
    "ema_decay": 0.7,
    "accumulate": 2,
    "log_every": 5,
    "eval_every": 4,
    "eval_batch_size": 10,
    "quiet": True,
}


def seeds_of(together: int | None) -> SeedsResult:
    return fit_seeds(Net(), TRAIN, optimizer=optimizer(), seeds=SEEDS, together=together, **OPTIONS)


@pytest.fixture(scope="module")
def own_runs():
    mesh = parallel.make_mesh(jax.devices()[:1])
    return [fit(Net(), TRAIN, optimizer=optimizer(), seed=seed, mesh=mesh, **OPTIONS) for seed in SEEDS]


@pytest.mark.parametrize("together", [None, 1, 2, 4])
def test_each_seed_is_its_own_run_of_fit(own_runs, together):
    """Bit by bit one after another, within rounding in one program."""
    result = seeds_of(together)
    exact = result.together == 1
    assert result.together == (together or 1)  # these tests run on CPUs
    for i, (seed, own) in enumerate(zip(SEEDS, own_runs, strict=True)):
        assert result.seeds[i] == seed
        mine = flatten(result.each()[i])
        for name, leaf in flatten(own.variables).items():
            np.testing.assert_allclose(mine[name], leaf, rtol=0 if exact else 2e-4, atol=0 if exact else 2e-5)
        for name, value in own.test.items():
            np.testing.assert_allclose(result.test[name][i], value, rtol=1e-12 if exact else 1e-3)
        theirs = [line for line in own.history if "selected_step" not in line]
        assert [line["step"] for line in result.history[:-1]] == [line["step"] for line in theirs]
        for line, their in zip(result.history[:-1], theirs, strict=True):
            names = {*their} - {*TIMINGS, "step", "epoch"}
            assert {*line} - {"step"} == names
            for name in names:
                np.testing.assert_allclose(line[name][i], their[name], rtol=1e-12 if exact else 1e-3)
    assert result.history[-1]["test_correct"].dtype.kind == "i"


def test_a_seed_that_diverges_leaves_the_others_alone():
    def explode(batch, key):
        batch = prepare(batch, key)
        bad = jax.random.key_data(key).sum() % 2 == 0
        return {**batch, "image": jnp.where(bad, jnp.nan, batch["image"])}

    options = OPTIONS | {"prepare": explode, "steps": 6}
    both = fit_seeds(Net(), TRAIN, optimizer=optimizer(), seeds=SEEDS, together=4, **options)
    apart = fit_seeds(Net(), TRAIN, optimizer=optimizer(), seeds=SEEDS, together=1, **options)
    assert both.skipped.tolist() == apart.skipped.tolist()
    assert 0 < both.skipped.sum() < 4 * 6
    assert np.isfinite(both.test["loss"]).all()


def test_curves_and_spread():
    result = seeds_of(4)
    steps, values = result.curve("test_accuracy")
    assert steps.tolist() == [4, 8, 12, 13]
    assert values.shape == (4, 4)
    np.testing.assert_array_equal(values[-1], result.test["accuracy"])
    found = result.spread()
    assert found.n == 4
    assert found.mean == pytest.approx(values[-1].mean())
    with pytest.raises(InputError, match="mse"):
        result.spread("mse")
    steps, values = result.curve("nothing")
    assert steps.shape == (0,)
    assert values.shape == (0, 4)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_spread_is_students(n):
    values = RNG.normal(3, 2, n)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = spread(values.tolist())
    assert found.interval == pytest.approx((low, high))
    assert found.std == pytest.approx(values.std(ddof=1))


def test_a_spread_reads_as_mean_and_half_of_its_interval():
    assert f"{spread([1.0, 2.0, 3.0]):.2f}" == "2.00 +- 2.48"  # t(0.975, 2) = 4.303, over sqrt(3)
    assert f"{spread([1.0, 2.0, 3.0]):+.1f}" == "+2.0 +- 2.5"
    assert f"{spread([1.5]):.1f}" == "1.5"


def test_spread_of_one_and_of_none():
    assert spread([4.0])[:2] == (1, 4.0)
    assert np.isnan(spread([4.0]).half)
    with pytest.raises(InputError, match="no values"):
        spread([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "twice"),
        ({"seeds": (-1,)}, "from 0"),
        ({"seeds": (1, 2, 3), "together": 2}, "divisor"),
        ({"seeds": (1,), "steps": 0}, "steps 0"),
        ({"seeds": (1,), "batch_size": 91}, "91"),
    ],
)
def test_bad_input_is_said_before_compilation(changes, message):
    options = {"steps": 1, "batch_size": 16, "quiet": True} | changes
    with pytest.raises(InputError, match=message):
        fit_seeds(Net(), TRAIN, optimizer=optimizer(), **options)
