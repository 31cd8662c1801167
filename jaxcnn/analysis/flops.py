"""Operations of one equation: multiply-accumulates (MACs) and floating-point operations (FLOPs), row A9."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxcnn.analysis.trace import shape_of

ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign",
    "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
))  # fmt: skip
"""One operation per output element."""

_REDUCTIONS = frozenset(("argmax", "argmin", *(f"reduce_{n}" for n in ("and", "max", "min", "or", "prod", "sum"))))
_WINDOWS = frozenset(("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"))
_RUNNING = frozenset(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"))


class Cost(NamedTuple):
    """Multiply-accumulates of convolutions and matrix products, and all floating-point operations."""

    macs: int
    flops: int


def cost(equation: JaxprEqn) -> Cost:
    """What one run of a primitive equation costs.

    A convolution is output elements x taps x input channels of a group, taps on padding counted; a transposed one
    input elements x taps x output channels of a group, its holes not counted. A product is 2 FLOPs per MAC. Sums,
    maxima and means over n elements are n - 1, elementwise operations 1 each, on floating-point numbers alone.
    What only moves data, and what is not known here, costs nothing.
    """
    name = equation.primitive.name
    macs = _macs(equation, name)
    if macs:
        return Cost(macs, 2 * macs)
    if not any(jnp.issubdtype(_dtype(v), jnp.inexact) for v in equation.invars):
        return Cost(0, 0)
    outputs = _size(equation.outvars[0])
    if name in ELEMENTWISE:
        return Cost(0, outputs)
    if name in _REDUCTIONS:
        return Cost(0, _size(equation.invars[0]) - outputs)
    if name in _WINDOWS:
        return Cost(0, outputs * (math.prod(equation.params["window_dimensions"]) - 1))
    return Cost(0, _size(equation.invars[0]) if name in _RUNNING else 0)


def _macs(equation: JaxprEqn, name: str) -> int:
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = shape_of(equation.invars[0])
        return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name != "conv_general_dilated":
        return 0
    image, kernel = equation.invars
    shape = shape_of(kernel)
    features, channels, *window = equation.params["dimension_numbers"].rhs_spec
    taps = math.prod(shape[axis] for axis in window)
    if max(equation.params["lhs_dilation"]) > 1:
        return _size(image) * taps * shape[features] // equation.params["feature_group_count"]
    return _size(equation.outvars[0]) * taps * shape[channels]


def _size(variable: Any) -> int:
    return math.prod(shape_of(variable))


def _dtype(variable: Any) -> Any:
    return variable.aval.dtype
