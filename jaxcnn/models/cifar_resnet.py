"""The CIFAR networks of He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.

Depth 6n + 2: a 3x3 convolution, three stages of n two-layer blocks with 16, 32 and 64 maps on 32, 16 and 8 pixels,
global average pooling and a dense layer. Residual nets use shortcut A, so that plain nets have the same parameters.
"""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import BasicBlock, Stage, family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.pool import global_avg_pool
from jaxcnn.models.table import Entry
from jaxcnn.types import Array

DEPTHS = (20, 32, 44, 56, 110)


class CifarResNet(nn.Module):
    """(b, 32, 32, c) -> logits (b, num_classes); other sizes of at least 4 pixels work too.

    `shortcut`: "A" (parameter-free), "B" (projections) or "none" (plain). `statistics` is BatchNorm's.
    """

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    shortcut: str = "A"
    norm: str = "batch"
    statistics: str | int = "global"
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise InputError(f"depth {self.depth} is not 6n + 2: 20, 32, 44, 56, 110 are")
        if self.shortcut not in ("A", "B", "none"):
            raise unknown("shortcut", self.shortcut, ("A", "B", "none"))
        init = initializer(self.kernel_init)
        conv = partial(Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
        normalise = family_norm(self.norm, statistics=self.statistics, width=self.width, dtype=self.dtype)
        act = activation(self.act)
        x = act(normalise(name="bn1")(conv(self.width, (3, 3), padding=1, name="conv1")(x), train=train))
        block = partial(BasicBlock, shortcut=self.shortcut, conv=conv, norm=normalise, act=act)
        for i in range(3):
            stage = Stage(block, (self.depth - 2) // 6, self.width * 2**i, 1 if i == 0 else 2, name=f"stage{i + 1}")
            x = stage(x, train=train)
        x = global_avg_pool(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="fc")(x)


_PAPER = "He et al. 2016"

VARIANTS = {
    **{f"cifar_plain{d}": Entry(CifarResNet, (32, 32, 3), _PAPER, {"depth": d, "shortcut": "none"}) for d in DEPTHS},
    **{f"cifar_resnet{d}": Entry(CifarResNet, (32, 32, 3), _PAPER, {"depth": d}) for d in DEPTHS},
}
