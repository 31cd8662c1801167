"""Pre-activation residual networks: He et al. 2016b, "Identity Mappings in Deep Residual Networks".

Norm and activation stand before each convolution, and nothing follows the addition, so that signal and gradient pass
from any block to any other unchanged. Neither stem has a norm; one norm and activation follow the last block.
"""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import PreActivationBlock, PreActivationBottleneck, Stage, check_shortcut, family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.models.resnet import IMAGENET_BLOCKS
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


class ResNetV2(nn.Module):
    """(b, h, w, c) -> logits (b, num_classes).

    `stem` "imagenet": 7x7 convolution with stride 2 and 3x3 max-pooling with stride 2; "cifar": 3x3 convolution of
    stride 1 to 16 maps. Then stages of `blocks` blocks of `width`, 2 `width`, ... (times 4 with `bottleneck`), each
    but the first halving the image, norm, activation, global average pooling and a dense layer.

    `shortcut`: "B", a projection of the activated input where the shape changes, "A" (parameter-free) or "none".
    `scan` and `remat` are `Stage`'s.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    stem: str = "imagenet"
    num_classes: int = 1000
    width: int = 64
    shortcut: str = "B"
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
        if self.stem not in ("imagenet", "cifar"):
            raise InputError(f"stem {self.stem!r}: expected 'imagenet' or 'cifar'")
        init = initializer(self.kernel_init)
        conv = partial(Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        act = activation(self.act)
        if self.stem == "imagenet":
            x = conv(self.width, 7, strides=2, padding=3, name="conv1")(x)
            x = Lambda(partial(max_pool, window=3, strides=2, padding=1), name="pool1")(x)
        else:
            x = conv(self.width, 3, padding=1, name="conv1")(x)
        block = PreActivationBottleneck if self.bottleneck else PreActivationBlock
        block = partial(block, shortcut=self.shortcut, conv=conv, norm=normalise, act=act)
        stage = partial(Stage, block, scan=self.scan, remat=self.remat)
        for i, blocks in enumerate(self.blocks):
            x = stage(blocks, self.width * 2**i, 1 if i == 0 else 2, name=f"stage{i + 1}")(x, train=train)
        x = Lambda(act, name="relu")(normalise(name="bn")(x, train=train))
        x = Lambda(global_avg_pool, name="pool")(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="fc")(x)


def _imagenet(depth: int) -> Entry:
    fields = {"blocks": IMAGENET_BLOCKS[depth], "bottleneck": depth >= 50}
    return Entry(ResNetV2, (224, 224, 3), "He et al. 2016b", fields)


def _cifar(depth: int) -> Entry:
    """Depth 9n + 2 with bottlenecks; 110 = 6n + 2 has basic blocks and shortcut A, as in the first paper."""
    bottleneck = depth != 110
    fields: dict[str, Any] = {"stem": "cifar", "width": 16, "num_classes": 10, "bottleneck": bottleneck}
    fields |= {"blocks": ((depth - 2) // (9 if bottleneck else 6),) * 3, "shortcut": "B" if bottleneck else "A"}
    return Entry(ResNetV2, (32, 32, 3), "He et al. 2016b", fields)


VARIANTS = {
    **{f"resnetv2_{depth}": _imagenet(depth) for depth in IMAGENET_BLOCKS},
    **{f"cifar_resnetv2_{depth}": _cifar(depth) for depth in (110, 164, 1001)},
}
