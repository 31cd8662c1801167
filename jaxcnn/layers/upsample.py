"""Up-sampling over any number of spatial axes: transposed convolution, nearest, bilinear, max-unpooling (row L4)."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer

from jaxcnn.errors import InputError
from jaxcnn.layers.named import located
from jaxcnn.layers.window import Padding, pairs, per_axis, traced_as_written
from jaxcnn.types import Array


def conv_transpose(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Array:
    """The transpose (gradient) of `conv`, as a layer: x (b, *spatial, c), kernel (*window, c, features), one dtype.

    Returns (b, *spatial', features), per axis
    H_out = (H - 1) stride - low - high + dilation (K - 1) + output_padding + 1:
    the input size whose convolution gives H. Every input adds kernel * value to the output, from stride * position
    - low on. With the axes c and features of its kernel exchanged, `conv` with the same options takes the result
    back to the shape of x, and this is its gradient with respect to its input: the meaning of the options, of
    `padding` (which crops) too, is PyTorch's, where the kernel is stored (c, features, *window).

    `output_padding` picks between the sizes that a stride maps to the same H: so many more rows at the end.

    Raises:
        InputError: x without batch, spatial and channel axes of the kernel's rank; other channels than the
            kernel's; `output_padding` not below the larger of stride and dilation; nothing left after cropping.
    """
    rank = kernel.ndim - 2
    if rank < 1 or x.ndim != kernel.ndim or x.shape[-1] != kernel.shape[-2]:
        raise InputError(
            f"transposed convolution: input {x.shape} and kernel {kernel.shape} do not fit: "
            "expected (b, *spatial, c) and (*window, c, features), with as many spatial axes"
        )
    window = kernel.shape[:rank]
    steps = per_axis("transposed convolution strides", strides, rank)
    holes = per_axis("transposed convolution dilation", dilation, rank)
    pads = pairs("transposed convolution padding", padding, rank)
    extra = _extra(output_padding, steps, holes)
    spans = [d * (k - 1) for k, d in zip(window, holes, strict=True)]
    sizes = [
        (n - 1) * s - low - high + span + more + 1
        for n, s, (low, high), span, more in zip(x.shape[1:-1], steps, pads, spans, extra, strict=True)
    ]
    if min(sizes) < 1:
        raise InputError(
            f"transposed convolution: padding {pads} crops all of the output, which would be {tuple(sizes)}"
        )
    if steps == window and not any((*extra, *np.ravel(pads))) and max(holes) == 1 and not traced_as_written():
        return _tiles(x, kernel)
    last = rank + 1
    spatial = range(1, last)
    return lax.conv_general_dilated(
        x,
        jnp.flip(kernel, range(rank)),
        (1,) * rank,
        [(n - low, n - high + more) for n, (low, high), more in zip(spans, pads, extra, strict=True)],
        lhs_dilation=steps,
        rhs_dilation=holes,
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, last, *spatial), (last, last - 1, *range(rank)), (0, last, *spatial)
        ),
    )


def _extra(output_padding: int | Sequence[int], steps: tuple[int, ...], holes: tuple[int, ...]) -> tuple[int, ...]:
    extra = (output_padding,) * len(steps) if isinstance(output_padding, int) else tuple(output_padding)
    if len(extra) != len(steps) or not all(0 <= n < max(sd) for n, *sd in zip(extra, steps, holes, strict=True)):
        raise InputError(
            f"transposed convolution output_padding {output_padding!r}: expected, for each of {len(steps)} axes, "
            f"an integer from 0 to below the larger of stride and dilation, here {steps} and {holes}"
        )
    return extra


def _tiles(x: Array, kernel: Array) -> Array:
    """The same where windows do not overlap: each position becomes one tile, by one product of matrices."""
    rank = kernel.ndim - 2
    y = jnp.tensordot(x, kernel, axes=(-1, -2))  # (b, *spatial, *window, features)
    axes = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    sizes = [n * k for n, k in zip(x.shape[1:-1], kernel.shape[:rank], strict=True)]
    return y.transpose(0, *axes, 2 * rank + 1).reshape(x.shape[0], *sizes, kernel.shape[-1])


class ConvTranspose(nn.Module):
    """`conv_transpose` with parameters `kernel` (*kernel_size, c, features) and `bias` (features,).

    An integer `kernel_size` is meant for every spatial axis of the input. `dtype` is what is computed in and
    returned (None: the input's), `param_dtype` the parameters'. An output sums over about prod(kernel_size /
    strides) * c inputs, whereas an initialiser sees the kernel's shape alone and takes prod(kernel_size) * c for
    the fan-in: with the default, of variance 2 / fan-in, signals shrink by sqrt(prod(strides)).

    Raises:
        InputError: as `conv_transpose`, with the layer's path in front; an input that is not floating-point.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = 0
    output_padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    bias_init: Initializer = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(b, *spatial, c) -> (b, *spatial', features)."""
        with located(self):
            y = self._convolve(x)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _convolve(self, x: Array) -> Array:
        dtype = jnp.dtype(self.dtype or x.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(f"transposed convolution: input of {dtype}: convert it to floating point first")
        window = self.kernel_size
        window = (window,) * (x.ndim - 2) if isinstance(window, int) else tuple(window)
        kernel = self.param("kernel", self.kernel_init, (*window, x.shape[-1], self.features), self.param_dtype)
        return conv_transpose(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
        )


def upsample_nearest(x: Array, *, factor: int | Sequence[int]) -> Array:
    """(b, *spatial, c) -> (b, *(factor * spatial), c): every element repeated `factor` times along each axis.

    Raises:
        InputError: x without spatial axes, or a factor below 1.
    """
    for axis, n in enumerate(per_axis("up-sampling factor", factor, _rank(x)), start=1):
        x = jnp.repeat(x, n, axis=axis)
    return x


def upsample_bilinear(
    x: Array,
    *,
    factor: int | Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
    align_corners: bool = False,
) -> Array:
    """(b, *spatial, c) -> (b, *size, c), linear along each axis: bilinear in 2-D, trilinear in 3-D.

    The size is `size` or `factor` times the input's. Output i lies at (i + 1/2) H / H_out - 1/2 of the input,
    beyond its ends at the end; with `align_corners` at i (H - 1) / (H_out - 1), so that the end points are kept.
    PyTorch's `interpolate`; where the output is smaller, no filter goes before it (antialias=False). Computed in
    float32 or wider.

    Raises:
        InputError: x without spatial axes, a factor or size below 1, both or neither of them.
    """
    rank = _rank(x)
    if factor is not None and size is None:
        factors = per_axis("up-sampling factor", factor, rank)
        sizes = tuple(n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    elif size is not None and factor is None:
        sizes = per_axis("up-sampling size", size, rank)
    else:
        raise InputError(f"up-sampling: give either factor or size, got factor={factor!r}, size={size!r}")
    y = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    for axis, out in enumerate(sizes, start=1):
        weights = jnp.asarray(_linear_weights(x.shape[axis], out, align_corners), y.dtype)
        # A product of matrices, because its gradient is one too: that of a gather adds in no fixed order on a GPU.
        y = jnp.moveaxis(jnp.tensordot(y, weights, axes=(axis, 1), precision=lax.Precision.HIGHEST), -1, axis)
    return y.astype(x.dtype)


def _linear_weights(size: int, out: int, align_corners: bool) -> np.ndarray:
    """(out, size): what each input contributes to each output, 1 - distance between its two neighbours."""
    i = np.arange(out)
    at = i * (size - 1) / max(out - 1, 1) if align_corners else (i + 0.5) * size / out - 0.5
    return np.maximum(1 - np.abs(np.subtract.outer(np.clip(at, 0, size - 1), np.arange(size))), 0)


def max_unpool(values: Array, indices: Array, *, size: int | Sequence[int]) -> Array:
    """The inverse of `max_pool_with_indices`: `values` at their `indices`, zeros elsewhere.

    `values`, `indices` (b, *spatial, c) -> (b, *size, c); `indices` count the positions of `size` row by row,
    apart for every example and channel, and those beyond it are left out. `size` is that of the pooled input,
    which the pooled one does not tell. Where windows overlapped, the values at one index are equal and written
    once. Zeiler & Fergus 2014 ("switches"); PyTorch's MaxUnpool.

    Raises:
        InputError: no spatial axes, values and indices of different shapes, indices that are not integers, or a
            size below 1.
    """
    rank = _rank(values)
    if indices.shape != values.shape or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise InputError(
            f"max-unpooling: values {values.shape} and indices {indices.shape} of {indices.dtype}: "
            "expected integers of the same shape, as max_pool_with_indices gives them"
        )
    sizes = per_axis("max-unpooling size", size, rank)
    batch, channels = values.shape[0], values.shape[-1]

    def place(values: Array, indices: Array) -> Array:
        return jnp.zeros(math.prod(sizes), values.dtype).at[indices].set(values, mode="drop")

    over_channels = jax.vmap(place, in_axes=-1, out_axes=-1)
    flat = (batch, -1, channels)
    return jax.vmap(over_channels)(values.reshape(flat), indices.reshape(flat)).reshape(batch, *sizes, channels)


def _rank(x: Array) -> int:
    if x.ndim < 3:
        raise InputError(f"up-sampling needs (b, *spatial, c), got shape {x.shape}")
    return x.ndim - 2
