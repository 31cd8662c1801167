"""Inception v1 (GoogLeNet) and BN-Inception, with and without batch normalisation.

Szegedy et al. 2015, "Going Deeper with Convolutions", table 1; Ioffe & Szegedy 2015, "Batch Normalization:
Accelerating Deep Network Training by Reducing Internal Covariate Shift", figure 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxcnn.errors import InputError
from jaxcnn.layers.act import Activation, activation
from jaxcnn.layers.adaptive import adaptive_avg_pool
from jaxcnn.layers.blocks import family_norm
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool
from jaxcnn.models.table import Entry, check_input
from jaxcnn.types import Array

# #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj: table 1 of the paper.
_V1 = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}

# #1x1, #3x3 reduce, #3x3, double #3x3 reduce, double #3x3, pool proj: figure 5. 3c and 4e have no 1x1 and no
# projection: they halve the size and pass the pooled input through.
_BN = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}

_halve = partial(max_pool, window=3, strides=2, ceil_mode=True)


class InceptionOutput(NamedTuple):
    """What a net with auxiliary heads returns in training: three times logits (b, num_classes).

    The paper adds the losses of the heads with weight 0.3 each.
    """

    logits: Array
    aux1: Array
    aux2: Array


@dataclass(frozen=True)
class _Unit:
    """Convolution, norm and activation, named NAME, NAME_bn and NAME_relu inside the module that calls it.

    The tables hold channels for a first stage of 64; other widths are in proportion.
    """

    conv: Callable[..., Conv]
    norm: Callable[..., Any]
    act: Activation
    width: int

    def channels(self, features: int) -> int:
        return max(1, features * self.width // 64)

    def __call__(self, x: Array, features: int, window: int, *, name: str, train: bool, strides: int = 1) -> Array:
        conv = self.conv(self.channels(features), window, strides=strides, padding=window // 2, name=name)
        x = self.norm(name=f"{name}_bn")(conv(x), train=train)
        return Lambda(self.act, name=f"{name}_relu")(x)


class Inception(nn.Module):
    """A module of table 1: (b, *spatial, c) -> (b, *spatial, c'); c' counts the 1x1, 3x3, 5x5 and pooled branches.

    `features` is a row of the table, `five` the window of the 5x5 branch.
    """

    features: tuple[int, ...]
    unit: _Unit
    five: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv1x1, reduce3x3, conv3x3, reduce5x5, conv5x5, pool_proj = self.features
        unit = partial(self.unit, train=train)
        one = unit(x, conv1x1, 1, name="conv1x1")
        three = unit(unit(x, reduce3x3, 1, name="reduce3x3"), conv3x3, 3, name="conv3x3")
        five = unit(unit(x, reduce5x5, 1, name="reduce5x5"), conv5x5, self.five, name="conv5x5")
        pooled = Lambda(partial(max_pool, window=3, strides=1, padding=1), name="pool")(x)
        pooled = unit(pooled, pool_proj, 1, name="pool_proj")
        return jnp.concatenate([one, three, five, pooled], axis=-1)


class DoubleInception(nn.Module):
    """A module of figure 5, where two 3x3 convolutions replace the 5x5 one: (b, *spatial, c) -> (b, *spatial', c').

    `features` is a row of the figure; where its #1x1 is 0, the module halves the size, rounded up, and passes the
    pooled input through. `pool` is the pooling of the other modules.
    """

    features: tuple[int, ...]
    unit: _Unit
    pool: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv1x1, reduce3x3, conv3x3, reduce_double, double, pool_proj = self.features
        unit = partial(self.unit, train=train)
        last = 1 if conv1x1 else 2
        three = unit(x, reduce3x3, 1, name="reduce3x3")
        three = unit(three, conv3x3, 3, name="conv3x3", strides=last)
        five = unit(x, reduce_double, 1, name="reduce_double3x3")
        five = unit(five, double, 3, name="double3x3_1")
        five = unit(five, double, 3, name="double3x3_2", strides=last)
        if not conv1x1:
            # Equal to no padding on even sizes; on odd ones it rounds up, as the convolutions beside it do.
            padding = ((0, 1),) * (x.ndim - 2)
            return jnp.concatenate([three, five, Lambda(partial(_halve, padding=padding), name="pool")(x)], axis=-1)
        one = unit(x, conv1x1, 1, name="conv1x1")
        pooled = Lambda(partial(self.pool, window=3, strides=1, padding=1), name="pool")(x)
        pooled = unit(pooled, pool_proj, 1, name="pool_proj")
        return jnp.concatenate([one, three, five, pooled], axis=-1)


class AuxiliaryHead(nn.Module):
    """A classifier on an inner stage: (b, *spatial, c) -> logits (b, num_classes).

    Section 5 of the paper, but the average pooling is adaptive, to 4 positions an axis, as in torchvision; the
    paper's is 5x5 with stride 3, which gives the same 4x4 of 14x14. `dropout` is the rate before the last layer.
    """

    num_classes: int
    unit: _Unit
    dense: Callable[..., nn.Dense]
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = Lambda(partial(adaptive_avg_pool, size=4), name="pool")(x)
        x = self.unit(x, 128, 1, name="conv", train=train)
        x = self.dense(self.unit.channels(1024), name="fc1")(x.reshape(x.shape[0], -1))
        x = Lambda(self.unit.act, name="fc1_relu")(x)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        return self.dense(self.num_classes, name="fc2")(x)


class _Network(nn.Module):
    """What both networks share: their switches, the layers before the first module and after the last."""

    num_classes: int = 1000
    width: int = 64
    dropout: float = 0.0
    norm: str = "batch"
    statistics: str | int = "global"
    epsilon: float = 1e-5
    act: str = "relu"
    kernel_init: str = "kaiming_normal"
    dimensions: int = 2
    dtype: Any = None

    def _unit(self, *, use_bias: bool, divisor: int) -> _Unit:
        """`divisor` divides every number of channels at width 64, so that group norm can."""
        init = initializer(self.kernel_init)
        divisor = max(1, divisor * self.width // 64)
        options: dict[str, Any] = {"statistics": self.statistics, "epsilon": self.epsilon, "dtype": self.dtype}
        normalise = family_norm(self.norm, width=divisor, **options)
        conv = partial(Conv, use_bias=use_bias, kernel_init=init, dtype=self.dtype)
        return _Unit(conv, normalise, activation(self.act), self.width)

    def _dense(self) -> Callable[..., nn.Dense]:
        return partial(nn.Dense, kernel_init=initializer("lecun_normal"), dtype=self.dtype)

    def _stem(self, x: Array, unit: _Unit, *, train: bool) -> Array:
        x = unit(x, 64, 7, strides=2, name="conv1", train=train)
        x = Lambda(_halve, name="pool1")(x)
        x = unit(x, 64, 1, name="conv2_reduce", train=train)
        x = unit(x, 192, 3, name="conv2", train=train)
        return Lambda(_halve, name="pool2")(x)

    def _head(self, x: Array, *, train: bool) -> Array:
        x = Lambda(global_avg_pool, name="pool5")(x)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        return self._dense()(self.num_classes, name="fc")(x)


class InceptionV1(_Network):
    """GoogLeNet, (b, 224, 224, c) -> logits (b, num_classes); any size of at least 15 pixels works.

    Table 1 of the paper with the departures of torchvision's `googlenet`, whose public weights fit: batch
    normalisation with epsilon 1e-3 after every convolution, which then has no bias, in place of local response
    normalisation; a 3x3 convolution where the paper has a 5x5 one (`five=5` is the paper's); a last max-pooling of
    2x2 (`pool4=3` is the paper's). All poolings round up (ceil mode). Dropout is the paper's 0.4 and, in the
    auxiliary heads, 0.7; torchvision's main rate is 0.2. `norm="none"` gives convolutions with biases and no
    normalisation at all: the paper's net without its local response normalisation.

    `aux` adds the heads `aux1` and `aux2` behind inception_4a and 4d. They run in training only, which then returns
    an `InceptionOutput`; their parameters exist after any `init`.

    Raises:
        InputError: `five` or `pool4` other than those named.
    """

    dropout: float = 0.4
    epsilon: float = 1e-3
    five: int = 3
    pool4: int = 2
    aux: bool = False
    aux_dropout: float = 0.7

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array | InceptionOutput:
        check_input(x, dimensions=self.dimensions)
        if self.five not in (3, 5) or self.pool4 not in (2, 3):
            raise InputError(
                f"five={self.five}, pool4={self.pool4}: expected 3 and 2 (torchvision's), or 5 and 3 (the paper's)"
            )
        unit = self._unit(use_bias=self.norm == "none", divisor=8)
        x = self._stem(x, unit, train=train)
        head = partial(AuxiliaryHead, self.num_classes, unit, self._dense(), self.aux_dropout)
        heads = {"4a": "aux1", "4d": "aux2"} if self.aux and (train or self.is_initializing()) else {}
        aux = {}
        for stage, features in _V1.items():
            x = Inception(features, unit, self.five, name=f"inception_{stage}")(x, train=train)
            if stage in heads:
                aux[heads[stage]] = head(name=heads[stage])(x, train=train)
            if stage == "3b":
                x = Lambda(_halve, name="pool3")(x)
            if stage == "4e":
                x = Lambda(partial(_halve, window=self.pool4), name="pool4")(x)
        logits = self._head(x, train=train)
        return InceptionOutput(logits, **aux) if self.aux and train else logits


class BNInception(_Network):
    """BN-Inception, (b, 224, 224, c) -> logits (b, num_classes); other sizes work too.

    Figure 5 of the paper, and the public Caffe weights (`bn_inception`), for what the figure leaves open:

    - The figure's output sizes of 4c, 4d and 4e (576, 576, 1024) are not the sums of their branches (608, 608,
      1056); the branches hold here.
    - Stride 2 in 3c and 4e is that of the last convolution of each branch and of the 3x3 max-pooling, so the modules
      halve the size that the figure prints as theirs.
    - Poolings of stride 2 round up (ceil mode) and have no padding; convolutions and poolings of stride 1 have the
      padding that keeps the size; average pooling counts its zeros.
    - The first layer is an ordinary 7x7 convolution; the paper's own was separable with depth multiplier 8.
    - No local response normalisation and no dropout, as section 4.2.1 of the paper has it.
    - Convolutions have biases with `norm="none"` only, which gives the net without batch normalisation that the
      paper compares with. `use_bias=True` adds the (idle) biases of the public weights.
    """

    use_bias: bool | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        check_input(x, dimensions=self.dimensions)
        unit = self._unit(use_bias=self.norm == "none" if self.use_bias is None else self.use_bias, divisor=32)
        x = self._stem(x, unit, train=train)
        for stage, features in _BN.items():
            pool = max_pool if stage == "5b" else avg_pool
            x = DoubleInception(features, unit, pool, name=f"inception_{stage}")(x, train=train)
        return self._head(x, train=train)


VARIANTS = {
    "inception_v1": Entry(InceptionV1, (224, 224, 3), "Szegedy et al. 2015"),
    "bn_inception": Entry(BNInception, (224, 224, 3), "Ioffe & Szegedy 2015"),
}
