"""What residual networks are made of: He et al. 2016, "Deep Residual Learning for Image Recognition"."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.norm import norm
from jaxcnn.types import Array


def pad_shortcut(x: Array, *, channels: int, stride: int) -> Array:
    """Option A, without parameters: every `stride`-th pixel, new channels zero.

    (b, h, w, c) -> (b, ceil(h / stride), ceil(w / stride), channels). The paper leaves open where the zeros go:
    half of them on either side, as in the public weights.
    """
    x = x[:, ::stride, ::stride]
    new = channels - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))) if new else x


def family_norm(name: str, *, statistics: str | int, width: int, dtype: Any) -> Callable[..., Any]:
    """The norm that a family's switches name; `width`, the narrowest layer, bounds the groups of group norm by 32.

    `InputError` for BatchNorm `statistics` given to another norm, which has none.
    """
    if name == "batch":
        return norm(name, dtype=dtype, statistics=statistics)
    if statistics != "global":
        raise InputError(f"statistics={statistics!r} belongs to norm 'batch', not to {name!r}: drop one of them")
    return norm(name, dtype=dtype, **({"groups": min(32, width)} if name == "group" else {}))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, y = act(F(x) + shortcut(x)); (b, h, w, c) -> (b, h / stride, w / stride, features).

    `shortcut`: "A" pads with zeros, "B" projects where the shape changes (1x1 convolution and norm), "none" makes
    the plain network. `conv`, `norm` and `act` are constructors and a function, so that variants are partials.
    """

    features: int
    stride: int = 1
    shortcut: str = "B"
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] | None = None
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        assert self.norm is not None
        y = self.conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = self.act(self.norm(name="bn1")(y, train=train))
        y = self.conv(self.features, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="bn2")(y, train=train)
        if self.shortcut == "none":
            return self.act(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == "A":
                x = pad_shortcut(x, channels=self.features, stride=self.stride)
            else:
                x = self.conv(self.features, (1, 1), strides=self.stride, padding=0, name="projection")(x)
                x = self.norm(name="projection_bn")(x, train=train)
        return self.act(y + x)


class Stage(nn.Module):
    """`blocks` blocks of one width, named block1, block2, ...; the first one has the stride."""

    block: Callable[..., Any]
    blocks: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(self.features, stride=stride, name=f"block{i + 1}")(x, train=train)
        return x
