"""Names shared by every room, and the axis glossary.

Axes: `b` batch, `h` height, `w` width, `c` channels, `k` classes; images are always `b h w c`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
PyTree: TypeAlias = Any

Batch: TypeAlias = Mapping[str, Any]
"""`image` (b, h, w, c); `label` (b,) int32 or (b, k) soft, or of every pixel (b, h, w), which then may have a `weight`
(b, h, w); in evaluation `mask` (b,), 1 for real examples."""

DATA_AXIS = "data"
"""The mesh (and pmap) axis over which the batch is divided."""
