"""Virtual shards: the same bits on any number of devices, and the arithmetic that they stand for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcnn import parallel
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.loader import gather, train_feed
from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.train import fit, state_sha256
from jaxcnn.train.log import TIMINGS
from jaxcnn.train.state import create_state
from jaxcnn.train.step import make_train_step

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 80).astype(np.int32)
IMAGES = (50 * LABELS[:, None, None, None] + RNG.integers(0, 60, (80, 12, 12, 1))).astype(np.float32)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


class Net(nn.Module):
    """Large enough for kernels that several threads share."""

    statistics: int | str = "global"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm(statistics=self.statistics, name="bn")(nn.Conv(16, (3, 3))(x / 255), train=train)
        x = Dropout(self.dropout)(nn.relu(x), train=train)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def mesh_of(devices: int):
    return parallel.make_mesh(jax.devices()[:devices])


def prepare(batch, key):
    batch = gather(batch)
    settings = Augmentation(crop_padding=1, flip=True, mixup=0.2)
    images, labels = augment(key, batch["image"], batch["label"], settings=settings, num_classes=4, fill=jnp.zeros(1))
    return {"image": images, "label": labels}


@pytest.mark.parametrize("resident", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_is_the_same_on_any_number_of_devices(resident):
    """Augmentation, dropout, BatchNorm, clipping, a moving average; evaluation of a split that nothing divides."""
    found = {}
    for devices in (1, 2, 4, 8):
        mesh = mesh_of(devices)
        feed = train_feed(IMAGES[:64], LABELS[:64], batch_size=32, seed=1, mesh=mesh, resident=resident)
        result = fit(
            Net(dropout=0.3),
            feed,
            optimizer=OPTIMIZER,
            steps=6,
            batch_size=32,
            validation=(IMAGES[64:77], LABELS[64:77]),
            prepare=prepare,
            ema_decay=0.9,
            shards=8,
            log_every=2,
            eval_every=3,
            eval_batch_size=5,
            seed=1,
            mesh=mesh,
            quiet=True,
        )
        lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in result.history]
        found[devices] = state_sha256(result.state), lines
    assert len(found[1][1]) == 5
    assert found[1][1][1]["validation_count"] == 13
    for devices in (2, 4, 8):
        assert found[devices] == found[1], devices


@pytest.mark.parametrize("shards", [1, 4])
def test_the_arithmetic_is_that_of_ghost_batches(shards):
    """Without random numbers, shards are ghost batches of BatchNorm and nothing else."""
    mesh = mesh_of(1)
    feed = train_feed(IMAGES, LABELS, batch_size=16, seed=1, mesh=mesh)
    state, sample = {}, jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    with jax.set_mesh(mesh):
        for name, net, options in (
            ("shards", Net(), {"shards": shards}),
            ("ghosts", Net(statistics=16 // shards), {}),
        ):
            step = make_train_step(net, optimizer=OPTIMIZER, mesh=mesh, **options)
            state[name] = create_state(net, optimizer=OPTIMIZER, sample=sample, mesh=mesh)
            for i in range(2):
                state[name], totals = step(state[name], feed(i), np.uint32(1))
            state[name] = state[name], totals
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state["shards"], state["ghosts"])


@pytest.mark.parametrize(
    ("batch_size", "shards", "message"),
    [(36, 8, "batch of 36 cannot be divided in 8"), (24, 6, "6 virtual shards cannot be divided over 4 devices")],
)
def test_what_does_not_divide_is_refused(batch_size, shards, message):
    with pytest.raises(InputError, match=message):
        fit(
            Net(), (IMAGES, LABELS), optimizer=OPTIMIZER, steps=1, batch_size=batch_size, shards=shards, mesh=mesh_of(4)
        )


@pytest.mark.parametrize("other", [{"accumulate": 2}, {"parallel_mode": "pmap"}, {"steps_per_call": 2}])
def test_other_divisions_of_the_batch_are_refused(other):
    with pytest.raises(InputError, match="shards 4 divide the batch"):
        fit(Net(), (IMAGES, LABELS), optimizer=OPTIMIZER, steps=1, batch_size=16, shards=4, mesh=mesh_of(1), **other)
