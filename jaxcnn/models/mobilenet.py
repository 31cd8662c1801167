"""MobileNet: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications".

Table 1 of the paper: a 3x3 convolution, then thirteen depthwise separable convolutions, each a 3x3 convolution of
every channel by itself and a 1x1 convolution over channels, both followed by norm and activation. Choices:

- The activation is ReLU6, as in the authors' code, Keras and timm; the paper says ReLU (`act="relu"`).
- Padding is symmetric, as in timm. Keras and TensorFlow pad (0, 1) at stride 2, as their weights need (`pad_after`).
- The last depthwise convolution has stride 1 and keeps 7x7; table 1 prints stride 2 there, and 7x7 after it.
- `width`, the multiplier alpha, scales channels as Keras does, int(alpha c); timm rounds to multiples of 8, which is
  the same for the paper's 1, 0.75, 0.5 and 0.25. The resolution multiplier rho is the size of the input.
- No dropout by default; Keras and the authors' code have 0.001 before the classifier (`dropout=0.001`).
- Epsilon is PyTorch's 1e-5; Keras has 1e-3.
"""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import global_avg_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

STEM = 32
# (stride of the depthwise, channels of the pointwise convolution) of conv_dw_1, conv_pw_1, ...: table 1
SEPARABLE = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024))


class MobileNet(nn.Module):
    """(b, 224, 224, c) -> logits (b, num_classes); any size works, 32 pixels leave one position at the end.

    Layers are Keras's: conv1, conv1_bn, conv_dw_1, conv_dw_1_bn, conv_pw_1, conv_pw_1_bn, ..., fc; activations
    conv1_relu, conv_dw_1_relu, ... `pad_after` pads where the stride is 2 with zeros behind the last position alone.
    """

    num_classes: int = 1000
    width: float = 1.0
    dropout: float = 0.0
    norm: str = "batch"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu6"
    pad_after: bool = False
    kernel_init: str = "kaiming_normal"
    dimensions: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        stem = self._channels(STEM)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=stem, epsilon=self.epsilon, dtype=self.dtype
        )
        conv = partial(Conv, use_bias=False, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        act = activation(self.act)

        def unit(x: Array, name: str, features: int, kernel: int, *, strides: int = 1, groups: int = 1) -> Array:
            padding = ((0, 1),) * self.dimensions if self.pad_after and strides == 2 else kernel // 2
            x = conv(features, kernel, strides=strides, padding=padding, groups=groups, name=name)(x)
            x = normalise(name=f"{name}_bn")(x, train=train)
            return Lambda(act, name=f"{name}_relu")(x)

        x = unit(x, "conv1", stem, 3, strides=2)
        for i, (stride, features) in enumerate(SEPARABLE, 1):
            channels = x.shape[-1]
            x = unit(x, f"conv_dw_{i}", channels, 3, strides=stride, groups=channels)
            x = unit(x, f"conv_pw_{i}", self._channels(features), 1)
        x = global_avg_pool(x)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=initializer("lecun_normal"), dtype=self.dtype, name="fc")(x)

    def _channels(self, channels: int) -> int:
        if self.width * STEM < 1:
            raise InputError(f"width multiplier {self.width}: expected at least 1/{STEM}, which leaves conv1 a channel")
        return int(self.width * channels)


VARIANTS = {"mobilenet_v1": Entry(MobileNet, (224, 224, 3), "Howard et al. 2017")}
