"""The CIFAR networks of He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.

Depth 6n + 2: a 3x3 convolution, three stages of n two-layer blocks with 16, 32 and 64 maps on 32, 16 and 8 pixels,
global average pooling and a dense layer. Residual nets use shortcut A, so that plain nets have the same parameters.
"""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import BasicBlock, Stage, check_shortcut, family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


class CifarResNet(nn.Module):
    """(b, 32, 32, c) -> logits (b, num_classes); other sizes work too.

    `shortcut`: "A" (parameter-free), "B" (projections) or "none" (plain). `act_first` moves the activation before the
    addition (He et al. 2016b, figure 4(c)), which is worse. `scan` and `remat` are `Stage`'s.
    """

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    shortcut: str = "A"
    act_first: bool = False
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
        if self.depth < 8 or (self.depth - 2) % 6:
            raise InputError(f"depth {self.depth} is not 6n + 2: 20, 32, 44, 56, 110 are")
        check_shortcut(self.shortcut)
        init = initializer(self.kernel_init)
        conv = partial(Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        x = conv(self.width, 3, padding=1, name="conv1")(x)
        x = Lambda(act, name="relu1")(normalise(name="bn1")(x, train=train))
        block = partial(
            BasicBlock, shortcut=self.shortcut, act_first=self.act_first, conv=conv, norm=normalise, act=act
        )
        stage = partial(Stage, block, (self.depth - 2) // 6, scan=self.scan, remat=self.remat)
        for i in range(3):
            x = stage(self.width * 2**i, 1 if i == 0 else 2, name=f"stage{i + 1}")(x, train=train)
        x = Lambda(global_avg_pool, name="pool")(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="fc")(x)


def _entry(depth: int, **fields: Any) -> Entry:
    return Entry(CifarResNet, (32, 32, 3), "He et al. 2016", {"depth": depth, **fields})


VARIANTS = {
    **{f"cifar_plain{depth}": _entry(depth, shortcut="none") for depth in (20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}": _entry(depth) for depth in (20, 32, 44, 56, 110, 1202)},
}
