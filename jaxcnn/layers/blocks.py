"""What residual networks are made of: He et al. 2016, "Deep Residual Learning for Image Recognition", and He et al.
2016b, "Identity Mappings in Deep Residual Networks"."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers import stacks
from jaxcnn.layers.conv import Conv, loop_body
from jaxcnn.layers.norm import norm
from jaxcnn.layers.window import traced_as_written
from jaxcnn.types import Array

SHORTCUTS = ("A", "B", "none")


def check_shortcut(shortcut: str) -> None:
    """`InputError` unless the shortcut is one of `SHORTCUTS`."""
    if shortcut not in SHORTCUTS:
        raise unknown("shortcut", shortcut, SHORTCUTS)


def pad_shortcut(x: Array, *, channels: int, stride: int) -> Array:
    """Option A, without parameters: every `stride`-th position, new channels zero.

    (b, *spatial, c) -> (b, *ceil(spatial / stride), channels). The paper leaves open where the zeros go: half of
    them on either side, as in the public weights.
    """
    x = x[(slice(None), *(slice(None, None, stride),) * (x.ndim - 2))]
    new = channels - x.shape[-1]
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (new // 2, new - new // 2))) if new else x


def family_norm(
    name: str, *, statistics: str | int, width: int, dtype: Any, epsilon: float = 1e-5
) -> Callable[..., Any]:
    """The norm that a family's switches name; `width`, the narrowest layer, bounds the groups of group norm by 32.

    `InputError` for BatchNorm `statistics` given to another norm, which has none.
    """
    if name == "batch":
        return norm(name, dtype=dtype, epsilon=epsilon, statistics=statistics)
    if statistics != "global":
        raise InputError(f"statistics={statistics!r} belongs to norm 'batch', not to {name!r}: drop one of them")
    return norm(name, dtype=dtype, epsilon=epsilon, **({"groups": min(32, width)} if name == "group" else {}))


class _Residual(nn.Module):
    """What all residual blocks share: (b, *spatial, c) -> (b, *spatial / stride, c').

    `shortcut`: "A" pads with zeros, "B" projects where the shape changes (1x1 convolution), "none" makes the plain
    network. `conv`, `norm` and `act` are constructors and a function, so that variants are partials.
    """

    features: int
    stride: int = 1
    shortcut: str = "B"
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] | None = None
    act: Callable[[Array], Array] = nn.relu

    def _norm(self, name: str, x: Array, train: bool) -> Array:
        assert self.norm is not None
        return self.norm(name=name)(x, train=train)

    def _changes(self, x: Array, channels: int) -> bool:
        return self.stride != 1 or x.shape[-1] != channels

    def _project(self, x: Array, channels: int) -> Array:
        return self.conv(channels, 1, strides=self.stride, padding=0, name="projection")(x)


class _PostActivation(_Residual):
    """y = act(F(x) + shortcut(x)); with `act_first`, y = act(F(x)) + shortcut(x), figure 4(c) of He et al. 2016b."""

    act_first: bool = False

    def _add(self, x: Array, y: Array, train: bool) -> Array:
        if self.shortcut == "none":
            return self.act(y)
        if self._changes(x, y.shape[-1]):
            if self.shortcut == "A":
                x = pad_shortcut(x, channels=y.shape[-1], stride=self.stride)
            else:
                x = self._norm("projection_bn", self._project(x, y.shape[-1]), train)
        return self.act(y) + x if self.act_first else self.act(y + x)


class BasicBlock(_PostActivation):
    """Two 3x3 convolutions; `features` channels come out."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = self.conv(self.features, 3, strides=self.stride, padding=1, name="conv1")(x)
        y = self.act(self._norm("bn1", y, train))
        y = self.conv(self.features, 3, padding=1, name="conv2")(y)
        return self._add(x, self._norm("bn2", y, train), train)


class Bottleneck(_PostActivation):
    """1x1, 3x3 and 1x1 convolutions; 4 `features` channels come out.

    The stride is the 3x3 convolution's (v1.5, as in the published weights), with `v1` the first 1x1's as in the paper.
    """

    v1: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        first, second = (self.stride, 1) if self.v1 else (1, self.stride)
        y = self.conv(self.features, 1, strides=first, padding=0, name="conv1")(x)
        y = self.act(self._norm("bn1", y, train))
        y = self.conv(self.features, 3, strides=second, padding=1, name="conv2")(y)
        y = self.act(self._norm("bn2", y, train))
        y = self.conv(4 * self.features, 1, padding=0, name="conv3")(y)
        return self._add(x, self._norm("bn3", y, train), train)


class _PreActivation(_Residual):
    """y = F(act(norm(x))) + shortcut: nothing follows the addition, He et al. 2016b, figure 4(e).

    Where the shape changes the projection sees act(norm(x)), as in the authors' code; shortcut "A" sees x.
    """

    def _activated(self, n: int, x: Array, train: bool) -> Array:
        return self.act(self._norm(f"bn{n}", x, train))

    def _add(self, x: Array, activated: Array, y: Array) -> Array:
        if self.shortcut == "none":
            return y
        if self._changes(x, y.shape[-1]):
            if self.shortcut == "A":
                x = pad_shortcut(x, channels=y.shape[-1], stride=self.stride)
            else:
                x = self._project(activated, y.shape[-1])
        return y + x


class PreActivationBlock(_PreActivation):
    """Two 3x3 convolutions, each after norm and activation; `features` channels come out."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        activated = self._activated(1, x, train)
        y = self.conv(self.features, 3, strides=self.stride, padding=1, name="conv1")(activated)
        y = self.conv(self.features, 3, padding=1, name="conv2")(self._activated(2, y, train))
        return self._add(x, activated, y)


class PreActivationBottleneck(_PreActivation):
    """1x1, 3x3 and 1x1 convolutions, each after norm and activation; 4 `features` channels come out."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        activated = self._activated(1, x, train)
        y = self.conv(self.features, 1, padding=0, name="conv1")(activated)
        y = self.conv(self.features, 3, strides=self.stride, padding=1, name="conv2")(self._activated(2, y, train))
        y = self.conv(4 * self.features, 1, padding=0, name="conv3")(self._activated(3, y, train))
        return self._add(x, activated, y)


class Stage(nn.Module):
    """`blocks` blocks of one width, named block1, block2, ...; the first one has the stride.

    All but the first are identical. `scan` compiles them once, as the body of a loop (None: where there are more
    than `UNROLLED`, and on CPU with `remat`, since its compiler undoes recomputation outside of loops); `remat` keeps
    only what enters a block and computes its inside anew in the backward pass (Chen et al. 2016). Neither changes
    parameters or their names, nor results beyond rounding.
    """

    block: Callable[..., Any]
    blocks: int
    features: int
    stride: int
    scan: bool | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        plain = self.is_initializing() or traced_as_written()
        names = [f"block{i + 1}" for i in range(self.blocks)]
        scan = self.scan
        if scan is None:
            scan = len(names) > UNROLLED or (self.remat and jax.default_backend() == "cpu")
        if plain or not (scan or self.remat):
            for i, name in enumerate(names):
                x = self._block(i, name=name)(x, train=train)
            return x
        x = self._apply(x, 0, names[:1], train=train, scan=False)
        return self._apply(x, 1, names[1:], train=train, scan=scan)

    def _block(self, i: int, **options: Any) -> nn.Module:
        return self.block(self.features, stride=self.stride if i == 0 else 1, **options)

    def _apply(self, x: Array, i: int, names: list[str], *, train: bool, scan: bool) -> Array:
        """The blocks of those names, all like the i-th, as a pure function of their variables."""
        if not names:
            return x
        moving = [c for c in self.variables if c != "params" and self.is_mutable_collection(c)]
        block = self._block(i, parent=None)

        def one(x: Array, variables: Any) -> tuple[Array, Any]:
            return block.apply(variables, x, train=train, mutable=moving)

        if self.remat:
            one = jax.checkpoint(one, prevent_cse=not scan)
        held = [{c: tree[name] for c, tree in self.variables.items() if name in tree} for name in names]
        if scan:
            together = {c: stacks.stack([variables[c] for variables in held]) for c in held[0]}
            with loop_body():
                x, stacked = jax.lax.scan(one, x, together)
            moved = stacks.unstack(stacked, len(names))
        else:
            moved = []
            for variables in held:
                x, new = one(x, variables)
                moved.append(new)
        for name, new in zip(names, moved, strict=True):
            for collection, tree in new.items():
                self.put_variable(collection, name, tree)
        return x


UNROLLED = 36
"""Stages of at most so many blocks are compiled block by block, which runs faster."""
