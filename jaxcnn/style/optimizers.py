"""Optimisers of pictures that are asked where to evaluate and told what was found there.

`ask` -> evaluate -> `tell` is one step and one gradient, for Adam as for L-BFGS: its line search is a state that moves
on with every evaluation, not a loop. So the evaluation may be one compiled program, or many tiles, and the same update
serves a batch of pictures, each with a line search of its own.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcnn.errors import unknown
from jaxcnn.types import Array, PyTree


class State(NamedTuple):
    """Of a batch of pictures: `x` (k, h, w, c), the last that was evaluated and kept, with its `value` (k,); `point`,
    where to evaluate next; `inner`, the optimiser's own."""

    x: Array
    value: Array
    point: Array
    inner: PyTree


class Optimizer(NamedTuple):
    """`init(x) -> State` asks for x first. `tell(state, value, grad)` takes what was found at `state.point`, and says
    beside the new state which pictures (k,) moved there; never to one whose value or gradient is not finite.
    `resized(state, x, resize)` goes on with pictures x of another size, by `resize` of what is like a picture."""

    init: Callable[[Array], State]
    tell: Callable[[State, Array, Array], tuple[State, Array]]
    resized: Callable[[State, Array, Callable[[Array], Array]], State]


@lru_cache
def make(name: str, *, learning_rate: float, memory: int = 10) -> Optimizer:
    """`adam`, whose step is `learning_rate` of pixels in 0..1, or `lbfgs`, which keeps `memory` pairs.

    Raises:
      InputError: another name.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    return adam(learning_rate) if name == "adam" else lbfgs(memory)


OPTIMIZERS = ("lbfgs", "adam")


def adam(learning_rate: float) -> Optimizer:
    """Kingma & Ba 2015, with Optax's (and PyTorch's) defaults. A larger picture goes on with the moments resized."""
    transform = optax.adam(learning_rate)

    def init(x: Array) -> State:
        return State(x, jnp.full(len(x), jnp.inf, x.dtype), x, transform.init(x))

    def tell(state: State, value: Array, grad: Array) -> tuple[State, Array]:
        fine = finite(value, grad)
        updates, inner = transform.update(grad, state.inner)
        point = jnp.add(state.point, updates)  # pyright: ignore[reportArgumentType]
        told = State(state.point, value, point, inner)
        return jax.tree.map(lambda new, old: chosen(fine, new, old), told, state), fine

    def resized(state: State, x: Array, resize: Callable[[Array], Array]) -> State:
        inner = jax.tree.map(lambda leaf: resize(leaf) if leaf.ndim == 4 else leaf, state.inner)
        first, *rest = inner
        inner = (first._replace(nu=jnp.maximum(first.nu, 0)), *rest)
        return State(x, jnp.full(len(x), jnp.inf, x.dtype), x, inner)

    return Optimizer(init, tell, resized)


class Pairs(NamedTuple):
    """The last differences of points `s` and gradients `y` (m, h, w, c), and 1 / <s, y> as `rho` (m,), 0 where there is
    none. A ring: the pair `newest` takes the place of the oldest, so that a step writes one pair and copies none."""

    s: Array
    y: Array
    rho: Array
    newest: Array


class Search(NamedTuple):
    """Of L-BFGS with the line search of Lewis & Overton 2013 (weak Wolfe conditions by bisection), a picture.

    `grad` and `direction` at x, their product `slope`; the next point is x + t direction, t in (`low`, `high`), after
    `tries` that were refused.
    """

    grad: Array
    direction: Array
    slope: Array
    t: Array
    low: Array
    high: Array
    tries: Array
    pairs: Pairs


DECREASE, CURVATURE = 1e-4, 0.9
"""The constants of the Wolfe conditions, as in Nocedal & Wright 2006, chapter 3.1."""
FIRST_CHANGE = 0.01
"""Root mean square of the first step, in pixels of 0..1: no curvature is known yet."""
MOST_TRIES = 20
"""Refusals after which the curvature is forgotten and the search begins anew downhill."""


def lbfgs(memory: int) -> Optimizer:
    """Nocedal 1980: directions from the last `memory` pairs. A picture of another size begins without any."""

    def init(x: Array) -> State:
        one = jnp.zeros(x.shape[1:], x.dtype)
        scalar, many = jnp.zeros((), x.dtype), jnp.zeros((memory, *one.shape), x.dtype)
        pairs = Pairs(many, many, jnp.zeros(memory, x.dtype), jnp.zeros((), jnp.int32))
        search = Search(one, one, scalar, scalar, scalar, scalar + jnp.inf, scalar, pairs)
        inner = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x), *leaf.shape)), search)
        return State(x, jnp.full(len(x), jnp.inf, x.dtype), x, inner)

    def tell(state: State, value: Array, grad: Array) -> tuple[State, Array]:
        return jax.vmap(_tell)(state, value, grad, finite(value, grad))

    return Optimizer(init, tell, lambda state, x, resize: init(x))


def _tell(state: State, value: Array, grad: Array, fine: Array) -> tuple[State, Array]:
    """One picture: keeps the point and turns to a new direction, or tries another t along the old one."""
    old = state.inner
    first = jnp.isinf(state.value)
    low_enough = fine & (first | (value <= state.value + DECREASE * old.t * old.slope))
    flat_enough = first | (_dot(grad, old.direction) >= CURVATURE * old.slope)
    stuck = old.tries >= MOST_TRIES
    keep = fine & low_enough & (flat_enough | stuck)
    x, value = chosen(keep, state.point, state.x), chosen(keep, value, state.value)
    pairs = _remembered(old.pairs, state.point - state.x, grad - old.grad, keep)
    pairs = pairs._replace(rho=jnp.where(stuck & ~keep, 0, pairs.rho))
    bare = old._replace(pairs=None)
    search = jax.tree.map(
        lambda kept, retried: chosen(keep, kept, retried),
        _turned(pairs, grad),
        jax.tree.map(lambda a, b: chosen(stuck, a, b), _downhill(bare), _narrowed(bare, low_enough)),
    )
    return State(x, value, x + search.t * search.direction, search._replace(pairs=pairs)), keep


def _remembered(pairs: Pairs, s: Array, y: Array, keep: Array) -> Pairs:
    """With the differences to a kept point, where they are convex."""
    curvature = _dot(s, y)
    keep = keep & (curvature > jnp.finfo(s.dtype).eps * jnp.sqrt(_dot(s, s) * _dot(y, y)))
    at = jnp.where(keep, (pairs.newest + 1) % len(pairs.rho), pairs.newest)
    rho = 1 / jnp.where(keep, curvature, 1)
    s, y, rho = (
        ring.at[at].set(jnp.where(keep, new, ring[at])) for ring, new in zip(pairs[:3], (s, y, rho), strict=True)
    )
    return Pairs(s, y, rho, at)


def _turned(pairs: Pairs, grad: Array) -> Search:
    """At a new point: a new direction, along which the whole step is tried first."""
    direction = -_inverse_hessian(pairs, grad)
    slope = _dot(grad, direction)
    known, zero = pairs.rho[pairs.newest] != 0, jnp.zeros_like(slope)
    t = jnp.where(known, 1, _first_t(direction))
    return Search(grad, direction, slope, t, zero, zero + jnp.inf, zero, None)  # pyright: ignore[reportArgumentType]


def _inverse_hessian(pairs: Pairs, grad: Array) -> Array:
    """The product with `grad`, by the two loops of Nocedal 1980; a pair with rho 0 changes nothing."""
    order = [(pairs.newest - i) % len(pairs.rho) for i in range(len(pairs.rho))]
    q, alphas = grad, []
    for i in order:
        alphas.append(pairs.rho[i] * _dot(pairs.s[i], q))
        q = q - alphas[-1] * pairs.y[i]
    s, y, rho = (ring[pairs.newest] for ring in pairs[:3])
    q = q * jnp.where(rho != 0, _dot(s, y) / jnp.where(rho != 0, _dot(y, y), 1), 1)
    for i, alpha in zip(reversed(order), reversed(alphas), strict=True):
        q = q + (alpha - pairs.rho[i] * _dot(pairs.y[i], q)) * pairs.s[i]
    return q


def _narrowed(old: Search, low_enough: Array) -> Search:
    """The same direction: a smaller t where the value did not fall enough, a larger one where it still falls."""
    low, high = chosen(low_enough, old.t, old.low), chosen(low_enough, old.high, old.t)
    t = jnp.where(jnp.isinf(high), 2 * low, (low + high) / 2)
    return old._replace(t=t, low=low, high=high, tries=old.tries + 1)


def _downhill(old: Search) -> Search:
    direction, zero = -old.grad, jnp.zeros_like(old.t)
    return old._replace(
        direction=direction,
        slope=-_dot(old.grad, old.grad),
        t=_first_t(direction) / 100,
        low=zero,
        high=zero + jnp.inf,
        tries=zero,
    )


def _first_t(direction: Array) -> Array:
    length = jnp.sqrt(_dot(direction, direction) / direction.size)
    return jnp.where(length > 0, FIRST_CHANGE / jnp.where(length > 0, length, 1), 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b)


def finite(value: Array, grad: Array) -> Array:
    """(k,): whether the value, the whole gradient and its square are finite, for each picture."""
    return jnp.isfinite(value) & jnp.isfinite(jnp.square(grad).sum(tuple(range(1, grad.ndim))))


def chosen(condition: Array, new: Array, old: Array) -> Array:
    """`new` where `condition` (k,) or () holds, for leaves that lead with its axes, or have no axis (counts)."""
    if new.ndim < condition.ndim:  # Adam's count is one for the batch, and goes on with any of it
        return jnp.where(condition.any(), new, old)
    return jnp.where(condition.reshape(condition.shape + (1,) * (new.ndim - condition.ndim)), new, old)
