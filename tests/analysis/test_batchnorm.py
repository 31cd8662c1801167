"""Running statistics against float64 ones of what the norms see, and the variance shift of dropout against theory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn import parallel
from jaxcnn.analysis.batchnorm import drift, fold, recalibrate
from jaxcnn.data.loader import eval_batches
from jaxcnn.errors import InputError
from jaxcnn.features import features
from jaxcnn.layers.blocks import BasicBlock, Stage
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout, UniformDropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.tree import flatten

X = np.random.default_rng(0).normal(3, 2, (53, 6, 6, 3)).astype(np.float32)
MESH = parallel.make_mesh()


class Tiny(nn.Module):
    """Two norms that a pass can share (`bn1`, `projection_bn`), one behind them of Flax's kind, dropout, and a head."""

    statistics: Any = "global"

    @nn.compact
    def __call__(self, x, *, train):
        norm = partial(BatchNorm, statistics=self.statistics)
        y = nn.relu(norm(name="bn1")(Conv(4, 3, name="conv1")(x), train=train))
        y = nn.BatchNorm(use_running_average=not train, name="bn2")(Conv(5, 3, use_bias=False, name="conv2")(y))
        z = nn.relu(y + norm(name="projection_bn")(Conv(5, 1, name="projection")(x), train=train))
        return nn.Dense(2, name="fc")(Dropout(0.5)(z.mean((1, 2)), train=train))


INPUTS = {"bn1": "conv1", "projection_bn": "projection", "bn2": "conv2"}


def made(net, x=X) -> dict[str, Any]:
    return net.init(jax.random.key(0), x[:1], train=False)


def seen(net, variables, x=X):
    """Mean and standard deviation, in float64, of what each norm sees in evaluation."""
    found = features(net, variables, jnp.asarray(x), names=INPUTS.values())
    wide = {norm: np.asarray(found[layer], np.float64) for norm, layer in INPUTS.items()}
    return {norm: (y.mean((0, 1, 2)), y.std((0, 1, 2))) for norm, y in wide.items()}


def check_exact(net, found, x=X):
    for path, (mean, std) in seen(net, found.variables, x).items():
        assert np.abs(found.statistics[path].mean - mean).max() < (1e-6 * std).min()
        assert np.abs(np.sqrt(found.statistics[path].var) - std).max() < (1e-6 * std).min()
        held = flatten(found.variables)
        for name, value in found.statistics[path]._asdict().items():
            np.testing.assert_array_equal(held[f"batch_stats/{path}/{name}"], value.astype(np.float32))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [16, 64])
def test_exact_statistics_for_any_batch_size_and_devices(devices, batch_size):
    net = Tiny()
    mesh = parallel.make_mesh(jax.devices()[:devices])
    calls = []
    given = made(net)
    found = recalibrate(
        net, given, X, batch_size=batch_size, mesh=mesh, progress=lambda done, passes: calls.append((done, passes))
    )
    check_exact(net, found)
    assert (found.mode, found.examples, found.passes, calls) == ("exact", 53, 2, [(1, 2), (2, 2)])
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], given["params"])


def test_exact_statistics_of_a_large_mean():
    """10,000 standard deviations away, where the difference of squares would give nothing."""
    x = np.random.default_rng(1).normal(1e4, 1, (40, 8, 8, 3)).astype(np.float32)
    net = One(lambda x, train: BatchNorm(name="bn")(x, train=train))
    found = recalibrate(net, made(net, x), x, batch_size=16, mode="exact").statistics["bn"]
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean((0, 1, 2)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.var, wide.var((0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize("statistics", ["frozen", 4])
def test_what_training_normalises_by_does_not_matter(statistics):
    """Ghost batches of 4 do not divide 53 either."""
    net = Tiny(statistics)
    given = made(net)
    want = recalibrate(Tiny(), given, X, batch_size=60, mode="one_pass").statistics
    got = recalibrate(net, given, X, batch_size=60, mode="one_pass").statistics
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_exact_agrees_with_float64(float64):
    """The network's own single precision moves the statistics by less than 1e-6 of a standard deviation."""
    net = Tiny()
    given = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), made(net, X))
    single = recalibrate(net, given, X, batch_size=16)
    double = recalibrate(net, jax.tree.map(np.float64, given), X.astype(np.float64), batch_size=16)
    assert single.variables["batch_stats"]["bn1"]["mean"].dtype == jnp.float32
    for path, want in double.statistics.items():
        got, std = single.statistics[path], np.sqrt(want.var)
        assert (np.abs(got.mean - want.mean) / std).max() < 1e-6
        assert (np.abs(np.sqrt(got.var) - std) / std).max() < 1e-6


class One(nn.Module):
    """`fn(x, train)`."""

    fn: Callable[[Any, bool], Any]

    @nn.compact
    def __call__(self, x, *, train):
        return self.fn(x, train)


def one_norm():
    return One(lambda x, train: BatchNorm(name="bn")(x, train=train))


@settings(max_examples=4, deadline=None)
@given(st.permutations([1, 2, 5, 8]), st.integers(0, 2**31))
def test_total_variance_of_uneven_batches(sizes, seed):
    """Var = E[Var] + Var[E], weighted by examples, is the variance of all of them."""
    x = np.random.default_rng(seed).normal(size=(sum(sizes), 3)).astype(np.float32) * [1, 10, 100]
    parts = np.split(x.astype(np.float32), np.cumsum(sizes)[:-1])
    net = one_norm()
    found = recalibrate(net, made(net, x.astype(np.float32)), lambda: ({"image": part} for part in parts))
    wide = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(found.statistics["bn"].mean, wide.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.statistics["bn"].var, wide.var(0), rtol=1e-9)
    assert found.examples == sum(sizes)


def test_one_pass_averages_the_batches_of_training():
    """Every norm sees what norms before it make of the batch's own statistics; padding changes nothing."""
    net = Tiny()
    given = made(net)
    found = recalibrate(net, given, X, batch_size=32, mode="one_pass")
    names = list(INPUTS.values())
    parts = []
    for x in (X[:32], X[32:]):  # of the second, 11 are padding
        found_of_x = features(net, given, jnp.asarray(x), names=names, train=True)
        parts.append({norm: np.asarray(found_of_x[layer], np.float64) for norm, layer in INPUTS.items()})
    for norm in INPUTS:
        means, variances = ([getattr(part[norm], what)((0, 1, 2)) for part in parts] for what in ("mean", "var"))
        share = np.array([32, 21])[:, None] / 53
        mean = (share * means).sum(0)
        var = (share * variances).sum(0) + (share * np.square(means)).sum(0) - mean**2
        np.testing.assert_allclose(found.statistics[norm].mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.statistics[norm].var, var, rtol=1e-5)
    assert (found.mode, found.passes) == ("one_pass", 1)


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_masked_examples_count_nowhere(mode):
    net = Tiny()
    given = made(net)
    batches = eval_batches(X, np.zeros(53), batch_size=32, mesh=MESH)

    def spoilt():
        for batch in batches():
            mask = batch["mask"].reshape(-1, 1, 1, 1)
            yield {**batch, "image": jnp.where(mask > 0, batch["image"], 1e3)}
        yield {"image": batch["image"], "mask": 0 * batch["mask"]}

    want, got = (recalibrate(net, given, data, mode=mode) for data in (batches, spoilt))
    assert want.examples == got.examples == 53
    for path in INPUTS:
        np.testing.assert_allclose(got.statistics[path].mean, want.statistics[path].mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.statistics[path].var, want.statistics[path].var, rtol=1e-6)


@pytest.mark.slow
def test_blocks_compiled_as_loops():
    """The same statistics as block by block, under the same names."""

    def net(**options):
        block = partial(BasicBlock, conv=partial(Conv, use_bias=False), norm=BatchNorm)
        return One(lambda x, train: Stage(block, 3, 3, 1, **options, name="stage1")(x, train=train))

    plain = net(scan=False)
    want, got = (recalibrate(one, made(plain), X, mode="one_pass") for one in (plain, net(scan=True)))
    assert list(got.statistics) == [f"stage1/block{i}/bn{n}" for i in (1, 2, 3) for n in (1, 2)]
    for path, one in want.statistics.items():
        np.testing.assert_allclose(got.statistics[path].var, one.var, rtol=1e-5)
    exact = recalibrate(net(scan=True), made(plain), X)
    assert exact.passes == 6
    for row in drift(plain, exact.variables, X):
        assert row.ratio == pytest.approx(1, rel=1e-4)


def test_no_drift_after_recalibration():
    net = Tiny()
    rows = drift(net, recalibrate(net, made(net), X).variables, X)
    assert [row.name for row in rows] == ["bn1", "bn2", "projection_bn"]
    for row in rows:
        np.testing.assert_allclose([row.ratio, row.smallest, row.largest], 1, rtol=1e-5)
        assert row.shift <= row.largest_shift < 1e-5


def test_drift_by_hand():
    net, x = one_norm(), np.random.default_rng(0).normal(1, 2, (64, 2)).astype(np.float32)
    moving = {"mean": jnp.asarray([0.0, 1]), "var": jnp.asarray([4.0, 1])}
    (row,) = drift(net, made(net, x) | {"batch_stats": {"bn": moving}}, x)
    var, mean = x.astype(np.float64).var(0), x.astype(np.float64).mean(0)
    ratio, shift = (var + 1e-5) / [4 + 1e-5, 1 + 1e-5], np.abs(mean - [0, 1]) / np.sqrt(var + 1e-5)
    assert row.name == "bn"
    np.testing.assert_allclose([row.ratio, row.smallest, row.largest], [ratio.mean(), ratio.min(), ratio.max()])
    np.testing.assert_allclose([row.shift, row.largest_shift], [shift.mean(), shift.max()])


@pytest.mark.parametrize(
    ("noise", "ratio"),
    [
        (Dropout(0.5), 0.5),
        (Dropout(0.2), 0.8),
        (UniformDropout(0.1), 3 / 3.01),
        (UniformDropout(0.5), 3 / 3.25),
        (UniformDropout(1.0), 0.75),
    ],
)
def test_variance_shift(noise, ratio):
    """Test over train variance at mean 0: the keep rate p for dropout, 3 / (3 + beta^2) for Uout (row A7)."""
    x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    net = One(lambda x, train: BatchNorm(name="bn")(noise.copy()(x, train=train), train=train))
    trained = recalibrate(net, made(net, x), x, batch_size=1000, mode="one_pass")
    (row,) = drift(net, trained.variables, x, batch_size=1000)
    assert row.ratio == pytest.approx(ratio, rel=0.01)
    assert row.smallest > 0.8 * ratio
    assert row.largest < 1.2 * ratio
    (row,) = drift(net, recalibrate(net, trained.variables, x).variables, x)
    assert row.ratio == pytest.approx(1, abs=1e-5)  # the exact mode sees no dropout


def test_bad_input():
    net, held = Tiny(), made(Tiny())
    with pytest.raises(InputError, match="unknown mode 'precise'"):
        recalibrate(net, held, X, mode="precise")
    with pytest.raises(InputError, match="at least one example"):
        recalibrate(net, held, lambda: iter(()))
    with pytest.raises(InputError, match=r"images \(0, 6, 6, 3\)"):
        drift(net, held, X[:0])
    with pytest.raises(InputError, match="not this network's"):
        drift(net, {"params": held["params"]}, X)
    with pytest.raises(InputError, match="bn1: the statistics are not finite"):
        drift(net, held, np.full_like(X[:8], np.nan))
    plain = One(lambda x, train: nn.Dense(2)(x))
    with pytest.raises(InputError, match="no BatchNorm"):
        drift(plain, made(plain), X)


def _twice(x, train):
    norm = BatchNorm(name="bn")
    return norm(norm(x, train=train), train=train)


def test_norms_that_cannot_be_measured():
    net = One(_twice)
    with pytest.raises(InputError, match="bn is called 2 times"):
        recalibrate(net, made(net), X)
    net = One(lambda x, train: nn.BatchNorm(axis=1, use_running_average=not train, name="bn")(x))
    with pytest.raises(InputError, match="bn: its statistics are over axis 1"):
        recalibrate(net, made(net), X)


class Headed(nn.Module):
    """With a head that runs in training only."""

    @nn.compact
    def __call__(self, x, *, train):
        y = BatchNorm(name="bn")(nn.Dense(3)(x), train=train)
        if train or self.is_initializing():
            y = y + BatchNorm(name="head_bn")(nn.Dense(3)(x), train=train)
        return y


def test_norms_of_training_alone():
    """Only training says what they see: evaluation leaves them as they are."""
    net = Headed()
    held = made(net)
    exact, one = (recalibrate(net, held, X, mode=mode) for mode in ("exact", "one_pass"))
    assert list(exact.statistics) == ["bn"]
    assert sorted(one.statistics) == ["bn", "head_bn"]
    np.testing.assert_array_equal(exact.variables["batch_stats"]["head_bn"]["var"], np.ones(3))
    assert [row.name for row in drift(net, held, X)] == ["bn"]
    assert fold(net, held, x=X).kept == {"head_bn": "is not called in evaluation"}


class Body(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=not self.train, name="bn")(nn.Dense(3)(x)), None


def test_a_loop_of_the_users():
    """One pass measures every round of it, which the exact mode cannot tell apart."""
    loop = nn.scan(Body, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)
    net = One(lambda x, train: loop(train, name="loop")(x, None)[0])
    held = made(net)
    with pytest.raises(InputError, match="loop/bn is inside a loop"):
        recalibrate(net, held, X)
    found = recalibrate(net, held, X, mode="one_pass", batch_size=53)
    first = np.asarray(X @ held["params"]["loop"]["Dense_0"]["kernel"][0], np.float64)
    assert found.statistics["loop/bn"].mean.shape == (2, 3)
    np.testing.assert_allclose(found.statistics["loop/bn"].mean[0], first.mean((0, 1, 2)), rtol=1e-5)
    (row,) = drift(net, found.variables, X)
    assert row.ratio == pytest.approx(1, rel=0.05)


def test_lifted_transformations():
    """Statistics come out of `nn.remat` as from outside."""
    net = One(lambda x, train: nn.remat(Body)(train, name="body")(x, None)[0])
    held = made(net)
    for mode in ("exact", "one_pass"):
        found = recalibrate(net, held, X, mode=mode)
        y = np.asarray(X @ held["params"]["body"]["Dense_0"]["kernel"], np.float64)
        np.testing.assert_allclose(found.statistics["body/bn"].var, y.var((0, 1, 2)), rtol=1e-5)
