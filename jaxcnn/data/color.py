"""Colour operations on one image (h, w, c) in 0..1, with 3 channels (red, green, blue) or 1 (grey): as Pillow's.

Contrast, equalize and posterize count in the 256 levels of 8-bit images, to which they round other values: sums of
integers have the same bits in any order.
"""

import jax.numpy as jnp

from jaxcnn.types import Array


def brightness(image: Array, factor: Array | float) -> Array:
    """0 gives black, 1 the image, above 1 a brighter one."""
    return blend(jnp.zeros_like(image), image, factor)


def contrast(image: Array, factor: Array | float) -> Array:
    """0 gives the image's mean grey everywhere, 1 the image."""
    levels = _levels(grey(image))
    mean = levels.sum(dtype=jnp.int32).astype(image.dtype) / (255 * levels.size)
    return blend(jnp.full_like(image, mean), image, factor)


def saturation(image: Array, factor: Array | float) -> Array:
    """0 gives the grey image, 1 the image; an image of 1 channel stays."""
    return image if image.shape[-1] == 1 else blend(grey(image), image, factor)


def sharpness(image: Array, factor: Array | float) -> Array:
    """0 gives the image smoothed over 3x3 pixels, the middle one with weight 5 of 13; its outermost pixels stay."""
    h, w, _ = image.shape
    around = [image[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)]
    smooth = image.at[1:-1, 1:-1].set((sum(around) + 4 * around[4]) / 13)
    return blend(smooth, image, factor)


def blend(other: Array, image: Array, factor: Array | float) -> Array:
    """From `other` at factor 0 to the image at 1 and beyond, clipped to 0..1."""
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)


def grey(image: Array) -> Array:
    """Luma (h, w, 1) of ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    if image.shape[-1] == 1:
        return image
    return 0.299 * image[..., :1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:]


def autocontrast(image: Array) -> Array:
    """Every channel stretched to 0..1; one of a single value stays."""
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    span = high - low
    return jnp.where(span > 0, (image - low) / jnp.where(span > 0, span, 1), image)


def equalize(image: Array) -> Array:
    """Every channel by its histogram to levels of about equal counts; where h * w is below 255, the image stays.

    Pillow's integer arithmetic: with n pixels, of which m have the highest level, a level goes to
    (step // 2 + the number of pixels below it) // step, step = (n - m) // 255, or stays where step is 0.
    """
    levels = _levels(image).reshape(-1, image.shape[-1])
    counts = jnp.zeros((256, image.shape[-1]), jnp.int32)
    channels = jnp.arange(image.shape[-1])[None]
    counts = counts.at[levels, channels].add(1)
    below = jnp.cumsum(counts, 0) - counts
    step = below.at[levels, channels].get().max(0, keepdims=True) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    found = table.at[levels, channels].get().astype(image.dtype) / 255
    return jnp.where(step[None] > 0, found.reshape(image.shape), image)


def solarize(image: Array, threshold: float) -> Array:
    """Values from `threshold` on are inverted."""
    return jnp.where(image < threshold, image, 1 - image)


def posterize(image: Array, bits: int) -> Array:
    """The highest `bits` of the 8 bits of every value."""
    width = 2 ** (8 - bits)
    return (_levels(image) // width * width).astype(image.dtype) / 255


def _levels(image: Array) -> Array:
    return jnp.round(image * 255).astype(jnp.int32)
