"""The vanilla CNN of textbooks: stages of convolution and pooling, then dense layers."""

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
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


class VanillaCNN(nn.Module):
    """(b, *spatial, c) -> logits (b, num_classes); sizes of at least 2^stages pixels.

    Stage i has `convs` 3x3 convolutions of width 2^i `width`, each with `norm` and `act`, and 2x2 max-pooling. Of the
    `dense_layers` dense layers the last gives the logits and the others have `hidden` units; `dropout` comes before
    each. With act="maxout", which takes the maximum of neighbouring channels, half of each width goes on.

    `fully_convolutional`: the dense layers are 1x1 convolutions and the map of class scores is averaged, so that one
    set of parameters serves any input size.
    """

    stages: int = 3
    convs: int = 1
    dense_layers: int = 2
    num_classes: int = 10
    width: int = 32
    hidden: int = 256
    dropout: float = 0.0
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
        for field in ("stages", "convs", "dense_layers"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}={getattr(self, field)}: vanilla_cnn needs at least 1")
        init, act = initializer(self.kernel_init), activation(self.act)
        conv = partial(Conv, kernel_init=init, dtype=self.dtype)
        normalise = family_norm(
            self.norm, statistics=self.statistics, width=self.width, epsilon=self.epsilon, dtype=self.dtype
        )
        for i in range(1, self.stages + 1):
            for j in range(1, self.convs + 1):
                number = f"{i}" if self.convs == 1 else f"{i}_{j}"
                x = conv(self.width * 2 ** (i - 1), 3, padding=1, name=f"conv{number}")(x)
                x = Lambda(act, name=f"relu{number}")(normalise(name=f"bn{number}")(x, train=train))
            x = Lambda(partial(max_pool, window=2), name=f"pool{i}")(x)
        if self.fully_convolutional:
            dense = partial(conv, kernel_size=1, padding=0)
        else:
            x = x.reshape(x.shape[0], -1)
            dense = partial(nn.Dense, kernel_init=init, dtype=self.dtype)
        for i in range(1, self.dense_layers):
            x = Dropout(self.dropout, name=f"drop_fc{i}")(x, train=train)
            x = Lambda(act, name=f"relu_fc{i}")(dense(self.hidden, name=f"fc{i}")(x))
        x = Dropout(self.dropout, name=f"drop_fc{self.dense_layers}")(x, train=train)
        x = dense(self.num_classes, name=f"fc{self.dense_layers}")(x)
        return global_avg_pool(x) if self.fully_convolutional else x


VARIANTS = {"vanilla_cnn": Entry(VanillaCNN, (32, 32, 3), "textbook")}
