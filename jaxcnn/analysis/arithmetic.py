"""Weights and operations of a dense layer beside those of a convolution that computes the same (rows A8 and A9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxcnn.errors import InputError
from jaxcnn.layers.window import Padding, output_size, pairs, per_axis

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Arithmetic:
    """What one linear layer holds and does for one example.

    `output` is its shape (*spatial, features); `weights` and `biases` are numbers of parameters; `macs`
    multiply-accumulates, with the taps on padding, as in `Summary`.
    """

    output: Shape
    weights: int
    biases: int
    macs: int

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return math.prod(self.output)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.weights + self.biases

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate, as in `Summary`: a sum starts from the bias, or from 0."""
        return 2 * self.macs

    @property
    def operations(self) -> int:
        """Multiplications and additions that a sum of n products needs without bias: n and n - 1."""
        return 2 * self.macs - self.outputs

    def activation_bytes(self, *, itemsize: int = 4) -> int:
        """Of the output, in elements of `itemsize` bytes."""
        return itemsize * self.outputs


def dense(input: Shape, output: Shape, *, use_bias: bool = False) -> Arithmetic:
    """A dense layer from every element of `input` to every element of `output`, shapes of one example.

    The convolution [-1 1] over (h, w) makes (h, w - 1) edges; a dense layer that does needs h w h (w - 1) weights.

    Raises:
        InputError: sizes that are not positive.
    """
    _check(input, output)
    weights = math.prod(input) * math.prod(output)
    return Arithmetic(tuple(output), weights, math.prod(output) if use_bias else 0, weights)


def convolution(
    input: Shape,
    *,
    kernel_size: int | Sequence[int],
    features: int = 1,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    use_bias: bool = False,
) -> Arithmetic:
    """A convolution over `input` (*spatial, c), with the options of `jaxcnn.layers.Conv` but for "SAME".

    Parameters are features (c / groups prod K + 1), MACs (features prod H_out) (c / groups prod K), FLOPs twice that.

    Raises:
        InputError: sizes that are not positive; channels or features that `groups` does not divide; a window larger
            than the padded input.
    """
    _check(input, (features, groups))
    *spatial, channels = input
    rank = len(spatial)
    if channels % groups or features % groups:
        raise InputError(f"{channels} channels and {features} features cannot both be divided in {groups} groups")
    window = per_axis("convolution kernel_size", kernel_size, rank)
    steps, holes = per_axis("convolution strides", strides, rank), per_axis("convolution dilation", dilation, rank)
    pads = pairs("convolution padding", padding, rank)
    sizes = tuple(
        output_size(n, kernel=k, stride=s, padding=pad, dilation=d)
        for n, k, s, pad, d in zip(spatial, window, steps, pads, holes, strict=True)
    )
    if min(sizes, default=1) < 1:
        raise InputError(f"input {input} padded by {pads} is smaller than the window {window}: use a larger image")
    taps = math.prod(window) * channels // groups
    biases = features if use_bias else 0
    return Arithmetic((*sizes, features), taps * features, biases, taps * features * math.prod(sizes))


def _check(*shapes: Shape) -> None:
    for shape in shapes:
        if not shape or any(type(size) is not int or size < 1 for size in shape):
            raise InputError(f"shape {shape}: expected positive sizes, such as (224, 224, 3)")
