"""U-Net: Ronneberger, Fischer & Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation"."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.act import Activation, activation
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import max_pool
from jaxcnn.layers.upsample import ConvTranspose
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


@dataclass(frozen=True)
class _Pair:
    """Two 3x3 convolutions, each with norm and activation: conv1, bn1, relu1, conv2, ... of the calling module."""

    conv: Callable[..., Conv]
    norm: Callable[..., Any]
    act: Activation

    def __call__(self, x: Array, features: int, *, train: bool) -> Array:
        for i in (1, 2):
            x = self.norm(name=f"bn{i}")(self.conv(features, 3, name=f"conv{i}")(x), train=train)
            x = Lambda(self.act, name=f"relu{i}")(x)
        return x


class Down(nn.Module):
    """A level of the contracting path, and the bottom: (b, *spatial, c) -> (b, *spatial', features)."""

    features: int
    pair: _Pair
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = self.pair(x, self.features, train=train)
        return Dropout(self.dropout, name="dropout")(x, train=train)


class Up(nn.Module):
    """A level of the expansive path: x (b, *spatial, 2 features) and skip -> (b, *spatial', features).

    2x2 up-convolution, then the middle of `skip` and the result side by side, then two convolutions.
    """

    features: int
    pair: _Pair
    upconv: Callable[..., ConvTranspose]

    @nn.compact
    def __call__(self, x: Array, skip: Array, *, train: bool) -> Array:
        x = self.upconv(self.features, 2, strides=2, name="upconv")(x)
        skip = Lambda(partial(_crop, size=x.shape[1:-1]), name="crop")(skip)
        return self.pair(jnp.concatenate([skip, x], axis=-1), self.features, train=train)


class UNet(nn.Module):
    """(b, h, w, c) -> a map of logits (b, h', w', num_classes); figure 1 of the paper.

    `depth` levels of two 3x3 convolutions, with `width` channels in the first and twice as many in each next,
    2x2 max-pooling between them, and the same way back with 2x2 up-convolutions and skip connections.

    `padding`: "same" (zeros), the default, gives h' = h and so fits masks of the image's size; h and w are multiples
    of 2^depth. "valid" is the paper's: no zeros, skip connections are cropped and h' = h - 12 2^depth + 8
    (572 -> 388), so that tiles fit together without seams; h + 4 is a multiple of 2^depth.

    Choices: the up-convolution is a transposed convolution of stride 2 without activation, as the text has it (the
    authors' released net has a ReLU there); concatenation is [skip, up], as drawn. Dropout stands "at the end of the
    contracting path": after the deepest level before the bottom, in its skip too, and after the bottom, with the
    released net's rate of 0.5. `kernel_init` is the paper's, of variance 2 / N; an output of the up-convolution has
    N = c inputs. The paper's net has no norm and biases everywhere; with a norm, the 3x3 convolutions have none.

    Raises:
        InputError: unknown padding, depth below 1, a size that does not fit (the message names those that do).
    """

    num_classes: int = 2
    width: int = 64
    depth: int = 4
    padding: str = "same"
    dropout: float = 0.5
    norm: str = "none"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dimensions: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        self._check(x.shape[1:-1])
        init = initializer(self.kernel_init)
        options: dict[str, Any] = {"statistics": self.statistics, "epsilon": self.epsilon, "dtype": self.dtype}
        normalise = family_norm(self.norm, width=self.width, **options)
        padding = 1 if self.padding == "same" else 0
        conv = partial(Conv, padding=padding, use_bias=self.norm == "none", kernel_init=init, dtype=self.dtype)
        upconv = partial(ConvTranspose, kernel_init=_as_matrix(init), dtype=self.dtype)
        pair = _Pair(conv, normalise, activation(self.act))
        skips = []
        for level in range(1, self.depth + 1):
            rate = self.dropout if level == self.depth else 0.0
            skips.append(Down(self.width * 2 ** (level - 1), pair, rate, name=f"down{level}")(x, train=train))
            x = Lambda(partial(max_pool, window=2), name=f"pool{level}")(skips[-1])
        x = Down(self.width * 2**self.depth, pair, self.dropout, name="bottom")(x, train=train)
        for level in range(self.depth, 0, -1):
            x = Up(self.width * 2 ** (level - 1), pair, upconv, name=f"up{level}")(x, skips[level - 1], train=train)
        return Conv(self.num_classes, 1, kernel_init=init, dtype=self.dtype, name="head")(x)

    def _check(self, sizes: tuple[int, ...]) -> None:
        if self.padding not in ("same", "valid"):
            raise unknown("padding of U-Net", self.padding, ("same", "valid"))
        if self.depth < 1:
            raise InputError(f"depth {self.depth}: U-Net needs at least 1 level")
        fitting = [_fitting(size, depth=self.depth, valid=self.padding == "valid") for size in sizes]
        for size, fit in zip(sizes, fitting, strict=True):
            if size not in fit:
                raise InputError(
                    f"U-Net of depth {self.depth} with {self.padding!r} convolutions does not fit images of "
                    f"{'x'.join(map(str, sizes))}: nearest to {size} is {' or '.join(map(str, fit))}; "
                    "resize, crop or pad the images"
                )


def _fitting(size: int, *, depth: int, valid: bool) -> list[int]:
    """The sizes that fit next to `size`, at most two: below or equal, and above.

    Every pooling must halve an even size, of at least 1 pair. Without padding, each of the levels before the bottom
    takes 4 first, and the output, of size - 12 2^depth + 8, must not be empty.
    """
    step = 2**depth
    border = 4 if valid else 0
    smallest = math.ceil((12 * step - 7 + border) / step) * step - border if valid else step
    below = (size + border) // step * step - border
    return [fit for fit in (below, max(below + step, smallest)) if fit >= smallest]


def _crop(x: Array, *, size: tuple[int, ...]) -> Array:
    """The middle of x (b, *spatial, c): (b, *size, c)."""
    starts = [(have - want) // 2 for have, want in zip(x.shape[1:-1], size, strict=True)]
    return x[(slice(None), *(slice(low, low + want) for low, want in zip(starts, size, strict=True)))]


def _as_matrix(init: Initializer) -> Initializer:
    """`init` for the kernel (*window, c, features) of an up-convolution whose windows do not overlap.

    It is a matrix from c inputs to one tile of outputs, so its fan-in is c, not prod(window) c.
    """

    def tile_init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        *window, inputs, features = shape
        matrix = init(key, (inputs, math.prod(window) * features), dtype, out_sharding=out_sharding)
        return jnp.moveaxis(matrix.reshape(inputs, *window, features), 0, -2)

    return tile_init


VARIANTS = {"unet": Entry(UNet, (512, 512, 1), "Ronneberger et al. 2015")}
