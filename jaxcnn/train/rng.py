"""Named random streams: every key is a function of (seed, purpose, step), so that a step can be replayed."""

import jax

from jaxcnn.types import ArrayLike

# Numbers are part of the format: a checkpoint resumed by later code must draw the same keys.
PURPOSES = {"init": 0, "augment": 1, "dropout": 2}


def stream(seed: int | ArrayLike, purpose: str, step: int | ArrayLike = 0) -> jax.Array:
    """The key of `purpose` at `step`; both may be traced."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])
    return jax.random.fold_in(key, step)
