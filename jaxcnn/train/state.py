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
from jaxcnn.layers import draws
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
    `variables` replaces the initialised parameters and collections (same structure and shapes, `InputError`
    otherwise).
    """

    def fresh(key: Array) -> PyTree:
        return module.init({"params": key}, jnp.zeros(sample.shape, sample.dtype), train=False)

    def widen(tree: PyTree) -> PyTree:  # modules make float32 parameters whatever they compute in
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) if sample.dtype == jnp.float64 else tree

    def init(seed: Array, keys: Array | None, given: Mapping[str, PyTree] | None) -> TrainState:
        made = given if keys is None else widen(draws.together(fresh, rng.stream(seed, "init"), keys))
        assert made is not None
        params, collections = made["params"], {k: v for k, v in made.items() if k != "params"}
        average = optim.ema_start({"params": params, "collections": collections}) if ema else None
        counters = {
            "skipped": jnp.int32(0),
            "skipped_in_a_row": jnp.int32(0),
            "evaluations_without_best": jnp.int32(0),
            "best": jnp.float32(-jnp.inf),
        }
        return TrainState(jnp.int32(0), params, collections, optimizer.init(params), counters, average)

    keys = None
    if variables is None:
        keys = draws.keys(fresh, rng.stream(jnp.uint32(seed), "init"))
    else:
        variables = unflatten(
            jax.eval_shape(lambda: widen(fresh(jax.random.key(0)))), flatten(variables), what="weights"
        )
    mesh = mesh or parallel.make_mesh()
    return jax.jit(init, out_shardings=parallel.replicated(mesh))(np.uint32(seed), keys, variables)
