"""Steps whose bits do not depend on the number of devices: the batch in a fixed number of virtual shards.

Each shard is augmented, normalised and differentiated by itself, one on each device at a time, always by the same
program; between the programs only data moves, and all sums are taken in the order of the shards. BatchNorm normalises
each shard by its own statistics, and the running ones move by their mean. A virtual shard has random numbers of its
own, so results differ from the default mode's, and from those of another number of shards.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcnn import parallel
from jaxcnn.errors import InputError
from jaxcnn.train import rng
from jaxcnn.train.state import Gradient, Prepare, Totals, TrainState, TrainStep
from jaxcnn.types import Array, Batch, PyTree

_AXIS = "shard"
"""Not `DATA_AXIS`: layers must not look beyond the shard."""


def check_parts(batch_size: int, *, devices: int, accumulate: int = 1, shards: int = 0) -> None:
    """`InputError` unless the batch can be divided over the devices and in micro-batches, or in `shards` over them."""
    if not shards:
        return parallel.check_divisible(batch_size, devices=devices, accumulate=accumulate)
    if batch_size % shards:
        raise InputError(f"a batch of {batch_size} cannot be divided in {shards} virtual shards: use a multiple")
    if shards % devices:
        raise InputError(
            f"{shards} virtual shards cannot be divided over {devices} devices: use a number of devices that divides"
            f" {shards}, or another number of shards from the start of the run"
        )


def train_step(
    gradient: Callable[[PyTree, PyTree, Batch, Array], Gradient],
    prepare: Prepare,
    update: Callable[[TrainState, Gradient], tuple[TrainState, Totals]],
    *,
    shards: int,
    mesh: Mesh,
) -> TrainStep:
    """`step(state, batch, seed) -> (state, totals)`, of `gradient(params, collections, batch, dropout_key)` of every
    shard and `update` by their mean."""

    def of_shard(shared: Any, rows: Any) -> Gradient:
        state, store, seed = shared
        batch, number = rows
        batch = prepare(batch | store, jax.random.fold_in(rng.stream(seed, "augment", state.step), number))
        key = jax.random.fold_in(rng.stream(seed, "dropout", state.step), number)
        return gradient(state.params, state.collections, batch, key)

    each = _each(of_shard, shards=shards, mesh=mesh)

    @jax.jit(donate_argnums=0)
    def finish(state: TrainState, parts: Gradient) -> tuple[TrainState, Totals]:
        collections, grads = jax.tree.map(_mean, (parts.collections, parts.grads))
        return update(state, Gradient(collections, grads, jax.tree.map(_sum, parts.totals)))

    def step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, Totals]:
        store = {name: part for name, part in batch.items() if name == "store"}
        rows = {name: part for name, part in batch.items() if name != "store"}
        seen = state.replace(opt_state=None, counters=None, ema=None)  # type: ignore[attr-defined]
        return finish(state, each((seen, store, seed), rows))

    return step


def eval_step(
    evaluation: Callable[[Mapping[str, PyTree], Batch], Totals], *, shards: int, mesh: Mesh
) -> Callable[[Mapping[str, PyTree], Batch], Totals]:
    """`step(variables, batch) -> totals` of every shard: (shards,)."""
    each = _each(lambda variables, rows: evaluation(variables, rows[0]), shards=shards, mesh=mesh)
    return lambda variables, batch: each(variables, dict(batch))


def _each(function: Callable[[PyTree, Any], PyTree], *, shards: int, mesh: Mesh) -> Callable[[PyTree, PyTree], PyTree]:
    """`f(shared, rows)`: `function(shared, (rows of one shard, its number))` for every shard, stacked in their order,
    on every device."""
    devices = mesh.size
    calls = shards // devices
    own = Mesh(mesh.devices, (_AXIS,), axis_types=(AxisType.Auto,))
    divided, everywhere = PartitionSpec(_AXIS), PartitionSpec()
    numbers = parallel.place(np.arange(shards, dtype=np.int32), NamedSharding(own, divided))

    def over(function: Callable, *specs: PartitionSpec) -> Callable:
        mapped = jax.shard_map(function, mesh=own, in_specs=specs, out_specs=divided, check_vma=False)
        return jax.jit(mapped)

    def one(shared: PyTree, rows: Any) -> PyTree:
        batch, number = rows
        return jax.tree.map(lambda leaf: leaf[None], function(shared, (batch, number[0])))

    def part(rows: PyTree, i: Array) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(calls, -1, *x.shape[1:])[i], rows)

    pick, compute = over(part, divided, everywhere), over(one, everywhere, divided)

    @jax.jit(out_shardings=NamedSharding(own, everywhere))
    def gathered(parts: list[PyTree]) -> PyTree:
        return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(shards, *x[0].shape[1:]), *parts)

    def run(shared: PyTree, rows: PyTree) -> PyTree:
        with jax.set_mesh(own):
            return gathered([compute(shared, pick((rows, numbers), np.int32(i))) for i in range(calls)])

    return run


def _sum(parts: Array) -> Array:
    """Over the first axis, in its order."""
    return reduce(jnp.add, list(parts))


def _mean(parts: Array) -> Array:
    return _sum(parts) / len(parts) if jnp.issubdtype(parts.dtype, jnp.inexact) else parts[0]
