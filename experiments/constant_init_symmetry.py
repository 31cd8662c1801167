"""Units that start alike stay alike.

    python experiments/constant_init_symmetry.py

Claim     units of a layer with the same weights get the same gradients, so that training keeps them identical: a layer
          that starts constant is worth one unit; with all zeros a ReLU net's hidden gradients are exactly 0; random
          weights break the symmetry, and random weights in the output layer alone free the layer below it, no other
Source    Goodfellow, Bengio & Courville 2016, Deep Learning, section 8.4
Data      the embedded digits, 8x8, standardised
Recipe    two hidden ReLU layers of 32 units, SGD with momentum 0.9, batch 64, 600 steps; the learning rate is for each
          way the best of four by the test accuracy of one further seed; a difference is the largest one between a
          weight of one unit and of another, over the layer's largest weight
Cost      a minute
Expected  differences of a constant start stay within rounding, one distinct unit a layer; zeros end at chance
Measured  n = 5 seeds (mean ± standard deviation), 32 units in each of two hidden layers; zeros: 1 and 1 distinct units,
          accuracy 0.101 ± 0.001; constant: 1 and 1 distinct units, accuracy 0.278 ± 0.055; constant, random output
          layer: 1 and 31 to 32 distinct units, accuracy 0.364 ± 0.042; random: 32 and 32 distinct units, accuracy 0.977
          ± 0.006; from a constant, the largest difference between two units is 0; from zeros, only output/bias ever
          moves
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcnn.config import Data, Experiment, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.init import initializer
from jaxcnn.plots import band, bands, dots
from jaxcnn.types import Array, PyTree


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (1, 4, 16, 60, 200, 600)
    """Steps after which units are compared; the last is the length of a run."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    seeds: int = 5


class Net(nn.Module):
    """(b, h, w, c) -> logits (b, num_classes), through hidden layers that start by `hidden`, the last by `output`."""

    hidden: str
    output: str
    width: int = 32
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        for name in ("dense1", "dense2"):
            x = nn.relu(nn.Dense(self.width, kernel_init=_start(self.hidden), name=name)(x))
        return nn.Dense(self.num_classes, kernel_init=_start(self.output), name="output")(x)


def _start(name: str) -> Any:
    return initializer(name, **({"value": 0.05} if name == "constant" else {}))


WAYS = {
    "zeros": Net("zeros", "zeros"),
    "constant": Net("constant", "constant"),
    "constant, random output layer": Net("constant", "kaiming_normal"),
    "random": Net("kaiming_normal", "kaiming_normal"),
}
HIDDEN = ("dense1", "dense2")
SAME = 1e-3
"""Difference, of the largest weight, up to which two units count as one."""


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    ways = {}
    for name, net in WAYS.items():
        tried = {rate: _run(bench, net, rate, settings.lengths[-1], [settings.seeds]) for rate in settings.rates}
        best = max(tried, key=lambda rate: tried[rate].test["accuracy"][0])
        runs = [_run(bench, net, best, steps, range(settings.seeds)) for steps in settings.lengths]
        params = [run.variables["params"] for run in runs]
        ways[name] = {
            "learning_rate": best,
            "accuracy": runs[-1].test["accuracy"],
            "moved": [path for path, leaf in _leaves(params[-1]) if leaf.any()],
            "layers": {
                layer: {
                    "difference": band(settings.lengths, [_differences(one[layer]["kernel"]) for one in params]),
                    "distinct": [_distinct(kernel) for kernel in params[-1][layer]["kernel"]],
                }
                for layer in HIDDEN
            },
        }
    return {"seeds": list(range(settings.seeds)), "units": WAYS["random"].width, "ways": ways}


def _run(bench: Bench, net: Net, rate: float, steps: int, seeds: Any) -> Any:
    experiment = Experiment(
        data=Data("digits", image_size=(8, 8), batch_size=64),
        optim=Optim("sgd", learning_rate=rate, options={"momentum": 0.9}),
        train=Train(steps=steps),
    )
    return bench.train(experiment, seeds=list(seeds), module=net, quiet=True)


def _leaves(params: PyTree) -> list[tuple[str, np.ndarray]]:
    return [("/".join(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _differences(kernels: np.ndarray) -> list[float]:
    """Of kernels (s, inputs, units): the largest difference between two units' weights, over the largest weight."""
    return [float(np.ptp(one, axis=1).max() / max(abs(one).max(), 1e-30)) for one in kernels]


def _distinct(kernel: np.ndarray) -> int:
    """Units (inputs, units) that are further than `SAME` from every one counted before."""
    found: list[np.ndarray] = []
    for unit in kernel.T:
        if all(abs(unit - other).max() > SAME * abs(kernel).max() for other in found):
            found.append(unit)
    return len(found)


def say(result: dict[str, Any]) -> str:
    parts = []
    for name, way in result["ways"].items():
        accuracy = np.array(way["accuracy"])
        units = " and ".join(_range(layer["distinct"]) for layer in way["layers"].values())
        parts.append(f"{name}: {units} distinct units, accuracy {accuracy.mean():.3f} ± {accuracy.std(ddof=1):.3f}")
    largest = max(layer["difference"]["high"][-1] for layer in result["ways"]["constant"]["layers"].values())
    return (
        f"n = {len(result['seeds'])} seeds (mean ± standard deviation), {result['units']} units in each of two hidden"
        f" layers; {'; '.join(parts)}; from a constant, the largest difference between two units is {largest:.1g};"
        f" from zeros, only {', '.join(result['ways']['zeros']['moved'])} ever moves"
    )


def _range(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    curves = {
        f"{name}: layer {layer[-1]}": way["layers"][layer]["difference"]
        for name, way in result["ways"].items()
        if name != "zeros"
        for layer in HIDDEN
    }
    bands(left, curves, marker="o")
    for line, size in zip(left.lines, (12, 8, 4, 5, 5, 3), strict=True):  # three of them lie on one another at 0
        line.set_markersize(size)
    left.set(xscale="log", xlabel="steps", ylabel="largest difference / largest weight")
    left.set_yscale("symlog", linthresh=1e-3)
    left.set_ylim(-3e-4, 4)
    left.set_title("Differences between the units of a layer", fontsize=11)
    dots(right, {name.replace(", random ", ",\nrandom\n"): way["accuracy"] for name, way in result["ways"].items()})
    right.tick_params(axis="x", labelsize=9)
    right.set(ylim=(0, 1.02), ylabel="test accuracy")
    right.set_title(f"Digits, {len(result['seeds'])} seeds", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"lengths": (1, 4), "rates": (0.1,), "seeds": 2})
