"""VGG: Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", table 1.

Columns A, B, D and E are the 11-, 13-, 16- and 19-layer networks. The published weights (torchvision) pool adaptively
to 7x7 before fc6, which leaves 224-pixel images as they are and lets other sizes through; their `_bn` variants, which
the paper does not have, put BatchNorm after every convolution and keep its bias.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcnn.errors import unknown
from jaxcnn.layers.act import activation
from jaxcnn.layers.adaptive import adaptive_avg_pool
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

POOLS = {"max": max_pool, "avg": avg_pool}
PADDINGS = ("zeros", "reflect")


class VGG(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); any size of at least 32 pixels works.

    Stage i has `convs[i]` 3x3 convolutions of width min(2^i, 8) `width`, each with `norm` and `act`, and halves the
    image by `pooling` ("max", or "avg" as in style transfer). fc6 and fc7 have `hidden` units and `dropout`.

    `stem` puts a 1x1 convolution conv0 in front, and `padding_mode` "reflect" continues images by their mirror in place
    of zeros: the encoders that style transfer has made of VGG (Li et al. 2017, Wang et al. 2020).

    `fully_convolutional`: section 3.2's dense evaluation. fc6 is a 7x7 convolution without padding, fc7 and fc8 are
    1x1, and the map of class scores is averaged; images have at least 224 pixels. Same parameters: fc6/kernel
    (7, 7, c, hidden) is the dense one (49 c, hidden) reshaped, fc7 and fc8 likewise.

    `kernel_init`: the paper draws from N(0, 0.01^2), "normal" here, and starts the deeper networks from the trained
    layers of A; the default, He et al. 2015, trains all of them from scratch.
    """

    convs: tuple[int, ...] = (2, 2, 3, 3, 3)
    num_classes: int = 1000
    width: int = 64
    hidden: int = 4096
    dropout: float = 0.5
    pooling: str = "max"
    stem: bool = False
    padding_mode: str = "zeros"
    fully_convolutional: bool = False
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
        if self.pooling not in POOLS:
            raise unknown("pooling", self.pooling, POOLS)
        if self.padding_mode not in PADDINGS:
            raise unknown("padding mode", self.padding_mode, PADDINGS)
        conv = partial(Conv, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        if self.stem:
            x = conv(x.shape[-1], 1, name="conv0")(x)
        for i, convs in enumerate(self.convs, 1):
            for j in range(1, convs + 1):
                x, padding = (_mirrored(x), 0) if self.padding_mode == "reflect" else (x, 1)
                x = conv(self.width * min(2 ** (i - 1), 8), 3, padding=padding, name=f"conv{i}_{j}")(x)
                x = normalise(name=f"bn{i}_{j}")(x, train=train)
                x = Lambda(act, name=f"relu{i}_{j}")(x)
            x = Lambda(partial(POOLS[self.pooling], window=2), name=f"pool{i}")(x)
        if not self.fully_convolutional:
            x = Lambda(partial(adaptive_avg_pool, size=7), name="avgpool")(x).reshape(x.shape[0], -1)
        for i, window in ((6, 7), (7, 1)):
            x = Lambda(act, name=f"relu{i}")(self._fc(i, self.hidden, window)(x))
            x = Dropout(self.dropout, name=f"drop{i}")(x, train=train)
        x = self._fc(8, self.num_classes, 1)(x)
        return global_avg_pool(x) if self.fully_convolutional else x

    def _fc(self, number: int, features: int, window: int) -> nn.Module:
        init, name = initializer(self.kernel_init), f"fc{number}"
        if self.fully_convolutional:
            return Conv(features, window, padding=0, kernel_init=init, dtype=self.dtype, name=name)
        return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)


def _mirrored(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), *((1, 1) for _ in x.shape[1:-1]), (0, 0)), mode="reflect")


_CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_PAPER = "Simonyan & Zisserman 2015"

VARIANTS = {
    **{f"vgg{depth}": Entry(VGG, (224, 224, 3), _PAPER, {"convs": convs}) for depth, convs in _CONVS.items()},
    **{
        f"vgg{depth}_bn": Entry(VGG, (224, 224, 3), _PAPER, {"convs": convs, "norm": "batch"})
        for depth, convs in _CONVS.items()
    },
}
