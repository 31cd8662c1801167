"""The linear classifier and the multi-layer perceptron."""

from typing import Any

import flax.linen as nn

from jaxcnn.layers.act import activation
from jaxcnn.layers.init import initializer
from jaxcnn.models.table import Entry
from jaxcnn.types import Array


class Linear(nn.Module):
    """One dense layer on the flattened image: (b, h, w, c) -> logits (b, num_classes)."""

    num_classes: int = 10
    kernel_init: str = "lecun_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=initializer(self.kernel_init), dtype=self.dtype, name="dense")(x)


class MLP(nn.Module):
    """`depth` hidden layers of `width` units and a linear output: (b, h, w, c) -> logits (b, num_classes).

    With act="identity" it is one linear map, W2 (W1 x + b1) + b2 = W21 x + b21, whatever its depth.
    """

    num_classes: int = 10
    depth: int = 2
    width: int = 256
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        init = initializer(self.kernel_init)
        for i in range(self.depth):
            x = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=f"dense{i + 1}")(x)
            x = activation(self.act)(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name=f"dense{self.depth + 1}")(x)


VARIANTS = {
    "linear": Entry(Linear, (28, 28, 1), "textbook"),
    "mlp": Entry(MLP, (28, 28, 1), "textbook"),
}
