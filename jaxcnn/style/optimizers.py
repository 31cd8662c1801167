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


class Search(NamedTuple):
    """Of L-BFGS with the line search of Lewis & Overton 2013 (weak Wolfe conditions by bisection), a picture.

    `grad` and `direction` at x, their product `slope`; the next point is x + t direction, t in (`low`, `high`), after
    `tries` that were refused. The last pairs of differences, newest last, of points `s`, gradients `y` (m, h, w, c),
    and 1 / <s, y> as `rho` (m,), 0 where there is none yet.
    """

    grad: Array
    direction: Array
    slope: Array
    t: Array
    low: Array
    high: Array
    tries: Array
    s: Array
    y: Array
    rho: Array


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
        scalar, pairs = jnp.zeros((), x.dtype), jnp.zeros((memory, *one.shape), x.dtype)
        search = Search(
            one, one, scalar, scalar, scalar, scalar + jnp.inf, scalar, pairs, pairs, jnp.zeros(memory, x.dtype)
        )
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
    search = jax.tree.map(
        lambda kept, retried: chosen(keep, kept, retried),
        _turned(old, grad, state.point - state.x),
        jax.tree.map(lambda a, b: chosen(stuck, a, b), _downhill(old), _narrowed(old, low_enough)),
    )
    return State(x, value, x + search.t * search.direction, search), keep


def _turned(old: Search, grad: Array, s: Array) -> Search:
    """At a new point, s from the old one: the pair is remembered where it is convex, and the direction follows."""
    y = grad - old.grad
    curvature = _dot(s, y)
    convex = curvature > jnp.finfo(s.dtype).eps * jnp.sqrt(_dot(s, s) * _dot(y, y))
    pairs = _Pairs(old.s, old.y, old.rho)
    newer = _Pairs(
        jnp.concatenate([old.s[1:], s[None]]),
        jnp.concatenate([old.y[1:], y[None]]),
        jnp.concatenate([old.rho[1:], (1 / jnp.where(convex, curvature, 1))[None]]),
    )
    pairs = jax.tree.map(lambda new, before: chosen(convex, new, before), newer, pairs)
    direction = -_inverse_hessian(pairs, grad)
    slope = _dot(grad, direction)
    known, zero = pairs.rho[-1] != 0, jnp.zeros_like(slope)
    t = jnp.where(known, 1, _first_t(direction))
    return Search(grad, direction, slope, t, zero, zero + jnp.inf, zero, *pairs)


class _Pairs(NamedTuple):
    s: Array
    y: Array
    rho: Array


def _inverse_hessian(pairs: _Pairs, grad: Array) -> Array:
    """The product with `grad`, by the two loops of Nocedal 1980; a pair with rho 0 changes nothing."""
    q, alphas = grad, []
    for s, y, rho in reversed(list(zip(*pairs, strict=True))):
        alpha = rho * _dot(s, q)
        q, alphas = q - alpha * y, [alpha, *alphas]
    s, y, rho = pairs.s[-1], pairs.y[-1], pairs.rho[-1]
    q = q * jnp.where(rho != 0, _dot(s, y) / jnp.where(rho != 0, _dot(y, y), 1), 1)
    for s, y, rho, alpha in zip(*pairs, alphas, strict=True):
        q = q + (alpha - rho * _dot(y, q)) * s
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
        s=jnp.zeros_like(old.s),
        y=jnp.zeros_like(old.y),
        rho=jnp.zeros_like(old.rho),
    )


def _first_t(direction: Array) -> Array:
    length = jnp.sqrt(_dot(direction, direction) / direction.size)
    return jnp.where(length > 0, FIRST_CHANGE / jnp.where(length > 0, length, 1), 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b)


def finite(value: Array, grad: Array) -> Array:
    """(k,): whether the value and the whole gradient of each picture are finite."""
    return jnp.isfinite(value) & jnp.isfinite(grad).all(tuple(range(1, grad.ndim)))


def chosen(condition: Array, new: Array, old: Array) -> Array:
    """`new` where `condition` (k,) or () holds, for leaves that lead with its axes, or have no axis (counts)."""
    if new.ndim < condition.ndim:  # Adam's count is one for the batch, and goes on with any of it
        return jnp.where(condition.any(), new, old)
    return jnp.where(condition.reshape(condition.shape + (1,) * (new.ndim - condition.ndim)), new, old)
