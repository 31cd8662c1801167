"""Data sets by name: where their files lie, and the arrays they become."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from jaxcnn.data import readers
from jaxcnn.data.classes import CIFAR10_CLASSES, CIFAR100_CLASSES, DIGIT_CLASSES, FASHION_CLASSES
from jaxcnn.data.dataset import Dataset, HeldOut, Split, array_digests, check, hold_out, stratified
from jaxcnn.data.disk import DiskImages, open_folder
from jaxcnn.data.images import Size, read_folder, read_image, resize
from jaxcnn.data.prepared import read_prepared
from jaxcnn.data.records import INDEX, open_records, read_records
from jaxcnn.errors import InputError, unknown

__all__ = [
    "SOURCES",
    "Dataset",
    "HeldOut",
    "Split",
    "check",
    "default_data_dir",
    "hold_out",
    "load",
    "read_image",
]

DIGITS_SIZE = (28, 28)
DIGITS_TEST_FRACTION = 0.2
DIGITS_SEED = 0


def default_data_dir() -> Path:
    """`JAXCNN_DATA` where it is set, else `~/.cache/jaxcnn/data`."""
    return Path(os.environ.get("JAXCNN_DATA") or "~/.cache/jaxcnn/data").expanduser()


def load(name: str, *, data_dir: Path | str | None = None, image_size: Size | None = None) -> Dataset:
    """Read a data set into host arrays, checked.

    `name` is one of `SOURCES`; `folder:NAME` or the NAME of any other directory in `data_dir` that holds
    class folders (`images.read_folder`) or what `jaxcnn data prepare` made of them (`records`); or
    `tfds:NAME` (`prepared.read_prepared`). `data_dir` defaults to `default_data_dir()`; the embedded digits
    need none. Images of another size than `image_size` (h, w) are scaled to cover it and centre-cropped.

    Raises:
      InputError: unknown name; missing, truncated or damaged file; label out of range; see `check`.
    """
    root = Path(data_dir) if data_dir is not None else default_data_dir()
    kind, _, rest = name.partition(":")
    if image_size is not None and min(image_size) < 1:
        raise InputError(f"image size is {image_size}, expected a positive height and width")
    if name in SOURCES:
        dataset = SOURCES[name](root, image_size)
    elif kind == "tfds" and rest:
        dataset = read_prepared(rest, root=root, image_size=image_size)
    elif (folder := _folder(name, root)) is not None:
        read = read_records if (folder / INDEX).exists() else read_folder
        dataset = read(folder, image_size=image_size)
    else:
        raise unknown("data set", name, [*SOURCES, "folder:NAME", "tfds:NAME", f"a folder in {root}"])
    dataset = replace(dataset, name=name)
    check(dataset)
    return dataset


def load_disk(
    name: str,
    *,
    data_dir: Path | str | None = None,
    image_size: Size | None,
    area: tuple[float, float] | None = None,
    workers: int | None = None,
) -> Dataset:
    """A folder of images, or what `jaxcnn data prepare` made of one, whose images stay on disk: `disk.DiskImages`.

    `folder:NAME`, or the NAME of a directory in `data_dir`; classes, splits and order are those of `load`. `area` is
    the range of random crops in training, `workers` the number of processes that decode.

    Raises:
      InputError: another kind of data set; no `image_size`, which every image is scaled to; missing or damaged
        files, but for what is wrong inside an image, which is found when it is decoded.
    """
    root = Path(data_dir) if data_dir is not None else default_data_dir()
    if image_size is None or min(image_size) < 1:
        raise InputError(f"image size is {image_size}, images on disk are scaled to one: give --data.image-size H W")
    folder = _folder(name, root)
    if folder is None:
        raise InputError(
            f"data set {name!r} cannot stay on disk: give the folder:NAME of images in {root}, or --data.storage memory"
        )
    dataset = (open_records if (folder / INDEX).exists() else open_folder)(folder, image_size=image_size)

    def settled(split: Split) -> Split:
        images = cast(np.ndarray, replace(cast(DiskImages, split.images), area=area, workers=workers))
        return replace(split, images=images)

    dataset = replace(dataset, name=name, train=settled(dataset.train), test=settled(dataset.test))
    check(dataset)
    return dataset


def _folder(name: str, root: Path) -> Path | None:
    """The directory that `folder:NAME` or NAME means, if it means one."""
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        return root / rest
    return root / name if name and name not in SOURCES and (root / name).is_dir() else None


def _resized(dataset: Dataset, size: Size | None) -> Dataset:
    if size is None:
        return dataset
    train, test = (replace(split, images=resize(split.images, size)) for split in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def _digits(root: Path, image_size: Size | None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (the test part of the UCI set of Alpaydin and Kaynak, 1998).

    The 8 x 8 images in 0..16 become (28, 28, 1) in 0..255 (scaled, rounded, then bilinear). The split is
    fixed: 1,438 to train and 359 to test, a fifth of each class (`stratified` with seed 0).
    """
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.floor(np.asarray(values) * (255 / 16) + 0.5).astype(np.uint8)
    whole = Split(pixels.reshape(-1, 8, 8, 1), np.asarray(labels, np.int32))
    held = stratified(whole.labels, DIGITS_TEST_FRACTION, seed=DIGITS_SEED)
    train, test = whole.take(np.flatnonzero(~held)), whole.take(np.flatnonzero(held))
    dataset = Dataset("digits", train, test, DIGIT_CLASSES, {})
    return array_digests(_resized(dataset, image_size or DIGITS_SIZE))


def _idx(name: str, classes: tuple[str, ...], root: Path, image_size: Size | None) -> Dataset:
    """A set in the four files of MNIST (LeCun, Cortes and Burges, 1998), gzipped or not."""
    digests: dict[str, str] = {}

    def open_idx(stem: str) -> readers.File:
        path = root / name / f"{stem}.gz"
        if not path.exists() and (root / name / stem).exists():
            path = root / name / stem
        return _read(path, name, digests)

    def split(part: str) -> Split:
        files = open_idx(f"{part}-images-idx3-ubyte"), open_idx(f"{part}-labels-idx1-ubyte")
        return Split(*readers.pair_idx(*files, classes=len(classes)))

    dataset = Dataset(name, split("train"), split("t10k"), classes, digests)
    return _resized(dataset, image_size)


@dataclass(frozen=True)
class Cifar:
    """The layout of a binary version of CIFAR (Krizhevsky, 2009); `records` counts those of each file."""

    name: str
    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: dict[str, int]
    label_bytes: int
    classes: tuple[str, ...]


CIFAR10 = Cifar(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    records={**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000},
    label_bytes=1,
    classes=CIFAR10_CLASSES,
)
CIFAR100 = Cifar(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    records={"train.bin": 50_000, "test.bin": 10_000},
    label_bytes=2,
    classes=CIFAR100_CLASSES,
)


def _cifar(layout: Cifar, root: Path, image_size: Size | None) -> Dataset:
    digests: dict[str, str] = {}
    files = _cifar_files(layout, root, digests)

    def split(names: tuple[str, ...]) -> Split:
        parts = [
            readers.parse_cifar(
                files[name],
                records=layout.records[name],
                label_bytes=layout.label_bytes,
                classes=len(layout.classes),
            )
            for name in names
        ]
        images = np.concatenate([part.images for part in parts])
        return Split(images, np.concatenate([part.labels for part in parts]))

    dataset = Dataset(layout.name, split(layout.train), split(layout.test), layout.classes, digests)
    return _resized(dataset, image_size)


def _cifar_files(layout: Cifar, root: Path, digests: dict[str, str]) -> dict[str, readers.File]:
    """The files of the unpacked folder where there is one, else the members of the archive."""
    names = [*layout.train, *layout.test]
    folder, archive = root / layout.name / layout.folder, root / layout.name / layout.archive
    if not folder.is_dir():
        members = [f"{layout.folder}/{name}" for name in names]
        limit = max(layout.records.values()) * (layout.label_bytes + readers.CIFAR_BYTES)
        found = readers.tar_members(_read(archive, layout.name, digests), names=members, limit=limit)
        return {name: found[member] for name, member in zip(names, members, strict=True)}
    return {name: _read(folder / name, layout.name, digests) for name in names}


def _read(path: Path, name: str, digests: dict[str, str]) -> readers.File:
    if not path.exists():
        raise InputError(
            f"{path} is missing: run `jaxcnn data fetch {name}`, or point --data-dir (or JAXCNN_DATA) at the "
            f"directory that holds {name}/"
        )
    file = readers.read_file(path)
    digests[path.name] = file.sha256
    return file


SOURCES: dict[str, Callable[[Path, Size | None], Dataset]] = {
    "digits": _digits,
    "mnist": partial(_idx, "mnist", DIGIT_CLASSES),
    "fashion_mnist": partial(_idx, "fashion_mnist", FASHION_CLASSES),
    "cifar10": partial(_cifar, CIFAR10),
    "cifar100": partial(_cifar, CIFAR100),
}
"""Name -> reader of (data directory, image size)."""
