"""Smaller batches, noisier gradients: their deviation falls with the square root of the batch.

    python experiments/batch_size_noise.py

Claim     a gradient over b examples scatters around that of the whole training split with a variance of 1/b of one
          example's; what one step gains from a larger batch ends where the scatter is smaller than the gradient
Source    Robbins & Monro 1951; McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", equation 2.7
Data      the embedded digits, 28 x 28 pixels
Recipe    LeNet-5, fresh and after 200 steps of Adam at 1e-3 (batches of 64); 200 batches of each size, drawn with
          replacement; relative deviation: sqrt(E|g_b - g|^2) / |g| over all weights, g of the whole split
Cost      4 minutes
Expected  slope -1/2 on log scales at both times, and after training more noise at every size
Measured  fresh weights: slope -0.502 +- 0.005, as much noise as gradient at batches of 65 +- 28; after 200 steps: slope
          -0.489 +- 0.042, as much noise as gradient at batches of 214 +- 179 (n = 5 seeds, 95 % intervals)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxcnn.config import Data, Experiment, Model
from jaxcnn.figures import Bench, run_figure
from jaxcnn.losses import cross_entropy
from jaxcnn.models import create
from jaxcnn.plots import band, bands
from jaxcnn.seeds import fit_seeds
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    steps: int = 200
    batches: int = 200
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    seeds: int = 5


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    data = bench.splits(Experiment(model=Model("lenet5"), data=Data("digits")))
    images, labels = data.train.images.astype(np.float32) / 255, data.train.labels
    net: Any = create("lenet5")
    seeds = list(range(settings.seeds))
    x, y = jnp.asarray(images), jnp.asarray(labels)

    @jax.jit
    def gradient(params: Any, rows: jax.Array) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            return cross_entropy(net.apply(params, x[rows], train=False), y[rows]).mean()

        return ravel_pytree(jax.grad(loss)(params))[0]

    options: dict[str, Any] = {"optimizer": optax.adam(1e-3), "batch_size": 64, "seeds": seeds, "quiet": True}
    result: dict[str, Any] = {"seeds": seeds, "deviation": {}, "slope": {}, "noise_scale": {}}
    for name, steps in (("fresh weights", 0), (f"after {settings.steps} steps", settings.steps)):
        weights = fit_seeds(net, (images, labels), steps=steps, **options).variables if steps else None
        values = []
        for seed in seeds:
            fresh = net.init(jax.random.key(seed), images[:1], train=False)
            mine = fresh if weights is None else jax.tree.map(lambda leaf, seed=seed: leaf[seed], weights)
            values.append(_deviations(gradient, mine, len(labels), settings, seed=seed))
        deviation = np.stack(values, 1)
        slopes = [float(np.polyfit(np.log(settings.sizes), np.log(column), 1)[0]) for column in deviation.T]
        result["deviation"][name] = band(settings.sizes, deviation)
        result["slope"][name] = slopes
        result["noise_scale"][name] = (deviation**2 * np.array(settings.sizes)[:, None]).mean(0)
    return result


def _deviations(gradient: Any, params: Any, examples: int, settings: Settings, *, seed: int) -> list[float]:
    """sqrt(E|g_b - g|^2) / |g| for every batch size b."""
    rng, whole = np.random.default_rng(seed), gradient(params, jnp.arange(examples))
    found = []
    for size in settings.sizes:
        drawn = rng.integers(0, examples, (settings.batches, size))
        squares = [float(jnp.sum((gradient(params, rows) - whole) ** 2)) for rows in drawn]
        found.append(float(np.sqrt(np.mean(squares) / jnp.sum(whole**2))))
    return found


def say(result: dict[str, Any]) -> str:
    parts = [
        f"{name}: slope {spread(slopes):.3f}, as much noise as gradient at batches of"
        f" {spread(result['noise_scale'][name]):.0f}"
        for name, slopes in result["slope"].items()
    ]
    return "; ".join(parts) + f" (n = {len(result['seeds'])} seeds, 95 % intervals)"


def draw(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    bands(axes, result["deviation"], marker="o", markersize=4)
    sizes = np.array(next(iter(result["deviation"].values()))["x"])
    top = max(curve["mean"][0] for curve in result["deviation"].values())
    axes.plot(sizes, 1.6 * top / np.sqrt(sizes), color="0.5", linewidth=1, label="slope -1/2")
    axes.axhline(1, color="0.5", linestyle=":", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="batch size b (examples)",
        ylabel="deviation of the gradient / its length",
        title=f"Noise of the gradient of LeNet-5: mean and range of {len(result['seeds'])} seeds",
    )
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(loc="upper right")


if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={"steps": 5, "batches": 8, "sizes": (1, 4, 16), "seeds": 2},
    )
