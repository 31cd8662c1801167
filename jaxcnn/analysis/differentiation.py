"""Forward and reverse mode, products with the Jacobian and whole Jacobians: what each takes (row A13).

For f from n inputs to m outputs, a product J v (forward) or u^T J (reverse) takes a few evaluations of f whatever n
and m. The whole Jacobian (m, n) takes n products forward or m in reverse: forward for few inputs, reverse for few
outputs, such as a loss's one. The Hessian's product H v is forward over reverse, without the Hessian.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxcnn.errors import InputError, unknown
from jaxcnn.files import replacing
from jaxcnn.plots import COLOURS
from jaxcnn.types import Array

Function = Callable[[Array], Array]
"""(n,) -> (m,)."""


def _value(f: Function, x: Array, v: Array, u: Array) -> Array:
    return f(x)


def _jvp(f: Function, x: Array, v: Array, u: Array) -> Array:
    return jax.jvp(f, (x,), (v,))[1]


def _vjp(f: Function, x: Array, v: Array, u: Array) -> Array:
    return jax.vjp(f, x)[1](u)[0]


def _jacfwd(f: Function, x: Array, v: Array, u: Array) -> Array:
    return jax.jacfwd(f)(x)


def _jacrev(f: Function, x: Array, v: Array, u: Array) -> Array:
    return jax.jacrev(f)(x)


def _hvp(f: Function, x: Array, v: Array, u: Array) -> Array:
    return jax.jvp(jax.grad(lambda x: f(x) @ u), (x,), (v,))[1]


MODES: dict[str, Callable[[Function, Array, Array, Array], Array]] = {
    "value": _value,
    "jvp": _jvp,
    "vjp": _vjp,
    "jacfwd": _jacfwd,
    "jacrev": _jacrev,
    "hvp": _hvp,
}
"""Of f at x (n,), with a tangent v (n,) and a cotangent u (m,): f(x) (m,), J v (m,), u^T J (n,), J (m, n) forward and
in reverse, and H v (n,) of the scalar u^T f."""


@dataclass(frozen=True)
class Cost:
    """What one mode takes for a function from `inputs` to `outputs` numbers, compiled.

    `seconds`: the median of the runs. `flops`: XLA's count. `bytes`: memory for intermediate values and the result,
    by XLA's plan. None where the backend does not say.
    """

    mode: str
    inputs: int
    outputs: int
    seconds: float
    flops: float | None
    bytes: int | None


def differentiate(mode: str, f: Function, x: Array, *, tangent: Array, cotangent: Array) -> Array:
    """One of `MODES`, of f at x (n,), with `tangent` (n,) and `cotangent` (m,).

    Raises:
        InputError: unknown mode; shapes that do not fit.
    """
    if mode not in MODES:
        raise unknown("mode of differentiation", mode, MODES)
    outputs = jax.eval_shape(f, x).shape
    if x.ndim != 1 or len(outputs) != 1:
        raise InputError(f"f takes {x.shape} to {outputs}: expected vectors (n,) and (m,); flatten what is not")
    if tangent.shape != x.shape or cotangent.shape != outputs:
        raise InputError(f"tangent {tangent.shape}, cotangent {cotangent.shape}: expected {x.shape} and {outputs}")
    return MODES[mode](f, x, tangent, cotangent)


def measure(f: Function, x: Array, *, modes: Iterable[str] = tuple(MODES), runs: int = 5) -> list[Cost]:
    """Time and memory of every mode for f: (n,) -> (m,) at x (n,), each compiled alone.

    Raises:
        InputError: unknown mode; no runs; f is not from a vector to a vector.
    """
    if runs < 1:
        raise InputError(f"runs {runs}: expected at least 1")
    v, u = jnp.ones_like(x), jnp.ones(jax.eval_shape(f, x).shape, x.dtype)
    return [_measure(mode, f, x, v, u, runs) for mode in modes]


def two_layers(inputs: int, outputs: int, *, width: int = 256, seed: int = 0) -> Function:
    """f(x) = W2 tanh(W1 x) from (inputs,) to (outputs,), with weights of variance 1 / fan-in."""
    first, second = jax.random.split(jax.random.key(seed))
    w1 = jax.random.normal(first, (width, inputs)) / inputs**0.5
    w2 = jax.random.normal(second, (outputs, width)) / width**0.5
    return lambda x: w2 @ jnp.tanh(w1 @ x)


def grow(
    sizes: Iterable[tuple[int, int]],
    *,
    function: Callable[[int, int], Function] = two_layers,
    modes: Sequence[str] = tuple(MODES),
    runs: int = 5,
) -> list[Cost]:
    """`measure` for `function(n, m)` at every (n, m) of `sizes`."""
    costs = []
    for inputs, outputs in sizes:
        x = jax.random.normal(jax.random.key(inputs), (inputs,))
        costs += measure(function(inputs, outputs), x, modes=modes, runs=runs)
    return costs


def plot(by_inputs: Sequence[Cost], by_outputs: Sequence[Cost], path: Path) -> None:
    """Time and memory of every mode as a PNG: of `by_inputs` against n, and of `by_outputs` against m."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    figure.suptitle("What differentiation takes for f: Rⁿ → Rᵐ")
    for column, (costs, size, fixed) in enumerate(
        ((by_inputs, "inputs", "outputs"), (by_outputs, "outputs", "inputs"))
    ):
        held = ", ".join(map(str, sorted({getattr(cost, fixed) for cost in costs})))
        for row, (of, unit) in enumerate((("seconds", "time (s)"), ("bytes", "memory (bytes)"))):
            panel = panels[row, column]
            for mode, colour, mark in zip(MODES, COLOURS[: len(MODES)], "os^vD*", strict=True):
                mine = [cost for cost in costs if cost.mode == mode]
                values: list[Any] = [getattr(cost, of) for cost in mine]
                panel.plot([getattr(cost, size) for cost in mine], values, f"{mark}-", color=colour, label=mode)
            panel.set(xscale="log", yscale="log", ylabel=unit if column == 0 else "")
            panel.grid(alpha=0.3)
        panels[0, column].set_title(f"more and more {size}; {fixed}: {held}")
        panels[1, column].set_xlabel(f"{size} ({'n' if size == 'inputs' else 'm'})")
    figure.legend(handles=panels[0, 0].get_lines(), loc="outside lower center", ncols=len(MODES))
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _measure(mode: str, f: Function, x: Array, v: Array, u: Array, runs: int) -> Cost:
    def run(x: Array, v: Array, u: Array) -> Array:
        return differentiate(mode, f, x, tangent=v, cotangent=u)

    compiled = jax.jit(run).lower(x, v, u).compile()
    jax.block_until_ready(compiled(x, v, u))
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, v, u))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    used = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    flops = (compiled.cost_analysis() or {}).get("flops")
    return Cost(mode, x.size, u.size, median(seconds), flops, used)
