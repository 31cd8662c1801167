"""Dropout whose masks do not depend on how many devices share the batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.errors import InputError
from jaxcnn.layers.axis import global_index
from jaxcnn.types import Array


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014): 0 with probability `rate`, else x / (1 - rate).

    Needs the random stream `dropout` in training. The mask of an example is a function of the stream's key
    and of the example's position in the whole batch alone: jit, pmap and shard_map on any number of devices
    give the same masks, and so does any dtype. Under pmap, every device must be given the same key.

    Raises:
        InputError: `rate` outside [0, 1).
    """

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise InputError(f"dropout rate {self.rate} must be in [0, 1): it is the probability of a zero")
        super().__post_init__()

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(b, ...) -> (b, ...); the identity when `train` is false."""
        if not train or self.rate == 0:
            return x
        key = self.make_rng("dropout")
        keep = 1 - self.rate

        def mask_of(index: Array) -> Array:
            # float32 under x64 too: a Python float would draw 64 bits there, and other masks.
            return jax.random.bernoulli(jax.random.fold_in(key, index), np.float32(keep), x.shape[1:])

        return jnp.where(jax.vmap(mask_of)(global_index(x.shape[0])), x / keep, 0)
