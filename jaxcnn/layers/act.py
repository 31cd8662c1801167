"""Activations by name (elementwise, any shape) and maxout."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError, unknown
from jaxcnn.types import Array

Activation = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """`x` itself."""
    return x


def scaled_tanh(x: Array) -> Array:
    """1.7159 tanh(2x/3): f(+-1) = +-1 and the largest curvature is there; LeCun et al. 1998, appendix A."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


def maxout(x: Array, *, pieces: int = 2) -> Array:
    """(..., c) -> (..., c / pieces): the maximum of each run of `pieces` neighbouring channels.

    Goodfellow et al. 2013. Where several are equal, the gradient is shared evenly.

    Raises:
        InputError: `pieces` does not divide c.
    """
    if pieces < 1 or x.shape[-1] % pieces:
        raise InputError(f"maxout: {x.shape[-1]} channels cannot be divided in runs of {pieces}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // pieces, pieces).max(-1)


ACTIVATIONS: dict[str, Activation] = {
    "identity": identity,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "scaled_tanh": scaled_tanh,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "leaky_relu_0.1": partial(jax.nn.leaky_relu, negative_slope=0.1),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "maxout": maxout,
}
"""GELU is the exact one, x Phi(x); `maxout` halves the channels."""


def activation(name: str | Activation) -> Activation:
    """The activation of that name; a callable is returned as it is.

    Raises:
        InputError: unknown name.
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
