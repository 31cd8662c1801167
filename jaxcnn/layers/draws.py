"""Initial kernels drawn together, those of one shape and initialiser in one call.

A network of a thousand layers otherwise compiles a thousand random generators, and as many derivations of their
keys, which takes minutes.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.nn.initializers import Initializer

from jaxcnn.types import Array, PyTree


class _Draw(NamedTuple):
    function: Initializer
    shape: tuple[int, ...]
    dtype: Any
    key: Array
    placeholder: Array


_pending: ContextVar[list[_Draw] | None] = ContextVar("pending", default=None)


def deferrable(function: Initializer) -> Initializer:
    """The initialiser, which inside `together` gives a placeholder and leaves the draw for later."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        pending = _pending.get()
        if pending is None:
            return function(key, shape, dtype, out_sharding=out_sharding)
        pending.append(_Draw(function, tuple(shape), jnp.dtype(dtype), key, jnp.zeros(shape, dtype)))
        return pending[-1].placeholder

    return init


@contextlib.contextmanager
def _deferred() -> Iterator[list[_Draw]]:
    pending: list[_Draw] = []
    token = _pending.set(pending)
    try:
        yield pending
    finally:
        _pending.reset(token)


def keys(init: Callable[[Array], PyTree]) -> Callable[[Array], np.ndarray]:
    """`keys(init)(key)`: (n, ...) uint32, the data of the keys that `init(key)` gives its n deferrable draws, in order.

    Traced once and derived one by one, without a compiled program: nothing else of `init` is computed.
    """

    def collect(key: Array) -> list[Array]:
        with _deferred() as pending:
            init(key)
        return [jax.random.key_data(one.key) for one in pending]

    traced = jax.make_jaxpr(collect)(jax.random.key(0))
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    derive = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
    return lambda key: np.asarray(derive(key), np.uint32)


def together(init: Callable[[Array], PyTree], key: Array, keys: Array) -> PyTree:
    """`init(key)` with its deferrable draws made together, from the `keys` of the same `init` and `key`."""
    with _deferred() as pending:
        tree = init(key)
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(pending):
        groups.setdefault((one.function, one.shape, one.dtype), []).append(i)
    drawn: dict[int, Array] = {}
    for (function, shape, dtype), members in groups.items():
        values = jax.lax.map(
            partial(function, shape=shape, dtype=dtype),
            jax.random.wrap_key_data(keys[np.array(members)], impl=jax.random.key_impl(key)),
        )
        drawn |= {id(pending[i].placeholder): value for i, value in zip(members, values, strict=True)}
    return jax.tree.map(lambda leaf: drawn.get(id(leaf), leaf), tree)
