"""A state divided over the devices: what lives where, the same steps, checkpoints that any number of devices reads."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxcnn import parallel
from jaxcnn.data.loader import train_feed
from jaxcnn.errors import InputError
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.train import fit, state_sha256
from jaxcnn.train.state import create_state
from jaxcnn.train.step import make_train_step, scan_steps
from jaxcnn.types import DATA_AXIS

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 64).astype(np.int32)
IMAGES = (50 * LABELS[:, None, None, None] + RNG.integers(0, 60, (64, 8, 8, 1))).astype(np.float32)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
SAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


class Net(nn.Module):
    """A kernel of 8 x 8 x 16 x 64 that is divided, and a convolution that is not."""

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm(name="bn")(nn.Conv(16, (3, 3), use_bias=False)(x / 255), train=train)
        x = nn.relu(nn.Dense(64, name="wide")(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(Dropout(0.2)(x, train=train))


def mesh_of(devices: int):
    return parallel.make_mesh(jax.devices()[:devices])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 512, 512), (None, None, None, DATA_AXIS)),  # the last of equally long axes
        ((1, 1, 1024, 256), (None, None, DATA_AXIS)),
        ((1000, 4096), (None, DATA_AXIS)),
        ((4096, 1000), (DATA_AXIS,)),
        ((129, 8, 1000), (None, None, DATA_AXIS)),
        ((127, 129), ()),  # nothing that 4 divides
        ((128, 127), ()),  # 16,256 elements: too few
        ((128, 128), (None, DATA_AXIS)),  # 16,384
        ((512,), ()),
        ((), ()),
    ],
)
def test_the_rule(shape, expected):
    sharding = parallel.Layout(mesh_of(4), fsdp=True).of(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert sharding.spec == PartitionSpec(*expected)
    assert parallel.Layout(mesh_of(4)).of(np.zeros(shape[:1])).spec == PartitionSpec()


def test_each_device_keeps_a_part_of_parameters_optimiser_and_average():
    state = create_state(Net(), optimizer=OPTIMIZER, sample=SAMPLE, mesh=mesh_of(8), ema=True, fsdp=True)
    wide = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (1024, 64)]
    assert len(wide) == 4  # the kernel, two moments, the average
    for leaf in wide:
        assert [shard.data.shape for shard in leaf.addressable_shards] == [(128, 64)] * 8
    others = sum(leaf.size for leaf in jax.tree.leaves(state)) - 4 * 1024 * 64
    held = [sum(leaf.addressable_shards[i].data.size for leaf in jax.tree.leaves(state)) for i in range(8)]
    assert held == [4 * 128 * 64 + others] * 8
    assert state_sha256(state) == state_sha256(
        create_state(Net(), optimizer=OPTIMIZER, sample=SAMPLE, mesh=mesh_of(1), ema=True)
    )


@pytest.mark.slow
def test_the_steps_are_those_of_a_whole_state():
    """Two steps of two micro-batches with clipping, BatchNorm, dropout and a moving average; and the state stays where
    it was, in one program of both steps too."""
    mesh, more = mesh_of(4), {"accumulate": 2, "ema_decay": 0.9}
    feed, found = train_feed(IMAGES, LABELS, batch_size=16, seed=1, mesh=mesh), {}
    with jax.set_mesh(mesh):
        for fsdp, many in ((False, False), (True, False), (True, True)):
            start = create_state(Net(), optimizer=OPTIMIZER, sample=SAMPLE, mesh=mesh, ema=True, fsdp=fsdp)
            where = jax.tree.map(lambda leaf: leaf.sharding, start)
            step = make_train_step(Net(), optimizer=OPTIMIZER, mesh=mesh, fsdp=fsdp, **more)
            if many:
                state, totals = scan_steps(step)(start, feed(0, steps=2), np.uint32(1))
                totals = jax.tree.map(lambda total: total[1], totals)
            else:
                state, _ = step(start, feed(0), np.uint32(1))
                state, totals = step(state, feed(1), np.uint32(1))
            same = jax.tree.map(
                lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, where
            )
            assert all(jax.tree.leaves(same))
            found[fsdp, many] = jax.device_get((state, totals))
    for case in ((True, False), (True, True)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found[case], found[False, False]
        )


@pytest.mark.slow
def test_the_gradient_is_divided_before_the_optimiser_sees_it():
    """No device holds two whole copies of the kernel: the moments are computed on parts."""
    mesh = mesh_of(8)
    feed, bytes_of = train_feed(IMAGES, LABELS, batch_size=16, seed=1, mesh=mesh), {}
    for fsdp in (False, True):
        state = create_state(Net(), optimizer=OPTIMIZER, sample=SAMPLE, mesh=mesh, fsdp=fsdp)
        step = make_train_step(Net(), optimizer=OPTIMIZER, mesh=mesh, fsdp=fsdp)
        with jax.set_mesh(mesh):
            planned = step.lower(state, feed(0), np.uint32(0)).compile().memory_analysis()
        bytes_of[fsdp] = planned.argument_size_in_bytes, planned.temp_size_in_bytes
    kernel = 4 * 1024 * 64
    assert bytes_of[False][0] - bytes_of[True][0] == 3 * kernel * 7 // 8
    assert bytes_of[True][1] < bytes_of[False][1]


def training(devices: int, directory, *, steps: int, **more):
    options = {"batch_size": 16, "checkpoint_every": 3, "log_every": 2, "eval_every": 3, "quiet": True, "fsdp": True}
    data = {"train": (IMAGES[:48], LABELS[:48]), "validation": (IMAGES[48:], LABELS[48:])}
    options |= {"mesh": mesh_of(devices), "directory": directory, "ema_decay": 0.9, "optimizer": OPTIMIZER}
    return fit(Net(), **data, **(options | more), steps=steps)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """To the same bits on the same devices; and on fewer, or undivided, from the same state."""
    expected = training(8, None, steps=9)
    training(8, tmp_path / "run", steps=6, asynchronous_saves=True)
    result = training(8, tmp_path / "run", steps=9)
    assert state_sha256(result.state) == state_sha256(expected.state)
    assert result.selected_step == expected.selected_step
    assert state_sha256(result.variables) == state_sha256(expected.variables)
    for name, devices, fsdp in (("fewer", 2, True), ("undivided", 8, False)):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        read = training(devices, tmp_path / name, steps=9, fsdp=fsdp)  # a finished run: nothing is left to train
        assert state_sha256(read.state) == state_sha256(expected.state)


@pytest.mark.parametrize("other", [{"shards": 8}, {"parallel_mode": "pmap"}])
def test_what_needs_the_whole_state_is_refused(other):
    with pytest.raises(InputError, match="fsdp divides the state"):
        training(8, None, steps=1, **other)
