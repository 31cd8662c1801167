"""Which examples a step sees is a function of (seed, step); evaluation sees every example once."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn import parallel
from jaxcnn.data import loader, order
from jaxcnn.data.loader import eval_batches, gather, train_feed
from jaxcnn.errors import InputError

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**32 - 1)


def stream(steps: int, **kwargs: int) -> np.ndarray:
    return np.concatenate([order.indices(step, **kwargs) for step in range(steps)])


@given(examples=sizes, seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(examples, seed, epoch):
    rows = order.permutation(examples, seed=seed, epoch=epoch)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(np.sort(rows), np.arange(examples))


@given(examples=sizes, seed=seeds, batch_size=st.integers(1, 700), epochs=st.integers(1, 3))
def test_batches_follow_each_other_through_the_epochs_without_a_gap(examples, seed, batch_size, epochs):
    steps = -(-epochs * examples // batch_size)
    rows = stream(steps, examples=examples, batch_size=batch_size, seed=seed)
    assert rows.shape == (steps * batch_size,)
    expected = [order.permutation(examples, seed=seed, epoch=e) for e in range(-(-len(rows) // examples))]
    np.testing.assert_array_equal(rows, np.concatenate(expected)[: len(rows)])


@given(examples=sizes, seed=seeds, one=st.integers(1, 50), factor=st.integers(1, 6))
def test_the_stream_does_not_depend_on_the_batch_size(examples, seed, one, factor):
    small = stream(2 * factor, examples=examples, batch_size=one, seed=seed)
    large = stream(2, examples=examples, batch_size=one * factor, seed=seed)
    np.testing.assert_array_equal(small, large)


@given(examples=st.integers(1, 50), seed=seeds, steps=st.permutations(range(8)))
def test_a_step_does_not_depend_on_the_steps_before(examples, seed, steps):
    kwargs = {"examples": examples, "batch_size": 7, "seed": seed}
    whole = stream(8, **kwargs).reshape(8, 7)
    for step in steps:
        np.testing.assert_array_equal(order.indices(step, **kwargs), whole[step])


def test_epochs_and_seeds_differ():
    orders = {tuple(order.permutation(100, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(100, seed=0, epoch=0)[0] = 1


# --- feeding -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (41, 4, 3, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 41).astype(np.int32)


def mesh_of(devices: int):
    return parallel.make_mesh(jax.devices()[:devices])


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_a_resident_feed_and_a_host_feed_are_the_same(devices, dtype):
    mesh, labels = mesh_of(devices), LABELS.astype(dtype)
    resident, host = (
        train_feed(IMAGES, labels, batch_size=16, seed=5, mesh=mesh, resident=resident) for resident in (True, False)
    )
    for step in (0, 2, 7):
        a, b = gather(resident(step)), gather(host(step))
        rows = order.indices(step, examples=41, batch_size=16, seed=5)
        np.testing.assert_array_equal(a["image"], IMAGES[rows])
        np.testing.assert_array_equal(a["label"], LABELS[rows])
        assert b["image"].sharding.is_equivalent_to(parallel.by_example(mesh), 4)
        for name in ("image", "label"):
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
        assert a["image"].dtype == np.uint8
        assert a["label"].dtype == (np.uint8 if dtype == np.uint8 else np.int32)


@pytest.mark.parametrize("limit", [0, loader.RESIDENT_BYTES])
def test_the_shapes_of_a_batch_are_known_before_it_is_made(monkeypatch, limit):
    monkeypatch.setattr(loader, "RESIDENT_BYTES", limit)
    options = {"batch_size": 16, "mesh": mesh_of(8)}
    batch = train_feed(IMAGES, LABELS, seed=5, **options)(0)
    assert ("store" in batch) == bool(limit)
    made = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    assert loader.batch_shapes(IMAGES, LABELS, **options) == made


def test_several_steps_in_one_call_are_the_same_steps():
    feed = train_feed(IMAGES, LABELS, batch_size=8, seed=5, mesh=mesh_of(8))
    many = feed(3, steps=4)
    for i in range(4):
        np.testing.assert_array_equal(many["indices"][i], feed(3 + i)["indices"])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match=r"batch size 48 is larger .* 41 examples.*41 or less"):
        train_feed(IMAGES, LABELS, batch_size=48, seed=0, mesh=mesh_of(8))


@pytest.mark.parametrize(
    ("batch_size", "devices", "accumulate", "use"), [(100, 8, 1, 96), (8, 8, 2, 16), (63, 8, 4, 32)]
)
def test_a_batch_that_cannot_be_divided_is_refused(batch_size, devices, accumulate, use):
    with pytest.raises(InputError, match=f"batch size {batch_size} cannot .* {use} say"):
        parallel.check_divisible(batch_size, devices=devices, accumulate=accumulate)
    parallel.check_divisible(use, devices=devices, accumulate=accumulate)


@pytest.mark.parametrize("batch_size", [1000, 128, 7])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_evaluation_sees_every_example_once_and_in_order(batch_size, devices):
    n = 1003
    images, labels = np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n) % 10
    batches = eval_batches(images, labels, batch_size=batch_size, mesh=mesh_of(devices))
    for _ in range(2):  # again and again
        seen, shapes = [], set()
        for batch in batches():
            real = np.asarray(batch["mask"]) > 0
            seen += np.asarray(batch["image"]).ravel()[real].astype(int).tolist()
            np.testing.assert_array_equal(np.asarray(batch["label"])[real], np.asarray(seen[-real.sum() :]) % 10)
            shapes.add(batch["image"].shape)
        assert seen == list(range(n))
        assert len(shapes) == 1  # one program for all, the last one too
        assert shapes.pop()[0] % devices == 0


@given(n=st.integers(1, 40), batch_size=st.integers(1, 60), devices=st.sampled_from([1, 2, 8]))
@settings(deadline=None, max_examples=30)
def test_padding_repeats_a_real_example_and_counts_for_nothing(n, batch_size, devices):
    images, labels = RNG.random((n, 2, 2, 1)), np.arange(n)
    count = 0
    for batch in eval_batches(images, labels, batch_size=batch_size, mesh=mesh_of(devices))():
        mask = np.asarray(batch["mask"])
        assert set(mask) <= {0.0, 1.0}
        assert set(np.asarray(batch["label"])[mask == 0]) <= {n - 1}
        count += int(mask.sum())
    assert count == n


def test_gather_leaves_other_batches_as_they_are():
    batch = {"image": IMAGES, "label": LABELS}
    assert gather(batch) is batch


def test_images_that_are_not_finite_are_named():
    images = np.zeros((8, 2, 2, 1), np.float32)
    images[5, 1, 0, 0] = np.inf
    with pytest.raises(InputError, match="training data: image 5 holds inf"):
        train_feed(images, np.zeros(8, np.int32), batch_size=4, seed=0, mesh=parallel.make_mesh())
