"""One training step and one evaluation step, as pure functions: compiled by jit over a mesh, or by pmap."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcnn import metrics as metric_table
from jaxcnn import optim, parallel
from jaxcnn.data.loader import gather
from jaxcnn.errors import InputError
from jaxcnn.layers.stacks import joined
from jaxcnn.losses import LossFn, classification
from jaxcnn.metrics import Metric, Total
from jaxcnn.train import elastic, rng
from jaxcnn.train.state import Gradient, Prepare, Totals, TrainState, TrainStep
from jaxcnn.types import DATA_AXIS, Array, Batch, PyTree

CLASSIFY = classification()


def make_train_step(
    module: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn = CLASSIFY,
    metrics: Mapping[str, Metric] = metric_table.CLASSIFICATION,
    prepare: Prepare | None = None,
    ema_decay: float | None = None,
    accumulate: int = 1,
    shards: int = 0,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    parallel_mode: Literal["jit", "pmap"] = "jit",
) -> TrainStep:
    """`step(state, batch, seed) -> (state, totals)`; under jit the old state's buffers are given up to the new one.

    `totals` holds (sum, count) of the loss and of every metric over the batch, and `skipped`: a step whose loss or
    result is not finite changes neither params nor optimiser nor collections, only the counters. An infinite gradient
    reaches the optimiser as NaN, which no clipping hides.
    With `accumulate` n the batch is divided into n micro-batches of every n-th example; each is normalised by
    itself and moves the BatchNorm statistics in turn, and the gradients are averaged. With `shards` n the result does
    not depend on the number of devices (`elastic`): the batch is that of n virtual shards. With `fsdp` each device
    keeps and updates its part of the state (`parallel.Layout`), and has all parameters while it differentiates.
    """
    gradient = make_gradient(module, loss_fn=loss_fn, metrics=metrics)
    mesh = mesh or parallel.make_mesh()
    layout = parallel.Layout(mesh, fsdp)

    def step(state: TrainState, batch: Batch, seed: Array, axis: str | None = None) -> tuple[TrainState, Totals]:
        dropout = rng.stream(seed, "dropout", state.step)
        params = layout.gather(state.params)

        def one(carry, part_and_index):
            collections, grads, totals = carry
            part, index = part_and_index
            new = gradient(params, collections, part, jax.random.fold_in(dropout, index))
            return (new.collections, _add(grads, new.grads), _add(totals, new.totals)), None

        collections, grads, totals = _over_microbatches(one, state.collections, batch, accumulate)
        grads = jax.tree.map(lambda g: g / accumulate, grads)
        if axis is not None:
            grads, totals = jax.lax.pmean(grads, axis), jax.lax.psum(totals, axis)
        state, totals = update(state, Gradient(collections, layout.divide(grads), totals))
        return layout.divide(state), totals

    update = partial(next_state, optimizer=optimizer, ema_decay=ema_decay)
    prepare = prepare or (lambda batch, key: gather(batch))
    if shards:
        return elastic.train_step(gradient, prepare, update, shards=shards, mesh=mesh)
    if parallel_mode == "pmap":
        return _pmapped(step, prepare, mesh)

    def whole(state: TrainState, batch: Batch, seed: Array) -> tuple[TrainState, Totals]:
        return step(state, prepare(batch, rng.stream(seed, "augment", state.step)), seed)

    return jax.jit(whole, donate_argnums=0)


def make_gradient(
    module: nn.Module, *, loss_fn: LossFn, metrics: Mapping[str, Metric]
) -> Callable[[PyTree, PyTree, Batch, Array], Gradient]:
    """`gradient(params, collections, batch, dropout_key)`, in training mode."""

    def loss_of(params: PyTree, collections: PyTree, batch: Batch, key: Array):
        outputs, collections = module.apply(
            {"params": params, **collections},
            batch["image"],
            train=True,
            mutable=list(collections),
            rngs={"dropout": key},
        )
        losses = loss_fn(outputs, batch)
        totals = {"loss": Total(losses.sum(), jnp.float32(losses.size))}
        totals |= {name: metric(outputs, batch) for name, metric in metrics.items()}
        return losses.mean(), (dict(collections), totals)

    def gradient(params: PyTree, collections: PyTree, batch: Batch, key: Array) -> Gradient:
        (_, (collections, totals)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, collections, batch, key)
        return Gradient(collections, grads, totals)

    return gradient


def next_state(
    state: TrainState, gradient: Gradient, *, optimizer: optax.GradientTransformation, ema_decay: float | None
) -> tuple[TrainState, Totals]:
    """The state after the update, or, where something is not finite, the old one with its counters moved."""
    collections, grads, totals = gradient
    grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, jnp.nan), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None
    if state.ema is not None:
        if ema_decay is None:
            raise InputError("the state has a moving average: give make_train_step its ema_decay")
        average = optim.ema(state.ema, {"params": params, "collections": collections}, ema_decay)
    ok = _finite((totals["loss"].sum, collections, params)) & _stays_finite(state.opt_state, opt_state)
    new = (params, collections, opt_state, average)
    old = (state.params, state.collections, state.opt_state, state.ema)
    params, collections, opt_state, average = _choose(ok, new, old)
    skipped = 1 - ok.astype(jnp.int32)
    counters = state.counters | {
        "skipped": state.counters["skipped"] + skipped,
        "skipped_in_a_row": (state.counters["skipped_in_a_row"] + 1) * skipped,
    }
    totals = jax.tree.map(lambda t: jnp.where(ok, t, 0), totals)  # a mean over the steps that were taken
    totals |= {"skipped": Total(skipped.astype(jnp.float32), jnp.float32(1))}
    return TrainState(state.step + 1, params, collections, opt_state, counters, average), totals


def scan_steps(step: TrainStep) -> TrainStep:
    """Several steps in one call, over the rows of a resident batch's `indices` (steps, b); totals are stacked."""

    def steps(state: TrainState, batch: Batch, seed: Array) -> tuple[TrainState, Totals]:
        def one(state: TrainState, indices: Array) -> tuple[TrainState, Totals]:
            return step(state, {"store": batch["store"], "indices": indices}, seed)

        return jax.lax.scan(one, state, batch["indices"])

    return jax.jit(steps, donate_argnums=0)


def _over_microbatches(one: Callable, collections: PyTree, batch: Batch, accumulate: int) -> tuple:
    """The carry (collections, sum of gradients, sum of totals) after every micro-batch."""
    carry = (collections, None, None)
    if accumulate == 1:
        return one(carry, (batch, 0))[0]

    def part(x: Array, i: int) -> Array:  # every n-th example: each device keeps its own ones
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])[:, i]

    carry, _ = one(carry, (jax.tree.map(lambda x: part(x, 0), batch), 0))
    if jax.default_backend() == "cpu":  # a convolution inside a loop is many times slower there
        for i in range(1, accumulate):
            carry, _ = one(carry, (jax.tree.map(lambda x, i=i: part(x, i), batch), i))
        return carry
    rest = jax.tree.map(lambda x: jnp.stack([part(x, i) for i in range(1, accumulate)]), batch)
    return jax.lax.scan(one, carry, (rest, jnp.arange(1, accumulate)))[0]


def _add(a: PyTree | None, b: PyTree) -> PyTree:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def _choose(ok: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `ok`, else `old`.

    XLA for CPU compiles a sequence of operations in a time that grows with the square of their number, so a state of
    thousands of arrays is chosen in branches, each a sequence of its own.
    """
    if jax.default_backend() != "cpu":
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
    leaves, structure = jax.tree.flatten(new)
    others = jax.tree.leaves(old)
    chosen = []
    for i in range(0, len(leaves), BRANCH):
        part = slice(i, i + BRANCH)
        chosen += jax.lax.cond(ok, lambda a, b: a, lambda a, b: b, leaves[part], others[part])
    return structure.unflatten(chosen)


BRANCH = 512
"""Arrays in one branch."""


def _finite(tree: PyTree) -> Array:
    return _all(jnp.isfinite, tree)


def _stays_finite(old: PyTree, new: PyTree) -> Array:
    """Whether nothing finite became infinite or NaN; some optimisers start from an infinite best value."""
    return _all(lambda a, b: jnp.isfinite(b) | ~jnp.isfinite(a), old, new)


def _all(test: Callable[..., Array], *trees: PyTree) -> Array:
    """Whether `test` holds for every floating-point element of `trees` of one structure.

    Leaves of one shape are tested together, and the barrier keeps XLA from repeating the conjunction of all answers
    in everything that depends on it, which is every leaf of the state: the program of a deep network grew with the
    square of the number of its leaves.
    """
    groups: dict[Any, list[tuple[Array, ...]]] = {}
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        if jnp.issubdtype(leaves[0].dtype, jnp.inexact):
            groups.setdefault((leaves[0].shape, leaves[0].dtype), []).append(leaves)
    joint = jax.lax.optimization_barrier([[*map(joined, zip(*leaves, strict=True))] for leaves in groups.values()])
    answers = [test(*arrays).all() for arrays in joint]
    return jax.lax.optimization_barrier(jnp.stack(answers)).all() if answers else jnp.bool_(True)


def _pmapped(step: Callable, prepare: Prepare, mesh: Mesh) -> Callable:
    """The second mode: the batch is prepared as a whole, so that augmentation is the same, then divided."""
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(
        lambda state, batch, seed: step(state, batch, seed, DATA_AXIS),
        axis_name=DATA_AXIS,
        in_axes=(None, 0, None),
        out_axes=None,  # type: ignore[arg-type]
        devices=devices,
    )

    @jax.jit
    def prepared(batch: Batch, seed: Array, index: Array) -> Batch:
        batch = prepare(batch, rng.stream(seed, "augment", index))
        return parallel.split_by_device(batch, len(devices))

    def whole(state: TrainState, batch: Batch, seed: Array) -> tuple[TrainState, Totals]:
        return mapped(state, prepared(batch, seed, state.step), seed)

    return whole


def make_eval_step(
    module: nn.Module,
    *,
    loss_fn: LossFn = CLASSIFY,
    metrics: Mapping[str, Metric] = metric_table.CLASSIFICATION,
    prepare: Callable[[Batch], Batch] | None = None,
    shards: int = 0,
    mesh: Mesh | None = None,
) -> Callable[[Mapping[str, PyTree], Batch], Totals]:
    """`step(variables, batch) -> totals`: (sum, count) of the loss and of every metric over the rows of `mask`.

    With `shards` they are of each virtual shard, (shards,), to be summed in their order.
    """

    def step(variables: Mapping[str, PyTree], batch: Batch) -> Totals:
        batch = prepare(batch) if prepare else batch
        outputs: Any = module.apply(variables, batch["image"], train=False)
        losses = loss_fn(outputs, batch)
        mask = batch.get("mask", jnp.ones(losses.shape, losses.dtype)).astype(losses.dtype)
        totals = {"loss": Total(jnp.where(mask > 0, losses, 0).sum(), mask.sum())}
        return totals | {name: metric(outputs, batch) for name, metric in metrics.items()}

    return elastic.eval_step(step, shards=shards, mesh=mesh or parallel.make_mesh()) if shards else jax.jit(step)
