"""Batches decoded on the way: the same for any number of workers and processes, after any stop, whatever dies."""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jpegs import deadly, faulty, folder, of_worker, several

from jaxcnn import parallel
from jaxcnn.data import order, stream
from jaxcnn.data.disk import DiskImages, EvalRows, Shard, TrainRows, open_folder
from jaxcnn.data.images import read_folder
from jaxcnn.data.loader import batch_shapes, eval_batches, train_feed
from jaxcnn.data.worker import Workers
from jaxcnn.errors import InputError, TrainingFailed

SIZE = (16, 12)
AREA = (0.2, 1.0)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="module")
def data(pets):
    return open_folder(pets, image_size=SIZE)


def crops(data, *, workers: int = 0) -> DiskImages:
    return dataclasses.replace(data.train.images, area=AREA, workers=workers)


def feed_of(data, *, workers: int = 0, devices: int = 8, seed: int = 5, shard: Shard | None = None):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    images = crops(data, workers=workers)
    return stream.StreamFeed(images, data.train.labels, batch_size=16, seed=seed, mesh=mesh, shard=shard)


def take(feed, steps) -> list[dict[str, np.ndarray]]:
    batches = [{name: np.asarray(array) for name, array in feed(step).items()} for step in steps]
    feed.close()
    return batches


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def straight(data):
    """Steps 0 to 7 of seed 5."""
    return take(feed_of(data), range(8))


def test_a_batch_is_of_the_step_alone(data, straight):
    rows = [order.indices(step, examples=len(data.train), batch_size=16, seed=5) for step in range(8)]
    for step, batch in enumerate(straight):
        assert batch["image"].shape == (16, *SIZE, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], data.train.labels[rows[step]])
        one = crops(data).trained(rows[step][3], seed=5, step=step, position=3)
        np.testing.assert_array_equal(batch["image"][3], one)
    assert len({batch["image"].tobytes() for batch in straight}) == 8
    assert (take(feed_of(data, seed=6), [0])[0]["image"] != straight[0]["image"]).any()


def test_a_batch_is_divided_over_the_mesh(data):
    feed = feed_of(data)
    batch = feed(0)
    assert batch["image"].sharding.is_equivalent_to(parallel.by_example(feed.mesh), 4)
    shapes = batch_shapes(crops(data), data.train.labels, batch_size=16, mesh=feed.mesh)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (x.shape, x.dtype) for k, x in shapes.items()}
    assert feed.examples == len(data.train)
    feed.close()


@pytest.mark.parametrize("workers", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_change_nothing(data, straight, workers):
    assert_same(take(feed_of(data, workers=workers), range(8)), straight)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_are_rows_of_the_same_batch(data, straight, count):
    parts = [take(feed_of(data, devices=1, shard=Shard(i, count)), range(3)) for i in range(count)]
    whole = [{name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][0]} for step in range(3)]
    assert_same(whole, straight[:3])


def test_a_shard_reads_only_its_own_files(data, monkeypatch):
    read = []
    monkeypatch.setattr(DiskImages, "trained", lambda self, index, **_: read.append(index) or np.zeros((*SIZE, 3)))
    TrainRows(crops(data), data.train.labels, 16, 5, Shard(1, 4))(2)
    rows = order.indices(2, examples=len(data.train), batch_size=16, seed=5)
    assert read == rows[4:8].tolist()


def test_unequal_shards_are_refused(data):
    with pytest.raises(InputError, match="batch size 16 cannot be divided evenly over 3 processes"):
        feed_of(data, shard=Shard(0, 3))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_going_on_at_any_step_is_the_straight_run(data, straight, workers):
    for start in (1, 5):
        assert_same(take(feed_of(data, workers=workers), range(start, 8)), straight[start:])
    feed = feed_of(data, workers=workers)
    assert_same(take(feed, [0, 1, 6, 7, 2, 3]), [straight[i] for i in (0, 1, 6, 7, 2, 3)])
    assert_same(take(feed, [4]), [straight[4]])  # after close


def test_without_crops_the_batches_are_those_of_memory(pets, data):
    memory = read_folder(pets, image_size=SIZE)
    mesh = parallel.make_mesh()
    kept, streamed = (
        train_feed(part.train.images, part.train.labels, batch_size=8, seed=1, mesh=mesh, resident=False)
        for part in (memory, data)
    )
    for step in range(3):
        assert_same([jax.device_get(streamed(step))], [jax.device_get(kept(step))])
    streamed.close()
    for part in ("train", "test"):
        a, b = (
            list(eval_batches(getattr(d, part).images, getattr(d, part).labels, batch_size=8, mesh=mesh)())
            for d in (memory, data)
        )
        assert_same([jax.device_get(batch) for batch in b], [jax.device_get(batch) for batch in a])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [8, 100])
def test_evaluation_sees_every_example_once_for_any_number_of_shards(data, count, batch_size):
    images, labels = data.test.images, np.arange(len(data.test), dtype=np.int32)  # which example, for a label
    mesh = parallel.make_mesh(jax.devices()[:4])
    size = -(-min(batch_size, len(labels)) // 4) * 4
    shards = [stream.eval_batches(images, labels, size=size, mesh=mesh, shard=Shard(i, count)) for i in range(count)]
    if size // count % 4:  # one process cannot place such a part on four devices: its rows alone are looked at
        rows = [EvalRows(images, labels, size, Shard(i, count)) for i in range(count)]
        parts = [[one(index) for index in range(-(-len(labels) // size))] for one in rows]
    else:
        parts = [list(batches()) for batches in shards]
    assert len({len(part) for part in parts}) == 1
    seen = [
        label
        for batches in zip(*parts, strict=True)
        for batch in batches
        for label, mask in zip(np.asarray(batch["label"]), np.asarray(batch["mask"]), strict=True)
        if mask
    ]
    assert seen == labels.tolist()
    assert {batch["image"].shape for part in parts for batch in part} == {(size // count, *SIZE, 3)}


def test_evaluation_can_be_left_and_done_again(data):
    batches = eval_batches(data.test.images, data.test.labels, batch_size=4, mesh=parallel.make_mesh())
    next(iter(batches()))
    assert sum(float(batch["mask"].sum()) for batch in batches()) == len(data.test)


def test_images_stand_for_an_array(data):
    images = data.test.images
    assert images.shape == (len(data.test), *SIZE, 3)
    whole = np.asarray(images)
    assert whole.shape == images.shape
    assert whole.dtype == images.dtype == np.uint8
    np.testing.assert_array_equal(images[2], whole[2])
    np.testing.assert_array_equal(np.asarray(images[np.array([4, 1])]), whole[[4, 1]])
    np.testing.assert_array_equal(np.asarray(images[:3]), whole[:3])
    large = dataclasses.replace(images, size=(10**5, 10**5))
    with pytest.raises(InputError, match="as an array"):
        np.asarray(large)
    with pytest.raises(InputError, match="storage memory"):
        train_feed(images, data.test.labels, batch_size=4, seed=0, mesh=parallel.make_mesh(), resident=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(tmp_path, workers):
    pets = folder(tmp_path / "pets", each=6, held=2)
    path = pets / "train" / "class1" / "002.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    feed = feed_of(open_folder(pets, image_size=SIZE), workers=workers)
    with pytest.raises(InputError, match=r"cannot read image .*train/class1/002\.jpg: .*truncated"):
        take(feed, range(2))
    feed.close()
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read image .*train/class1/002\.jpg: No such file"):
        take(feed, range(2))
    feed.close()


def test_the_number_of_workers_is_sensible_and_checked(monkeypatch):
    assert stream.count(3) == 3
    with pytest.raises(InputError, match="--workers -1 must be at least 0"):
        stream.count(-1)
    for cores, expected in ((1, 0), (2, 0), (8, 6), (96, 16)):
        monkeypatch.setattr(stream, "_cores", lambda cores=cores: cores)
        assert stream.count(None) == expected


def started(action) -> list:
    """The processes that `action()` starts."""
    before = set(multiprocessing.active_children())
    action()
    return list(set(multiprocessing.active_children()) - before)


def test_workers_have_no_jax_and_ignore_signals_and_are_replaced_when_killed(data, capfd):
    pipeline = stream.Pipeline(of_worker, start=0, stop=3, workers=1, room=2)
    found = next(pipeline)
    pipeline.close()
    assert found["ignored"].all()
    assert found["modules"].tolist() == []

    feed = feed_of(data, workers=2)
    processes = started(lambda: feed(0))
    assert len(processes) == 2
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    first = jax.device_get(feed(1))
    assert all(process.is_alive() for process in processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join()
    many = range(2, 30)  # more than lie ready
    assert_same([first, *take(feed, many)], take(feed_of(data, workers=0), [1, *many]))
    assert "exit code -9" in capfd.readouterr().err
    assert not any(process.is_alive() for process in processes)


def test_workers_that_die_again_and_again_end_the_run(capfd):
    pipeline = stream.Pipeline(deadly, start=7, stop=8, workers=2, room=0)
    with pytest.raises(TrainingFailed, match=r"batch 7 .* 3 attempts: .*exit code -9.*fewer --workers than 1"):
        next(pipeline)
    assert capfd.readouterr().err.count("batch 7") == 3
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_no_moment_of_a_workers_death_stops_the_batches(data, capfd):
    feed, straight, rng = feed_of(data, workers=2), feed_of(data, workers=0), np.random.default_rng(0)
    killed, step = 0, 0
    due = time.monotonic() + 2
    try:
        while killed < 20:
            assert_same([jax.device_get(feed(step))], [jax.device_get(straight(step))])
            step += 1
            if time.monotonic() > due:
                multiprocessing.active_children()[killed % 2].kill()
                killed, due = killed + 1, time.monotonic() + rng.uniform(0.5, 1)  # another has begun by then
    finally:
        feed.close()
        straight.close()
    assert capfd.readouterr().err.count("exit code -9") >= 15


@pytest.mark.parametrize("room", [0, 60, 200, 10_000])
def test_arrays_come_whole_by_memory_or_pipe(room):
    pool = Workers(several, 1, room=room)
    for index in range(2):
        found, expected = pool.make(index), several(index)
        assert_same([found], [expected])
    pool.close()
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_worker_shows_its_traceback():
    pool = Workers(faulty, 1, room=0)
    with pytest.raises(KeyError) as caught:
        pool.make(2)
    assert "in faulty" in caught.value.__notes__[0]
    pool.close()


SCRIPT = """
    import os, sys, time
    import numpy as np
    from pathlib import Path
    from jaxcnn import parallel
    from jaxcnn.data import stream
    from jaxcnn.data.disk import open_folder
    import dataclasses, multiprocessing

    # No `if __name__ == "__main__"`: workers do not run the script again.
    data = open_folder(Path(sys.argv[1]), image_size=(16, 12))
    images = dataclasses.replace(data.train.images, workers=2)
    feed = stream.StreamFeed(images, data.train.labels, batch_size=16, seed=5, mesh=parallel.make_mesh())
    feed(0)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_their_trainer(pets, tmp_path, killed):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "script.py"), str(pets), "600" if killed else "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        workers = [int(word) for word in trainer.stdout.readline().split()]
        if killed:
            trainer.kill()
        error = trainer.communicate(timeout=60)[1]
    assert len(workers) == 2
    assert error == ""
    assert trainer.returncode == (-signal.SIGKILL if killed else 0)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_read_their_rows_of_one_global_batch(pets):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("two_hosts.py")
    commands = [[sys.executable, str(script), str(i), f"127.0.0.1:{port}", str(pets)] for i in range(2)]
    hosts = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        said = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    assert all(f"process {i}: 2 evaluation batches" in said[i] for i in range(2)), said
