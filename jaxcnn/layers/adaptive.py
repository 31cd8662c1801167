"""Pooling to a given size, over any number of spatial axes."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from jaxcnn.errors import InputError
from jaxcnn.layers.pool import avg_pool, max_pool
from jaxcnn.layers.window import per_axis
from jaxcnn.types import Array


def adaptive_avg_pool(x: Array, *, size: int | Sequence[int]) -> Array:
    """(b, *spatial, c) -> (b, *size, c): the mean of each window; `size` for all axes, or one per axis.

    Window i of m over an axis of n elements is floor(i n / m) .. ceil((i + 1) n / m), PyTorch's rule: plain average
    pooling where every m divides its n, the input itself where they are equal; windows overlap where m does not
    divide n, and elements repeat where m > n.

    Raises:
        InputError: an input without spatial axes or with an empty one; a size that is not positive.
    """
    return _adaptive(x, size, avg_pool)


def adaptive_max_pool(x: Array, *, size: int | Sequence[int]) -> Array:
    """(b, *spatial, c) -> (b, *size, c): the maximum of each window of `adaptive_avg_pool`.

    These are the bins of spatial pyramid pooling, He et al. 2014. The gradient goes to one maximum of each window.

    Raises:
        InputError: as `adaptive_avg_pool`.
    """
    return _adaptive(x, size, max_pool)


def _adaptive(x: Array, size: int | Sequence[int], pool: Callable[..., Array]) -> Array:
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise InputError(f"adaptive pooling needs (b, *spatial, c) with elements on every axis, got shape {x.shape}")
    sizes = per_axis("adaptive pooling size", size, x.ndim - 2)
    spatial = x.shape[1:-1]
    if spatial == sizes:
        return x
    if all(n % m == 0 for n, m in zip(spatial, sizes, strict=True)):
        return pool(x, window=[n // m for n, m in zip(spatial, sizes, strict=True)])
    for axis, m in enumerate(sizes):
        x = _along(x, axis, m, pool)
    return x


def _along(x: Array, axis: int, m: int, pool: Callable[..., Array]) -> Array:
    """Windows are products of intervals, so that a mean or maximum over them is one axis after the other."""
    n = x.shape[axis + 1]
    parts = []
    for i in range(m):
        start, end = i * n // m, -(-(i + 1) * n // m)
        window = [1] * (x.ndim - 2)
        window[axis] = end - start
        parts.append(pool(lax.slice_in_dim(x, start, end, axis=axis + 1), window=window))
    return jnp.concatenate(parts, axis + 1)
