"""What a training run is at one step: arrays only, so that a checkpoint is the state."""

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcnn import optim, parallel
from jaxcnn.train import rng
from jaxcnn.tree import flatten, unflatten
from jaxcnn.types import Array, PyTree


@flax.struct.dataclass
class TrainState:
    """`step` int32; `collections` holds every mutable collection (`batch_stats` among them); `counters` the
    skipped steps and early stopping's patience; `ema` the averaged params and collections, or None."""

    step: Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree
    counters: dict[str, Array]
    ema: dict[str, PyTree] | None = None

    def variables(self) -> dict[str, PyTree]:
        """What evaluation applies the model with: the moving average where there is one."""
        if self.ema is not None:
            return {"params": self.ema["params"], **self.ema["collections"]}
        return {"params": self.params, **self.collections}


def create_state(
    module: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    sample: Array | jax.ShapeDtypeStruct,
    seed: int = 0,
    ema: bool = False,
    mesh: Mesh | None = None,
    variables: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """The state before the first step, on every device of `mesh`.

    `sample` is shaped and typed like the model's input (b, h, w, c); a float64 one makes everything float64.
    `variables` replaces the initialised
    parameters and collections (same structure and shapes, `InputError` otherwise).
    """

    def init(seed: Array, given: Mapping[str, PyTree] | None) -> TrainState:
        x = jnp.zeros(sample.shape, sample.dtype)
        fresh = module.init({"params": rng.stream(seed, "init")}, x, train=False) if given is None else given
        if sample.dtype == jnp.float64:  # modules make float32 parameters whatever they compute in
            fresh = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), fresh)
        params, collections = fresh["params"], {k: v for k, v in fresh.items() if k != "params"}
        average = optim.ema_start({"params": params, "collections": collections}) if ema else None
        counters = {
            "skipped": jnp.int32(0),
            "skipped_in_a_row": jnp.int32(0),
            "evaluations_without_best": jnp.int32(0),
            "best": jnp.float32(-jnp.inf),
        }
        return TrainState(jnp.int32(0), params, collections, optimizer.init(params), counters, average)

    if variables is not None:
        expected = jax.eval_shape(lambda: init(jnp.uint32(0), None))
        expected = {"params": expected.params, **expected.collections}
        variables = unflatten(expected, flatten(variables), what="weights")
    mesh = mesh or parallel.make_mesh()
    return jax.jit(init, out_shardings=parallel.replicated(mesh))(np.uint32(seed), variables)
