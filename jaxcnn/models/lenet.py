"""LeNet-5: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document Recognition"."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation, scaled_tanh
from jaxcnn.layers.conv import Conv, conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.pool import avg_pool, max_pool
from jaxcnn.models.table import Entry
from jaxcnn.types import Array


def _to_32(x: Array, padding: int | None) -> int:
    """The padding that brings the input to the paper's 32 pixels, if none is given."""
    return max(0, (32 - x.shape[1]) // 2) if padding is None else padding


class LeNet5(nn.Module):
    """Seven layers, with today's ReLU and max-pooling and a dense C3: (b, h, w, c) -> logits (b, num_classes).

    61,706 parameters for 28x28x1 (padded to 32 by default) and 32x32x1 images, 44,426 with padding=0 on 28x28.
    """

    num_classes: int = 10
    padding: int | None = None
    act: str = "relu"
    kernel_init: str = "lecun_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        act, init = activation(self.act), initializer(self.kernel_init)
        padding = _to_32(x, self.padding)
        if min(x.shape[1:3]) + 2 * padding < 16:
            raise InputError(
                f"LeNet-5 needs at least 16x16 pixels after padding, got {x.shape[1]}x{x.shape[2]} padded by {padding}:"
                " give a larger --data.image-size"
            )
        x = act(Conv(6, (5, 5), padding=padding, kernel_init=init, dtype=self.dtype, name="c1")(x))
        x = max_pool(x, window=2)
        x = act(Conv(16, (5, 5), padding=0, kernel_init=init, dtype=self.dtype, name="c3")(x))
        x = max_pool(x, window=2)
        x = x.reshape(x.shape[0], -1)
        x = act(nn.Dense(120, kernel_init=init, dtype=self.dtype, name="c5")(x))
        x = act(nn.Dense(84, kernel_init=init, dtype=self.dtype, name="f6")(x))
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="output")(x)


# Table I of the paper: which of the 6 maps of S2 each of the 16 maps of C3 sees.
_C3 = [
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
]  # fmt: skip

# Targets of the output units: the digits as 7x12 bitmaps, +1 where there is ink, -1 elsewhere. The paper prints
# its ASCII set as a picture only; these are drawn after it.
_DIGITS = """
.#####. ...#... .#####. .#####. ....##. ####### .#####. ####### .#####. .#####.
##...## ..##... ##...## ##...## ...###. ##..... ##...## .....## ##...## ##...##
##...## .###... .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
##...## ...#... .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
##...## ...#... ....##. ...###. ##..##. ######. ######. ....##. .#####. ##...##
##...## ...#... ...##.. .....## ##..##. .....## ##...## ...##.. .#####. .######
##...## ...#... ..##... .....## ####### .....## ##...## ...##.. ##...## .....##
##...## ...#... .##.... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...#... ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...#... ##..... ##...## ....##. ##...## ##...## .##.... ##...## ##...##
##...## ...#... ##..... ##...## ....##. ##...## ##...## .##.... ##...## ##...##
.#####. .#####. ####### .#####. ....##. .#####. .#####. .##.... .#####. .#####.
"""


def _targets() -> np.ndarray:
    """(84, 10): one column of +-1 for each digit."""
    rows = [line.split() for line in _DIGITS.split("\n") if line]
    return np.array([[1.0 if ink == "#" else -1.0 for row in rows for ink in row[k]] for k in range(10)]).T


def _paper_uniform(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    """U(+-2.4 / fan-in), appendix A of the paper."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * (2.4 / math.prod(shape[:-1]))


class Subsample(nn.Module):
    """The paper's pooling: the sum over 2x2, times a trained coefficient, plus a trained bias, per map.

    The coefficient starts at 1/4, so at the average; the paper does not say.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(b, h, w, c) -> (b, h // 2, w // 2, c)."""
        scale = self.param("scale", nn.initializers.constant(0.25), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        total = 4 * avg_pool(x, window=2)
        return total * scale.astype(total.dtype).reshape(1, 1, 1, -1) + bias.astype(total.dtype).reshape(1, 1, 1, -1)


class SparseC3(nn.Module):
    """The 5x5 convolution 6 -> 16 of table I: 60 kernels instead of 96, 1,516 parameters with the biases."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(b, h, w, 6) -> (b, h - 4, w - 4, 16)."""
        inputs = np.array([i for maps in _C3 for i in maps])
        outputs = np.array([o for o, maps in enumerate(_C3) for _ in maps])
        fan_in = 25 * np.array([len(_C3[o]) for o in outputs])

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -1, 1) * jnp.float32(2.4 / fan_in).reshape(1, 1, -1)

        kernel = self.param("kernel", init, (5, 5, 60))
        bias = self.param("bias", nn.initializers.zeros, (16,))
        dtype = self.dtype or x.dtype
        dense = jnp.zeros((5, 5, 6, 16), dtype).at[:, :, inputs, outputs].set(kernel.astype(dtype))
        return conv(x.astype(dtype), dense, padding=0) + bias.astype(dtype).reshape(1, 1, 1, -1)


class LeNet5Of1998(nn.Module):
    """The network as published: trained subsampling, sparse C3, scaled tanh, distances to fixed bitmaps.

    (b, 28, 28, 1) padded to 32, or (b, 32, 32, 1) -> logits (b, 10): minus the squared distances between F6 and the
    targets, so that cross-entropy is the paper's discriminative criterion (equation 9) without its constant j.
    60,000 trained parameters; the targets are fixed.
    """

    num_classes: int = 10
    padding: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.num_classes != 10:
            raise InputError(
                f"lenet5_1998 has bitmaps for the 10 digits, not for {self.num_classes} classes: use lenet5"
            )
        padding = _to_32(x, self.padding)
        if x.shape[1] + 2 * padding != 32 or x.shape[2] + 2 * padding != 32 or x.shape[3] != 1:
            raise InputError(f"lenet5_1998 needs 28x28x1 or 32x32x1 images, got {x.shape[1:]}: use lenet5")
        dense = functools.partial(nn.Dense, kernel_init=_paper_uniform, dtype=self.dtype)
        window = functools.partial(Conv, kernel_size=(5, 5), padding=0, kernel_init=_paper_uniform, dtype=self.dtype)
        x = scaled_tanh(window(6, padding=padding, name="c1")(x))
        x = scaled_tanh(Subsample(dtype=self.dtype, name="s2")(x))
        x = scaled_tanh(SparseC3(dtype=self.dtype, name="c3")(x))
        x = scaled_tanh(Subsample(dtype=self.dtype, name="s4")(x))
        x = scaled_tanh(window(120, name="c5")(x)).reshape(x.shape[0], 120)
        x = scaled_tanh(dense(84, name="f6")(x))
        targets = jnp.asarray(_targets(), x.dtype)
        return -jnp.square(x[:, :, None] - targets[None]).sum(1)


VARIANTS = {
    "lenet5": Entry(LeNet5, (28, 28, 1), "LeCun et al. 1998"),
    "lenet5_1998": Entry(LeNet5Of1998, (28, 28, 1), "LeCun et al. 1998"),
}
