"""ImageNet residual networks: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1."""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import BasicBlock, Bottleneck, Stage, check_shortcut, family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


class ResNet(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); other sizes work too.

    7x7 convolution with stride 2, 3x3 max-pooling with stride 2, four stages of `blocks` residual blocks, global
    average pooling, a dense layer. Padding is symmetric, as the published weights were trained.

    `shortcut`: "B", a projection where the shape changes, "A" (parameter-free) or "none" (plain). `bottleneck` blocks
    have their stride in the 3x3 convolution (v1.5, as in the published weights); `v1` puts it in the first 1x1
    convolution, as the paper does. `use_bias` gives the convolutions biases, as in Keras. `scan` and `remat` are
    `Stage`'s.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    num_classes: int = 1000
    width: int = 64
    shortcut: str = "B"
    v1: bool = False
    use_bias: bool = False
    norm: str = "batch"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dimensions: int = 2
    scan: bool | None = None
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        check_shortcut(self.shortcut)
        conv = partial(Conv, use_bias=self.use_bias, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        x = conv(self.width, 7, strides=2, padding=3, name="conv1")(x)
        x = Lambda(act, name="relu1")(normalise(name="bn1")(x, train=train))
        x = Lambda(partial(max_pool, window=3, strides=2, padding=1), name="pool1")(x)
        block = partial(Bottleneck, v1=self.v1) if self.bottleneck else BasicBlock
        block = partial(block, shortcut=self.shortcut, conv=conv, norm=normalise, act=act)
        stage = partial(Stage, block, scan=self.scan, remat=self.remat)
        for i, blocks in enumerate(self.blocks):
            x = stage(blocks, self.width * 2**i, 1 if i == 0 else 2, name=f"stage{i + 1}")(x, train=train)
        x = Lambda(global_avg_pool, name="pool5")(x)
        return nn.Dense(self.num_classes, kernel_init=initializer("lecun_normal"), dtype=self.dtype, name="fc")(x)


IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks in each stage by depth: table 1 of the paper; 200 of He et al. 2016b. From 50 on, bottlenecks."""


def _entry(depth: int, **fields: Any) -> Entry:
    fields = {"blocks": IMAGENET_BLOCKS[depth], "bottleneck": depth >= 50, **fields}
    return Entry(ResNet, (224, 224, 3), "He et al. 2016", fields)


VARIANTS = {
    **{f"plain{depth}": _entry(depth, shortcut="none") for depth in (18, 34)},
    **{f"resnet{depth}": _entry(depth) for depth in (18, 34, 50, 101, 152)},
}
