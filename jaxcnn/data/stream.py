"""Batches of images that are decoded for every step, by Grain ahead of it: positions are steps, no iterator is kept."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcnn import parallel
from jaxcnn.data.disk import DiskImages, EvalRows, Shard, TrainRows
from jaxcnn.data.worker import Make, Workers
from jaxcnn.errors import InputError
from jaxcnn.types import Batch

THREADS = 8
"""At most so many threads decode where there are no workers."""

MOST_WORKERS = 16


def count(workers: int | None) -> int:
    """The number of worker processes; None leaves two cores to training. 0 decodes in threads of this process."""
    if workers is None:
        return min(MOST_WORKERS, max(0, _cores() - 2))
    if workers < 0:
        raise InputError(f"--workers {workers} must be at least 0")
    return workers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pipeline:
    """An iterator over `make(index)` from `start` up to `stop`, made ahead of time by `workers` or threads.

    Ahead are up to two batches of each worker, or one of each thread and one more. `room` is what a batch's images
    take, in bytes.

    Raises:
      InputError: what `make` raises, a damaged file, say.
      TrainingFailed: workers were lost to one batch again and again.
    """

    def __init__(self, make: Make, *, start: int, stop: int, workers: int | None, room: int):
        self._make, self._at, self._stop, self._room = make, start, stop, room
        self._count = min(count(workers), stop - start)
        self._workers: Workers | None = None
        self._iterator: Any = None

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._at == self._stop:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._begin()
        try:
            made = next(self._iterator)
        except Exception:
            self.close()  # Grain has gone on without this one
            raise
        self._at += 1
        return made

    def _begin(self) -> Any:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads some of its own, which have their defaults here
            flags.FLAGS.mark_as_parsed()
        if self._count:
            self._workers = Workers(self._make, self._count, room=self._room)
            make, threads, ahead = self._workers.make, self._count, 2 * self._count
        else:
            # For good, as what silences Pillow's warnings about metadata for a while would not be safe in threads.
            warnings.filterwarnings("ignore", module="PIL")
            make, threads = self._make, min(THREADS, _cores(), self._stop - self._at)
            ahead = threads + 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(grain.MapDataset.range(self._at, self._stop).map(make).to_iter_dataset(options))

    def close(self) -> None:
        """Ends the workers; the next batch would start them anew."""
        iterator, self._iterator = self._iterator, None
        workers, self._workers = self._workers, None
        if iterator is not None:
            iterator.close()
        if workers is not None:
            workers.close()


class StreamFeed:
    """Training batches as a function of the step: `image` (b, h, w, 3) uint8 and `label` (b,) int32, on the mesh.

    Made for consecutive steps; at another one the pipeline begins anew there. Each process decodes its `shard` of the
    global batch, by default its own share. What is in a batch depends on the seed and the step alone.
    """

    def __init__(
        self,
        images: DiskImages,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        shard: Shard | None = None,
    ):
        self.batch_size, self.seed, self.mesh = batch_size, seed, mesh
        self._labels, self._workers = labels, images.workers
        self._rows = TrainRows(images, labels, batch_size, seed, shard or own_shard())
        self._room = len(self._rows.shard.part(batch_size)) * images[:1].nbytes
        self._pipeline: Pipeline | None = None
        self._next = 0

    @property
    def examples(self) -> int:
        return len(self._labels)

    def __call__(self, step: int) -> Batch:
        if self._pipeline is None or step != self._next:
            self.close()
            self._pipeline = Pipeline(self._rows, start=step, stop=2**31, workers=self._workers, room=self._room)
        rows, self._next = next(self._pipeline), step + 1
        return place(rows, self.mesh, batch_size=self.batch_size, shard=self._rows.shard)

    def close(self) -> None:
        """Ends the workers. The feed can be used again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __del__(self) -> None:
        if getattr(self, "_pipeline", None) is not None:
            self.close()


def eval_batches(
    images: DiskImages, labels: np.ndarray, *, size: int, mesh: Mesh, shard: Shard | None = None
) -> Callable[[], Iterator[Batch]]:
    """As `loader.eval_batches`, in batches of `size`, decoded on the way: each process its `shard` of every batch."""
    own = shard or own_shard()
    rows = EvalRows(images, labels, size, own)
    room = len(own.part(size)) * images[:1].nbytes

    def batches() -> Iterator[Batch]:
        pipeline = Pipeline(rows, start=0, stop=-(-len(labels) // size), workers=images.workers, room=room)
        try:
            for batch in pipeline:
                yield place(batch, mesh, batch_size=size, shard=own)
        finally:
            pipeline.close()

    return batches


def own_shard() -> Shard:
    return Shard(jax.process_index(), jax.process_count())


def place(batch: dict[str, np.ndarray], mesh: Mesh, *, batch_size: int, shard: Shard) -> Batch:
    """This process's share of a batch, as the global batch divided over the mesh by example."""
    sharding = parallel.by_example(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }
