"""Pooling over any number of spatial axes, with the padding written out (row L3)."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcnn.errors import InputError
from jaxcnn.layers.conv import conv
from jaxcnn.layers.window import Padding, pairs, per_axis, traced_as_written
from jaxcnn.types import Array

FOLD_LIMIT = 9
"""Maxima over at most so many elements are folded one by one; larger windows go to `reduce_window`.

Both give the same values and gradients. On CPU folding with its gradient is 2 to 30 times faster
(16x64x64x64, 2x2: 1.5 ms against 49), but the program grows with the window.
"""

_SMALLEST = 1e-30
"""The least sum of weights to divide by, well inside float32."""


class _Axis(NamedTuple):
    """One spatial axis of `size` elements, `low` and `high` padded ones, and `out` windows."""

    size: int
    window: int
    stride: int
    low: int
    high: int
    out: int


def _axes(
    x: Array,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Padding,
    ceil_mode: bool,
) -> list[_Axis]:
    if x.ndim < 3:
        raise InputError(f"pooling needs (b, *spatial, c), got shape {x.shape}")
    rank = x.ndim - 2
    windows = per_axis("pooling window", window, rank)
    steps = windows if strides is None else per_axis("pooling strides", strides, rank)
    pads = pairs("pooling padding", padding, rank)
    axes = []
    for size, k, s, (low, high) in zip(x.shape[1:-1], windows, steps, pads, strict=True):
        if not (0 <= low < k and 0 <= high < k):
            raise InputError(f"pooling padding {(low, high)} must be at least 0 and less than the window {k}")
        spare = size + low + high - k
        out = (-(-spare // s) if ceil_mode else spare // s) + 1
        if out < 1:
            raise InputError(f"pooling window {k} is larger than the padded axis of {size + low + high}")
        if (out - 1) * s >= size + low:  # PyTorch's rule: no window starts beyond the image
            out -= 1
        axes.append(_Axis(size, k, s, low, high, out))
    return axes


def _phases(x: Array, axes: list[_Axis]) -> dict[tuple[int, ...], Array]:
    """`x`, padded, split by position modulo the stride: phase p holds elements p, p + stride, ...

    `split` rather than strided slices, because its gradient is a concatenation; that of a strided slice
    is a padding with holes, which is slow on CPU.
    """
    blocks = [axis.out - 1 + -(-axis.window // axis.stride) for axis in axes]
    config = [(axis.low, n * axis.stride - axis.size - axis.low, 0) for axis, n in zip(axes, blocks, strict=True)]
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    interleaved = [n for axis, count in zip(axes, blocks, strict=True) for n in (count, axis.stride)]
    parts = {(): x.reshape(x.shape[0], *interleaved, x.shape[-1])}
    for n, axis in enumerate(axes):
        parts = {
            (*phase, i): piece
            for phase, part in parts.items()
            for i, piece in enumerate(lax.split(part, (1,) * axis.stride, axis=2 * n + 2))
        }
    return {phase: part.reshape(x.shape[0], *blocks, x.shape[-1]) for phase, part in parts.items()}


@jax.custom_jvp
def _first_maximum(best: Array, other: Array) -> Array:
    return lax.max(best, other)


@_first_maximum.defjvp
def _first_maximum_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of equal elements the first has the derivative; that of `lax.max` would be shared."""
    best, other = primals
    chosen = jnp.where((other > best) | jnp.isnan(other), tangents[1], tangents[0])
    return _first_maximum(best, other), chosen


def _fold_max(x: Array, axes: list[_Axis]) -> Array:
    """The maximum of every window, the first row first."""
    phases = _phases(x, axes)

    def tap(offset: tuple[int, ...]) -> Array:
        phase = tuple(i % axis.stride for i, axis in zip(offset, axes, strict=True))
        starts = [i // axis.stride for i, axis in zip(offset, axes, strict=True)]
        window = (slice(start, start + axis.out) for start, axis in zip(starts, axes, strict=True))
        return phases[phase][(slice(None), *window)]

    return reduce(_first_maximum, map(tap, itertools.product(*(range(axis.window) for axis in axes))))


def _pads(axes: list[_Axis]) -> list[tuple[int, int]]:
    """Padding up to the last window's end, which may lie before the end of the axis: the rest is left out."""
    ends = ((axis.out - 1) * axis.stride + axis.window for axis in axes)
    return [(axis.low, max(end - axis.size - axis.low, 0)) for axis, end in zip(axes, ends, strict=True)]


def _reduce_window(x: Any, axes: list[_Axis], start: Any, combine: Callable) -> Any:
    return lax.reduce_window(
        x,
        start,
        combine,
        (1, *(axis.window for axis in axes), 1),
        (1, *(axis.stride for axis in axes), 1),
        ((0, 0), *_pads(axes), (0, 0)),
    )


def _sum(x: Array, axes: list[_Axis]) -> Array:
    return _reduce_window(x, axes, np.array(0, x.dtype), lax.add)


def _widen(x: Array) -> Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def max_pool(
    x: Array,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
) -> Array:
    """(b, *spatial, c) -> (b, *spatial', c): the maximum of each window; padding never wins.

    H_out = floor((H + low + high - window) / stride) + 1, with `ceil_mode` ceil, less a last window that
    would start beyond the image (PyTorch's rule). `strides` defaults to `window`. `padding`: 'VALID', an
    integer for both sides of every axis, or one integer or pair (before, after) per axis. The gradient goes to the
    first maximum of the window in row order, as in PyTorch (after ReLU, ties at 0 are common). NaN wins.

    Raises:
        InputError: window or stride below 1, padding not in [0, window), a window larger than the axis.
    """
    axes = _axes(x, window, strides, padding, ceil_mode)
    if math.prod(axis.window for axis in axes) <= FOLD_LIMIT and not traced_as_written():
        return _fold_max(x, axes)
    return _reduce_window(x, axes, np.array(-jnp.inf, x.dtype), lax.max)


class PooledWithIndices(NamedTuple):
    """`values` (b, *spatial', c) of a pooling and, as int32, the `indices` (b, *spatial', c) that they come from.

    An index counts the positions of the pooled input's spatial axes row by row, (i w + j) in 2-D, apart for every
    example and channel.
    """

    values: Array
    indices: Array


def max_pool_with_indices(
    x: Array,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
) -> PooledWithIndices:
    """`max_pool` and where each maximum lies, for `max_unpool`; PyTorch's `return_indices`.

    Of equal maxima the first in row order, the one that the gradient goes to; of several NaN the last.

    Raises:
        InputError: as `max_pool`.
    """
    values = max_pool(x, window=window, strides=strides, padding=padding, ceil_mode=ceil_mode)
    axes = _axes(x, window, strides, padding, ceil_mode)
    sizes = x.shape[1:-1]
    positions = np.arange(math.prod(sizes), dtype=np.int32).reshape(1, *sizes, 1)
    beyond = np.array(np.iinfo(np.int32).max, np.int32)

    def first(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, i), (y, j) = a, b
        x_nan, y_nan = jnp.isnan(x), jnp.isnan(y)
        earlier = jnp.where(x_nan, j > i, j < i)
        take_b = jnp.where(x_nan | y_nan, y_nan & (~x_nan | earlier), (y > x) | ((y == x) & earlier))
        return jnp.where(take_b, y, x), jnp.where(take_b, j, i)

    operands = (lax.stop_gradient(x), jnp.broadcast_to(positions, x.shape))
    _, indices = _reduce_window(operands, axes, (np.array(-jnp.inf, x.dtype), beyond), first)
    return PooledWithIndices(values, indices)


def avg_pool(
    x: Array,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Array:
    """(b, *spatial, c) -> (b, *spatial', c): the mean of each window; sizes as in `max_pool`.

    `count_include_pad` counts padded zeros in the divisor, as PyTorch does by default; elements that only
    `ceil_mode` reaches are never counted. Sums are taken in float32 or wider.

    Raises:
        InputError: as `max_pool`.
    """
    axes = _axes(x, window, strides, padding, ceil_mode)
    total = _sum(_widen(x), axes)
    counts = [_count(axis, count_include_pad) for axis in axes]
    return (total / np.expand_dims(_outer(counts), (0, -1)).astype(total.dtype)).astype(x.dtype)


def _count(axis: _Axis, include_pad: bool) -> np.ndarray:
    """(out,): how many elements of each window along the axis count in the mean."""
    start = np.arange(axis.out) * axis.stride - axis.low
    end = start + axis.window
    if include_pad:
        return np.minimum(end, axis.size + axis.high) - start
    return np.minimum(end, axis.size) - np.maximum(start, 0)


def l2_pool(
    x: Array,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
) -> Array:
    """(b, *spatial, c) -> (b, *spatial', c): the L2 norm of each window, sqrt(sum x^2); sizes as in `max_pool`.

    The root of the sum, as in L2 (or p = 2) pooling of the literature, not of the mean. Where a window is all zeros
    the gradient, which has no limit there, is 0. Sums are taken in float32 or wider.

    Raises:
        InputError: as `max_pool`.
    """
    total = _sum(jnp.square(_widen(x)), _axes(x, window, strides, padding, ceil_mode))
    some = total != 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, total, 1)), 0).astype(x.dtype)


def weighted_avg_pool(
    x: Array,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    sigma: float = 1.0,
) -> Array:
    """(b, *spatial, c) -> (b, *spatial', c): the average of each window, weighted by the distance to its centre.

    An element at distance d (in pixels) from the window's centre weighs exp(-d^2 / (2 sigma^2)), over the sum of the
    weights of the window's elements that belong to x: padding does not count, and a constant stays a constant.
    The literature leaves the weights open; a large `sigma` gives `avg_pool` without padding in the count.
    Sizes as in `max_pool`. Sums are taken in float32 or wider.

    Raises:
        InputError: as `max_pool`; `sigma` not positive, or so small that all weights of a window vanish.
    """
    if not sigma > 0:
        raise InputError(f"pooling sigma {sigma} must be positive: it is the width of the weights in pixels")
    axes = _axes(x, window, strides, padding, ceil_mode)
    weights = [np.exp(-0.5 * ((np.arange(axis.window) - (axis.window - 1) / 2) / sigma) ** 2) for axis in axes]
    inside = _outer([_inside(axis) @ w for axis, w in zip(axes, weights, strict=True)])
    if inside.min() < _SMALLEST:
        raise InputError(f"pooling sigma {sigma} is too small for window {window}: all weights of a window vanish")
    wide = _widen(x)
    kernel = np.expand_dims(_outer(weights), (-2, -1)).repeat(x.shape[-1], -1).astype(wide.dtype)
    strides = [axis.stride for axis in axes]
    total = conv(wide, jnp.asarray(kernel), strides=strides, padding=_pads(axes), groups=x.shape[-1])
    return (total / np.expand_dims(inside, (0, -1)).astype(wide.dtype)).astype(x.dtype)


def _inside(axis: _Axis) -> np.ndarray:
    """(out, window): whether each element of each window along the axis belongs to the input."""
    at = np.add.outer(np.arange(axis.out) * axis.stride - axis.low, np.arange(axis.window))
    return (at >= 0) & (at < axis.size)


def _outer(factors: Sequence[np.ndarray]) -> np.ndarray:
    """The product of one vector per axis."""
    return reduce(np.multiply, np.ix_(*factors))


def global_avg_pool(x: Array) -> Array:
    """(b, *spatial, c) -> (b, c): the mean over all positions."""
    return x.mean(tuple(range(1, x.ndim - 1)))
