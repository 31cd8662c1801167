"""Compressed images to pixels, whole or by random crops; workers import this, so JAX stays out of it."""

import io
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcnn.data.images import Size, cover, open_image

RATIOS = (3 / 4, 4 / 3)
"""Width over height of a random crop, drawn uniformly in its logarithm."""

ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS

BORDER = 1 / 16
"""Cut off each side in evaluation after training on random crops: the central 224 of 256 pixels, usually."""

DRAFT = 2
"""A JPEG is decoded at a half, a quarter or an eighth of its size as long as the crop keeps this many times the
target's height and width; the antialiased scaling does the rest."""

CROPS = 1
"""Marks the stream of these draws in the counter, beside that of `order.permutation`, which has 0 there."""


class Compressed(NamedTuple):
    """The bytes of a JPEG or PNG file, and what errors call it."""

    content: bytes
    name: str


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: float
    top: float
    width: float
    height: float


def centre(image: Compressed, *, size: Size | None, border: float = 0.0) -> NDArray[np.uint8]:
    """The image as RGB (h, w, 3) in 0..255, exactly as `read_image` gives it; `border` as in `cover`.

    Raises:
      InputError: as `read_image`, naming the file or record.
    """
    picture = open_image(io.BytesIO(image.content), image.name)
    return np.asarray(picture if size is None else cover(picture, size, border=border), np.uint8)


def random_crop(
    image: Compressed, *, size: Size, area: tuple[float, float], draws: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """The part `crop_box` of the image scaled to `size`, RGB (h, w, 3) in 0..255: the random-resized crop of
    Inception (Szegedy et al. 2015, section 6) as torchvision draws it.

    Scaled bilinearly with antialias. Deviations: pixels just outside the box count at its edge, and large JPEGs are
    decoded smaller (`DRAFT`), which moves the edges of the box by less than a pixel of what was decoded.

    Raises:
      InputError: as `read_image`, naming the file or record.
    """
    from PIL import Image

    box = Box(0, 0, 1, 1)

    def draft(picture: Any) -> None:
        nonlocal box
        (width, height), turned = picture.size, picture.getexif().get(0x0112, 1) >= 5
        found = crop_box(*((width, height) if turned else (height, width)), area=area, draws=draws)
        scale = min(found.width / size[1], found.height / size[0]) / DRAFT
        if scale >= 2:
            picture.draft(None, (math.ceil(width / scale), math.ceil(height / scale)))
        across, down = picture.width / width, picture.height / height
        if turned:
            across, down = down, across
        box = Box(found.left * across, found.top * down, found.width * across, found.height * down)

    picture = open_image(io.BytesIO(image.content), image.name, draft=draft)
    edges = (box.left, box.top, min(box.left + box.width, picture.width), min(box.top + box.height, picture.height))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=edges), np.uint8)


def crop_box(height: int, width: int, *, area: tuple[float, float], draws: NDArray[np.float64]) -> Box:
    """A box of whole pixels: its share of the area uniform in `area`, its shape in `RATIOS`, its place uniform.

    The first of `ATTEMPTS` that fits; if none does, the largest central box whose shape is in `RATIOS`. `draws`
    (DRAWS,) are uniform in [0, 1): area, shape, top and left of each attempt.
    """
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for share, shape, top, left in draws.reshape(ATTEMPTS, 4).tolist():
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(left * (width - w + 1)), int(top * (height - h + 1)), w, h)
    w = min(width, max(1, round(height * RATIOS[1])))
    h = min(height, max(1, round(width / RATIOS[0])))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def uniform_draws(seed: int, step: int, position: int) -> NDArray[np.float64]:
    """(DRAWS,) in [0, 1), a function of the arguments alone: raw Philox words, which NumPy promises never to change."""
    philox = np.random.Philox(key=[seed, step], counter=[0, 0, position, CROPS])
    return np.ldexp((philox.random_raw(DRAWS) >> np.uint64(11)).astype(np.float64), -53)
