"""Batches on the devices: training batches by step, evaluation batches padded and masked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcnn import parallel
from jaxcnn.data import order, stream
from jaxcnn.data.dataset import check_finite
from jaxcnn.data.disk import DiskImages
from jaxcnn.errors import InputError
from jaxcnn.types import DATA_AXIS, Batch

RESIDENT_BYTES = 2 << 30
"""Training sets up to this size live on every device; larger ones are gathered on the host for each step."""


@dataclass(frozen=True)
class TrainFeed:
    """Training batches as a function of the step.

    `images` (n, h, w, c), `labels` (n, ...). A resident feed puts both on every device once, and a batch is
    {"store": {"image", "label"}, "indices": (b,)}, gathered inside the compiled step by `gather`.
    """

    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    seed: int
    mesh: Mesh
    store: dict[str, jax.Array] | None

    @property
    def examples(self) -> int:
        return len(self.labels)

    def indices(self, step: int) -> np.ndarray:
        return order.indices(step, examples=self.examples, batch_size=self.batch_size, seed=self.seed)

    def __call__(self, step: int, *, steps: int = 1) -> dict[str, Any]:
        """The batch of `step`; with `steps` > 1 (resident feeds) the indices of so many steps: (steps, b)."""
        if steps > 1:
            rows = np.stack([self.indices(step + i) for i in range(steps)])
            sharding = NamedSharding(self.mesh, PartitionSpec(None, DATA_AXIS))
            return {"store": self.store, "indices": parallel.place(rows, sharding)}
        rows, sharding = self.indices(step), parallel.by_example(self.mesh)
        if self.store is not None:  # to one device the call itself takes them, faster than device_put
            return {"store": self.store, "indices": rows if self.mesh.size == 1 else parallel.place(rows, sharding)}
        return parallel.place_rows({"image": self.images, "label": self.labels}, rows, sharding)

    def close(self) -> None:
        """Nothing: a `stream.StreamFeed` ends its workers."""


def check_batch_size(batch_size: int, *, examples: int) -> None:
    """`InputError` unless a batch fits into the training split."""
    if examples < batch_size:
        raise InputError(
            f"batch size {batch_size} is larger than the training split of {examples} examples:"
            f" use --data.batch-size {examples} or less"
        )


def train_feed(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh,
    resident: bool | None = None,
) -> TrainFeed:
    """A feed over (n, h, w, c) images; `resident` None decides by size. Of images on disk (`disk.DiskImages`) it is a
    `stream.StreamFeed`.

    `InputError` if n < batch_size, or for NaN.
    """
    check_batch_size(batch_size, examples=len(labels))
    if isinstance(images, DiskImages):
        if resident:
            raise InputError("images on disk cannot live on the devices: give --data.storage memory")
        feed = stream.StreamFeed(images, labels, batch_size=batch_size, seed=seed, mesh=mesh)
        return cast(TrainFeed, feed)  # as the images are typed as an array
    if np.issubdtype(images.dtype, np.floating):
        check_finite("training data", images)
    if resident is None:
        resident = _fits(images)
    store = None
    if resident:
        store = parallel.place({"image": images, "label": labels}, parallel.replicated(mesh))
    return TrainFeed(images, labels, batch_size, seed, mesh, store)


def _fits(images: np.ndarray) -> bool:
    return not isinstance(images, DiskImages) and images.nbytes <= RESIDENT_BYTES


def batch_shapes(images: np.ndarray, labels: np.ndarray, *, batch_size: int, mesh: Mesh) -> dict[str, Any]:
    """Shapes, types and places of the batches of `train_feed(images, labels)`; nothing is read or moved."""

    def shape(array: np.ndarray, n: int, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *array.shape[1:]), array.dtype, sharding=sharding)

    arrays, spread = {"image": images, "label": labels}, parallel.by_example(mesh)
    if not _fits(images):
        return {name: shape(array, batch_size, spread) for name, array in arrays.items()}
    store = {name: shape(array, len(labels), parallel.replicated(mesh)) for name, array in arrays.items()}
    return {"store": store, "indices": jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=spread)}


def gather(batch: Batch) -> Batch:
    """Inside a compiled step: the examples that a resident batch points at; other batches as they are."""
    if "store" not in batch:
        return batch
    return {name: array[batch["indices"]] for name, array in batch["store"].items()}


def eval_batches(
    images: np.ndarray, labels: np.ndarray, *, batch_size: int, mesh: Mesh, shards: int = 0
) -> Callable[[], Iterator[Batch]]:
    """Batches of every example exactly once, in order: `image`, `label` and `mask` (b,), 0 for padding.

    The size is rounded up to a multiple of the devices, or of the virtual `shards`, and the last batch padded to it by
    repeating its last example. Returns a function, so that one split can be evaluated again and again.
    """
    multiple = shards or mesh.size
    size = -(-min(batch_size, len(labels)) // multiple) * multiple
    if isinstance(images, DiskImages):
        return stream.eval_batches(images, labels, size=size, mesh=mesh)
    sharding = parallel.by_example(mesh)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(labels), size):
            rows = np.minimum(np.arange(start, start + size), len(labels) - 1)
            mask = (np.arange(start, start + size) < len(labels)).astype(np.float32)
            batch = {"image": images[rows], "label": labels[rows], "mask": mask}
            yield parallel.place(batch, sharding)

    return batches
