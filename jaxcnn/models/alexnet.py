"""AlexNet on one device: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks".

61,100,840 parameters, as in torchvision, whose adaptive pooling to 6x6 before fc6 leaves 224-pixel images as they are.
The network of Krizhevsky, Sutskever & Hinton 2012 lies on two GPUs and differs so: conv1 has 96 maps and conv2 256
(here 64 and 192); conv4 has 384 (here 256); conv2, conv4 and conv5 see only the maps of their own GPU (two groups);
conv1 and conv2 are followed by local response normalisation. Its 224-pixel images need 227 for the stated sizes; here
conv1 is padded by 2.
"""

from functools import partial
from typing import Any

import flax.linen as nn

from jaxcnn.layers.act import activation
from jaxcnn.layers.adaptive import adaptive_avg_pool
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

# (width in units of conv1's, kernel size, stride, padding) of conv1 to conv5
_CONVS = ((1, 11, 4, 2), (3, 5, 1, 2), (6, 3, 1, 1), (4, 3, 1, 1), (4, 3, 1, 1))
_POOLED = (1, 2, 5)


class AlexNet(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); any size of at least 63 pixels works.

    Five convolutions, 3x3 max-pooling with stride 2 after the first, second and fifth, three dense layers, the first
    two of `hidden` units. As in torchvision, `dropout` comes before fc6 and fc7. `norm`, absent from the published
    network, stands between convolution and activation.
    """

    num_classes: int = 1000
    width: int = 64
    hidden: int = 4096
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
        init, act = initializer(self.kernel_init), activation(self.act)
        conv = partial(Conv, kernel_init=init, dtype=self.dtype)
        dense = partial(nn.Dense, kernel_init=init, dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        pool = partial(max_pool, window=3, strides=2)
        for i, (multiple, kernel, stride, padding) in enumerate(_CONVS, 1):
            x = conv(multiple * self.width, kernel, strides=stride, padding=padding, name=f"conv{i}")(x)
            x = Lambda(act, name=f"relu{i}")(normalise(name=f"bn{i}")(x, train=train))
            if i in _POOLED:
                x = Lambda(pool, name=f"pool{i}")(x)
        x = Lambda(partial(adaptive_avg_pool, size=6), name="avgpool")(x).reshape(x.shape[0], -1)
        for i in (6, 7):
            x = Dropout(self.dropout, name=f"drop{i}")(x, train=train)
            x = Lambda(act, name=f"relu{i}")(dense(self.hidden, name=f"fc{i}")(x))
        return dense(self.num_classes, name="fc8")(x)


VARIANTS = {"alexnet": Entry(AlexNet, (224, 224, 3), "Krizhevsky 2014")}
