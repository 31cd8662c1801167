"""Small DenseNets and ResNets: accuracy against parameters.

    python experiments/densenet_vs_resnet_params.py --data-dir DIR

Claim     at the same number of parameters a DenseNet is more accurate than a ResNet: the paper's DenseNet-BC with 0.8
          million equals the 1001-layer ResNet with 10 million
Source    Huang et al. 2017, table 2 and figure 4
Data      CIFAR-10 at 16 pixels (--full: 32), standardised, shifted by up to 2 pixels (4) and mirrored
Recipe    DenseNet-BC of 16 layers (3 blocks of 2) with growth 4, 6 and 8 against pre-activation ResNets of 14 layers
          with width 3, 4 and 6; all with BatchNorm, SGD with Nesterov momentum 0.9, weight decay 1e-4 and the papers'
          rate of 0.1, divided by 10 after 1/2 and 3/4 of the run, batch 64, 400 steps (--full: BC of 40 layers, growth
          12, 16 and 24, and ResNets of 56 layers, width 8, 16 and 24, 64,000 steps); compared at equal parameters, and
          at equal multiplications, along straight lines between the sizes in the logarithm, at the middle of the range
          that both span
Cost      7 minutes
Expected  the DenseNets' curve above the ResNets' at the same parameters; at the same multiplications it need not be
Measured  n = 5 seeds, 400 steps; test accuracy at 11,370 parameters DenseNet less ResNet is +1.8 points (95 % interval
          +0.0 to +3.6): DenseNet is ahead; at 750,918 multiplications DenseNet less ResNet is -1.6 points (95 %
          interval -2.4 to -0.8): ResNet is ahead
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn import models
from jaxcnn.analysis.network import summary
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.recipes import residual
from jaxcnn.plots import COLOURS, LINES
from jaxcnn.spread import Spread, spread


@dataclass(frozen=True)
class Settings:
    dense_layers: int = 2
    """Layers of each dense block."""
    growths: tuple[int, ...] = (4, 6, 8)
    residual_blocks: int = 2
    """Blocks of each stage."""
    widths: tuple[int, ...] = (3, 4, 6)
    image_size: tuple[int, int] = (16, 16)
    steps: int = 400
    seeds: int = 5


def networks(settings: Settings) -> dict[str, list[nn.Module]]:
    return {
        "DenseNet-BC": [
            models.create("cifar_densenet_bc_100_k12", blocks=(settings.dense_layers,) * 3, growth=growth)
            for growth in settings.growths
        ],
        "ResNet": [
            models.create("cifar_resnetv2_110", blocks=(settings.residual_blocks,) * 3, width=width)
            for width in settings.widths
        ],
    }


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    cases = {family: [_case(settings, bench, net) for net in nets] for family, nets in networks(settings).items()}
    return {"seeds": list(range(settings.seeds)), "steps": settings.steps, "cases": cases}


def _case(settings: Settings, bench: Bench, net: nn.Module) -> dict[str, Any]:
    experiment = residual(image_size=settings.image_size, batch_size=64, steps=settings.steps, logged=10, nesterov=True)
    found = bench.train(experiment, seeds=range(settings.seeds), module=net)
    cost = summary(net, input=(*settings.image_size, 3))
    return {
        "parameters": cost.parameters,
        "multiplications": cost.macs,
        "train_accuracy": 100 * found.curve("accuracy")[1][-1],
        "test_accuracy": 100 * found.test["accuracy"],
    }


def ahead(result: dict[str, Any], size: str) -> tuple[float, Spread] | None:
    """The middle of the sizes that both families span, and how many points the DenseNets are ahead there, with the
    ResNets of the same seed; None where the families do not overlap."""
    dense, residual = result["cases"].values()
    sizes = [np.log([case[size] for case in cases]) for cases in (dense, residual)]
    low, high = max(one.min() for one in sizes), min(one.max() for one in sizes)
    if low > high:
        return None
    middle = (low + high) / 2
    at = [
        np.array([np.interp(middle, x, column) for column in np.array([case["test_accuracy"] for case in cases]).T])
        for x, cases in zip(sizes, (dense, residual), strict=True)
    ]
    return float(np.exp(middle)), spread(list(at[0] - at[1]))


def say(result: dict[str, Any]) -> str:
    parts = []
    for size in ("parameters", "multiplications"):
        found = ahead(result, size)
        if found is None:
            parts.append(f"the {size} of the two families do not overlap")
            continue
        at, points = found
        low, high = points.interval
        verdict = "DenseNet is ahead" if low > 0 else "ResNet is ahead" if high < 0 else "no difference is shown"
        parts.append(
            f"at {at:,.0f} {size} DenseNet less ResNet is {points.mean:+.1f} points (95 % interval {low:+.1f} to"
            f" {high:+.1f}): {verdict}"
        )
    return f"n = {len(result['seeds'])} seeds, {result['steps']} steps; test accuracy {'; '.join(parts)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    panels = figure.subplots(1, 2, sharey=True)
    for panel, size in zip(panels, ("parameters", "multiplications"), strict=True):
        for i, (family, cases) in enumerate(result["cases"].items()):
            x = [case[size] for case in cases]
            values = np.array([case["test_accuracy"] for case in cases], float)
            mean, low, high = values.mean(1), values.min(1), values.max(1)
            panel.errorbar(
                x,
                mean,
                yerr=[mean - low, high - mean],
                color=COLOURS[i],
                linestyle=LINES[i],
                marker="os"[i],
                capsize=3,
                label=family,
            )
        panel.set(xscale="log", xlabel=size)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    panels[0].set_ylabel("test accuracy (%)")
    figure.suptitle(f"CIFAR-10, {result['steps']:,} steps: mean and range of {len(result['seeds'])} seeds", fontsize=11)


FULL = {
    "dense_layers": 6,
    "growths": (12, 16, 24),
    "residual_blocks": 9,
    "widths": (8, 16, 24),
    "image_size": (32, 32),
    "steps": 64_000,
}

if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={
            "dense_layers": 1,
            "growths": (4,),
            "residual_blocks": 1,
            "widths": (4,),
            "steps": 2,
            "seeds": 2,
        },
        full=FULL,
    )
