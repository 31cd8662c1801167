"""Activations and back-propagated gradients of five tanh layers, with standard weights and with Xavier's.

    python experiments/gradient_histograms.py --data-dir DIR

Claim     with the weights U(-1/sqrt(n), 1/sqrt(n)) that were standard, activations shrink from layer to layer on the
          way up, and gradients on the way down; with Xavier's both keep far more of their size
Source    Glorot & Bengio 2010, figures 6 and 7
Data      MNIST, standardised (the paper: Shapeset-3x2)
Recipe    5 tanh layers of 1,000 units and 10 outputs, untrained, biases 0; a gradient of N(0, 1) by the outputs (the
          paper: of the loss), taken by every layer's sums, before tanh; predicted: the mean field of `probe`
Cost      seconds
Expected  n Var w = 1/3 multiplies the gradient's root mean square by up to 0.58 for each layer down: at most 0.11 from
          layer 5 to layer 1, less what tanh's slope takes; Xavier's by at most 1, less the same
Measured  n = 5 seeds, factor of the root mean square between layers 1 and 5, mean and range; standard: activations 0.10
          (0.10 to 0.10) on the way up, gradients 0.084 (0.082 to 0.085) on the way down; Xavier: activations 0.53 (0.52
          to 0.53) on the way up, gradients 0.436 (0.426 to 0.444) on the way down
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcnn import models
from jaxcnn.analysis.signal import Layer, probe
from jaxcnn.config import Data, Experiment, Model
from jaxcnn.data import preprocess
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import COLOURS, LINES


@dataclass(frozen=True)
class Settings:
    layers: int = 5
    width: int = 1000
    examples: int = 300
    seeds: int = 5


CASES = {"standard": "standard", "Xavier": "xavier_uniform"}
BINS = 61


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    data = bench.splits(Experiment(model=Model("mlp"), data=Data("mnist")), train=settings.examples)
    x = preprocess.fit("standardize", data.train.images)(preprocess.to_float(data.train.images))
    signals = {
        name: probe(
            models.create(
                "mlp",
                depth=settings.layers,
                width=settings.width,
                act="tanh",
                kernel_init=init,
                num_classes=len(data.classes),
            ),
            x,
            seeds=settings.seeds,
        )
        for name, init in CASES.items()
    }
    sums = {name: signal.layers[0:-1:2] for name, signal in signals.items()}
    tanhs = {name: signal.layers[1::2] for name, signal in signals.items()}
    reach = 3 * max(layer.gradient**0.5 for layers in sums.values() for layer in layers)
    cases = {
        name: {
            "activation": _side(tanhs[name], "sample", 1.0)
            | {
                "rms": [np.sqrt(layer.second_moments) for layer in tanhs[name]],
                "predicted": [layer.predicted**0.5 for layer in tanhs[name]],
            },
            "gradient": _side(sums[name], "gradient_sample", reach)
            | {
                "rms": [np.sqrt(layer.gradients) for layer in sums[name]],
                "predicted": [layer.predicted_gradient**0.5 for layer in sums[name]],
            },
        }
        for name in CASES
    }
    return {"seeds": list(range(settings.seeds)), "width": settings.width, "cases": cases}


def _side(layers: tuple[Layer, ...], sample: str, reach: float) -> dict[str, Any]:
    """Counts of the samples within +-reach, (layers, BINS)."""
    return {"reach": reach, "counts": [np.histogram(getattr(one, sample), BINS, (-reach, reach))[0] for one in layers]}


def say(result: dict[str, Any]) -> str:
    parts = []
    for name, case in result["cases"].items():
        up = np.array(case["activation"]["rms"])
        down = np.array(case["gradient"]["rms"])
        up, down = up[-1] / up[0], down[0] / down[-1]
        parts.append(
            f"{name}: activations {up.mean():.2f} ({up.min():.2f} to {up.max():.2f}) on the way up, gradients"
            f" {down.mean():.3f} ({down.min():.3f} to {down.max():.3f}) on the way down"
        )
    layers = len(result["cases"]["Xavier"]["gradient"]["rms"])
    return (
        f"n = {len(result['seeds'])} seeds, factor of the root mean square between layers 1 and {layers}, mean and"
        f" range; {'; '.join(parts)}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(2, 3, width_ratios=(1, 1, 0.9))
    for row, (side, what) in enumerate((("activation", "activation"), ("gradient", "gradient by the sums"))):
        lows, highs = [], []
        for column, (name, case) in enumerate(result["cases"].items()):
            panel, found = axes[row, column], case[side]
            middles = (np.arange(BINS) + 0.5) * (2 * found["reach"] / BINS) - found["reach"]
            for i, counts in enumerate(found["counts"]):
                shares = 100 * np.array(counts) / max(1, sum(counts))
                shares[shares == 0] = np.nan
                panel.plot(middles, shares, color=COLOURS[i], linestyle=LINES[i], label=f"layer {i + 1}", linewidth=1.2)
            panel.set_xlim(-found["reach"], found["reach"])
            panel.set_xlabel(what, fontsize=9)
            panel.set_title(f"{name}: {side}s", fontsize=10)
            mean = np.array(found["rms"]).mean(1)
            layers, colour = range(1, len(mean) + 1), COLOURS[5 + column]
            style = "-" if column == 0 else "--"
            axes[row, 2].plot(layers, found["predicted"], color=colour, linestyle=style, label=f"{name}, predicted")
            lows, highs = [*lows, np.min(found["rms"])], [*highs, np.max(found["rms"])]
            for values in np.array(found["rms"]).T:
                axes[row, 2].plot(layers, values, "os"[column], color=colour, markersize=3)
        for panel in axes[row, :2]:
            panel.set(yscale="log", ylim=(0.1, 120))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
        axes[row, 0].set_ylabel("share (%)", fontsize=9)
        axes[row, 2].set(yscale="log", xticks=layers)
        axes[row, 2].set_yticks([digit * 10.0**power for power in (-3, -2, -1) for digit in (1, 2, 5)])
        axes[row, 2].set_ylim(0.8 * min(lows), 1.25 * max(highs))
        axes[row, 2].yaxis.set_major_formatter("{x:g}")
        axes[row, 2].minorticks_off()
        axes[row, 2].set_xlabel("layer", fontsize=9)
        axes[row, 2].set_ylabel(f"{side}s", fontsize=9)
        axes[row, 2].set_title(f"rms; dots: {len(result['seeds'])} seeds", fontsize=10)
        axes[row, 2].grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    more, names = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles + more, labels + names, loc="outside lower center", ncols=7, fontsize=8, columnspacing=0.9)
    for panel in axes.ravel():
        panel.tick_params(labelsize=8)


if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"width": 64, "examples": 32, "seeds": 2})
