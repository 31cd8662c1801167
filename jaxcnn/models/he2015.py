"""The plain 22- and 30-layer ReLU networks of the initialisation study: He, Zhang, Ren & Sun 2015, "Delving Deep into
Rectifiers: Surpassing Human-Level Performance on ImageNet Classification", section 2.2, figures 2 and 3.

he22 is model B of the paper's table 3, as the caption of figure 2 says: 7x7 convolution of 96 maps with stride 2,
max-pooling, three stages of six 3x3 convolutions (256, 512 and 512 maps on 56, 28 and 14 pixels) with max-pooling
between, spatial pyramid pooling to {7, 3, 2, 1} bins a side, three dense layers.

he30 of figure 3 is described in the text alone: the 14-layer network of table 1 (from He & Sun 2015, "Convolutional
Neural Networks at Constrained Time Cost") with sixteen more convolutions of 256 2x2 filters, 27 convolutions and 3
dense layers. Table 1: 7x7 convolution of 64 maps with stride 2, 3x3 max-pooling with stride 3, four 2x2 convolutions
of 128 maps, 2x2 max-pooling, six of 256 maps, pyramid {6, 3, 2, 1}, dense layers of 4096, 4096 and 1000.

Tables 1 and 3 are given from memory and still to be compared with the paper. What speaks for them: the depths come
out, and so do the remembered operations of models B (2.32e10) and, with five convolutions a stage, A (1.90e10).

Left open by the paper and chosen here:
- The sixteen stand in the last stage, which alone has 256 maps.
- A 2x2 filter cannot keep the size with even padding; layers are padded by 1 and 0 in turn, so that a stage, which
  has an even number of them, returns to its size without shifting it.
- he30's conv1 is unpadded, which gives the 36- and 18-pixel maps of He & Sun, divisible by the bins; he22's is padded
  by 3, which gives the 112 of table 3.
- Bins of a pyramid level n span floor(i h / n) .. ceil((i + 1) h / n), as in the journal version of He et al. 2014,
  "Spatial Pyramid Pooling in Deep Convolutional Networks"; its conference version has windows of ceil(h / n) and
  strides of floor(h / n), the same where n divides h.
- Activations are ReLU, as in the figures; the paper's best results have learned slopes (PReLU).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcnn.layers.act import activation
from jaxcnn.layers.adaptive import adaptive_max_pool
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


def spatial_pyramid_pool(x: Array, *, bins: Sequence[int]) -> Array:
    """(b, *spatial, c) -> (b, sum of n^d c over `bins`): maxima over n bins along each of the d axes, for each n.

    He et al. 2014; the length does not depend on the size of the image.

    Raises:
        InputError: as `adaptive_max_pool`.
    """
    return jnp.concatenate([adaptive_max_pool(x, size=n).reshape(x.shape[0], -1) for n in bins], axis=-1)


class He2015(nn.Module):
    """(b, 224, 224, 3) -> logits (b, num_classes); he22 takes any size of at least 15 pixels, he30 of at least 17.

    `kernel_init` is what the paper studies: "kaiming_normal" (equation 10), against "xavier_normal" or, for its
    forward form 1 / fan-in alone, "lecun_normal", with which the signal shrinks by sqrt(2) a layer. Stage i has
    `convs[i]` convolutions of `growth[i]` times `width` maps; `hidden` and `dropout` are the first two dense layers'.
    """

    convs: tuple[int, ...] = (6, 6, 6)
    growth: tuple[float, ...] = (8 / 3, 16 / 3, 16 / 3)
    kernel_size: int = 3
    conv1_padding: int = 3
    pool1: int = 2
    pyramid: tuple[int, ...] = (7, 3, 2, 1)
    num_classes: int = 1000
    width: int = 96
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
        x = conv(self.width, 7, strides=2, padding=self.conv1_padding, name="conv1")(x)
        x = Lambda(act, name="relu1")(normalise(name="bn1")(x, train=train))
        x = Lambda(partial(max_pool, window=self.pool1), name="pool1")(x)
        for i, (convs, growth) in enumerate(zip(self.convs, self.growth, strict=True), 2):
            for j in range(1, convs + 1):
                padding = (self.kernel_size - 1 + j % 2) // 2
                x = conv(round(growth * self.width), self.kernel_size, padding=padding, name=f"conv{i}_{j}")(x)
                x = Lambda(act, name=f"relu{i}_{j}")(normalise(name=f"bn{i}_{j}")(x, train=train))
            if i <= len(self.convs):
                x = Lambda(partial(max_pool, window=2), name=f"pool{i}")(x)
        x = Lambda(partial(spatial_pyramid_pool, bins=self.pyramid), name="spp")(x)
        for i in (1, 2):
            x = Lambda(act, name=f"relu_fc{i}")(dense(self.hidden, name=f"fc{i}")(x))
            x = Dropout(self.dropout, name=f"drop_fc{i}")(x, train=train)
        return dense(self.num_classes, name="fc3")(x)


_HE30 = {
    "convs": (4, 22),
    "growth": (2, 4),
    "kernel_size": 2,
    "conv1_padding": 0,
    "pool1": 3,
    "pyramid": (6, 3, 2, 1),
    "width": 64,
}

VARIANTS = {
    "he22": Entry(He2015, (224, 224, 3), "He et al. 2015"),
    "he30": Entry(He2015, (224, 224, 3), "He et al. 2015", _HE30),
}
