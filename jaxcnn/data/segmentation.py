"""Pictures with a label for every pixel: stacks on disk, the U-Net paper's weights and deformations, tiles.

Equations and sections are those of Ronneberger, Fischer & Brox 2015, "U-Net".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from numpy.typing import NDArray

from jaxcnn.data.images import read_image
from jaxcnn.errors import InputError
from jaxcnn.types import Array, Batch


class Stack(NamedTuple):
    """`images` (n, h, w, 1) uint8 in 0..255; `labels` (n, h, w) uint8, 1 where the mask is white (cells), 0 (membranes)
    where it is black."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def read_stack(folder: Path | str) -> Stack:
    """The slices `folder/image/*.png` and their masks of the same names in `folder/label`, in the order of numbers.

    The ISBI 2012 challenge's (Arganda-Carreras et al. 2015): 30 slices of 512 x 512 pixels of a fly's nerve cord, of
    4 x 4 x 50 nm a voxel. Cells are 255 in its masks and the membranes between them 0.

    Raises:
      InputError: no slice, a mask missing or left over, a damaged file, several sizes, or a mask with other values.
    """
    folder = Path(folder)
    names, masks = ({p.name for p in (folder / part).glob("*.png")} for part in ("image", "label"))
    if not names:
        raise InputError(
            f"{folder}/image holds no .png file: expected slices image/0.png ... and masks label/0.png ..."
        )
    if names != masks:
        raise InputError(f"{folder}: {', '.join(sorted(names ^ masks)[:5])} only in one of image/ and label/")
    ordered = sorted(names, key=lambda name: (len(name), name))
    images, labels = ([read_image(folder / part / name, channels=1) for name in ordered] for part in ("image", "label"))
    for name, image, label in zip(ordered, images, labels, strict=True):
        if not image.shape == label.shape == images[0].shape:
            raise InputError(
                f"{folder}: slice {name} is {image.shape[:2]}, its mask {label.shape[:2]} and the first slice "
                f"{images[0].shape[:2]}: all must have one size"
            )
        if not np.isin(label, (0, 255)).all():
            raise InputError(f"{folder}/label/{name} holds other values than 0 (membrane) and 255 (cell)")
    return Stack(np.stack(images), (np.stack(labels)[..., 0] // 255).astype(np.uint8))


def components(cells: np.ndarray) -> NDArray[np.int32]:
    """The 4-connected components of what is above 0 in (h, w), numbered from 1; 0 elsewhere."""
    from scipy import ndimage

    numbers = np.zeros(cells.shape, np.int32)
    ndimage.label(cells > 0, output=numbers)
    return numbers


def weight_map(label: np.ndarray, *, w0: float = 10.0, sigma: float = 5.0, balance: bool = True) -> NDArray[np.float32]:
    """The weight of every pixel's loss, equation 2: w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)).

    `label` (h, w), 0 for the background, else a cell's pixel; cells are its 4-connected components. d1 and d2 are
    the distances in pixels to the nearest and the second nearest cell, so that the narrow gaps between cells weigh
    most; the term stands on background pixels alone. It is left out where a cell is 6 sigma away or more, as it is
    below 2e-8 w0 there.
    `balance`: w_c makes both classes weigh the same in this picture, with a mean of 1; else w_c is 1.
    Raises InputError unless `label` is (h, w) and sigma positive.
    """
    from scipy import ndimage

    if label.ndim != 2 or sigma <= 0:
        raise InputError(f"a weight map of labels {label.shape} with sigma {sigma}: expected (h, w) and sigma above 0")
    cells = label > 0
    weights = np.ones(label.shape)
    if balance and 0 < cells.mean() < 1:
        weights = np.where(cells, 0.5 / cells.mean(), 0.5 / (1 - cells.mean()))
    parts = components(cells)
    nearest, second = np.full((2, *label.shape), np.inf)
    reach = int(np.ceil(6 * sigma))
    for index, box in enumerate(ndimage.find_objects(parts), start=1):
        area = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
        distance = np.asarray(ndimage.distance_transform_edt(parts[area] != index))
        second[area] = np.minimum(second[area], np.maximum(nearest[area], distance))
        nearest[area] = np.minimum(nearest[area], distance)
    border = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return np.asarray(weights + np.where(cells, 0, border), np.float32)


def pack(labels: np.ndarray, weights: np.ndarray) -> NDArray[np.float32]:
    """Labels and weights (n, h, w) as the one array of labels that `fit` takes, (n, h, w, 2); `unpack` undoes it."""
    return np.stack([labels, weights], axis=-1).astype(np.float32)


def unpack(batch: Batch) -> dict[str, Any]:
    """A batch whose labels were packed: `image`, `label` (b, h, w) int32 and `weight` (b, h, w)."""
    both = batch["label"]
    return {**batch, "label": both[..., 0].astype(jnp.int32), "weight": both[..., 1]}


@dataclass(frozen=True)
class Deformation:
    """Settings of `deform`; the defaults are section 3.1 of the paper. Raises InputError for a value out of range."""

    size: int
    """Side of the square of labels that is cut out at a random place, in pixels."""
    context: int = 0
    """Pixels of the image beyond that square on every side; what lies beyond the picture is mirrored."""
    grid: int = 3
    """Points of the coarse grid of displacements along each axis; it spans the whole picture."""
    std: float = 10.0
    """Standard deviation of either part of a displacement, in pixels; 0 is off."""
    symmetries: bool = True
    """One of the 8 flips and turns by 90 degrees, each equally likely."""

    def __post_init__(self) -> None:
        for name, low in (("size", 1), ("context", 0), ("grid", 2), ("std", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} {getattr(self, name)} of a deformation must be at least {low}")


def deform(key: Array, batch: Batch, *, settings: Deformation) -> dict[str, Any]:
    """A random, elastically deformed square of every example, flipped and turned; image, label and weight alike.

    `image` (b, h, w, c) floating point -> (b, s + 2 context, s + 2 context, c) with s = `settings.size`, bilinear;
    `label` (b, h, w) integers -> (b, s, s), of the nearest pixel; `weight` (b, h, w), where there is one, as `image`.
    Displacements are drawn on a coarse grid and interpolated by cubic convolution (Keys 1981, a = -1/2, the outermost
    points repeated). The example's index in the batch and the key decide, as in `augment`.
    Raises InputError for shapes that do not belong together, or a picture smaller than `size`.
    """
    image, label = batch["image"], batch["label"]
    if image.ndim != 4 or label.shape != image.shape[:3] or not jnp.issubdtype(image.dtype, jnp.floating):
        raise InputError(
            f"images {image.dtype}{list(image.shape)} with labels {label.shape}: expected (b, h, w, c) "
            "floating point and (b, h, w)"
        )
    if min(label.shape[1:]) < settings.size:
        raise InputError(f"pictures of {label.shape[1:]} are smaller than squares of {settings.size}: lower the size")
    maps = {"weight": batch["weight"]} if "weight" in batch else {}

    def one(index: Array, image: Array, label: Array, maps: dict[str, Array]) -> dict[str, Array]:
        places = _places(jax.random.fold_in(key, index), label.shape, settings)
        inner = places[:, settings.context :, settings.context :][:, : settings.size, : settings.size]
        moved = {"image": jax.vmap(lambda x: _sample(x, places, order=1), in_axes=2, out_axes=2)(image)}
        moved["label"] = _sample(label, inner, order=0)
        return moved | {name: _sample(x, inner, order=1) for name, x in maps.items()}

    return {**batch, **jax.vmap(one)(jnp.arange(len(image)), image, label, maps)}


def _sample(picture: Array, places: Array, *, order: int) -> Array:
    """The values of a picture (h, w) at places (2, ...), mirrored about its outermost pixels."""
    return map_coordinates(picture, list(places), order=order, mode="mirror")


def _places(key: Array, shape: tuple[int, ...], settings: Deformation) -> Array:
    """Where each pixel of the square with its context comes from: rows and columns (2, side, side)."""
    corner_key, shift_key, coin_key = jax.random.split(key, 3)
    steps = jnp.arange(-settings.context, settings.size + settings.context)
    corner = jax.random.randint(corner_key, (2,), 0, jnp.array(shape) - settings.size + 1)
    rows, columns = ((corner[i] + steps).astype(jnp.float32) for i in range(2))
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"))
    if settings.std:
        shifts = settings.std * jax.random.normal(shift_key, (2, settings.grid, settings.grid))
        across, along = (_cubic(x, n, settings.grid) for x, n in zip((rows, columns), shape, strict=True))
        places += jnp.einsum("yi,dij,xj->dyx", across, shifts, along, precision="highest")
    if settings.symmetries:
        upside_down, mirrored, transposed = jax.random.bernoulli(coin_key, shape=(3,))
        places = jnp.where(upside_down, places[:, ::-1], places)
        places = jnp.where(mirrored, places[:, :, ::-1], places)
        places = jnp.where(transposed, places.swapaxes(1, 2), places)
    return places


def _cubic(x: Array, length: int, points: int) -> Array:
    """Weights (n, points) at pixels x (n,) of equally spaced values, the first at pixel 0, the last at length - 1."""
    u = jnp.clip(x / max(length - 1, 1), 0, 1) * (points - 1)
    taps = np.arange(-1, points + 1)
    d = jnp.abs(u[:, None] - jnp.asarray(taps, u.dtype)[None])
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    kernel = jnp.where(d <= 1, near, jnp.where(d < 2, far, 0))
    fold = np.eye(points, dtype=np.float32)[np.clip(taps, 0, points - 1)]
    return jnp.matmul(kernel, fold, precision="highest")


def tiles(images: np.ndarray, *, tile: int, context: int) -> np.ndarray:
    """Overlapping squares (n * rows * columns, tile + 2 context, tile + 2 context, c) of images (n, h, w, c).

    Their middles (tile x tile) cover every image, row by row; beyond its border the image is mirrored about its
    outermost pixels (the overlap-tile strategy, figure 2). So many rows and columns that h and w are covered.
    Raises InputError for other shapes, or a tile below 1.
    """
    if images.ndim != 4 or tile < 1 or context < 0:
        raise InputError(
            f"tiles of {tile} + 2 * {context} from images {images.shape}: expected (n, h, w, c), tile >= 1"
        )
    _, h, w, c = images.shape
    beyond = [(context, context + -size % tile) for size in (h, w)]
    padded = np.pad(images, [(0, 0), *beyond, (0, 0)], mode="reflect")
    side = tile + 2 * context
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))[:, ::tile, ::tile]
    return np.moveaxis(windows, 3, -1).reshape(-1, side, side, c)
