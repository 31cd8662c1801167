"""Images that stay compressed on disk, and the batches that workers decode of them; JAX stays out of it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from jaxcnn.data import decode, order
from jaxcnn.data.dataset import Dataset, Split
from jaxcnn.data.decode import Compressed
from jaxcnn.data.images import Entry, Size, list_folder
from jaxcnn.errors import InputError

MATERIALISED_BYTES = 2 << 30
"""So much may become an array at once, for what works on arrays alone."""


class Reader(Protocol):
    """Compressed images by index, from any thread; workers get a pickled copy."""

    def __getitem__(self, index: int, /) -> Compressed: ...


@dataclass(frozen=True, eq=False)
class Files:
    """`names` (n,) bytes: paths below `root`."""

    root: Path
    names: np.ndarray

    def __getitem__(self, index: int, /) -> Compressed:
        path = self.root / os.fsdecode(self.names[index])
        try:
            return Compressed(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"cannot read image {path}: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class DiskImages:
    """Images (n, h, w, 3), uint8 in 0..255, of which only the files are known: `reader[rows[i]]` is image i.

    Stands for an array in `Split.images`: it has the shape and type of one, and indices give a part of it. The loader
    streams it. As an array (`np.asarray`, or an integer index) it is decoded as for evaluation: scaled to cover `size`
    and cropped about the centre, as `read_image` does, or only what is inside `decode.BORDER` where `area` is given:
    then training batches are random crops of that range of the image's area. `workers` decode (`stream.count`).
    """

    reader: Reader
    rows: NDArray[np.int64]
    size: Size
    area: tuple[float, float] | None = None
    workers: int | None = None

    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    ndim: ClassVar[int] = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), *self.size, 3)

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.size[0] * self.size[1] * 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | np.integer):
            return self.evaluated(int(key))
        return replace(self, rows=self.rows[key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.nbytes > MATERIALISED_BYTES:
            raise InputError(
                f"{len(self)} images of {self.size} pixels would take {self.nbytes / 2**30:.1f} GiB as an array:"
                " this works on images in memory; give fewer, or a smaller --data.image-size"
            )
        return np.stack([self.evaluated(i) for i in range(len(self))]).astype(dtype or np.uint8, copy=False)

    def evaluated(self, index: int) -> NDArray[np.uint8]:
        border = 0.0 if self.area is None else decode.BORDER
        return decode.centre(self.reader[self.rows[index]], size=self.size, border=border)

    def trained(self, index: int, *, seed: int, step: int, position: int) -> NDArray[np.uint8]:
        """As `position` in the global batch of `step` sees it."""
        if self.area is None:
            return self.evaluated(index)
        draws = decode.uniform_draws(seed, step, position)
        return decode.random_crop(self.reader[self.rows[index]], size=self.size, area=self.area, draws=draws)


class Shard(NamedTuple):
    """The `index`-th of `count` equal parts of every batch."""

    index: int = 0
    count: int = 1

    def part(self, batch_size: int) -> range:
        """Its positions in the batch. `InputError` where the parts are not equal."""
        if batch_size % self.count:
            raise InputError(f"batch size {batch_size} cannot be divided evenly over {self.count} processes")
        own = batch_size // self.count
        return range(self.index * own, (self.index + 1) * own)


@dataclass(frozen=True, eq=False)
class TrainRows:
    """A shard of the training batch of a step: `image` (b, h, w, 3) uint8 and `label` (b,) int32."""

    images: DiskImages
    labels: np.ndarray
    batch_size: int
    seed: int
    shard: Shard

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = order.indices(step, examples=len(self.labels), batch_size=self.batch_size, seed=self.seed)
        part = self.shard.part(self.batch_size)
        image = np.empty((len(part), *self.images.shape[1:]), np.uint8)
        for target, position in zip(image, part, strict=True):
            target[...] = self.images.trained(rows[position], seed=self.seed, step=step, position=position)
        return {"image": image, "label": self.labels[rows[part.start : part.stop]].astype(np.int32)}


@dataclass(frozen=True, eq=False)
class EvalRows:
    """A shard of the evaluation batch of an index, as `loader.eval_batches` has it: also `mask` (b,) float32."""

    images: DiskImages
    labels: np.ndarray
    batch_size: int
    shard: Shard

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        part = self.shard.part(self.batch_size)
        places = index * self.batch_size + np.arange(part.start, part.stop)
        last = len(self.labels) - 1
        image = np.empty((len(part), *self.images.shape[1:]), np.uint8)
        for i, place in enumerate(places):  # padding repeats the last example, decoded once
            image[i] = image[i - 1] if i and place > last else self.images.evaluated(min(int(place), last))
        labels = self.labels[np.minimum(places, last)].astype(np.int32)
        return {"image": image, "label": labels, "mask": (places <= last).astype(np.float32)}


def split_of(reader: Reader, labels: Sequence[int] | np.ndarray, *, size: Size) -> Split:
    """All images of a reader, in its order."""
    images = DiskImages(reader, np.arange(len(labels)), size)
    return Split(cast(np.ndarray, images), np.asarray(labels, np.int32))


def open_folder(folder: Path, *, image_size: Size) -> Dataset:
    """The images of `images.list_folder` where they lie: the same classes, splits and order as `read_folder`.

    The digest covers the relative paths and the lengths of the files, in the order of use: reading the bytes of a
    large set at every start would take longer than it is worth.
    """
    classes, train, test = list_folder(folder)
    sha = hashlib.sha256()

    def split(entries: list[Entry]) -> Split:
        names = [os.fsencode(entry.path.relative_to(folder)) for entry in entries]
        for entry, name in zip(entries, names, strict=True):
            sha.update(name + b"\0%d\0" % entry.path.stat().st_size)
        return split_of(Files(folder, np.array(names)), [entry.label for entry in entries], size=image_size)

    dataset = Dataset(folder.name, split(train), split(test), classes, {})
    return replace(dataset, digests={folder.name: sha.hexdigest()})
