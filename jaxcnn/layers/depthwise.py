"""Depthwise convolution as a sum of shifted images, for CPU, where XLA's grouped convolution is slow."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from jaxcnn.layers.window import Pairs, output_size
from jaxcnn.types import Array

Ints = tuple[int, ...]

_PIECES = 8
"""The weight gradient adds up so many parts of the batch elementwise before it sums over positions."""


def depthwise(x: Array, kernel: Array, *, steps: Ints, pads: Pairs, holes: Ints) -> Array:
    """Cross-correlation of every channel of x (b, *spatial, c) with its own kernel (*window, 1, c).

    Returns (b, *spatial', c) in x's dtype, to rounding what `lax.conv_general_dilated` gives with as many groups as
    channels; half precision is summed in float32. `steps`, `pads` (before, after) and `holes` (the dilation) are one
    for each spatial axis; sizes are the caller's to check. Differentiable in reverse mode, any number of times, not
    in forward mode.

    y[o] = sum_t x[o step + t hole - before] kernel[t], one multiplication and addition of whole images for each tap.
    """
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y: Array = _depthwise(x.astype(wide), kernel.astype(wide), steps, pads, holes)  # pyright: ignore[reportAssignmentType]
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x: Array, kernel: Array, steps: Ints, pads: Pairs, holes: Ints) -> Array:
    window = kernel.shape[:-2]
    sizes = [
        output_size(n, kernel=k, stride=s, padding=pad, dilation=d)
        for n, k, s, pad, d in zip(x.shape[1:-1], window, steps, pads, holes, strict=True)
    ]
    shifted = zip(_taps(window), _shifted(x, window, sizes, steps, pads, holes), strict=True)
    return _sum_of_products([(image, _weight(kernel, tap)) for tap, image in shifted])


def _forward(x: Array, kernel: Array, steps: Ints, pads: Pairs, holes: Ints) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, steps, pads, holes), (x, kernel)


def _backward(steps: Ints, pads: Pairs, holes: Ints, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return (
        _input_gradient(dy, kernel, x.shape[1:-1], steps, pads, holes),
        _weight_gradient(dy, x, kernel.shape, steps, pads, holes),
    )


_depthwise.defvjp(_forward, _backward)


def _input_gradient(dy: Array, kernel: Array, sizes: Ints, steps: Ints, pads: Pairs, holes: Ints) -> Array:
    """dx[i] = sum of dy[o] kernel[t] over all o step + t hole - before = i, the positions i with the same remainder
    by the step together: i = step q + r needs the taps with t hole - before = r modulo the step, at
    o = q + (r + before - t hole) / step. A strided slice's own gradient, padding with holes, is slow on CPU.
    """
    counts = [-(-n // s) for n, s in zip(sizes, steps, strict=True)]
    phases: dict[Ints, list[tuple[Array, Array]]] = {r: [] for r in _taps(steps)}
    for tap in _taps(kernel.shape[:-2]):
        offsets = [t * d - before for t, d, (before, _) in zip(tap, holes, pads, strict=True)]
        phase = tuple(offset % s for offset, s in zip(offsets, steps, strict=True))
        starts = [-(offset // s) for offset, s in zip(offsets, steps, strict=True)]
        phases[phase].append((_window(dy, starts, counts), _weight(kernel, tap)))
    zeros = jnp.zeros((dy.shape[0], *counts, dy.shape[-1]), dy.dtype)
    parts = [_sum_of_products(terms) if terms else zeros for terms in phases.values()]
    return _interleave(parts, steps)[(slice(None), *(slice(n) for n in sizes))]


def _weight_gradient(dy: Array, x: Array, shape: Ints, steps: Ints, pads: Pairs, holes: Ints) -> Array:
    """dkernel[t] = sum_o dy[o] x[o step + t hole - before].

    XLA's sums over all but the last axis are slow on CPU, so parts of the batch are first added up elementwise.
    """
    pieces = math.gcd(_PIECES, dy.shape[0])

    def parts(image: Array) -> Iterator[Array]:
        image = image.reshape(-1, pieces, *image.shape[1:])  # every n-th example: a batch on many devices stays there
        return (image[:, i] for i in range(pieces))

    taps = []
    for image in _shifted(x, shape[:-2], dy.shape[1:-1], steps, pads, holes):
        products = _sum_of_products(list(zip(parts(image), parts(dy), strict=True)))
        taps.append(products.sum(tuple(range(dy.ndim - 1))))
    return jnp.stack(taps).reshape(shape)


def _sum_of_products(terms: Sequence[tuple[Array, Array]]) -> Array:
    """The sum of a * b over `terms`, as real parts of complex products: (a + ib) (c - id) = (ac + bd) + i ... .

    The library that takes elementwise operations over on CPU takes no complex ones. It would want every shifted image
    written out first (14 ms against 3 for 16x56x56x64, 3x3), while XLA's own loop reads them where they lie.
    """
    if len(terms) % 2:
        a, b = terms[0]
        terms = [*terms, (jnp.zeros_like(a), jnp.zeros_like(b))]
    products = (lax.complex(a, c) * lax.complex(b, -d) for (a, b), (c, d) in zip(terms[::2], terms[1::2], strict=True))
    return reduce(lax.add, products).real


def _taps(window: Sequence[int]) -> Iterator[Ints]:
    return itertools.product(*map(range, window))


def _weight(kernel: Array, tap: Ints) -> Array:
    """(c,) of one tap, as (1, ..., 1, c)."""
    return kernel[tap].reshape((1,) * (kernel.ndim - 1) + (-1,))


def _shifted(x: Array, window: Ints, sizes: Sequence[int], steps: Ints, pads: Pairs, holes: Ints) -> Iterator[Array]:
    """For each tap, what it sees of x at each of the outputs: (b, *sizes, c)."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
    for tap in _taps(window):
        starts = [t * d for t, d in zip(tap, holes, strict=True)]
        ends = [start + (n - 1) * s + 1 for start, n, s in zip(starts, sizes, steps, strict=True)]
        yield x[(slice(None), *map(slice, starts, ends, steps))]


def _window(x: Array, starts: Sequence[int], sizes: Sequence[int]) -> Array:
    """x from `starts` on, (b, *sizes, c), zero outside of x."""
    ends = [start + n - size for start, n, size in zip(starts, sizes, x.shape[1:-1], strict=True)]
    inner = [(-start, end, 0) for start, end in zip(starts, ends, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])


def _interleave(parts: Sequence[Array], steps: Ints) -> Array:
    """One image (b, *(n step), c) of its parts (b, *n, c) by position modulo the steps, the last axis fastest."""
    rank = len(steps)
    b, *sizes, c = parts[0].shape
    stacked = jnp.stack(parts, axis=1).reshape(b, *steps, *sizes, c)
    order = [axis for i in range(rank) for axis in (1 + rank + i, 1 + i)]
    stacked = stacked.transpose(0, *order, 2 * rank + 1)
    return stacked.reshape(b, *(n * s for n, s in zip(sizes, steps, strict=True)), c)
