"""The moment map of a layer: from the mean and variance of its inputs to those of its outputs (rows A1, A22).

For z = sum_i w_i x_i over n inputs, with independent weights of mean 0: Var z = n Var(w) E(x^2), as Var(xy) =
Var(x) E(y^2) where x has mean 0; z is taken as Gaussian, and the activation's moments are integrals over it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation

REACH = 12.0
"""Standard deviations that integrals go to."""
NODES = 24_000
"""Of the midpoint rule: even, so that the kink of ReLU and its kind lies between two at mean 0."""


class Moments(NamedTuple):
    """Mean and variance of one unit."""

    mean: float
    variance: float

    @property
    def second(self) -> float:
        """E[x^2]."""
        return self.variance + self.mean**2


def gaussian_moments(act: str | Callable[[Any], Any], moments: Moments) -> Moments:
    """Mean and variance of act(z) for z ~ N(mean, variance): an elementwise function, or a name of `jaxcnn.layers.act`.

    Raises:
      InputError: unknown activation; a variance below 0, or one that is not finite.
    """
    if not (np.isfinite(moments).all() and moments.variance >= 0):
        raise InputError(f"{moments}: expected a finite mean and a variance of at least 0")
    unit = (np.arange(NODES) + 0.5) * (2 * REACH / NODES) - REACH
    weights = np.exp(-(unit**2) / 2)
    weights /= weights.sum()
    values = _float64(activation(act), moments.mean + np.sqrt(moments.variance) * unit)
    mean = float(weights @ values)
    return Moments(mean, float(weights @ (values - mean) ** 2))


def gains(act: str | Callable[[Any], Any], variance: float) -> tuple[float, float]:
    """(G0, G1) of z ~ N(0, variance): E[act(z)^2] / variance and E[act'(z)^2], 1/2 and 1/2 for ReLU.

    Var[z] is multiplied by G0 n Var[w] in each layer forward, the gradient's by G1 n_out Var[w] backward.

    Raises:
      InputError: unknown activation; a variance that is not above 0.
    """
    if not variance > 0:
        raise InputError(f"variance {variance}: expected a number above 0")
    forward = gaussian_moments(act, Moments(0.0, variance)).second / variance
    slope = jax.vmap(jax.grad(activation(act)))
    return forward, gaussian_moments(slope, Moments(0.0, variance)).second


def moment_map(act: str | Callable[[Any], Any], *, gain: float) -> Callable[[Moments], Moments]:
    """g: the moments of a layer's activations to those of the next layer's, where `gain` is n Var(w).

    1/3 for U(+-1/sqrt n), 1 for LeCun's and, between equal widths, Xavier's initialisation, 2 for Kaiming's.

    Raises:
      InputError: unknown activation; a gain below 0.
    """
    if not gain >= 0:
        raise InputError(f"gain {gain}: expected n Var(w), a number of at least 0")
    activation(act)
    return lambda moments: gaussian_moments(act, Moments(0.0, gain * Moments(*moments).second))


def iterate(function: Callable[[Any], Any], start: Any, *, steps: int) -> list[Any]:
    """start, function(start), function(function(start)), ...: the path to a fixed point, where it attracts.

    The picture of one: `iterate(math.cos, 1.0, steps=100)` ends at 0.739085.

    Raises:
      InputError: fewer than 0 steps.
    """
    if steps < 0:
        raise InputError(f"steps {steps}: expected at least 0")
    path = [start]
    for _ in range(steps):
        path.append(function(path[-1]))
    return path


def _float64(function: Callable[[Any], Any], values: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(function(jnp.asarray(values, jnp.float64)))
