"""Pictures before and after: sizes, colours, where the optimisation starts."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.types import Array

Picture = NDArray[np.uint8]
"""(h, w, 3), RGB in 0..255."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R BT.601, the Y of YIQ."""
STARTS = ("content", "noise", "statistics")
FORMATS = (".png", ".jpg", ".jpeg")


def fitted(picture: Picture, longer: float) -> Picture:
    """Scaled (Lanczos, antialiased) to `longer` pixels on its longer side, at least 1 on the other."""
    height, width = picture.shape[:2]
    factor = longer / max(height, width)
    return scaled(picture, (max(1, round(height * factor)), max(1, round(width * factor))))


def scaled(picture: Picture, size: Sequence[int]) -> Picture:
    """Scaled (Lanczos, antialiased) to `size` (h, w)."""
    from PIL import Image

    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.uint8)


def to_array(picture: Picture) -> Array:
    """(1, h, w, 3) in 0..1."""
    return jnp.asarray(picture, jnp.float32)[None] / 255


def to_picture(x: Array) -> Picture:
    """(h, w, 3); values beyond 0..1 are cut, the others rounded."""
    return np.asarray(jnp.round(jnp.clip(x, 0, 1) * 255), np.uint8)


def write(path: Path, picture: Picture) -> None:
    """A PNG or JPEG by suffix, whole or not at all."""
    from PIL import Image

    with replacing(path) as file:
        options = {"quality": 95, "subsampling": 0} if path.suffix.lower() != ".png" else {}
        Image.fromarray(picture).save(file, format="PNG" if not options else "JPEG", **options)


def luminance(x: Array) -> Array:
    """(b, h, w, 3) -> the same shape, grey: Y in every channel."""
    return jnp.broadcast_to((x * LUMA.reshape(1, 1, 1, 3)).sum(-1, keepdims=True), x.shape)


def matched_luminance(style: Array, content: Array) -> Array:
    """The style's luminance, moved to the mean and deviation of the content's (Gatys et al. 2017, equation 10)."""
    style, content = luminance(style), luminance(content)
    deviation = jnp.where(style.std() > 0, style.std(), 1)
    return (style - style.mean()) / deviation * content.std() + content.mean()


def coloured(x: Array, content: Array) -> Array:
    """The luminance of x with the colours (I and Q of YIQ) of `content`; (k, h, w, 3) and (1, h, w, 3)."""
    return luminance(x) + (content - luminance(content))


def start(name: str, *, content: Array, styles: Sequence[Array], count: int, seed: int) -> Array:
    """Where `count` pictures of the content's size begin; (count, h, w, 3).

    "content": there. "noise": white, uniform in 0..1. "statistics": normal noise with the mean and covariance of the
    colours of `styles`, one for each picture.
    """
    shape = (count, *content.shape[1:])
    key = jax.random.key(seed)
    if name == "content":
        return jnp.broadcast_to(content, shape)
    if name == "noise":
        return jax.random.uniform(key, shape)
    noise = jax.random.normal(key, shape)
    return jnp.stack([_with_colours(one, style) for one, style in zip(noise, styles, strict=True)])


def _with_colours(noise: Array, style: Array) -> Array:
    """Noise (h, w, 3) of variance 1 with the colours' mean and covariance of a picture (1, h, w, 3)."""
    pixels = style.reshape(-1, 3)
    centred = pixels - pixels.mean(0, keepdims=True)
    values, vectors = jnp.linalg.eigh(centred.T @ centred / len(pixels))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0)).reshape(1, 3) @ vectors.T
    return noise @ root + pixels.mean(0).reshape(1, 1, 3)


def check_output(path: Path) -> None:
    """`InputError` where no picture can be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"output {path} has suffix {path.suffix!r}: expected one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"output {path} is a directory: give the name of a file")
