"""RandAugment (Cubuk et al. 2020): some operations out of 14, each drawn with equal chances, at one magnitude."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.data import color
from jaxcnn.data.warp import warp
from jaxcnn.types import Array, ArrayLike

MAX_MAGNITUDE = 30
OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def randaugment(image: Array, choices: Array, *, magnitude: int, fill: ArrayLike) -> Array:
    """One image (h, w, c), float32 or float64 in 0..1, after the operations that `choices` names; `fill` (c,).

    `choices` (n, 2) integers: an index of OPERATIONS, and 1 where its strength is negative; applied one after another.
    `magnitude` M is from 0 to 30, with torchvision's 31 strengths, of which 30 is the paper's strongest: rotation by
    M degrees; shear of M/100 about the upper left corner; translation by whole pixels, up to M/30 * 150/331 of the
    side; factors 1 +- 0.9 M/30 of color, contrast, brightness and sharpness; posterize to 8 - round(M/7.5) bits;
    solarize from 1 - M/30. The paper's code lets posterize and solarize become weaker with M instead.
    Warps are bilinear. For a batch, under `vmap`, every image passes through every operation of `color`, and one warp.
    """
    matrices = jnp.asarray(_matrices(image.shape[0], image.shape[1], magnitude), image.dtype)
    for i in range(len(choices)):
        choice, negative = choices[i, 0], choices[i, 1]
        image = warp(image, matrices[choice, negative], fill=fill)
        image = _recolour(image, choice, negative, magnitude / MAX_MAGNITUDE)
    return image


def _recolour(image: Array, choice: Array, negative: Array, strength: float) -> Array:
    factor = 1 + 0.9 * strength * (1 - 2 * negative).astype(image.dtype)
    branches = {
        "autocontrast": color.autocontrast,
        "equalize": color.equalize,
        "solarize": lambda x: color.solarize(x, 1 - strength),
        "posterize": lambda x: color.posterize(x, 8 - round(4 * strength)),
        "color": lambda x: color.saturation(x, factor),
        "contrast": lambda x: color.contrast(x, factor),
        "brightness": lambda x: color.brightness(x, factor),
        "sharpness": lambda x: color.sharpness(x, factor),
    }
    return jax.lax.switch(choice, [branches.get(name, lambda x: x) for name in OPERATIONS], image)


def _matrices(h: int, w: int, magnitude: int) -> np.ndarray:
    """For `warp`, of every operation in both directions: (14, 2, 2, 3); the identity where it does not move pixels."""
    found = np.tile(np.eye(2, 3), (len(OPERATIONS), 2, 1, 1))
    strength = magnitude / MAX_MAGNITUDE
    for i, sign in enumerate((1, -1)):
        angle, shear = math.radians(30) * strength * sign, 0.3 * strength * sign
        cos, sin = math.cos(angle), math.sin(angle)
        rows, columns = (sign * int(strength * 150 / 331 * side) for side in (h, w))
        for name, matrix in {
            "rotate": [[cos, sin, 0], [-sin, cos, 0]],
            "shear_x": [[1, 0, 0], [shear, 1, shear * h / 2]],
            "shear_y": [[1, shear, shear * w / 2], [0, 1, 0]],
            "translate_x": [[1, 0, 0], [0, 1, columns]],
            "translate_y": [[1, 0, rows], [0, 1, 0]],
        }.items():
            found[OPERATIONS.index(name), i] = matrix
    return found
