"""The objective and its gradient tile by tile: equal to the untiled ones, in the memory of one tile.

A tile's window reaches so far beyond it that what its features see lies inside, or ends where the image ends. Moments
are sums over tiles; with their sum known, so is the derivative of the style terms by each tile's share of it, and one
more pass gives the gradient. Windows are of one size, so one compiled program serves them all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcnn.errors import InputError
from jaxcnn.style.losses import Moments, content_loss, normalised, total_variation, weighted_sums
from jaxcnn.style.network import Network, Reach
from jaxcnn.style.objective import Objective, Targets, Terms
from jaxcnn.types import Array

_FIRST = np.int32(0)
"""Of an axis that is taken whole; origins are int32, and slices want indices of one type."""


class Tile(NamedTuple):
    """Along both axes, in pixels: where its window begins, and what it owns, from `first` to before `last`."""

    origin: Array
    first: Array
    last: Array


@dataclass(frozen=True)
class Grid:
    """Tiles of `tile` pixels over an image of `size` (h, w), for features of `reach`.

    Raises:
      InputError: `tile` that is no positive multiple of the deepest layer's stride.
    """

    size: tuple[int, int]
    tile: int
    reach: Reach

    def __post_init__(self) -> None:
        if self.tile < 1 or self.tile % self.reach.stride:
            raise InputError(
                f"tile {self.tile}: expected a multiple of {self.reach.stride}, the stride of the deepest layer"
            )

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) of every window. It too has what the image has beyond whole strides: pooling drops the same."""
        stride = self.reach.stride
        height, width = (min(n, self.tile + 2 * self.reach.halo + n % stride) for n in self.size)
        return height, width

    def __iter__(self) -> Iterator[Tile]:
        for y in self._along(0):
            for x in self._along(1):
                yield Tile(*(jnp.array(pair, jnp.int32) for pair in zip(y, x, strict=True)))

    def _along(self, axis: int) -> Iterator[tuple[int, int, int]]:
        size, window = self.size[axis], self.window[axis]
        if window == size:
            yield 0, 0, size
            return
        for first in range(0, size, self.tile):
            origin = min(max(first - self.reach.halo, 0), size - window)
            yield origin, first, min(first + self.tile, size)

    def owned(self, tile: Tile, shape: Sequence[int], stride: int) -> Array:
        """(h, w) of 0 and 1: which features of a window's map, of that shape and stride, are the tile's."""
        inside = []
        for axis in (0, 1):
            at = tile.origin[axis] + stride * jnp.arange(shape[axis])
            inside.append((at >= tile.first[axis]) & (at < tile.last[axis]))
        return inside[0].reshape(-1, 1) & inside[1].reshape(1, -1)


@dataclass(frozen=True)
class Tiled:
    """`objective` over the tiles of `grid`. Its functions loop on the host over compiled ones of one window."""

    objective: Objective
    grid: Grid

    def value_and_grad(self, network: Network, targets: Targets, x: Array) -> tuple[Terms, Array]:
        """As `Objective.value_and_grad`, for pictures x (k, h, w, 3) of the grid's size."""
        sums, totals = self._sums(network, x, targets.masks)
        style, slopes = _style(self.objective, sums, totals, targets)
        grad = jnp.zeros_like(x)
        content: Terms = {name: jnp.zeros(len(x), x.dtype) for name, _ in self.objective.content}
        for tile in self.grid:
            content, grad = _pull(self, network, targets, x, tile, slopes, content, grad)
        return _finish(self.objective, content, style, x, grad)

    def moments(self, network: Network, x: Array, masks: Array | None) -> dict[str, Moments]:
        """Of the style layers, over the whole image."""
        sums, totals = self._sums(network, x, masks)
        return {name: normalised(sums[name], totals[name]) for name in sums}

    def _sums(self, network: Network, x: Array, masks: Array | None) -> tuple[dict[str, Moments], dict[str, Array]]:
        tiles = iter(self.grid)
        found = _sums(self, network, x, masks, next(tiles))
        for tile in tiles:
            found = jax.tree.map(jnp.add, found, _sums(self, network, x, masks, tile))
        return found

    def features(self, network: Network, x: Array, layers: Sequence[str]) -> dict[str, Array]:
        """Whole maps, put together from the tiles' windows."""
        maps = jax.eval_shape(lambda x: network.features(x, layers), x)
        whole = {name: jnp.zeros(one.shape, one.dtype) for name, one in maps.items()}
        for tile in self.grid:
            whole = _paste(self, network, x, tile, whole)
        return whole


def _window(tiled: Tiled, x: Array, tile: Tile) -> Array:
    return lax.dynamic_slice(x, (_FIRST, *tile.origin, _FIRST), (len(x), *tiled.grid.window, x.shape[-1]))


def _owned(tiled: Tiled, name: str, tile: Tile, features: Array) -> Array:
    return tiled.grid.owned(tile, features.shape[1:3], tiled.grid.reach.of(name))


def _part(tiled: Tiled, name: str, tile: Tile, whole: Array, features: Array) -> Array:
    """What a window shows of a layer's whole map (n, h, w, ...)."""
    stride = tiled.grid.reach.of(name)
    y, x = tile.origin // stride
    rest = whole.shape[3:]
    start = (_FIRST, y, x, *(_FIRST for _ in rest))
    return lax.dynamic_slice(whole, start, (len(whole), *features.shape[1:3], *rest))


def _weights(tiled: Tiled, name: str, tile: Tile, features: Array, masks: Array | None) -> Array:
    """(r, h, w): how each location of a window counts in the moments of each region."""
    owned = _owned(tiled, name, tile, features)[None]
    if masks is None:
        return owned
    stride = tiled.grid.reach.of(name)
    shape = (len(masks), *(n // stride for n in masks.shape[1:]))
    return owned * _part(tiled, name, tile, jax.image.resize(masks, shape, "linear"), features)


@partial(jax.jit, static_argnums=0)
def _sums(
    tiled: Tiled, network: Network, x: Array, masks: Array | None, tile: Tile
) -> tuple[dict[str, Moments], dict[str, Array]]:
    """A tile's part of the moments' sums, and of the weights that they will be divided by."""
    layers = [name for name, _ in tiled.objective.style]
    if not layers:
        return {}, {}
    features = network.features(_window(tiled, x, tile), layers)
    weights = {name: _weights(tiled, name, tile, features[name], masks).astype(x.dtype) for name in layers}
    sums = {name: weighted_sums(features[name], weights[name]) for name in layers}
    return sums, {name: one.sum((1, 2)) for name, one in weights.items()}


@partial(jax.jit, static_argnums=0)
def _style(
    objective: Objective, sums: dict[str, Moments], totals: dict[str, Array], targets: Targets
) -> tuple[Terms, dict[str, Moments]]:
    """The style terms, and their derivatives by the sums."""

    def total(sums: dict[str, Moments]) -> tuple[Array, Terms]:
        found = {name: normalised(sums[name], totals[name]) for name in sums}
        terms = objective.style_terms(found, targets)
        return sum((term.sum() for term in terms.values()), jnp.zeros(())), terms

    slopes, terms = jax.grad(total, has_aux=True)(sums)
    return terms, slopes


@partial(jax.jit, static_argnums=0, donate_argnums=(6, 7))
def _pull(
    tiled: Tiled,
    network: Network,
    targets: Targets,
    x: Array,
    tile: Tile,
    slopes: dict[str, Moments],
    content: Terms,
    grad: Array,
) -> tuple[Terms, Array]:
    """Adds a tile's content losses to `content`, and what its content and moments pull at its pixels to `grad`."""
    objective = tiled.objective

    def total(window: Array) -> tuple[Array, Terms]:
        features = network.features(window, objective.layers)
        losses, pull = {}, jnp.zeros((), x.dtype)
        for name, weight in objective.content:
            target = _part(tiled, name, tile, targets.content[name], features[name])
            losses[name] = content_loss(features[name], target, _owned(tiled, name, tile, features[name]))
            pull += weight * losses[name].sum()
        for name, _ in objective.style:
            weights = _weights(tiled, name, tile, features[name], targets.masks).astype(x.dtype)
            part = weighted_sums(features[name], weights)
            pull += sum(jnp.vdot(a, b) for a, b in zip(part, slopes[name], strict=True))
        return pull, losses

    pulled, losses = jax.grad(total, has_aux=True)(_window(tiled, x, tile))
    before = _window(tiled, grad, tile)
    grad = lax.dynamic_update_slice(grad, before + pulled, (_FIRST, *tile.origin, _FIRST))
    return {name: content[name] + loss for name, loss in losses.items()}, grad


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _finish(objective: Objective, content: Terms, style: Terms, x: Array, grad: Array) -> tuple[Terms, Array]:
    """All terms; total variation, which needs no tiles, joins the gradient."""
    if objective.tv:
        grad = grad + jax.grad(lambda x: objective.tv * total_variation(x).sum())(x)
    return objective.terms(content, style, x), grad


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _paste(tiled: Tiled, network: Network, x: Array, tile: Tile, whole: dict[str, Array]) -> dict[str, Array]:
    features = network.features(_window(tiled, x, tile), tuple(whole))
    pasted = {}
    for name, one in features.items():
        stride = tiled.grid.reach.of(name)
        y, left = tile.origin // stride
        kept = _part(tiled, name, tile, whole[name], one)
        owned = _owned(tiled, name, tile, one).reshape(1, *one.shape[1:3], 1)
        pasted[name] = lax.dynamic_update_slice(whole[name], jnp.where(owned, one, kept), (_FIRST, y, left, _FIRST))
    return pasted
