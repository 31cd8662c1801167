"""Convolution over any number of spatial axes, with the padding written out (row L2).

As everywhere in deep learning this is cross-correlation: the kernel is not flipped.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from jaxcnn.errors import InputError
from jaxcnn.layers.depthwise import depthwise
from jaxcnn.layers.named import located
from jaxcnn.layers.window import Padding, Pairs, output_size, pairs, per_axis, traced_as_written
from jaxcnn.types import Array

_NARROW = 8
"""Convolutions from or to at most so many channels are folded on CPU, up to `_FOLDED` channels of output."""
_FOLDED = 32

_in_loop: ContextVar[bool] = ContextVar("in_loop", default=False)


@contextlib.contextmanager
def loop_body() -> Iterator[None]:
    """For the trace of a loop's body (`lax.scan`): there, convolutions write out their gradients on CPU.

    XLA's CPU backend brings the two convolutions of a gradient into the form that its library takes, but in the
    program's entry computation only: inside a loop they run up to 50 times slower. Written in that form from the
    start they are as fast as outside, and the same to the bit. The price is that only reverse mode works inside.
    """
    token = _in_loop.set(True)
    try:
        yield
    finally:
        _in_loop.reset(token)


def conv(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Array:
    """Cross-correlation of x (b, *spatial, c) with kernel (*window, c / groups, features) of the same dtype.

    Returns (b, *spatial', features), per axis
    H_out = floor((H + low + high - dilation (K - 1) - 1) / stride) + 1.

    `strides`, `dilation`: for all axes, or one per axis. `padding`: an integer for both sides of every axis,
    one integer or pair (before, after) per axis, "VALID" (none), or, where every stride is 1, "SAME"
    (H_out = H; an even window has its extra zero behind).

    On CPU, depthwise convolutions and those in the body of a loop are differentiable in reverse mode only; forward
    mode works inside `as_written`.

    Raises:
        InputError: x without batch, spatial and channel axes of the kernel's rank; channels or features that
            `groups` does not divide; an input smaller than the kernel; "SAME" with a stride, whose uneven
            padding is not the symmetric one that published weights were trained with.
    """
    rank = kernel.ndim - 2
    if rank < 1 or x.ndim != kernel.ndim:
        raise InputError(
            f"convolution: input {x.shape} and kernel {kernel.shape} do not fit: "
            "expected (b, *spatial, c) and (*window, c / groups, features), with as many spatial axes"
        )
    _check_groups(x.shape[-1], kernel.shape[-1], groups)
    if x.shape[-1] != kernel.shape[-2] * groups:
        raise InputError(
            f"convolution: the kernel {kernel.shape} in {groups} groups takes {kernel.shape[-2] * groups} channels, "
            f"the input {x.shape} has {x.shape[-1]}: images are (b, h, w, c)"
        )
    window = kernel.shape[:rank]
    steps, holes = per_axis("convolution strides", strides, rank), per_axis("convolution dilation", dilation, rank)
    pads = _pairs(padding, window, steps, holes)
    _check_sizes(x.shape[1:-1], window, steps, pads, holes)
    if x.shape[0] > 1 and _fold_pays(kernel.shape, steps, holes, groups):
        return _fold(x, kernel, pads)
    if groups == x.shape[-1] == kernel.shape[-1] > 1 and jax.default_backend() == "cpu" and not traced_as_written():
        return depthwise(x, kernel, steps=steps, pads=pads, holes=holes)
    if _in_loop.get() and max(*steps, *holes, groups) == 1 and jax.default_backend() == "cpu":
        return _correlate_in_loop(x, kernel, pads)
    return _correlate(x, kernel, steps, pads, holes, groups)


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Array:
    """Convolution as mathematics and signal processing define it: `conv` with the kernel flipped in every axis.

    Shapes, options and errors are those of `conv`; `padding` of K - 1 gives the full convolution, which commutes.
    """
    flipped = jnp.flip(kernel, range(kernel.ndim - 2))
    return conv(x, flipped, strides=strides, padding=padding, dilation=dilation, groups=groups)


class Conv(nn.Module):
    """`conv` with parameters `kernel` (*kernel_size, c / groups, features) and `bias` (features,).

    `kernel_init` defaults to the untruncated normal of variance 2 / fan-in (He et al. 2015). `dtype` is what is
    computed in and returned (None: the input's), `param_dtype` the parameters'. An integer `kernel_size` is meant
    for every spatial axis of the input: 1-D, 2-D and 3-D convolutions are this one layer.

    Raises:
        InputError: as `conv`, with the layer's path in front; an input that is not floating-point.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    dilation: int | Sequence[int] = 1
    groups: int = 1
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
            raise InputError(f"convolution: input of {dtype}: convert it to floating point first")
        _check_groups(x.shape[-1], self.features, self.groups)
        window = self.kernel_size
        window = (window,) * (x.ndim - 2) if isinstance(window, int) else tuple(window)
        shape = (*window, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return conv(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


def _pairs(padding: Padding, window: tuple[int, ...], steps: tuple[int, ...], holes: tuple[int, ...]) -> Pairs:
    if padding != "SAME":
        return pairs("convolution padding", padding, len(window))
    if max(steps) > 1:
        raise InputError(
            f"convolution padding 'SAME' with strides {steps}: its zeros are uneven and not those that published "
            "weights were trained with; give the padding, such as padding=1 for a window of 3"
        )
    totals = (d * (k - 1) for k, d in zip(window, holes, strict=True))
    return tuple((total // 2, total - total // 2) for total in totals)


def _check_groups(channels: int, features: int, groups: int) -> None:
    if groups < 1 or channels % groups or features % groups:
        raise InputError(
            f"convolution: {channels} channels and {features} features cannot both be divided in {groups} groups"
        )


def _check_sizes(
    sizes: tuple[int, ...], window: tuple[int, ...], steps: tuple[int, ...], pads: Pairs, holes: tuple[int, ...]
) -> None:
    for size, k, s, pad, d in zip(sizes, window, steps, pads, holes, strict=True):
        if output_size(size, kernel=k, stride=s, padding=pad, dilation=d) < 1:
            raise InputError(
                f"convolution: input {sizes} padded by {pads} is smaller than the window {window} at dilation "
                f"{holes}: {size + sum(pad)} < {d * (k - 1) + 1}; use a larger image, more padding or a smaller window"
            )


def _correlate(
    x: Array, kernel: Array, steps: tuple[int, ...], pads: Pairs, holes: tuple[int, ...], groups: int
) -> Array:
    last = x.ndim - 1
    spatial = range(1, last)
    dimensions = lax.ConvDimensionNumbers((0, last, *spatial), (last, last - 1, *range(last - 1)), (0, last, *spatial))
    return lax.conv_general_dilated(
        x, kernel, steps, pads, rhs_dilation=holes, dimension_numbers=dimensions, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate_in_loop(x: Array, kernel: Array, pads: Pairs) -> Array:
    ones = (1,) * len(pads)
    return _correlate(x, kernel, ones, pads, ones, 1)


def _correlate_forward(x: Array, kernel: Array, pads: Pairs) -> tuple[Array, tuple[Array, Array]]:
    return _correlate_in_loop(x, kernel, pads), (x, kernel)


def _correlate_backward(pads: Pairs, held: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """dx: dy correlated with the flipped kernel; dkernel: x correlated with dy, the batch in place of the channels."""
    x, kernel = held
    ones, spatial = (1,) * len(pads), tuple(range(1, x.ndim - 1))
    rest = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, pads, strict=False))
    flipped = jnp.flip(kernel, range(len(pads))).swapaxes(-1, -2)
    dx = _correlate(dy, flipped, ones, rest, ones, 1)
    swapped = x.transpose(x.ndim - 1, *spatial, 0)
    dkernel = _correlate(swapped, dy.transpose(*spatial, 0, x.ndim - 1), ones, pads, ones, 1)
    return dx, dkernel.transpose(*spatial, 0, x.ndim - 1)


_correlate_in_loop.defvjp(_correlate_forward, _correlate_backward)


def _fold_pays(shape: tuple[int, ...], steps: tuple[int, ...], holes: tuple[int, ...], groups: int) -> bool:
    plain = len(shape) == 4 and max(*steps, *holes, groups) == 1
    channels, features = shape[-2:]
    narrow = min(channels, features) <= _NARROW and features <= _FOLDED // 2 and shape[1] > 1
    return plain and narrow and not traced_as_written() and jax.default_backend() == "cpu"


def _fold(x: Array, kernel: Array, pads: Pairs) -> Array:
    """The same convolution, with `n` neighbouring outputs of a row computed as n * features channels.

    The CPU library multiplies matrices with one row per output and one column per channel, so that a few
    channels leave it idle. The window grows by n - 1 columns, in each of which n - 1 copies of the kernel are 0,
    and moves by n. Equal to rounding for finite inputs; forward and both gradients of LeNet-5's two
    convolutions together took 2.5 times less (batch 128, 2 cores). A single image is left as it is, so that XLA's own
    count of operations of a network, asked for one example, is the network's (and takes 0.1 ms for LeNet-5).
    """
    columns, features = kernel.shape[1], kernel.shape[-1]
    width = output_size(x.shape[2], kernel=columns, padding=pads[1])
    n = min(4, _FOLDED // features, width)
    shifted = [jnp.pad(kernel, ((0, 0), (i, n - 1 - i), (0, 0), (0, 0))) for i in range(n)]
    blocks = -(-width // n)
    pads = (pads[0], (pads[1][0], pads[1][1] + blocks * n - width))
    y = _correlate(x, jnp.concatenate(shifted, axis=-1), (1, n), pads, (1, 1), 1)
    return y.reshape(*y.shape[:2], blocks * n, features)[:, :, :width]
