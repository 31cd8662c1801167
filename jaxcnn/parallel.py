"""The device mesh and where arrays live on it: the batch divided, the state everywhere or, by one rule, divided too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcnn.errors import InputError
from jaxcnn.signals import spare_new_threads
from jaxcnn.types import DATA_AXIS, PyTree


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (all of them by default), its axis named `DATA_AXIS`."""
    with spare_new_threads():  # those of the devices, where this is what starts them
        devices = list(jax.devices() if devices is None else devices)
    # Explicit axes, JAX's default, refuse Linen's random layers.
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The first axis of an array divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


FSDP_ELEMENTS = 2**14
"""Arrays with fewer elements stay on every device: to gather them would take longer than it saves."""


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a training state live: on every device or, with `fsdp` (fully sharded data parallelism,
    Zhao et al. 2023, arXiv:2304.11277), each one of `FSDP_ELEMENTS` or more divided along its longest axis that the
    devices divide, the last of equally long ones."""

    mesh: Mesh
    fsdp: bool = False

    def of(self, tree: PyTree) -> PyTree:
        """The sharding of each array, or `jax.ShapeDtypeStruct`, of `tree`."""
        return jax.tree.map(lambda leaf: self._of(np.shape(leaf)), tree)

    def _of(self, shape: tuple[int, ...]) -> NamedSharding:
        divisible = [(size, axis) for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not (self.fsdp and divisible and math.prod(shape) >= FSDP_ELEMENTS):
            return replicated(self.mesh)
        return NamedSharding(self.mesh, PartitionSpec(*[None] * max(divisible)[1], DATA_AXIS))

    def place(self, tree: PyTree) -> PyTree:
        """Host arrays, the same in every process, on the devices."""
        return jax.tree.map(place, tree, self.of(tree))

    def divide(self, tree: PyTree) -> PyTree:
        """Inside a compiled function: each array where it lives."""
        return jax.lax.with_sharding_constraint(tree, self.of(tree)) if self.fsdp else tree

    def gather(self, tree: PyTree) -> PyTree:
        """Inside a compiled function: each array whole on every device."""
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh)) if self.fsdp else tree


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Host arrays, the same in every process, on the devices: no process sends anything to another."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def placed(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(placed, tree)


def whole(tree: PyTree) -> PyTree:
    """Arrays that this process can read: those divided over several processes come to the host, one after the other.
    Every process must call this."""

    def readable(leaf: Any) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(readable, tree)


def place_rows(arrays: Mapping[str, np.ndarray], rows: np.ndarray, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Of each array (n, ...) the `rows` (b,), of which a process takes only those of its own devices."""
    if jax.process_count() == 1:
        return jax.device_put({name: array[rows] for name, array in arrays.items()}, sharding)

    def placed(array: np.ndarray) -> jax.Array:
        shape = (len(rows), *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: array[rows[index[:1]]])  # type: ignore[index]

    return {name: placed(array) for name, array in arrays.items()}


def check_divisible(batch_size: int, *, devices: int, accumulate: int = 1) -> None:
    """`InputError` unless each device gets the same number of examples in each micro-batch."""
    if batch_size % (devices * accumulate):
        parts = f"{devices} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
        step = devices * accumulate
        near = max(step, batch_size // step * step)
        raise InputError(
            f"batch size {batch_size} cannot be divided evenly over {parts}: use a multiple of {step}, {near} say"
        )


def split_by_device(tree: PyTree, devices: int) -> PyTree:
    """(b, ...) arrays as (devices, b / devices, ...), the layout that pmap takes."""
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), tree)
