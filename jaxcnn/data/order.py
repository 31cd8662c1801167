"""Which examples a step sees: a function of (seed, step), not a state, so that resuming needs no iterator."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def permutation(examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one pass over the data: int32 (examples,), a function of its arguments alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(examples).astype(np.int32)
    order.flags.writeable = False
    return order


def indices(step: int, *, examples: int, batch_size: int, seed: int) -> np.ndarray:
    """The examples of the batch of `step` (from 0): int32 (batch_size,).

    Passes follow each other without a gap: a batch may end one pass and begin the next, so that every pass
    uses every example exactly once, whatever the batch size.
    """
    start = step * batch_size
    parts, taken = [], 0
    while taken < batch_size:
        epoch, offset = divmod(start + taken, examples)
        part = permutation(examples, seed=seed, epoch=epoch)[offset : offset + batch_size - taken]
        parts.append(part)
        taken += len(part)
    return np.concatenate(parts)
