"""Forward and reverse mode: what derivatives take as inputs and outputs grow.

    python experiments/forward_vs_reverse.py

Claim     a product with the Jacobian (m, n) takes a few evaluations of f, however many inputs and outputs; the whole
          Jacobian takes n products forward and m in reverse: forward for few inputs, reverse for few outputs
Source    Griewank & Walther 2008, Evaluating Derivatives; Baydin et al. 2018
Recipe    f(x) = W2 tanh(W1 x) with 256 units; n inputs to 16 outputs, and 16 inputs to m outputs; operations as XLA
          counts them, memory as it plans, time: the median of the runs; all modes' Jacobians are compared on inputs of
          N(0, 1)
Cost      seconds
Expected  operations over those of f: 3 or less for jvp, vjp and hvp; about n for jacfwd, m for jacrev
Measured  operations, and time in brackets, over those of f, with 16 on the other side; n = 1024: jvp 1.99 (1.5), vjp
          1.99 (1.4), hvp 2.97 (2), jacfwd 1.03e+03 (1.6e+02), jacrev 17 (5.9); m = 1024: jvp 1.02 (0.92), vjp 1.02
          (0.94), hvp 1.04 (1), jacfwd 16 (7), jacrev 1.03e+03 (1.3e+02); the modes' Jacobians and products agree within
          4e-07 of the largest entry (n = 5 nets and inputs)
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcnn.analysis.differentiation import MODES, Cost, differentiate, grow, two_layers
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import COLOURS, LINES


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Numbers of inputs, and of outputs."""
    runs: int = 20
    seeds: int = 5


HELD = 16
"""Outputs as inputs grow, and inputs as outputs do."""


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    by_inputs = grow([(n, HELD) for n in settings.sizes], runs=settings.runs)
    by_outputs = grow([(HELD, m) for m in settings.sizes], runs=settings.runs)
    return {
        "seeds": list(range(settings.seeds)),
        "sizes": settings.sizes,
        "inputs": _by_mode(by_inputs),
        "outputs": _by_mode(by_outputs),
        "difference": [agreement(seed) for seed in range(settings.seeds)],
        "timings": {
            "inputs": {mode: [cost.seconds for cost in by_inputs if cost.mode == mode] for mode in MODES},
            "outputs": {mode: [cost.seconds for cost in by_outputs if cost.mode == mode] for mode in MODES},
        },
    }


def _by_mode(costs: list[Cost]) -> dict[str, Any]:
    return {
        mode: {
            "flops": [cost.flops for cost in costs if cost.mode == mode],
            "bytes": [cost.bytes for cost in costs if cost.mode == mode],
        }
        for mode in MODES
    }


def agreement(seed: int) -> float:
    """Largest difference between the Jacobian forward and in reverse, and of products with it from jvp and vjp,
    over the largest entry."""
    x, v, u = (jax.random.normal(key, (HELD,)) for key in jax.random.split(jax.random.key(seed), 3))
    f = two_layers(HELD, HELD, seed=seed)
    found = {
        mode: np.asarray(differentiate(mode, f, x, tangent=v, cotangent=u))
        for mode in ("jvp", "vjp", "jacfwd", "jacrev")
    }
    pairs = (
        (found["jacfwd"], found["jacrev"]),
        (found["jvp"], found["jacfwd"] @ np.asarray(v)),
        (found["vjp"], np.asarray(u) @ found["jacrev"]),
    )
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def ratios(costs: dict[str, Any], what: str) -> dict[str, np.ndarray]:
    """Over the value's, by mode and size."""
    value = np.array(costs["value"][what], float)
    return {mode: np.array(one[what], float) / value for mode, one in costs.items() if mode != "value"}


def say(result: dict[str, Any]) -> str:
    n, parts = result["sizes"][-1], []
    for side, letter in (("inputs", "n"), ("outputs", "m")):
        flops = ratios(result[side], "flops")
        times = ratios({mode: {"seconds": one} for mode, one in result["timings"][side].items()}, "seconds")
        found = ", ".join(
            f"{mode} {flops[mode][-1]:.3g} ({times[mode][-1]:.2g})"
            for mode in ("jvp", "vjp", "hvp", "jacfwd", "jacrev")
        )
        parts.append(f"{letter} = {n}: {found}")
    return (
        f"operations, and time in brackets, over those of f, with {HELD} on the other side; {'; '.join(parts)}; the"
        f" modes' Jacobians and products agree within {max(result['difference']):.0e} of the largest entry"
        f" (n = {len(result['seeds'])} nets and inputs)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    panels = figure.subplots(1, 4)
    for column, (side, letter, other) in enumerate((("inputs", "n", "m"), ("outputs", "m", "n"))):
        operations, memory = panels[column], panels[2 + column]
        flops = ratios(result[side], "flops")
        for i, mode in enumerate(MODES):
            style = {"color": COLOURS[i], "linestyle": LINES[i], "marker": "os^vD*"[i], "markersize": 4, "label": mode}
            if mode in flops:
                operations.plot(result["sizes"], flops[mode], **style)
            memory.plot(result["sizes"], np.array(result[side][mode]["bytes"], float) / 1024, **style)
        operations.set_title(f"operations / those of f\n{other} = {HELD}", fontsize=10)
        memory.set_title(f"memory (KiB)\n{other} = {HELD}", fontsize=10)
        for axes in (operations, memory):
            axes.set(xscale="log", yscale="log", xlabel=f"{side} {letter}")
            axes.set_xticks([1, 16, 256], ["1", "16", "256"])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    for pair in (panels[:2], panels[2:]):
        low, high = min(axes.get_ylim()[0] for axes in pair), max(axes.get_ylim()[1] for axes in pair)
        for axes in pair:
            axes.set_ylim(low, high)
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"sizes": (1, 16), "runs": 2, "seeds": 1})
