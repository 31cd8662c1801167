"""Initialisers by name, with the textbooks' distributions.

The normals here are NOT truncated; JAX's own `glorot_normal`, `lecun_normal` and `he_normal` are (at two
standard deviations, widened so that the variance is the same). `truncated=True` gives JAX's.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, orthogonal
from jax.nn.initializers import constant as jax_constant
from jax.nn.initializers import normal as jax_normal
from jax.nn.initializers import truncated_normal as jax_truncated_normal
from jax.nn.initializers import zeros as jax_zeros

from jaxcnn.errors import InputError, unknown
from jaxcnn.layers.draws import deferrable
from jaxcnn.types import ArrayLike

Mode = Literal["fan_in", "fan_out", "fan_avg"]

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated to (-2, 2)."""


class Fans(NamedTuple):
    """Connections per unit: `fan_in` into an output, `fan_out` from an input, `fan_avg` their mean."""

    fan_in: float
    fan_out: float

    @property
    def fan_avg(self) -> float:
        return (self.fan_in + self.fan_out) / 2


def fans(shape: Sequence[int], *, groups: int = 1, connections: ArrayLike | None = None) -> Fans:
    """Connections per unit of a dense (c_in, c_out) or convolution (*k, c_in / groups, c_out) kernel.

    Densely connected: fan_in = K*K*c_in and fan_out = K*K*c_out. `groups` divides fan_out; fan_in is right
    as it stands, because the kernel holds c_in / groups inputs. Where units are partly connected,
    `connections` (c_in / groups, c_out), nonzero where an input map feeds an output map (LeNet's table of
    C3), gives the average over units.

    Raises:
        InputError: fewer than two axes, groups that do not divide c_out, a table of another shape.
    """
    if len(shape) < 2:
        raise InputError(
            f"a kernel of shape {tuple(shape)} has no fans: expected (..., inputs, outputs); use zeros, "
            "constant or normal for vectors"
        )
    *window, inputs, outputs = shape
    if groups < 1 or outputs % groups:
        raise InputError(f"groups={groups} does not divide {outputs} output channels")
    connected = inputs * outputs
    if connections is not None:
        if np.shape(connections) != (inputs, outputs):
            raise InputError(f"connections {np.shape(connections)} must have shape {(inputs, outputs)}")
        connected = np.count_nonzero(np.asarray(connections))
    taps = math.prod(window)
    return Fans(taps * connected / outputs, taps * connected / (inputs * groups))


def _zeros() -> Initializer:
    return jax_zeros


def _constant(*, value: float) -> Initializer:
    return jax_constant(value)


def _normal(*, std: float = 0.01, truncated: bool = False) -> Initializer:
    return jax_truncated_normal(std / TRUNCATED_STD) if truncated else jax_normal(std)


def _scaled_normal(
    scale: float,
    mode: Mode,
    *,
    truncated: bool = False,
    groups: int = 1,
    connections: ArrayLike | None = None,
) -> Initializer:
    """N(0, scale / fan)."""

    def init(key, shape, dtype=None, out_sharding=None):
        fan = getattr(fans(shape, groups=groups, connections=connections), mode)
        draw = _normal(std=math.sqrt(scale / fan), truncated=truncated)
        return draw(key, shape, dtype, out_sharding=out_sharding)

    return init


def _scaled_uniform(scale: float, mode: Mode, *, groups: int = 1, connections: ArrayLike | None = None) -> Initializer:
    """Uniform of variance scale / fan, that is U(+-sqrt(3 scale / fan))."""

    def init(key, shape, dtype=None, out_sharding=None):
        limit = math.sqrt(3 * scale / getattr(fans(shape, groups=groups, connections=connections), mode))
        return jax.random.uniform(key, shape, dtype, -limit, limit, out_sharding=out_sharding)

    return init


def _dirac(*, groups: int = 1) -> Initializer:
    """The convolution that copies input channel i to output channel i (of each group) and leaves others 0."""

    def init(key, shape, dtype=None, out_sharding=None):
        del key
        *window, inputs, outputs = shape
        fans(shape, groups=groups)  # the same checks
        identity = jnp.tile(jnp.eye(inputs, outputs // groups, dtype=dtype), (1, groups))
        centre = tuple(k // 2 for k in window)
        kernel = jnp.zeros(shape, dtype).at[centre].set(identity)
        return kernel if out_sharding is None else jax.device_put(kernel, out_sharding)

    return init


INITIALIZERS: dict[str, Callable[..., Initializer]] = {
    "zeros": _zeros,
    "constant": _constant,
    "normal": _normal,
    "standard": partial(_scaled_uniform, 1 / 3, "fan_in"),
    "xavier_normal": partial(_scaled_normal, 1.0, "fan_avg"),
    "xavier_uniform": partial(_scaled_uniform, 1.0, "fan_avg"),
    "lecun_normal": partial(_scaled_normal, 1.0, "fan_in"),
    "kaiming_normal": partial(_scaled_normal, 2.0, mode="fan_in"),
    "kaiming_uniform": partial(_scaled_uniform, 2.0, mode="fan_in"),
    "orthogonal": orthogonal,
    "dirac": _dirac,
}


def initializer(name: str, **options) -> Initializer:
    """An initialiser `(key, shape, dtype) -> array` from `INITIALIZERS`, for kernels (*k, c_in, c_out).

    With n the fan_in and variances of the kernel's entries:

    - `zeros`, `constant(value)`: break no symmetry; `constant` suits biases (0.01).
    - `normal(std=0.01, truncated=False)`: N(0, std^2), AlexNet's and VGG's.
    - `standard`: U(+-1/sqrt(n)), so n Var = 1/3.
    - `xavier_normal`, `xavier_uniform`: variance 2 / (n_in + n_out), Glorot & Bengio 2010.
    - `lecun_normal`: 1 / n, LeCun et al. 1998.
    - `kaiming_normal`, `kaiming_uniform` (`mode="fan_in"` or `"fan_out"`): 2 / n, He et al. 2015.
    - `orthogonal(scale=1.0)`: orthonormal rows or columns of the (K*K*c_in, c_out) matrix, Saxe et al. 2014.
    - `dirac(groups=1)`: the identity convolution.

    Those with a fan take `groups` and `connections` (see `fans`); the normals take `truncated`.

    Raises:
        InputError: unknown name or option.
    """
    if name not in INITIALIZERS:
        raise unknown("initialiser", name, INITIALIZERS)
    known = inspect.signature(INITIALIZERS[name]).parameters
    for option in options:
        if option not in known:
            raise unknown(f"option of initialiser {name!r}", option, known)
    return deferrable(INITIALIZERS[name](**options))
