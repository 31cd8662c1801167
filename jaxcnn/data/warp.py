"""Bilinear affine warps: rotation, zoom, shear and translation, any of them by one look at the image.

A matrix (2, 3) says where a pixel comes from: source (row, column) = matrix @ (row, column, 1), both measured in
pixels from the image's centre, rows downwards and columns to the right.
"""

import jax.numpy as jnp

from jaxcnn.types import Array, ArrayLike


def warp(image: Array, matrix: Array, *, fill: ArrayLike) -> Array:
    """One image (h, w, c), float32 or float64, warped by a matrix (2, 3); shape and dtype stay.

    Beyond the border lies `fill` (c,), with which the outermost pixels are blended. The identity changes no bit.
    """
    h, w, c = image.shape
    rows, columns = (jnp.arange(size, dtype=image.dtype) - (size - 1) / 2 for size in (h, w))
    bordered = jnp.broadcast_to(jnp.asarray(fill, image.dtype)[None, None], (h + 2, w + 2, c))
    bordered = bordered.at[1:-1, 1:-1].set(image).reshape((h + 2) * (w + 2), c)
    (y, down), (x, right) = (
        _split(m[0] * rows[:, None] + m[1] * columns[None] + m[2] + (size + 1) / 2, size)
        for m, size in zip(matrix.astype(image.dtype), (h, w), strict=True)
    )

    def corner(y: Array, x: Array) -> Array:
        return bordered.at[y * (w + 2) + x].get(mode="promise_in_bounds")

    above = (1 - right) * corner(y, x) + right * corner(y, x + 1)
    below = (1 - right) * corner(y + 1, x) + right * corner(y + 1, x + 1)
    return (1 - down) * above + down * below


def _split(place: Array, size: int) -> tuple[Array, Array]:
    """Places in a bordered image as the pixel before them and what is left, from 0 to 1, with an axis for channels."""
    place = jnp.clip(place, 0, size + 1)
    pixel = jnp.minimum(jnp.floor(place), size)
    return pixel.astype(jnp.int32), (place - pixel)[..., None]


def rotation(degrees: Array, *, zoom: Array) -> Array:
    """The matrix (2, 3) that turns counter-clockwise about the centre and magnifies by `zoom`; both scalars."""
    angle = jnp.deg2rad(degrees)
    cos, sin, zero = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom, jnp.zeros_like(angle)
    return jnp.array([[cos, sin, zero], [-sin, cos, zero]])
