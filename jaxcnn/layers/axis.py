"""Which part of the batch this trace sees: all of it (jit), or one device's slice (pmap, shard_map)."""

import jax
import jax.numpy as jnp

from jaxcnn.types import DATA_AXIS, Array


def data_axis_bound() -> bool:
    """Whether the trace runs once per device over `DATA_AXIS` (pmap, shard_map) and sees its slice only."""
    try:
        jax.lax.axis_size(DATA_AXIS)
    except NameError:
        return False
    return True


def global_index(n: int) -> Array:
    """(n,) int32: positions in the whole batch of the `n` examples that this trace sees."""
    first = jax.lax.axis_index(DATA_AXIS) * n if data_axis_bound() else 0
    return first + jnp.arange(n, dtype=jnp.int32)
