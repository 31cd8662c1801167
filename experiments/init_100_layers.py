"""A hundred dense layers: what initial weights leave of a signal.

    python experiments/init_100_layers.py

Claim     through 100 layers of 512 units a signal explodes, vanishes or keeps its size, as the weights' variance and
          the activation say: Var w = 1/n serves tanh, 2/n serves ReLU
Source    Glorot & Bengio 2010; He et al. 2015
Recipe    x ~ N(0, 1), 512 inputs; weights drawn anew for every layer and seed; root mean square after every layer
Cost      a minute
Expected  N(0, 1) overflows at about layer 29; N(0, 0.01^2) ends at 0; tanh with 1/n ends at 0.04 to 0.08; ReLU with 1/n
          at about 2^-50 = 9e-16; ReLU with 2/n at 0.25 to 2, geometric mean 0.74 (20 seeds)
Measured  n = 20 seeds: N(0, 1) overflows in 20, at layer 28 to 29; N(0, 0.01²) ends at 0; tanh with 1/n at 0.065
          (standard deviation 0.012); ReLU with 1/n at 6.1e-16 (geometric mean); ReLU with 2/n at 0.69 (geometric mean;
          0.34 to 1.79)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import bands


@dataclass(frozen=True)
class Settings:
    layers: int = 100
    width: int = 512
    seeds: int = 20


CASES = {
    "linear, N(0, 1)": ("identity", 1.0),
    "linear, N(0, 0.01²)": ("identity", 0.01),
    "tanh, 1/n": ("tanh", "1/n"),
    "ReLU, 1/n": ("relu", "1/n"),
    "ReLU, 2/n": ("relu", "2/n"),
}
ACTIVATIONS = {"identity": lambda x: x, "tanh": jnp.tanh, "relu": jax.nn.relu}


def signal(seed: jax.Array, *, activation: str, deviation: float, layers: int, width: int) -> jax.Array:
    """Root mean square after the input and after every layer: (layers + 1,)."""
    key = jax.random.key(seed)

    def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = deviation * jax.random.normal(jax.random.fold_in(key, i), (width, width))
        x = ACTIVATIONS[activation](x @ weights)
        return x, root_mean_square(x)

    x = jax.random.normal(jax.random.fold_in(key, layers), (width,))
    return jnp.append(root_mean_square(x), jax.lax.scan(layer, x, jnp.arange(layers))[1])


def root_mean_square(x: jax.Array) -> jax.Array:
    largest = jnp.abs(x).max()  # the squares of the smallest and largest values leave float32
    return jnp.where(largest > 0, largest * jnp.sqrt(jnp.mean((x / largest) ** 2)), 0.0)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    cases = {}
    for name, (activation, deviation) in CASES.items():
        if isinstance(deviation, str):
            deviation = (float(deviation[0]) / settings.width) ** 0.5
        run = jax.jit(
            lambda seed, a=activation, d=deviation: signal(
                seed, activation=a, deviation=d, layers=settings.layers, width=settings.width
            )
        )
        values = np.stack([run(np.uint32(seed)) for seed in range(settings.seeds)], 1).astype(float)
        overflow = ~np.isfinite(values)
        values[overflow] = np.nan
        with np.errstate(divide="ignore"):
            middle = np.exp(np.log(values).mean(1))
        cases[name] = {
            "rms": {"x": np.arange(len(values)), "mean": middle, "low": values.min(1), "high": values.max(1)},
            "end": values[-1],
            "overflow_at": [int(column.argmax()) for column in overflow.T if column.any()],
        }
    return {"seeds": list(range(settings.seeds)), "cases": cases}


def say(result: dict[str, Any]) -> str:
    cases, n = result["cases"], len(result["seeds"])
    overflow = cases["linear, N(0, 1)"]["overflow_at"]
    ends = {name: np.array(case["end"], float) for name, case in cases.items()}
    means = {name: case["rms"]["mean"][-1] for name, case in cases.items()}
    he = ends["ReLU, 2/n"]
    return (
        f"n = {n} seeds: N(0, 1) overflows in {len(overflow)}, at layer {min(overflow, default=0)} to"
        f" {max(overflow, default=0)}; N(0, 0.01²) ends at {ends['linear, N(0, 0.01²)'].max():.1g};"
        f" tanh with 1/n at {ends['tanh, 1/n'].mean():.3f} (standard deviation {ends['tanh, 1/n'].std(ddof=1):.3f});"
        f" ReLU with 1/n at {means['ReLU, 1/n']:.1e} (geometric mean);"
        f" ReLU with 2/n at {means['ReLU, 2/n']:.2f} (geometric mean; {he.min():.2f} to {he.max():.2f})"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    curves = {name: dict(case["rms"]) for name, case in result["cases"].items()}
    for curve in curves.values():  # no logarithm of 0
        for key in ("mean", "low", "high"):
            curve[key] = [value or None for value in curve[key]]
    bands(axes, curves)
    layers = len(curves["ReLU, 2/n"]["x"]) - 1
    axes.set(
        yscale="log",
        xlabel="layer",
        ylabel="root mean square of the units",
        title=f"A signal through {layers} dense layers: geometric mean and range of {len(result['seeds'])} seeds",
    )
    axes.legend(loc="upper right")


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"layers": 40, "width": 64, "seeds": 2})
