"""SqueezeNet: Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
size".

1.0 is the paper's table 1; 1.1 is the authors' later release, which has a smaller conv1 and pools earlier: 2.4 times
fewer operations. As in the authors' release and torchvision, pooling windows may hang over the end of the map (ceil
mode), conv1 is unpadded, and a ReLU follows conv10, so that logits are at least 0. conv10 starts from N(0, 0.01^2), as
in both releases, whatever `kernel_init` is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

_SQUEEZES = (1, 1, 2, 2, 3, 3, 4, 4)
"""Squeeze maps of fire2 to fire9 in units of fire2's: the paper's SR = 0.125, base_e = incr_e = 128, freq = 2."""


class Fire(nn.Module):
    """(b, *spatial, c) -> (b, *spatial, 8 squeeze): 1x1 to `squeeze` maps, then 4 `squeeze` maps each of 1x1 and 3x3.

    Section 3.2. `conv` and `norm` are constructors, `act` a function.
    """

    squeeze: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def layer(y: Array, features: int, window: int, name: str) -> Array:
            y = self.conv(features, window, padding=window // 2, name=name)(y)
            return Lambda(self.act, name=f"relu_{name}")(self.norm(name=f"bn_{name}")(y, train=train))

        x = layer(x, self.squeeze, 1, "squeeze1x1")
        return jnp.concatenate([layer(x, 4 * self.squeeze, k, f"expand{k}x{k}") for k in (1, 3)], axis=-1)


class SqueezeNet(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes), at least 0 with ReLU; other sizes work too.

    conv1 of `width` maps with stride 2, fire2 to fire9, conv10, the mean of its map. fire2 squeezes to
    `width` / `ratio` maps and the others in proportion. 3x3 max-pooling with stride 2 follows conv1 and the fire
    modules of the numbers in `pools`. `dropout` comes before conv10; `norm`, absent from the published network, before
    every activation but the last.
    """

    kernel_size: int = 7
    ratio: int = 6
    pools: tuple[int, ...] = (1, 4, 8)
    conv1_padding: int = 0
    num_classes: int = 1000
    width: int = 96
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
        if self.width < 1 or self.width % self.ratio:
            raise InputError(f"width {self.width}: expected a positive multiple of {self.ratio}, as fire2 squeezes to")
        squeeze = self.width // self.ratio
        conv = partial(Conv, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=squeeze, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        pool = partial(max_pool, window=3, strides=2, ceil_mode=True)
        x = conv(self.width, self.kernel_size, strides=2, padding=self.conv1_padding, name="conv1")(x)
        x = Lambda(act, name="relu1")(normalise(name="bn1")(x, train=train))
        if 1 in self.pools:
            x = Lambda(pool, name="pool1")(x)
        for i, multiple in enumerate(_SQUEEZES, 2):
            x = Fire(multiple * squeeze, conv, normalise, act, name=f"fire{i}")(x, train=train)
            if i in self.pools:
                x = Lambda(pool, name=f"pool{i}")(x)
        x = Dropout(self.dropout, name="drop9")(x, train=train)
        x = conv(self.num_classes, 1, padding=0, kernel_init=initializer("normal"), name="conv10")(x)
        return global_avg_pool(Lambda(act, name="relu10")(x))


_PAPER = "Iandola et al. 2016"

VARIANTS = {
    "squeezenet1_0": Entry(SqueezeNet, (224, 224, 3), _PAPER),
    "squeezenet1_1": Entry(
        SqueezeNet, (224, 224, 3), _PAPER, {"kernel_size": 3, "width": 64, "ratio": 4, "pools": (1, 3, 5)}
    ),
}
