"""Dropout and its kin (row L6), whose noise does not depend on how many devices share the batch.

All need the random stream `dropout` in training. What an example draws is a function of the stream's key and of
the example's position in the whole batch alone: jit, pmap and shard_map on any number of devices give the same
masks, and so does any dtype. Under pmap, every device must be given the same key.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.layers.axis import global_index
from jaxcnn.types import Array

SELU_FLOOR = -1.7580993408473766
"""alpha' = -lambda alpha: what SELU tends to at -infinity; Klambauer et al. 2017."""


def _per_example(key: Array, examples: int, draw: Callable[[Array], Array]) -> Array:
    """`draw(key of the example)` for each of the `examples` that this trace sees."""
    return jax.vmap(lambda index: draw(jax.random.fold_in(key, index)))(global_index(examples))


def _kept(key: Array, examples: int, shape: tuple[int, ...], rate: float) -> Array:
    """(examples, *shape): true with probability 1 - rate."""
    # float32 under x64 too: a Python float would draw 64 bits there, and other masks.
    return _per_example(key, examples, lambda key: jax.random.bernoulli(key, np.float32(1 - rate), shape))


class _Rated(nn.Module):
    """A layer that drops with probability `rate`."""

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise InputError(f"dropout rate {self.rate} must be in [0, 1): it is the probability of a zero")
        super().__post_init__()


class Dropout(_Rated):
    """Inverted dropout (Srivastava et al. 2014): 0 with probability `rate`, else x / (1 - rate).

    Raises:
        InputError: `rate` outside [0, 1).
    """

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ...) -> (b, ...); the identity when `train` is false."""
        if not train or self.rate == 0:
            return x
        return jnp.where(_kept(self.make_rng("dropout"), x.shape[0], x.shape[1:], self.rate), x / (1 - self.rate), 0)


class AlphaDropout(_Rated):
    """Alpha dropout, for SELU networks: a (x or, with probability `rate`, alpha') + b; Klambauer et al. 2017.

    alpha' = -1.7581 is where SELU ends, and a = (q + alpha'^2 q (1 - q))^(-1/2), b = -a (1 - q) alpha', with
    q = 1 - rate, keep mean 0 and variance 1.

    Raises:
        InputError: `rate` outside [0, 1).
    """

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ...) -> (b, ...); the identity when `train` is false."""
        if not train or self.rate == 0:
            return x
        q = 1 - self.rate
        a = (q + SELU_FLOOR**2 * q * (1 - q)) ** -0.5
        b = -a * (1 - q) * SELU_FLOOR
        kept = _kept(self.make_rng("dropout"), x.shape[0], x.shape[1:], self.rate)
        return jnp.where(kept, a * x + b, a * SELU_FLOOR + b)


class StochasticDepth(_Rated):
    """Stochastic depth (Huang et al. 2016): the residual branch of a whole example is 0 with probability `rate`.

    Meant for the branch, before it is added: `x + StochasticDepth(rate)(branch, train=train)`. What is kept is
    divided by 1 - rate in training and left alone in evaluation (torchvision's "row" mode); the paper multiplies
    by the survival probability in evaluation instead, and drops a block for the whole mini-batch at once.

    Raises:
        InputError: `rate` outside [0, 1).
    """

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ...) -> (b, ...); the identity when `train` is false."""
        if not train or self.rate == 0:
            return x
        alike = (1,) * (x.ndim - 1)
        return jnp.where(_kept(self.make_rng("dropout"), x.shape[0], alike, self.rate), x / (1 - self.rate), 0)


class UniformDropout(nn.Module):
    """Uout: x (1 + r) with r uniform in [-beta, beta); Li et al. 2018, arXiv:1801.05134.

    It moves the variance of x less than dropout does: for mean 0, test over train variance is 3 / (3 + beta^2)
    (row A7), in place of the keep rate.

    Raises:
        InputError: `beta` outside [0, 1].
    """

    beta: float

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise InputError(f"uniform dropout beta {self.beta} must be in [0, 1]: it is the largest relative noise")
        super().__post_init__()

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ...) -> (b, ...); the identity when `train` is false."""
        if not train or self.beta == 0:
            return x

        def draw(key: Array) -> Array:
            return jax.random.uniform(key, x.shape[1:], jnp.float32, -self.beta, self.beta)

        return x * (1 + _per_example(self.make_rng("dropout"), x.shape[0], draw)).astype(x.dtype)
