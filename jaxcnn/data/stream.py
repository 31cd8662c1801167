"""Batches of images that are decoded for every step, by Grain: positions are steps, so that no iterator is a state."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcnn import parallel
from jaxcnn.data import worker
from jaxcnn.data.disk import DiskImages, EvalRows, Shard, TrainRows
from jaxcnn.errors import InputError, TrainingFailed
from jaxcnn.types import Batch

THREADS = 8
"""At most so many threads decode where there are no workers."""

MOST_WORKERS = 16

RESTARTS = 3
"""So often in a row lost workers are replaced before the run fails."""

Make = Callable[[int], dict[str, np.ndarray]]


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
    """An iterator over `make(index)` from `start` up to `stop`, made ahead of time by processes or threads.

    Ahead are up to four batches of each process, or one of each thread and one more. A process that is killed is
    replaced, with all others, and the batches stay what they are.

    Raises:
      InputError: what `make` raises, a damaged file, say.
      TrainingFailed: workers were lost `RESTARTS` times in a row without a batch between.
    """

    def __init__(self, make: Make, *, start: int, stop: int, workers: int | None):
        self._make, self._at, self._stop = make, start, stop
        self._workers = min(count(workers), stop - start)
        self._iterator: Any = None

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        for _ in range(RESTARTS):
            if self._iterator is None:
                self._iterator = self._begin()
            try:
                made = next(self._iterator)
            except RuntimeError as error:  # Grain's, for a process that ended; `make` raises none
                self.close()
                lost = error
                print(f"warning: batch {self._at}: {error}; the workers are started anew", file=sys.stderr, flush=True)
            else:
                self._at += 1
                return {name: np.array(array) for name, array in made.items()}  # gives shared memory back at once
        raise TrainingFailed(
            f"batch {self._at} could not be decoded in {RESTARTS} attempts: {lost}; if memory or /dev/shm ran out,"
            f" use fewer --workers than {self._workers}, or 0"
        )

    def _begin(self) -> Any:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads some of its own, which have their defaults here
            flags.FLAGS.mark_as_parsed()
        data = grain.MapDataset.range(self._at, self._stop).map(self._make)
        if self._workers == 0:
            # For good, as what silences Pillow's warnings about metadata for a while would not be safe in threads.
            warnings.filterwarnings("ignore", module="PIL")
            threads = min(THREADS, _cores(), self._stop - self._at)
            return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
        iterator = iter(data.to_iter_dataset(alone).mp_prefetch(options, worker_init_fn=worker.begin))
        with worker.first_in_children(self._workers):
            iterator.get_state()  # makes the iterators of all workers, so that the next line starts them all
            iterator.start_prefetch()
        return iterator

    def close(self) -> None:
        """Ends the workers; the next batch would start them anew."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()


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
        self._rows.shard.part(batch_size)
        self._pipeline: Pipeline | None = None
        self._last: tuple[int, Batch] | None = None

    @property
    def examples(self) -> int:
        return len(self._labels)

    def __call__(self, step: int) -> Batch:
        if self._last is not None and self._last[0] == step:  # `fit` looks at its first batch before it trains on it
            return self._last[1]
        if self._pipeline is None or self._last is None or self._last[0] + 1 != step:
            self.close()
            self._pipeline = Pipeline(self._rows, start=step, stop=2**31, workers=self._workers)
        self._last = (step, place(next(self._pipeline), self.mesh, batch_size=self.batch_size, shard=self._rows.shard))
        return self._last[1]

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
    own.part(size)

    def batches() -> Iterator[Batch]:
        pipeline = Pipeline(rows, start=0, stop=-(-len(labels) // size), workers=images.workers)
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
