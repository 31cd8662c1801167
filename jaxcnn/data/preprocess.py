"""Preprocessing, fitted on the training split or fixed: stored with the run and applied again ever after."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.data.disk import DiskImages
from jaxcnn.errors import InputError, unknown
from jaxcnn.files import replacing
from jaxcnn.types import Array, ArrayLike

CHUNK_BYTES = 1 << 25
"""Training values are turned into float64 this much at a time."""

MAX_DIMENSIONS = 8192
"""Most h * w * c for the kinds that need a covariance matrix: 0.5 GB in float64."""

EPSILON = 1e-5
"""Whitening adds this share of the largest variance to every variance before the root."""

Arrays = dict[str, np.ndarray]


TINY = float(np.finfo(np.float32).tiny)
"""Smallest deviation to divide by: the float32 arrays hold nothing smaller exactly."""


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["kind"])
@dataclass(frozen=True, eq=False)
class Preprocessing:
    """A fitted `kind` of `PREPROCESSINGS` and its float32 arrays.

    A pytree: jitted functions can close over it or take it as an argument (better for the rotations,
    whose matrix would otherwise become a constant of the program).
    """

    kind: str
    arrays: Arrays

    @property
    def channel_mean(self) -> ArrayLike:
        """Mean of the training split per channel (c,), before preprocessing: in 0..1 for images."""
        return self.arrays["channel_mean"]

    def __call__(self, x: ArrayLike) -> Array:
        """Images (b, h, w, c) in 0..1 (or vectors (b, d)), floating point, to the same shape and type."""
        return PREPROCESSINGS[self.kind].apply(self.arrays, _floating(x))

    def invert(self, x: ArrayLike) -> Array:
        """Back from the result of the call: to images in 0..1, or predictions to the targets' own units."""
        return PREPROCESSINGS[self.kind].invert(self.arrays, _floating(x))

    def save(self, path: Path | str) -> None:
        """Write an npz file, whole or not at all."""
        content: dict[str, Any] = {"kind": np.array(self.kind), **self.arrays}
        with replacing(Path(path)) as file:
            np.savez(file, **content)


def load(path: Path | str) -> Preprocessing:
    """What `Preprocessing.save` wrote. Raises InputError for a missing or damaged file."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
        kind = str(arrays.pop("kind"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read preprocessing {path}: {error}") from error
    if kind not in PREPROCESSINGS:
        raise unknown("preprocessing", kind, PREPROCESSINGS)
    return Preprocessing(kind, arrays)


def fit(kind: str, images: np.ndarray) -> Preprocessing:
    """Fit on the training split alone: images (n, h, w, c), uint8 or in 0..1, or vectors (n, d).

    Sums run in float64 over chunks, so that memory stays bounded, and are divided by n. `channel` below
    is the last axis. A channel without variance (a deviation of at most 1e-7 of its mean, the
    resolution of float32) is centred and not scaled.

    Images on disk are not read for it: only the fixed kinds can be had, and `channel_mean` is their centre.

    Raises:
      InputError: unknown kind, no example, a value that is not finite, more than `MAX_DIMENSIONS`
        values per example for pca, whiten and zca, or a kind that is fitted, for images on disk.
    """
    if kind not in PREPROCESSINGS:
        raise unknown("preprocessing", kind, PREPROCESSINGS)
    if isinstance(images, DiskImages):
        return _without_reading(kind, images)
    if len(images) == 0 or images.ndim < 2:
        raise InputError(f"cannot fit preprocessing to shape {images.shape}: expected (n, h, w, c) or (n, d)")
    mean = _mean(images)
    if not np.isfinite(mean).all():
        raise InputError("cannot fit preprocessing: the training split holds NaN or infinite values")
    arrays = PREPROCESSINGS[kind].fit(images, mean) | {"channel_mean": _over_pixels(mean)}
    return Preprocessing(kind, {key: np.asarray(array, np.float32) for key, array in arrays.items()})


def _without_reading(kind: str, images: DiskImages) -> Preprocessing:
    if kind not in FIXED:
        raise InputError(
            f"preprocessing {kind!r} is fitted to images in memory, with --data.storage disk there are none:"
            f" give --data.preprocessing {', '.join(FIXED)}"
        )
    centre = np.full(images.shape[1:], 0.5)
    arrays = PREPROCESSINGS[kind].fit(np.empty((0, *images.shape[1:]), np.uint8), centre)
    arrays |= {"channel_mean": arrays.get("mean", _over_pixels(centre))}
    return Preprocessing(kind, {key: np.asarray(array, np.float32) for key, array in arrays.items()})


def to_float(x: ArrayLike) -> Array:
    """uint8 in 0..255 to float32 in 0..1; floating point stays as it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else _floating(x)


def _floating(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"preprocessing got {x.dtype}, expected floating point: call to_float first")
    return x


# Statistics, in float64 on the host.


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, CHUNK_BYTES // (8 * max(1, images[0].size)))
    for start in range(0, len(images), rows):
        chunk = images[start : start + rows].astype(np.float64)
        yield chunk / 255 if images.dtype == np.uint8 else chunk


def _mean(images: np.ndarray) -> np.ndarray:
    total = np.zeros(images.shape[1:])
    for chunk in _chunks(images):
        total += chunk.sum(axis=0)
    return total / len(images)


def _over_pixels(per_pixel: np.ndarray) -> np.ndarray:
    return per_pixel.mean(axis=tuple(range(per_pixel.ndim - 1)))


def _no_statistics(images: np.ndarray, mean: np.ndarray) -> Arrays:
    return {}


def _fit_mean_image(images: np.ndarray, mean: np.ndarray) -> Arrays:
    return {"mean": mean, "std": np.ones(mean.shape[-1:])}


def _fit_channel_mean(images: np.ndarray, mean: np.ndarray) -> Arrays:
    return _fit_mean_image(images, _over_pixels(mean))


def _fit_standardize(images: np.ndarray, mean: np.ndarray) -> Arrays:
    mean = _over_pixels(mean)
    squares = np.zeros(images.shape[1:])
    for chunk in _chunks(images):
        squares += ((chunk - mean) ** 2).sum(axis=0)
    std = np.sqrt(_over_pixels(squares / len(images)))
    return {"mean": mean, "std": np.where(std <= 1e-7 * np.abs(mean) + TINY, 1.0, std)}


def _fit_scale(images: np.ndarray, mean: np.ndarray) -> Arrays:
    half = np.full(mean.shape[-1:], 0.5)
    return {"mean": half, "std": half}


def _fixed(images: np.ndarray, mean: np.ndarray, *, centre: tuple[float, ...], std: tuple[float, ...]) -> Arrays:
    if mean.ndim != 3 or mean.shape[-1] != 3:
        raise InputError(f"images of shape {mean.shape}: expected three channels, red, green and blue (h, w, 3)")
    return {"mean": np.array(centre), "std": np.array(std)}


def _fit_pca(images: np.ndarray, mean: np.ndarray) -> Arrays:
    axes, _ = _principal_axes(images, mean)
    return {"mean": mean, "axes": axes, "std": np.ones_like(mean)}


def _fit_whiten(images: np.ndarray, mean: np.ndarray) -> Arrays:
    axes, variance = _principal_axes(images, mean)
    std = np.sqrt(variance + EPSILON * variance[0])
    return {"mean": mean, "axes": axes, "std": np.where(std <= TINY, 1.0, std).reshape(mean.shape)}


def _principal_axes(images: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns (d, d) of falling variance (d,); the largest entry of each column is positive."""
    if mean.size > MAX_DIMENSIONS:
        raise InputError(f"a covariance of {mean.size} values per example is too large, at most {MAX_DIMENSIONS}")
    covariance = np.zeros((mean.size, mean.size))
    for chunk in _chunks(images):
        centred = (chunk - mean).reshape(len(chunk), -1)
        covariance += centred.T @ centred
    variance, axes = np.linalg.eigh(covariance / len(images))
    variance, axes = np.maximum(variance[::-1], 0), axes[:, ::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    return axes * np.where(largest < 0, -1.0, 1.0), variance


# Application, in JAX.


def _like(array: ArrayLike, x: Array) -> Array:
    """A fitted mean or deviation in the type of `x`, with leading axes of 1 to broadcast against it."""
    if x.ndim <= array.ndim or x.shape[x.ndim - array.ndim :] != array.shape:
        raise InputError(f"preprocessing was fitted on (..., {', '.join(map(str, array.shape))}), got {x.shape}")
    return jnp.asarray(array, x.dtype).reshape((1,) * (x.ndim - array.ndim) + array.shape)


def _identity(arrays: Arrays, x: Array) -> Array:
    return x


def _shift(arrays: Arrays, x: Array) -> Array:
    return (x - _like(arrays["mean"], x)) / _like(arrays["std"], x)


def _unshift(arrays: Arrays, x: Array) -> Array:
    return x * _like(arrays["std"], x) + _like(arrays["mean"], x)


def _turn(arrays: Arrays, x: Array) -> Array:
    """Each example as a vector in the coordinates of the principal axes, in the shape of `x`."""
    flat = x.reshape(x.shape[0], -1)
    return jnp.dot(flat, jnp.asarray(arrays["axes"], x.dtype), precision="highest").reshape(x.shape)


def _turn_back(arrays: Arrays, x: Array) -> Array:
    flat = x.reshape(x.shape[0], -1)
    return jnp.dot(flat, jnp.asarray(arrays["axes"], x.dtype).T, precision="highest").reshape(x.shape)


def _rotate(arrays: Arrays, x: Array) -> Array:
    return _turn(arrays, x - _like(arrays["mean"], x)) / _like(arrays["std"], x)


def _unrotate(arrays: Arrays, x: Array) -> Array:
    return _turn_back(arrays, x * _like(arrays["std"], x)) + _like(arrays["mean"], x)


def _zca(arrays: Arrays, x: Array) -> Array:
    return _turn_back(arrays, _rotate(arrays, x))


def _unzca(arrays: Arrays, x: Array) -> Array:
    return _unrotate(arrays, _turn(arrays, x))


class Kind(NamedTuple):
    """`fit` takes the training images and their mean (h, w, c); the others take the arrays and a batch."""

    fit: Callable[[np.ndarray, np.ndarray], Arrays]
    apply: Callable[[Arrays, Array], Array]
    invert: Callable[[Arrays, Array], Array]


IMAGENET = {"centre": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Mean and deviation of its training images per channel, as torchvision rounds them."""
INCEPTION = {"centre": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

PREPROCESSINGS = {
    "none": Kind(_no_statistics, _identity, _identity),
    "mean_image": Kind(_fit_mean_image, _shift, _unshift),
    "channel_mean": Kind(_fit_channel_mean, _shift, _unshift),
    "standardize": Kind(_fit_standardize, _shift, _unshift),
    "scale": Kind(_fit_scale, _shift, _unshift),
    "pca": Kind(_fit_pca, _rotate, _unrotate),
    "whiten": Kind(_fit_whiten, _rotate, _unrotate),
    "zca": Kind(_fit_whiten, _zca, _unzca),
    "imagenet": Kind(partial(_fixed, **IMAGENET), _shift, _unshift),
    "inception": Kind(partial(_fixed, **INCEPTION), _shift, _unshift),
}
"""none; minus the mean image; minus the channel means; those over the channel deviations; 0..1 to -1..1;
centred and rotated onto the principal axes; those over their deviations; and that rotated back;
and what published weights were trained with, whatever the training split is, RGB."""

FIXED = ("none", "scale", "imagenet", "inception")
"""The kinds that no training split changes."""
