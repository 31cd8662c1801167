"""Trees stacked for a loop and taken apart again, in a form that compiles quickly on CPU.

XLA compiles equal kernels once there, but a slice at a constant index is a kernel of its own: of the 3,270 different
kernels in the training step of a ResNet-1001 some 2,800 were such slices. Here the index is an input of the kernel.
"""

import jax
import jax.numpy as jnp

from jaxcnn.types import Array, PyTree


@jax.custom_vjp
def stack(trees: list[PyTree]) -> PyTree:
    """n trees of one structure -> one tree of leaves (n, ...). It has no forward-mode derivative."""
    return jax.tree.map(lambda *leaves: joined(leaves).reshape(len(leaves), *leaves[0].shape), *trees)


def joined(leaves: tuple[Array, ...]) -> Array:
    """Leaves of one shape (d, ...) -> (n * d, ...): one operation, where `jnp.stack` reshapes each leaf first."""
    return jnp.concatenate([*map(jnp.atleast_1d, leaves)])


def unstack(tree: PyTree, n: int) -> list[PyTree]:
    """The inverse: leaves (n, ...) -> n trees."""
    leaves, structure = jax.tree.flatten(tree)
    if jax.default_backend() != "cpu" or not leaves:
        return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(n)]
    return [structure.unflatten([_at(leaf, i) for leaf in leaves]) for i in _indices(leaves[0])]


def _at(leaf: Array, i: Array) -> Array:
    start, shape = (i, *(jnp.int32(0),) * (leaf.ndim - 1)), (1, *leaf.shape[1:])
    return jax.lax.dynamic_slice(leaf, start, shape, allow_negative_indices=False).reshape(shape[1:])


def _indices(leaf: Array) -> list[Array]:
    """0, 1, ... n - 1 for a leaf (n, ...), as values that the compiler cannot fold into what reads them.

    They come from the taken branch of a conditional whose predicate is always true: the bits of a number, with the
    lowest one set, are not zero.
    """
    n = leaf.shape[0]
    bits = jax.lax.bitcast_convert_type(leaf.ravel()[0], f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.cond((bits | 1) != 0, lambda: [*map(jnp.int32, range(n))], lambda: [jnp.int32(0)] * n)


stack.defvjp(lambda trees: (stack(trees), None), lambda _, tree: (unstack(tree, len(jax.tree.leaves(tree)[0])),))
