"""What a unit sees: the receptive field by theory, by the gradient's support, and the part that counts.

    python experiments/receptive_fields.py

Claim     the receptive field 1 + sum_l d_l (K_l - 1) prod_{i<l} S_i grows linearly with the layers without stride,
          and exponentially with strides or growing dilations, and is just where the input's gradient is not 0; the
          effective field, where most of the gradient is, grows more slowly, as the root of the depth
Source    Luo et al. 2016; Yu & Koltun 2016
Recipe    untrained 3x3 convolutions with ReLU, 4 channels; the gradient of the central unit by an input of N(0, 1),
          magnitudes added up over 10 inputs and weights a seed; effective: above 4.55 % of the largest
Cost      1.5 minutes
Expected  6 layers: 13 plain, 127 with stride 2 or dilations 1, 2, 4, ..., measured alike; effective size by about the
          power 0.5 of the depth, theoretical by 1
Measured  n = 3 seeds: the measured size is the theoretical one in 54 of 54 cases; after 6 layers 13 (plain), 127
          (stride 2), 127 (dilation 1, 2, 4, ...); effective size of plain stacks, 5 to 40 layers: 10.0 to 25.3 of 11 to
          81, by the power 0.45 of the depth (0.44 to 0.46)
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn.analysis.measured import measured_field
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.init import initializer
from jaxcnn.plots import AMBER, COLOURS, LINES, ORANGE, band, bands
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    layers: int = 6
    """Of the stacks whose receptive fields are compared."""
    depths: tuple[int, ...] = (2, 5, 10, 20, 40)
    """Of the plain stacks whose effective fields are measured."""
    draws: int = 10
    seeds: int = 3


class Stack(nn.Module):
    """3x3 convolutions with ReLU: (b, h, w, c) -> (b, h', w', 4); the i-th one has dilation growth^i."""

    layers: int
    stride: int = 1
    growth: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            holes = self.growth**i
            conv = nn.Conv(
                4,
                (3, 3),
                strides=self.stride,
                padding=holes,
                kernel_dilation=holes,
                kernel_init=initializer("kaiming_normal"),
            )
            x = nn.relu(conv(x))
        return x


KINDS = {"plain": {}, "stride 2": {"stride": 2}, "dilation 1, 2, 4, ...": {"growth": 2}}


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    seeds = range(settings.seeds)
    side, kinds = 3 * 2**settings.layers - 1, {}
    for name, options in KINDS.items():
        theory, measured = [], []
        for layers in range(1, settings.layers + 1):
            fields = [
                measured_field(Stack(layers, **options), input=(side, side, 1), draws=settings.draws, seed=seed)
                for seed in seeds
            ]
            theory.append(fields[0].theoretical_size)
            measured.append([field.size for field in fields])
        kinds[name] = {"theoretical": theory, "measured": measured}
    side, effective, field = 2 * settings.depths[-1] + 3, [], None
    for layers in settings.depths:
        fields = [
            measured_field(Stack(layers), input=(side, side, 1), draws=settings.draws, seed=seed) for seed in seeds
        ]
        effective.append([field.effective_size for field in fields])
        field = fields[0]
    assert field is not None
    logs = np.log(settings.depths[1:]), np.log(effective[1:])
    return {
        "seeds": list(seeds),
        "kinds": kinds,
        "depths": settings.depths,
        "plain": [2 * layers + 1 for layers in settings.depths],
        "effective": band(settings.depths, effective),
        "exponents": [np.polyfit(logs[0], column, 1)[0] for column in logs[1].T],
        "map": np.round(field.map, 3),
        "window": field.theoretical,
    }


def say(result: dict[str, Any]) -> str:
    found = [
        (size, theory)
        for kind in result["kinds"].values()
        for theory, sizes in zip(kind["theoretical"], kind["measured"], strict=True)
        for size in sizes
    ]
    ends = ", ".join(f"{kind['theoretical'][-1]} ({name})" for name, kind in result["kinds"].items())
    effective, depths, exponents = result["effective"], result["depths"], result["exponents"]
    return (
        f"n = {len(result['seeds'])} seeds: the measured size is the theoretical one in"
        f" {sum(size == theory for size, theory in found)} of {len(found)} cases; after"
        f" {len(result['kinds']['plain']['theoretical'])} layers {ends}; effective size of plain stacks, {depths[1]} to"
        f" {depths[-1]} layers: {effective['mean'][1]:.1f} to {effective['mean'][-1]:.1f} of {result['plain'][1]} to"
        f" {result['plain'][-1]}, by the power {np.mean(exponents):.2f} of the depth"
        f" ({min(exponents):.2f} to {max(exponents):.2f})"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    sizes, growth, picture = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    for i, (name, kind) in enumerate(result["kinds"].items()):
        layers = range(1, len(kind["theoretical"]) + 1)
        sizes.plot(layers, kind["theoretical"], color=COLOURS[i], linestyle=LINES[i], label=name)
        for values in np.array(kind["measured"]).T:
            sizes.plot(layers, values, "os^"[i], color=COLOURS[i], markersize=9 - 2.5 * i, alpha=0.5)
    sizes.set(yscale="log", xlabel="layers", ylabel="receptive field (pixels)", xticks=layers)
    sizes.set_yticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    sizes.minorticks_off()
    sizes.grid(alpha=0.3)
    sizes.legend(fontsize=8, loc="upper left")
    sizes.set_title(f"Theory; dots: {len(result['seeds'])} seeds", fontsize=10)
    bands(growth, {"effective": result["effective"]}, marker="o", markersize=4)
    growth.plot(result["depths"], result["plain"], color=ORANGE, linestyle="--", label="theoretical")
    growth.set(xlabel="layers, 3x3, stride 1", ylabel="side (pixels)")
    growth.legend(fontsize=8)
    growth.set_title(f"Depth to the power {np.mean(result['exponents']):.2f}", fontsize=10)
    shown = picture.imshow(np.sqrt(result["map"]), cmap="cividis", vmin=0, vmax=1)
    (top, bottom), (left, right) = result["window"]
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
    picture.plot(*corners.T, color=AMBER, linewidth=2)
    picture.contour(np.array(result["map"]), levels=[1 - 0.9545], colors="white", linewidths=1)
    picture.set(xlabel="column (pixels)", ylabel="row (pixels)")
    picture.set_title(f"{result['depths'][-1]} layers: effective (white)\nin theoretical field (frame)", fontsize=10)
    figure.colorbar(shown, ax=picture, shrink=0.6, label="√(|gradient| / largest)")


if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={"layers": 1, "depths": (1, 2, 3), "draws": 2, "seeds": 1},
    )
