"""The receptive field of a unit as it is measured, beside the one that theory gives (row A10)."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.analysis.receptive_field import Span, Window
from jaxcnn.analysis.rows import PerAxis, axes
from jaxcnn.analysis.trace import trace
from jaxcnn.analysis.walk import walk
from jaxcnn.errors import InputError
from jaxcnn.features import features
from jaxcnn.layers.window import as_written
from jaxcnn.models.table import call_options
from jaxcnn.types import Array, PyTree

GAUSSIAN_TAIL = 1 - 0.9545
"""Share of the largest gradient above which a position belongs to the effective field, Luo et al. 2016."""

_NONE: Window = (math.inf, -math.inf)


@dataclass(frozen=True)
class MeasuredField:
    """What the central unit of a layer sees: (first, last) position of the input on each spatial axis.

    `unit` is the position in the layer's output, () where it has none. `theoretical` counts on beyond the image,
    `expected` is the part of it inside the image, and `measured` where any gradient arrived: the same, unless theory
    is an upper bound (resizing as a product with a matrix full of zeros) or no draw found a way through.
    (inf, -inf) stands for nothing.

    `map` (*spatial), float64: the unit's mean gradient magnitude by each position of the input, the largest 1; all 0
    where none arrives.
    """

    unit: tuple[int, ...]
    theoretical: tuple[Window, ...]
    expected: tuple[Window, ...]
    map: np.ndarray

    @property
    def measured(self) -> tuple[Window, ...]:
        """First and last position on each axis with a gradient: its support."""
        found = np.argwhere(self.map > 0)
        if not len(found):
            return (_NONE,) * self.map.ndim
        return tuple((int(low), int(high)) for low, high in zip(found.min(0), found.max(0), strict=True))

    @property
    def size(self) -> PerAxis:
        """Measured positions from first to last; one number if all axes agree, else one for each."""
        return _sizes(self.measured)

    @property
    def theoretical_size(self) -> PerAxis:
        """r_L = 1 + sum_l d_l (K_l - 1) prod_{i<l} S_i of this unit, which may be larger than the image."""
        return _sizes(self.theoretical)

    @property
    def effective_size(self) -> float:
        """Side of a square (cube, ...) of as many positions as are above `GAUSSIAN_TAIL` of the largest."""
        return float(np.count_nonzero(self.map > GAUSSIAN_TAIL) ** (1 / self.map.ndim))


def measured_field(
    module: nn.Module,
    *,
    input: tuple[int, ...],
    layer: str | None = None,
    variables: PyTree | None = None,
    draws: int = 20,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> MeasuredField:
    """The gradient of the central unit of `layer` (a name of `jaxcnn.features`; None: the output) by the input.

    Its support is the receptive field, its magnitude the effective one (Luo et al. 2016). In a single draw it
    vanishes by chance, where a ReLU is off or another element was the maximum. So magnitudes are added up over
    `draws` inputs of N(0, 1), with fresh weights for each unless there are `variables`, and over the input's
    channels. (Setting inputs to NaN would leave nothing to chance, but XLA's CPU backend, in jaxlib 0.10.2, loses
    NaN in the maxima of large arrays.) The unit is the sum over its channels with new weights of N(0, 1) in each
    draw, as a plain sum has no gradient after a softmax; Luo et al. take one channel.

    On accelerators, convolutions by transforms (FFT, Winograd) may leave rounding errors beyond the support.

    Raises:
        InputError: an input without spatial axes or one that the module does not take; an unknown layer, or one with
            several outputs; no draws; a gradient that is not finite.
    """
    if draws < 1:
        raise InputError(f"draws {draws}: expected at least 1")
    unit, theoretical = _theory(module, input, layer, dtype)

    @jax.jit
    def magnitude(variables: PyTree | None, key: Array) -> Array:
        weights, image, channels = jax.random.split(key, 3)
        held = _initialised(module, weights, input, dtype) if variables is None else variables

        def central(x: Array) -> Array:
            found = _output(module, held, x, layer)[(0, *unit)]
            return (found * jax.random.normal(channels, found.shape, found.dtype)).sum()

        return jnp.abs(jax.grad(central)(jax.random.normal(image, (1, *input), dtype)))[0].mean(-1)

    total = np.zeros(input[:-1])
    for key in jax.random.split(jax.random.key(seed), draws):
        total += np.asarray(magnitude(variables, key), np.float64)
    if not np.isfinite(total).all():
        raise InputError(f"the gradient of {layer or type(module).__name__} is not finite for inputs of N(0, 1)")
    expected = tuple(_inside(window, n) for window, n in zip(theoretical, total.shape, strict=True))
    return MeasuredField(unit, theoretical, expected, total / (total.max() or 1.0))


def _theory(
    module: nn.Module, input: tuple[int, ...], layer: str | None, dtype: Any
) -> tuple[tuple[int, ...], tuple[Window, ...]]:
    """The central position of the layer, and what theory says that it sees; checks the input."""
    traced = trace(module, input=input, dtype=dtype)
    if len(input) < 2:
        raise InputError(f"input {input}: expected spatial axes and channels, such as (224, 224, 3)")

    def run(x: Array) -> Any:
        return _output(module, _initialised(module, jax.random.key(0), input, dtype), x, layer)

    output = jax.eval_shape(run, jax.ShapeDtypeStruct((1, *input), dtype))
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise InputError(f"{layer or type(module).__name__} has several outputs: give the name of a layer with one")
    unit = tuple(n // 2 for n in output.shape[1:-1])
    operations, outputs = walk(traced)
    reach = outputs[0]
    if layer is not None:
        path = tuple(layer.split("/"))
        call = next(call.number for call in traced.calls if call.path == path)
        reach = next(op.reach for op in operations if op.primitive is None and op.call == call)
    if reach is None:
        return unit, (_NONE,) * (len(input) - 1)
    return unit, tuple(_window(span, unit, output.shape) for span in reach)


def _window(span: Span, unit: tuple[int, ...], shape: tuple[int, ...]) -> Window:
    """What the unit sees, all its channels together."""
    if span.axis is not None and 0 < span.axis <= len(unit):
        return span.at(unit[span.axis - 1])
    return span.everywhere(shape[span.axis or 0]).windows[0]


def _initialised(module: nn.Module, key: Array, input: tuple[int, ...], dtype: Any) -> PyTree:
    return module.init(key, jnp.zeros((1, *input), dtype), **call_options(module, train=False))


def _output(module: nn.Module, variables: PyTree, x: Array, layer: str | None) -> Any:
    if layer is not None:
        return features(module, variables, x, names=[layer])[layer]
    with as_written():
        return module.apply(variables, x, **call_options(module, train=False))


def _inside(window: Window, n: int) -> Window:
    low, high = max(window[0], 0), min(window[1], n - 1)
    return (int(low), int(high)) if low <= high else _NONE


def _sizes(windows: tuple[Window, ...]) -> PerAxis:
    return axes(int(max(0, high - low + 1)) for low, high in windows)
