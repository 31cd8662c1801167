"""Pictures before and after: sizes, colours, where the optimisation starts."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.style.settings import check_weight
from jaxcnn.tree import state_sha256
from jaxcnn.types import Array

Picture = NDArray[np.uint8]
"""(h, w, 3), RGB in 0..255."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R BT.601, the Y of YIQ."""
STARTS = ("content", "noise", "statistics")
FORMATS = (".png", ".jpg", ".jpeg")


def check(picture: Picture, *, what: str) -> None:
    """`InputError` where that is no picture."""
    found = np.asarray(picture)
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[-1] != 3 or not found.size:
        raise InputError(f"{what} is {found.dtype} of shape {found.shape}: expected uint8 (h, w, 3), RGB in 0..255")


def check_mask(mask: NDArray) -> None:
    """`InputError` where that is no mask, or one that lets nothing through."""
    if mask.ndim != 2 or not ((mask >= 0) & (mask <= 1)).all():
        raise InputError(f"a mask is {mask.dtype} of shape {mask.shape}: expected (h, w), values in 0..1")
    if not mask.any():
        raise InputError("a mask is black everywhere: its style would count nowhere")


@dataclass(frozen=True)
class Style:
    """`picture` is held against the result where `mask` (h, w) in 0..1, of any size, is high; None: everywhere.

    Raises:
      InputError: no picture, a weight that is not above 0, a mask that is none or 0 everywhere.
    """

    picture: Picture
    weight: float = 1.0
    mask: NDArray | None = None

    def __post_init__(self) -> None:
        check(self.picture, what="a style image")
        check_weight(self.weight, of="a style image")
        if self.mask is not None:
            check_mask(self.mask)


def digest(array: NDArray | None) -> str | None:
    """The beginning of the SHA-256 of a picture or mask."""
    return None if array is None else state_sha256(array)[:16]


def fitted_size(picture: Picture, longer: float) -> tuple[int, int]:
    """(h, w) of `picture` scaled to `longer` pixels on its longer side, at least 1 on the other.

    Raises:
      InputError: more pixels than are read from a file.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    factor = longer / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    most = Image.MAX_IMAGE_PIXELS
    if most and size[0] * size[1] > most:
        raise InputError(f"an image scaled to {size[1]} x {size[0]} pixels: expected at most {most} in all")
    return size


def scaled(picture: Picture, size: Sequence[int]) -> Picture:
    """Scaled (Lanczos, antialiased) to `size` (h, w)."""
    from PIL import Image

    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.uint8)


def scaled_masks(masks: Sequence[NDArray | None], size: tuple[int, int]) -> Array:
    """(s, h, w) of that size (h, w); 1 everywhere for None."""
    whole = np.ones(size, np.float32)
    arrays = [whole if mask is None else np.asarray(mask, np.float32) for mask in masks]
    return jnp.stack([jax.image.resize(array, size, "linear") for array in arrays])


def photograph(name: str) -> Picture:
    """One of the two that come with scikit-learn: china.jpg, a temple, or flower.jpg."""
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


def to_array(picture: Picture) -> Array:
    """(1, h, w, 3) in 0..1."""
    return jnp.asarray(picture, jnp.float32)[None] / 255


def to_picture(x: Array) -> Picture:
    """(h, w, 3); values beyond 0..1 are cut, the others rounded."""
    return np.asarray(jnp.round(jnp.clip(x, 0, 1) * 255), np.uint8)


def write(path: Path, picture: Picture) -> None:
    """A PNG or JPEG by suffix, whole or not at all; its directory is made."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        options = {"quality": 95, "subsampling": 0} if path.suffix.lower() != ".png" else {}
        Image.fromarray(picture).save(file, format="PNG" if not options else "JPEG", **options)


def luminance(x: Array) -> Array:
    """(b, h, w, 3) -> the same shape, grey: Y in every channel."""
    return jnp.broadcast_to((x * LUMA.reshape(1, 1, 1, 3)).sum(-1, keepdims=True), x.shape)


def matched_luminance(style: Array, content: Array) -> Array:
    """The style's luminance, moved to the mean and deviation of the content's (Gatys et al. 2017, equation 10).

    One that deviates by less than a quarter of an 8-bit level has none to stretch, but for rounding.
    """
    style, content = luminance(style), luminance(content)
    deviation = jnp.where(style.std() > 0.25 / 255, style.std(), 1)
    return (style - style.mean()) / deviation * content.std() + content.mean()


def coloured(x: Array, content: Array) -> Array:
    """The luminance of x with the colours (I and Q of YIQ) of `content`; (k, h, w, 3) and (1, h, w, 3)."""
    return luminance(x) + (content - luminance(content))


def start(name: str, *, content: Array, styles: Sequence[Array], seed: int) -> Array:
    """Where pictures of the content's size begin; (1, h, w, 3) for all of them, or (k, h, w, 3).

    "content": there. "noise": white, uniform in 0..1. "statistics": normal noise with the mean and covariance of the
    colours of `styles`, one for each picture.
    """
    key, shape = jax.random.key(seed), content.shape
    if name == "content":
        return content
    if name == "noise":
        return jax.random.uniform(key, shape)
    noise = jax.random.normal(key, shape[1:])
    return jnp.stack([_with_colours(noise, style) for style in styles])


def _with_colours(noise: Array, style: Array) -> Array:
    """Noise (h, w, 3) of variance 1 with the colours' mean and covariance of a picture (1, h, w, 3)."""
    pixels = style.reshape(-1, 3)
    centred = pixels - pixels.mean(0, keepdims=True)
    values, vectors = jnp.linalg.eigh(centred.T @ centred / len(pixels))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0)).reshape(1, 3) @ vectors.T
    return noise @ root + pixels.mean(0).reshape(1, 1, 3)


def check_output(path: Path) -> None:
    """`InputError` where no picture can be written to `path`. Directories that are not there can be made."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"output {path} has suffix {path.suffix!r}: expected one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"output {path} is a directory: give the name of a file")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"output {path} cannot be written: {there}: {error.strerror}") from error
