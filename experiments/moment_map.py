"""The moment map: initial weights and activation decide to which size a signal goes.

    python experiments/moment_map.py

Claim     the second moment v of a layer's inputs becomes g(v) at the next layer, and its fixed points foretell deep
          nets: ReLU with 2/n keeps every v, with 1/n it halves; tanh with 1/n falls to 0 slowly; SELU with 1/n has the
          attracting fixed point mean 0, variance 1
Source    Glorot & Bengio 2010; He et al. 2015; Klambauer et al. 2017
Recipe    g by integrals over a Gaussian; dense layers of 512 units with Gaussian weights, 64 inputs of N(0, v) for
          v = 0.25 and 4; cos is iterated from 1 as the picture of a fixed point
Cost      half a minute
Expected  SELU: both starts end at mean 0, variance 1; ReLU with 2/n stays at 0.25 and at 4 but for the chance of a
          finite width; ReLU with 1/n falls by 2 a layer; cos ends at 0.739085
Measured  second moments 0.25 and 4, after 30 layers, geometric mean and range of n = 10 nets: SELU 0.98 (0.97 to 1) and
          0.99 (0.97 to 1), predicted 1 and 1 (mean within 0.002 of 0, slope of the map at 1 0.78); ReLU with 2/n 0.17
          (0.079 to 0.48) and 2.8 (1.3 to 7.7), predicted 0.25 and 4; ReLU with 1/n 1.6e-10 (7.4e-11 to 4.5e-10) and
          2.6e-09 (1.2e-09 to 7.1e-09), predicted 2.3e-10 and 3.7e-09; tanh with 1/n 0.015 (0.014 to 0.017) and 0.017
          (0.016 to 0.018), predicted 0.016 and 0.018; cos ends at 0.739085
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxcnn.analysis.moments import Moments, iterate, moment_map
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.act import activation
from jaxcnn.plots import BLACK, COLOURS, LINES


@dataclass(frozen=True)
class Settings:
    layers: int = 30
    width: int = 512
    examples: int = 64
    seeds: int = 10


CASES = {
    "ReLU, 2/n": ("relu", 2.0),
    "ReLU, 1/n": ("relu", 1.0),
    "tanh, 1/n (Xavier)": ("tanh", 1.0),
    "tanh, 1/3n (standard)": ("tanh", 1 / 3),
    "SELU, 1/n (LeCun)": ("selu", 1.0),
}
STARTS = (0.25, 4.0)


@partial(jax.jit, static_argnames=("act", "gain", "settings"))
def net(seed: jax.Array, start: jax.Array, *, act: str, gain: float, settings: Settings) -> jax.Array:
    """Mean and second moment of inputs N(0, start) and after every layer: (layers + 1, 2)."""
    key = jax.random.key(seed)

    def moments(x: jax.Array) -> jax.Array:
        return jax.numpy.stack([x.mean(), (x**2).mean()])

    def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.random.normal(jax.random.fold_in(key, i), (settings.width, settings.width))
        x = activation(act)((gain / settings.width) ** 0.5 * x @ weights)
        return x, moments(x)

    begin = jax.random.fold_in(key, settings.layers)
    x = start**0.5 * jax.random.normal(begin, (settings.examples, settings.width))
    after = jax.lax.scan(layer, x, jax.numpy.arange(settings.layers))[1]
    return jax.numpy.concatenate([moments(x)[None], after])


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    v, cases = np.linspace(0, 2.5, 26), {}
    for name, (act, gain) in CASES.items():
        g = moment_map(act, gain=gain)
        runs = []
        for start in STARTS:
            path = iterate(g, Moments(0.0, start), steps=settings.layers)
            found = np.stack(
                [
                    net(np.uint32(seed), np.float32(start), act=act, gain=gain, settings=settings)
                    for seed in range(settings.seeds)
                ]
            ).astype(float)
            second = found[..., 1]
            runs.append(
                {
                    "predicted": [moments.second for moments in path],
                    "predicted_end": path[-1],
                    "middle": np.exp(np.log(second).mean(0)),
                    "low": second.min(0),
                    "high": second.max(0),
                    "end_means": found[:, -1, 0],
                    "ends": second[:, -1],
                }
            )
        step = 1e-3
        slope = (g(Moments(0.0, 1 + step)).second - g(Moments(0.0, 1 - step)).second) / (2 * step)
        cases[name] = {"map": [g(Moments(0.0, one)).second for one in v], "slope_at_1": slope, "runs": runs}
    cosine = iterate(math.cos, 1.0, steps=100)
    return {"seeds": list(range(settings.seeds)), "starts": STARTS, "v": v, "cases": cases, "cosine": cosine}


def say(result: dict[str, Any]) -> str:
    layers, (low, high) = len(result["cases"]["ReLU, 2/n"]["runs"][0]["middle"]) - 1, result["starts"]

    def ends(name: str) -> str:
        runs = result["cases"][name]["runs"]
        found = [f"{run['middle'][-1]:.2g} ({min(run['ends']):.2g} to {max(run['ends']):.2g})" for run in runs]
        return f"{found[0]} and {found[1]}, predicted {runs[0]['predicted'][-1]:.2g} and {runs[1]['predicted'][-1]:.2g}"

    selu = result["cases"]["SELU, 1/n (LeCun)"]
    means = [abs(float(np.mean(run["end_means"]))) for run in selu["runs"]]
    return (
        f"second moments {low:g} and {high:g}, after {layers} layers, geometric mean and range of"
        f" n = {len(result['seeds'])} nets: SELU {ends('SELU, 1/n (LeCun)')} (mean within {max(means):.1g} of 0, slope"
        f" of the map at 1 {selu['slope_at_1']:.2f}); ReLU with 2/n {ends('ReLU, 2/n')}; ReLU with 1/n"
        f" {ends('ReLU, 1/n')}; tanh with 1/n {ends('tanh, 1/n (Xavier)')}; cos ends at {result['cosine'][-1]:.6f}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    maps, paths, cosine = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.85))
    v = result["v"]
    maps.plot(v, v, color="0.6", linewidth=1)
    for i, (name, case) in enumerate(result["cases"].items()):
        style = {"color": COLOURS[i], "linestyle": LINES[i]}
        maps.plot(v, case["map"], label=name, **style)
        for run in case["runs"]:
            layers = range(len(run["predicted"]))
            paths.plot(layers, run["predicted"], linewidth=1.2, **style)
            middle, low, high = (np.array(run[key], float)[::3] for key in ("middle", "low", "high"))
            paths.errorbar(
                layers[::3], middle, yerr=[middle - low, high - middle], fmt="o", color=COLOURS[i], markersize=3
            )
    maps.plot(0, 0, "o", color=BLACK, markersize=5, clip_on=False, zorder=3)
    maps.plot(1, 1, "*", color=BLACK, markersize=11)
    maps.annotate("SELU's fixed point", (1, 1), (0.1, 2.1), fontsize=8, arrowprops={"arrowstyle": "-"})
    maps.set(xlim=(0, 2.5), ylim=(0, 2.5), xlabel="v, second moment before", ylabel="g(v), after one layer")
    maps.set_title("The map", fontsize=10)
    paths.set(yscale="log", ylim=(1e-3, 10), xlabel="layer", ylabel="second moment")
    paths.set_title(f"Iterated; dots: {len(result['seeds'])} nets, range", fontsize=10)
    x = np.repeat(result["cosine"], 2)
    grid = np.linspace(0, 1.1, 50)
    cosine.plot(grid, grid, color="0.6", linewidth=1)
    cosine.plot(grid, np.cos(grid), color=COLOURS[0])
    cosine.plot(x[:-1], np.append(0.0, x[2:]), color=COLOURS[1], linewidth=1)
    cosine.plot(result["cosine"][-1], result["cosine"][-1], "*", color=BLACK, markersize=11)
    cosine.set(xlim=(0, 1.1), ylim=(0, 1.1), xlabel="x", ylabel="cos x")
    cosine.set_title(f"cos: to {result['cosine'][-1]:.6f}", fontsize=10)
    for axes in (maps, paths, cosine):
        axes.grid(alpha=0.3)
    figure.legend(*maps.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, columnspacing=1)


if __name__ == "__main__":
    run_figure(
        Settings(), measure=measure, say=say, draw=draw, smoke={"layers": 9, "width": 64, "examples": 8, "seeds": 2}
    )
