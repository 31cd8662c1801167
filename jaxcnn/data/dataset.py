"""What a data set is once read: host arrays in two splits, checked, and how a part is held out."""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxcnn.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """`images` (n, h, w, c), uint8 in 0..255 or floating point; `labels` (n,) integers from 0."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """`classes[label]` is a class name; `digests` maps what was read to its SHA-256."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digests: dict[str, str]


class HeldOut(NamedTuple):
    train: Split
    validation: Split


def check(dataset: Dataset) -> None:
    """Refuse a data set that cannot be trained on, before anything is compiled.

    Raises:
      InputError: a split is empty, images are not (n, h, w, c) in uint8 or floating point, lengths or
        image shapes disagree, a label is outside the classes, or a value is NaN or infinite.
    """
    _check_split(dataset, "train", dataset.train)
    _check_split(dataset, "test", dataset.test)
    train, test = dataset.train.images, dataset.test.images
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise InputError(
            f"data set {dataset.name!r}: training images are {train.shape[1:]} {train.dtype}, test images "
            f"{test.shape[1:]} {test.dtype}: both splits need one shape and type"
        )


def _check_split(dataset: Dataset, part: str, split: Split) -> None:
    where = f"data set {dataset.name!r}, {part} split"
    images, labels = split.images, split.labels
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{where}: images have shape {images.shape}, expected (n, h, w, c), none of them 0")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{where}: images are {images.dtype}, expected uint8 in 0..255 or floating point")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{where}: labels have shape {labels.shape} and type {labels.dtype}, expected (n,) integers")
    if len(images) != len(labels):
        raise InputError(f"{where}: {len(images)} images but {len(labels)} labels")
    outside = np.flatnonzero((labels < 0) | (labels >= len(dataset.classes)))
    if outside.size:
        index = int(outside[0])
        raise InputError(f"{where}: label {labels[index]} of example {index} is outside 0..{len(dataset.classes) - 1}")
    if images.dtype != np.uint8:
        check_finite(where, images)


def check_finite(where: str, images: np.ndarray) -> None:
    """`InputError` naming the first image that holds NaN or an infinity."""
    for index, image in enumerate(images):
        finite = np.isfinite(image)
        if not finite.all():
            raise InputError(f"{where}: image {index} holds {image[~finite][0]}: every value must be finite")


def hold_out(dataset: Dataset, fraction: float, *, seed: int) -> HeldOut:
    """Set aside `fraction` of the training split for model selection, the same share of every class.

    The choice is a function of the training labels, `fraction` and `seed` alone. Both parts keep the
    order of the training split; the test split is not touched.

    Raises:
      InputError: `fraction` is not inside (0, 1), or so small that nothing is held out.
    """
    held = stratified(dataset.train.labels, fraction, seed=seed)
    if not held.any():
        raise InputError(f"holding out {fraction} of {len(held)} training examples leaves no validation example")
    return HeldOut(dataset.train.take(np.flatnonzero(~held)), dataset.train.take(np.flatnonzero(held)))


def stratified(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """A mask (n,) that is true for `fraction` of the examples of each class, rounded half up.

    A class of two or more examples keeps at least one on the false side. The order in which examples
    are drawn comes from the raw PCG64 stream, which NumPy promises never to change (its shuffling
    functions carry no such promise).
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction to set aside is {fraction}, expected a number between 0 and 1")
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        mask[members[: min(int(len(members) * fraction + 0.5), len(members) - 1)]] = True
    return mask


def array_digests(dataset: Dataset) -> Dataset:
    """The data set with the SHA-256 of each split's arrays (type, shape, bytes) as its digests."""
    digests = {part: _digest(split) for part, split in (("train", dataset.train), ("test", dataset.test))}
    return replace(dataset, digests=digests)


def _digest(split: Split) -> str:
    sha = hashlib.sha256()
    for array in (split.images, split.labels):
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
