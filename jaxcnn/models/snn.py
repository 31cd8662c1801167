"""The self-normalising network: Klambauer, Unterthiner, Mayr and Hochreiter 2017, "Self-Normalizing Neural Networks".

SELU keeps activations near mean 0 and variance 1 from layer to layer where weights have mean 0 and variance
1 / fan-in (LeCun normal; not truncated here), so that deep fully connected networks train without normalisation.
"""

from typing import Any

import flax.linen as nn

from jaxcnn.layers.act import activation
from jaxcnn.layers.dropout import AlphaDropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array


class SNN(nn.Module):
    """Vectors (b, d) or images (b, h, w, c), flattened -> logits (b, num_classes).

    `depth` hidden layers of `width` units, each followed by SELU and alpha dropout, and a linear output. Inputs
    should have mean 0 and variance 1. 8 layers of 256 units and rate 0.05 lie in the ranges that the paper searched.
    """

    num_classes: int = 10
    depth: int = 8
    width: int = 256
    act: str = "selu"
    kernel_init: str = "lecun_normal"
    dropout: float = 0.05
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if x.ndim != 2:
            check_input(x)
        init = initializer(self.kernel_init)
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth + 1):
            x = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=f"dense{i}")(x)
            x = Lambda(activation(self.act), name=f"act{i}")(x)
            x = AlphaDropout(self.dropout, name=f"dropout{i}")(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name=f"dense{self.depth + 1}")(x)


VARIANTS = {"snn": Entry(SNN, (28, 28, 1), "Klambauer et al. 2017")}
