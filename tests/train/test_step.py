"""The step is the same step on one device and on eight, under jit and under pmap, and the one PyTorch takes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcnn import models, parallel
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.loader import gather, train_feed
from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.losses import classification
from jaxcnn.train import create_state, fit, make_eval_step, make_train_step
from jaxcnn.train.state import state_shapes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 96).astype(np.int32)


class Small(nn.Module):
    """Convolution, BatchNorm and dropout: everything that could depend on how the batch is divided."""

    statistics: str | int = "global"
    rate: float = 0.2
    normalise: bool = True

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), dtype=x.dtype, param_dtype=x.dtype)(x)
        if self.normalise:
            x = BatchNorm(statistics=self.statistics, param_dtype=x.dtype, name="bn")(x, train=train)
        x = Dropout(self.rate)(nn.relu(x), train=train)
        return nn.Dense(10, dtype=x.dtype, param_dtype=x.dtype)(x.reshape(x.shape[0], -1))


def prepare(batch, key, dtype=jnp.float32):
    batch = gather(batch)
    settings = Augmentation(crop_padding=1, flip=True, cutout=2, mixup=0.5)
    image = batch["image"].astype(dtype) / 255
    images, labels = augment(key, image, batch["label"], settings=settings, num_classes=10, fill=jnp.zeros(3, dtype))
    return {"image": images, "label": labels.astype(dtype)}


def losses_of(module, *, devices, mode="jit", steps=20, dtype=jnp.float32, **options):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    optimizer = optax.sgd(0.05, momentum=0.9)
    feed = train_feed(IMAGES, LABELS, batch_size=16, seed=3, mesh=mesh)
    step = make_train_step(
        module,
        optimizer=optimizer,
        prepare=functools.partial(prepare, dtype=dtype),
        mesh=mesh,
        parallel_mode=mode,
        **options,
    )
    sample = jax.ShapeDtypeStruct((1, 8, 8, 3), dtype)
    with jax.set_mesh(mesh):
        state = create_state(module, optimizer=optimizer, sample=sample, mesh=mesh, ema="ema_decay" in options)
        losses = []
        for i in range(steps):
            state, totals = step(state, feed(i), np.uint32(0))
            losses.append(float(totals["loss"].sum) / float(totals["loss"].count))
    return np.array(losses), jax.device_get(state)


def test_eight_devices_follow_one_in_float64(float64):
    one, state_one = losses_of(Small(), devices=1, dtype=jnp.float64)
    for mode in ("jit", "pmap"):
        many, state_many = losses_of(Small(), devices=8, mode=mode, dtype=jnp.float64)
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), state_one.collections, state_many.collections
        )


@pytest.mark.slow
@pytest.mark.parametrize(("normalise", "steps"), [(True, 2), (False, 20)])
def test_eight_devices_follow_one_in_float32(normalise, steps):
    """With BatchNorm, whose rounding grows from step to step, over the first two; without, over 20."""
    one, _ = losses_of(Small(normalise=normalise), devices=1, steps=steps)
    for mode in ("jit", "pmap"):
        many, _ = losses_of(Small(normalise=normalise), devices=8, mode=mode, steps=steps)
        np.testing.assert_allclose(many, one, atol=1e-5)


@pytest.mark.slow
def test_accumulation_takes_the_same_microbatches_on_any_number_of_devices(float64):
    one, _ = losses_of(Small(), devices=1, dtype=jnp.float64, steps=5, accumulate=4)
    for mode in ("jit", "pmap"):
        many, _ = losses_of(Small(), devices=4, mode=mode, dtype=jnp.float64, steps=5, accumulate=4)
        np.testing.assert_allclose(many, one, atol=1e-9)


def test_accumulation_without_batchnorm_is_the_whole_batch(float64):
    module = Small(normalise=False, rate=0.0)
    whole, _ = losses_of(module, devices=1, dtype=jnp.float64, steps=5)
    parts, _ = losses_of(module, devices=1, dtype=jnp.float64, steps=5, accumulate=4)
    np.testing.assert_allclose(parts, whole, atol=1e-12)


def test_accumulation_moves_statistics_once_for_each_microbatch(float64):
    _, once = losses_of(Small(statistics=4), devices=1, dtype=jnp.float64, steps=1, accumulate=1)
    _, four = losses_of(Small(), devices=1, dtype=jnp.float64, steps=1, accumulate=4)
    mean = once.collections["batch_stats"]["bn"]["mean"] / 0.1  # the mean over four ghost batches of 4
    moved = four.collections["batch_stats"]["bn"]["mean"]
    # four moves by about the same mean: 1 - 0.9^4 of it, not 0.1 of it
    np.testing.assert_allclose(np.abs(moved).sum(), (1 - 0.9**4) * np.abs(mean).sum(), rtol=0.1)


def test_statistics_move_in_training_alone():
    module = models.create("cifar_resnet20", width=4, depth=8)
    optimizer = optax.sgd(0.1)
    sample = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    state = create_state(module, optimizer=optimizer, sample=sample)
    stats = state.collections["batch_stats"]
    assert all(
        (leaf == (0 if "mean" in str(path) else 1)).all() for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
    )
    before = jax.device_get(stats)
    batch = {"image": IMAGES[:16].astype(np.float32) / 255, "label": LABELS[:16]}
    make_eval_step(module)(state.variables(), batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.collections["batch_stats"]))
    state, _ = make_train_step(module, optimizer=optimizer)(state, batch, 0)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.collections["batch_stats"]))
    assert all(jax.tree.leaves(moved))


def test_a_nonfinite_batch_changes_nothing_but_the_counters():
    module, optimizer = Small(), optax.adam(1e-2)
    sample = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    state = create_state(module, optimizer=optimizer, sample=sample, ema=True)
    step = make_train_step(module, optimizer=optimizer, ema_decay=0.9)
    good = {"image": IMAGES[:16].astype(np.float32) / 255, "label": LABELS[:16]}
    state, _ = step(state, good, 0)
    before = jax.device_get(state)
    bad = {**good, "image": good["image"].copy()}
    bad["image"][3, 2, 1, 0] = np.nan
    state, totals = step(state, bad, 0)
    after = jax.device_get(state)
    for name in ("params", "collections", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (after.step, after.counters["skipped"], after.counters["skipped_in_a_row"]) == (2, 1, 1)
    assert (float(totals["skipped"].sum), float(totals["loss"].count)) == (1, 0)
    state, _ = step(state, good, 0)
    assert (int(state.counters["skipped"]), int(state.counters["skipped_in_a_row"])) == (1, 0)


@pytest.mark.parametrize("arrays", [1, 600])
def test_no_clipping_hides_an_infinite_gradient_nor_does_the_number_of_arrays(arrays):
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            names = (f"w{i}" for i in range(arrays))
            roots = sum(jnp.sqrt(self.param(name, nn.initializers.zeros, (2,))) for name in names)
            return x[:, 0, 0] * 0 + jnp.broadcast_to(roots, (len(x), 2))

    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    state = create_state(Root(), optimizer=optimizer, sample=jax.ShapeDtypeStruct((1, 1, 1, 2), jnp.float32))
    step = make_train_step(Root(), optimizer=optimizer, loss_fn=lambda outputs, batch: outputs.sum(1), metrics={})
    state, totals = step(state, {"image": np.ones((4, 1, 1, 2), np.float32), "label": np.zeros(4, np.int32)}, 0)
    assert (int(state.counters["skipped"]), float(totals["skipped"].sum)) == (1, 1)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, [0, 0]), state.params)


@pytest.mark.parametrize("name", ["lenet5", "alexnet", pytest.param("inception_v1", marks=pytest.mark.slow)])
def test_a_step_scatters_nothing(name):
    """On a GPU a scatter adds in any order and the gradient of a pooling window compiles to one, which
    --train.deterministic refuses: losses compare labels with the classes, small windows are folded."""
    net, optimizer, size = models.create(name), optax.sgd(0.1), {"lenet5": (28, 28, 1)}.get(name, (224, 224, 3))
    state = state_shapes(net, optimizer=optimizer, sample=jax.ShapeDtypeStruct((1, *size), np.float32))
    store = {"image": jax.ShapeDtypeStruct((64, *size), np.float32), "label": jax.ShapeDtypeStruct((64,), np.int32)}
    batch = {"store": store, "indices": jax.ShapeDtypeStruct((8,), np.int32)}
    mesh = parallel.make_mesh(jax.devices()[:1])
    program = make_train_step(net, optimizer=optimizer, mesh=mesh).lower(state, batch, np.uint32(0)).as_text()
    assert "stablehlo.gather" in program
    assert "scatter" not in program


def test_the_moving_average_covers_parameters_and_statistics():
    decay = 0.75
    _, first = losses_of(Small(), devices=1, steps=1, ema_decay=decay)
    _, second = losses_of(Small(), devices=1, steps=2, ema_decay=decay)
    for name in ("params", "collections"):
        expected = jax.tree.map(
            lambda average, value: decay * average + (1 - decay) * value, first.ema[name], getattr(second, name)
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), second.ema[name], expected)


def test_label_smoothing_and_soft_labels_reach_the_loss():
    module, optimizer = Small(rate=0.0), optax.sgd(0.0)
    sample = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    batch = {"image": IMAGES[:16].astype(np.float32) / 255, "label": LABELS[:16]}
    soft = {**batch, "label": np.eye(10, dtype=np.float32)[LABELS[:16]] * 0.9 + 0.01}
    values = []
    for loss_fn, data in ((classification(label_smoothing=0.1), batch), (classification(), soft)):
        state = create_state(module, optimizer=optimizer, sample=sample)
        _, totals = make_train_step(module, optimizer=optimizer, loss_fn=loss_fn)(state, data, 0)
        values.append(float(totals["loss"].sum))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def fit_small(**options):
    arrays = (IMAGES.astype(np.float32) / 255, LABELS)
    return fit(Small(rate=0.0), arrays, optimizer=optax.sgd(0.05), batch_size=16, quiet=True, **options)


def test_several_steps_in_one_call_are_the_same_steps(tmp_path):
    one = fit_small(steps=11, log_every=4, test=(IMAGES.astype(np.float32) / 255, LABELS))
    fit_small(steps=8, log_every=4, checkpoint_every=8, directory=tmp_path, steps_per_call=4)
    four = fit_small(steps=11, log_every=4, checkpoint_every=8, directory=tmp_path, steps_per_call=4)
    assert [line["step"] for line in four.history] == [4, 8, 11]
    for a, b in zip(one.history, four.history, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, jax.device_get(one.state.params), jax.device_get(four.state.params))


def test_an_update_that_overflows_is_skipped_whole():
    module, optimizer = Small(rate=0.0, normalise=False), optax.sgd(3e38)
    state = create_state(module, optimizer=optimizer, sample=jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    before = jax.device_get(state.params)
    batch = {"image": 100 * IMAGES[:16].astype(np.float32), "label": LABELS[:16]}
    state, totals = make_train_step(module, optimizer=optimizer)(state, batch, 0)
    assert float(totals["skipped"].sum) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every 0"),
        ({"checkpoint_every": 0}, "checkpoint_every 0"),
        ({"early_stopping": 2}, "validation"),
        ({"select_by": "acuracy", "validation": (IMAGES, LABELS)}, "did you mean 'accuracy'"),
        ({"steps_per_call": 2, "parallel_mode": "pmap"}, "steps_per_call"),
        ({"batch_size": 97}, "97"),
    ],
)
def test_fit_refuses_what_cannot_work_before_compiling(options, message):
    with pytest.raises(InputError, match=message):
        fit(Small(), (IMAGES, LABELS), optimizer=optax.sgd(0.1), **{"steps": 2, "batch_size": 16, **options})
