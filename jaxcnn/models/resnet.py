"""ImageNet residual networks: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1."""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import BasicBlock, Stage, family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.models.table import Entry
from jaxcnn.types import Array


class ResNet(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); any size of at least 32 pixels works.

    7x7 convolution with stride 2, 3x3 max-pooling with stride 2, four stages of `blocks` basic blocks, global average
    pooling, a dense layer. Padding is symmetric, as the published weights were trained. Shortcut B: a projection
    where the shape changes, so none in the first stage.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 1000
    width: int = 64
    shortcut: str = "B"
    norm: str = "batch"
    statistics: str | int = "global"
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv = partial(Conv, use_bias=False, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        normalise = family_norm(self.norm, statistics=self.statistics, width=self.width, dtype=self.dtype)
        act = activation(self.act)
        x = conv(self.width, (7, 7), strides=2, padding=3, name="conv1")(x)
        x = act(normalise(name="bn1")(x, train=train))
        x = max_pool(x, window=3, strides=2, padding=1)
        block = partial(BasicBlock, shortcut=self.shortcut, conv=conv, norm=normalise, act=act)
        for i, blocks in enumerate(self.blocks):
            stage = Stage(block, blocks, self.width * 2**i, 1 if i == 0 else 2, name=f"stage{i + 1}")
            x = stage(x, train=train)
        x = global_avg_pool(x)
        return nn.Dense(self.num_classes, kernel_init=initializer("lecun_normal"), dtype=self.dtype, name="fc")(x)


VARIANTS = {"resnet18": Entry(ResNet, (224, 224, 3), "He et al. 2016", {"blocks": (2, 2, 2, 2)})}
