"""DenseNet: Huang, Liu, van der Maaten and Weinberger 2017, "Densely Connected Convolutional Networks".

Every layer of a dense block sees the outputs of all layers before it, and adds `growth` channels of its own. The
ImageNet networks follow table 1, the CIFAR networks section 3, "Implementation Details": three blocks on 32, 16 and
8 pixels after a plain 3x3 convolution. Choices, most of them the authors' code's:

- Padding is symmetric, as published weights were trained. The convolution of a transition keeps its norm and
  activation in front, and exists without compression too.
- 16 channels enter the first block, or twice the growth rate with bottlenecks. Compression rounds down.
- Dropout follows every convolution but the first, those of transitions and bottlenecks included.
- The last norm, over all that the last block returns, is `norm5` for three blocks as for four (torchvision's name),
  and its activation `relu5`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.act import activation
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool
from jaxcnn.layers.window import traced_as_written
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

STEMS = ("imagenet", "cifar")


class DenseLayer(nn.Module):
    """H_l of the paper: norm, activation, 3x3 convolution to `growth` channels; with `bottleneck`, norm, activation
    and a 1x1 convolution to 4 growth channels before it."""

    growth: int
    bottleneck: bool
    dropout: float
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, features: list[Array], *, train: bool) -> Array:
        """[(b, *spatial, c_i), ...] -> (b, *spatial, growth)."""
        x = jnp.concatenate(features, axis=-1)
        widths = [(4 * self.growth, 1), (self.growth, 3)] if self.bottleneck else [(self.growth, 3)]
        for n, (channels, kernel) in enumerate(widths, 1):
            x = self.norm(name=f"norm{n}")(x, train=train)
            x = Lambda(self.act, name=f"relu{n}")(x)
            x = self.conv(channels, kernel, padding=kernel // 2, name=f"conv{n}")(x)
            x = Dropout(self.dropout, name=f"dropout{n}")(x, train=train)
        return x


class DenseBlock(nn.Module):
    """`layers` dense layers, layer1, layer2, ...: (b, *spatial, c) -> (b, *spatial, c + layers growth).

    `remat` keeps the outputs of the layers alone for the backward pass, so memory grows with the number of layers and
    not with its square, and computes concatenation, norms, activations and bottleneck anew there (Pleiss et al. 2017,
    "Memory-Efficient Implementation of DenseNets", who keep the bottleneck's output). Nothing else changes.
    """

    layers: int
    layer: Callable[..., Any]
    remat: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def plain(layer: Any, features: list[Array]) -> Array:
            return layer(features, train=train)

        recompute = self.remat and not (self.is_initializing() or traced_as_written())
        call = _recomputed(plain) if recompute else plain
        features = [x]
        for i in range(self.layers):
            features.append(call(self.layer(name=f"layer{i + 1}"), features))
        return jnp.concatenate(features, axis=-1)


def _recomputed(fn: Callable[[Any, list[Array]], Array]) -> Callable[[Any, list[Array]], Array]:
    """`fn(module, features)`, of which the backward pass keeps the inputs and computes the rest anew.

    The compiler for CPU drops the barrier by which `nn.remat` alone keeps the second computation apart from the first,
    and merges them. So the inputs of the second have a 0 added that it can know only once the gradient is there.
    """

    def forward(module: Any, features: list[Array]) -> Any:
        return nn.vjp(nn.remat(fn), module, features)

    def backward(vjp: Callable[..., Any], gradient: Array) -> Any:
        zero = jnp.minimum(jnp.abs(gradient.reshape(-1)[0]), 0)

        def later(saved: Array) -> Array:
            return saved + zero.astype(saved.dtype) if jnp.issubdtype(saved.dtype, jnp.floating) else saved

        return jax.tree.map(later, vjp)(gradient)

    return nn.custom_vjp(fn, forward_fn=forward, backward_fn=backward)


class Transition(nn.Module):
    """Norm, activation, 1x1 convolution to `features` channels, 2x2 average pooling:
    (b, *spatial, c) -> (b, *spatial / 2, features)."""

    features: int
    dropout: float
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = self.norm(name="norm")(x, train=train)
        x = Lambda(self.act, name="relu")(x)
        x = self.conv(self.features, 1, padding=0, name="conv")(x)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        return Lambda(partial(avg_pool, window=2), name="pool")(x)


class DenseNet(nn.Module):
    """(b, 224, 224, c) or, with the CIFAR stem, (b, 32, 32, c) -> logits (b, num_classes); other sizes work too,
    of at least 29 and 4 pixels.

    `blocks`: layers of each dense block. `growth`: the growth rate k. `bottleneck` and `compression` (theta, in
    (0, 1]) make the B and the C of DenseNet-BC. `stem`: "imagenet" (7x7 convolution and 3x3 max-pooling, of stride 2
    each) or "cifar" (3x3 convolution). `dropout`: the rate, 0.2 in the paper for data that is not augmented.
    `remat`: see `DenseBlock`.
    """

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    num_classes: int = 1000
    growth: int = 32
    bottleneck: bool = True
    compression: float = 0.5
    stem: str = "imagenet"
    dropout: float = 0.0
    remat: bool = False
    norm: str = "batch"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dimensions: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        widths = self._widths()
        normalise = family_norm(
            self.norm,
            statistics=self.statistics,
            width=math.gcd(32, self.growth, *widths),
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        conv = partial(Conv, use_bias=False, kernel_init=initializer(self.kernel_init), dtype=self.dtype)
        parts = {"dropout": self.dropout, "conv": conv, "norm": normalise, "act": activation(self.act)}
        layer = partial(DenseLayer, self.growth, self.bottleneck, **parts)
        x = self._stem(x, widths[0], conv, normalise, train)
        for i, layers in enumerate(self.blocks):
            if i > 0:
                x = Transition(widths[i], name=f"transition{i}", **parts)(x, train=train)
            x = DenseBlock(layers, layer, self.remat, name=f"denseblock{i + 1}")(x, train=train)
        x = normalise(name="norm5")(x, train=train)
        x = Lambda(parts["act"], name="relu5")(x)
        x = global_avg_pool(x)
        return nn.Dense(self.num_classes, kernel_init=initializer("lecun_normal"), dtype=self.dtype, name="fc")(x)

    def _widths(self) -> list[int]:
        """The channels that enter each block."""
        if not self.blocks or min(self.blocks) < 1 or self.growth < 1:
            raise InputError(f"blocks={self.blocks}, growth={self.growth}: expected positive integers")
        if not 0 < self.compression <= 1:
            raise InputError(f"compression {self.compression} must be in (0, 1]: 1 keeps every channel")
        widths = [2 * self.growth if self.bottleneck else 16]
        for layers in self.blocks[:-1]:
            widths.append(max(1, math.floor(self.compression * (widths[-1] + layers * self.growth))))
        return widths

    def _stem(self, x: Array, width: int, conv: Any, normalise: Any, train: bool) -> Array:
        if self.stem == "cifar":
            return conv(width, 3, padding=1, name="conv0")(x)
        if self.stem != "imagenet":
            raise unknown("stem", self.stem, STEMS)
        x = conv(width, 7, strides=2, padding=3, name="conv0")(x)
        x = normalise(name="norm0")(x, train=train)
        x = Lambda(activation(self.act), name="relu0")(x)
        return Lambda(partial(max_pool, window=3, strides=2, padding=1), name="pool0")(x)


_PAPER = "Huang et al. 2017"


def _imagenet(growth: int, *blocks: int) -> Entry:
    return Entry(DenseNet, (224, 224, 3), _PAPER, {"blocks": blocks, "growth": growth})


def _cifar(depth: int, growth: int, *, bottleneck: bool) -> Entry:
    """L = 3 n + 4 convolutions and the dense layer, or 6 n + 4 with bottlenecks, for three blocks of n layers."""
    layers = (depth - 4) // (6 if bottleneck else 3)
    fields = {
        "blocks": (layers,) * 3,
        "num_classes": 10,
        "growth": growth,
        "bottleneck": bottleneck,
        "compression": 0.5 if bottleneck else 1.0,
        "stem": "cifar",
    }
    return Entry(DenseNet, (32, 32, 3), _PAPER, fields)


VARIANTS = {
    "densenet121": _imagenet(32, 6, 12, 24, 16),
    "densenet161": _imagenet(48, 6, 12, 36, 24),
    "densenet169": _imagenet(32, 6, 12, 32, 32),
    "densenet201": _imagenet(32, 6, 12, 48, 32),
    "cifar_densenet_40_k12": _cifar(40, 12, bottleneck=False),
    "cifar_densenet_100_k12": _cifar(100, 12, bottleneck=False),
    "cifar_densenet_100_k24": _cifar(100, 24, bottleneck=False),
    "cifar_densenet_bc_100_k12": _cifar(100, 12, bottleneck=True),
    "cifar_densenet_bc_250_k24": _cifar(250, 24, bottleneck=True),
    "cifar_densenet_bc_190_k40": _cifar(190, 40, bottleneck=True),
}
