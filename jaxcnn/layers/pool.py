"""Max and average pooling over any number of spatial axes, with the padding written out."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcnn.errors import InputError
from jaxcnn.layers.window import Padding, pairs, per_axis, traced_as_written
from jaxcnn.types import Array

FOLD_LIMIT = 9
"""Maxima over at most so many elements are folded one by one; larger windows go to `reduce_window`.

Both give the same values and gradients. On CPU folding with its gradient is 2 to 30 times faster
(16x64x64x64, 2x2: 1.5 ms against 49), but the program grows with the window.
"""


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
        if spare < 0:
            raise InputError(f"pooling window {k} is larger than the padded axis of {size + low + high}")
        out = (-(-spare // s) if ceil_mode else spare // s) + 1
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


def _fold_max(x: Array, axes: list[_Axis]) -> Array:
    """The maximum of every window, the first row first."""
    phases = _phases(x, axes)

    def tap(offset: tuple[int, ...]) -> Array:
        phase = tuple(i % axis.stride for i, axis in zip(offset, axes, strict=True))
        starts = [i // axis.stride for i, axis in zip(offset, axes, strict=True)]
        window = (slice(start, start + axis.out) for start, axis in zip(starts, axes, strict=True))
        return phases[phase][(slice(None), *window)]

    def first_maximum(best: Array, other: Array) -> Array:
        return jnp.where((other > best) | jnp.isnan(other), other, best)

    return reduce(first_maximum, map(tap, itertools.product(*(range(axis.window) for axis in axes))))


def _reduce_window(x: Array, axes: list[_Axis], start: float, combine: Callable) -> Array:
    # The last window's end, which may lie before the end of the axis: reduce_window then leaves the rest out.
    highs = (max((axis.out - 1) * axis.stride + axis.window - axis.size - axis.low, 0) for axis in axes)
    return lax.reduce_window(
        x,
        np.array(start, x.dtype),
        combine,
        (1, *(axis.window for axis in axes), 1),
        (1, *(axis.stride for axis in axes), 1),
        ((0, 0), *((axis.low, high) for axis, high in zip(axes, highs, strict=True)), (0, 0)),
    )


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
    integer for both sides of every axis, or a pair (before, after) for each axis. The gradient goes to the
    first maximum of the window in row order, as in PyTorch (after ReLU, ties at 0 are common). NaN wins.

    Raises:
        InputError: window or stride below 1, padding not in [0, window), a window larger than the axis.
    """
    axes = _axes(x, window, strides, padding, ceil_mode)
    if math.prod(axis.window for axis in axes) <= FOLD_LIMIT and not traced_as_written():
        return _fold_max(x, axes)
    return _reduce_window(x, axes, -jnp.inf, lax.max)


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
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    total = _reduce_window(wide, axes, 0, lax.add)
    counts = [_count(axis, count_include_pad) for axis in axes]
    divisor = reduce(np.multiply, np.ix_(*counts))
    return (total / np.expand_dims(divisor, (0, -1)).astype(wide.dtype)).astype(x.dtype)


def _count(axis: _Axis, include_pad: bool) -> np.ndarray:
    """(out,): how many elements of each window along the axis count in the mean."""
    start = np.arange(axis.out) * axis.stride - axis.low
    end = start + axis.window
    if include_pad:
        return np.minimum(end, axis.size + axis.high) - start
    return np.minimum(end, axis.size) - np.maximum(start, 0)


def global_avg_pool(x: Array) -> Array:
    """(b, *spatial, c) -> (b, c): the mean over all positions."""
    return x.mean(tuple(range(1, x.ndim - 1)))
