"""What a training run is at one step: arrays only, so that a checkpoint is the state; and what a step is made of."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcnn import optim, parallel
from jaxcnn.layers import draws
from jaxcnn.metrics import Total
from jaxcnn.train import rng
from jaxcnn.tree import flatten, unflatten
from jaxcnn.types import Array, Batch, PyTree


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


Prepare = Callable[[Batch, Array], Batch]
"""(batch, key) -> batch: what stands before the model, augmentation and preprocessing say."""
Totals = dict[str, Total]
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Totals]]
"""(state, batch, seed) -> (state, totals)."""


class Gradient(NamedTuple):
    """What one pass over a batch gives: the collections it leaves, the gradient of the mean loss, sums and counts."""

    collections: PyTree
    grads: PyTree
    totals: Totals


def create_state(
    module: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    sample: Array | jax.ShapeDtypeStruct,
    seed: int = 0,
    ema: bool = False,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    variables: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """The state before the first step, on every device of `mesh` or, with `fsdp`, divided over them
    (`parallel.Layout`).

    `sample` is shaped and typed like the model's input (b, h, w, c); a float64 one makes everything float64.
    `variables` replaces the initialised parameters and collections (same structure and shapes, `InputError`
    otherwise).
    """
    mesh = mesh or parallel.make_mesh()
    if variables is None:
        return state_maker(module, optimizer=optimizer, sample=sample, ema=ema, mesh=mesh, fsdp=fsdp)(seed)
    like = jax.eval_shape(lambda: _widened(_fresh(module, sample)(jax.random.key(0)), sample))
    given = unflatten(like, flatten(variables), what="weights")
    start = partial(_start, optimizer=optimizer, ema=ema)
    return jax.jit(start, out_shardings=parallel.Layout(mesh, fsdp).of(jax.eval_shape(start, given)))(given)


def state_shapes(
    module: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    sample: Array | jax.ShapeDtypeStruct,
    ema: bool = False,
) -> TrainState:
    """Shapes and types of `create_state`, without running or compiling anything."""
    made = partial(_start, optimizer=optimizer, ema=ema)
    return jax.eval_shape(lambda: made(_widened(_fresh(module, sample)(jax.random.key(0)), sample)))


def state_maker(
    module: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    sample: Array | jax.ShapeDtypeStruct,
    ema: bool = False,
    mesh: Mesh,
    fsdp: bool = False,
) -> Callable[[int], TrainState]:
    """`create_state` as a function of the seed, traced and compiled once for all seeds."""
    fresh = _fresh(module, sample)
    keys = draws.keys(fresh)

    def init(seed: Array, keys: Array) -> TrainState:
        made = _widened(draws.together(fresh, rng.stream(seed, "init"), keys), sample)
        return _start(made, optimizer=optimizer, ema=ema)

    where: Any = parallel.replicated(mesh)
    if fsdp:  # only then does it depend on the shapes, whose tracing takes a while
        shapes = state_shapes(module, optimizer=optimizer, sample=sample, ema=ema)
        where = parallel.Layout(mesh, fsdp).of(shapes)
    compiled = jax.jit(init, out_shardings=where)
    return lambda seed: compiled(np.uint32(seed), keys(rng.stream(jnp.uint32(seed), "init")))


def _fresh(module: nn.Module, sample: Array | jax.ShapeDtypeStruct) -> Callable[[Array], PyTree]:
    return lambda key: module.init({"params": key}, jnp.zeros(sample.shape, sample.dtype), train=False)


def _widened(tree: PyTree, sample: Array | jax.ShapeDtypeStruct) -> PyTree:
    """In float64 where the sample is: modules make float32 parameters whatever they compute in."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) if sample.dtype == jnp.float64 else tree


def _start(variables: Mapping[str, PyTree], *, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    params, collections = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    average = optim.ema_start({"params": params, "collections": collections}) if ema else None
    counters = {
        "skipped": jnp.int32(0),
        "skipped_in_a_row": jnp.int32(0),
        "evaluations_without_best": jnp.int32(0),
        "best": jnp.float32(-jnp.inf),
    }
    return TrainState(jnp.int32(0), params, collections, optimizer.init(params), counters, average)
