"""Pre-activation at depth: where norm and activation stand in a residual block.

    python experiments/preactivation_depth.py --data-dir DIR

Claim     residual blocks with norm and activation before each convolution and nothing after the addition train at least
          as well as the first paper's, the more so the deeper they are; with the ReLU alone moved before the addition
          the blocks can only add, and the network is worse
Source    He et al. 2016b, table 2 and figure 4
Data      CIFAR-10 at 16 pixels (--full: 32), standardised, shifted by up to 2 pixels (4) and mirrored
Recipe    basic blocks (of two 3x3 convolutions; the paper's 164 has bottlenecks) with shortcuts that have no
          parameters, 14 and 44 layers of width 4 (--full: 110 and 164, width 16); SGD with momentum 0.9 and weight
          decay 1e-4, the paper's rate of 0.1 for all, reached over the first twentieth of the run, divided by 10 after
          1/2 and 3/4 of it; batch 64 (128), 600 steps (64,000)
Cost      12 minutes
Expected  at 110 layers the paper has test errors of 6.6 % (first form), 7.8 % (ReLU before the addition), 6.4 %
          (pre-activation); differences of about a point, which few seeds of small nets may not resolve
Measured  n = 5 seeds, width 4, 600 steps; test error of post-activation, and what the others have more, in points; 14
          layers: 60.4 %, ReLU first -0.0 (95 % interval -1.1 to +1.1), pre-activation -1.6 (95 % interval -2.3 to
          -0.9); 44 layers: 69.1 %, ReLU first +0.6 (95 % interval -2.2 to +3.5), pre-activation -11.0 (95 % interval
          -15.2 to -6.8); in the deeper nets ReLU before the addition is not shown to be worse, pre-activation is better
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn import models
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.recipes import errors, residual
from jaxcnn.plots import bands, dots
from jaxcnn.spread import Spread, spread


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, int] = (14, 44)
    width: int = 4
    image_size: tuple[int, int] = (16, 16)
    batch_size: int = 64
    steps: int = 600
    seeds: int = 5


FIRST, MOVED, PRE = "post-activation", "ReLU first", "pre-activation"
LOGGED = 20


def net(kind: str, *, depth: int, width: int) -> nn.Module:
    """The three have the same parameters but for the norms."""
    if kind == PRE:
        blocks = ((depth - 2) // 6,) * 3
        return models.create("cifar_resnetv2_110", blocks=blocks, width=width)
    return models.create("cifar_resnet20", depth=depth, width=width, act_first=kind == MOVED)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    cases = {
        f"{depth} layers": {kind: _case(settings, bench, depth, kind) for kind in (FIRST, MOVED, PRE)}
        for depth in settings.depths
    }
    return {"seeds": list(range(settings.seeds)), "steps": settings.steps, "width": settings.width, "cases": cases}


def _case(settings: Settings, bench: Bench, depth: int, kind: str) -> dict[str, Any]:
    experiment = residual(
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        steps=settings.steps,
        logged=LOGGED,
        warmup=0.05,
    )
    module = net(kind, depth=depth, width=settings.width)
    return errors(bench.train(experiment, seeds=range(settings.seeds), module=module))


def less(cases: dict[str, Any], kind: str) -> Spread:
    """Test error of `kind` less that of the first form with the same seed, in points."""
    return spread(list(np.array(cases[kind]["test_error"], float) - np.array(cases[FIRST]["test_error"], float)))


def say(result: dict[str, Any]) -> str:
    parts = []
    for depth, cases in result["cases"].items():
        each = [
            f"{kind} {less(cases, kind).mean:+.1f} (95 % interval {less(cases, kind).interval[0]:+.1f} to"
            f" {less(cases, kind).interval[1]:+.1f})"
            for kind in (MOVED, PRE)
        ]
        parts.append(f"{depth}: {np.mean(cases[FIRST]['test_error']):.1f} %, {', '.join(each)}")
    deep = list(result["cases"].values())[-1]
    worse, better = less(deep, MOVED).interval[0] > 0, less(deep, PRE).interval[1] < 0
    return (
        f"n = {len(result['seeds'])} seeds, width {result['width']}, {result['steps']} steps; test error of"
        f" post-activation, and what the others have more, in points; {'; '.join(parts)}; in the deeper nets ReLU"
        f" before the addition {'is worse' if worse else 'is not shown to be worse'}, pre-activation"
        f" {'is better' if better else 'is not shown to be better'}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    panels = figure.subplots(1, 3)
    for panel, (depth, cases) in zip(panels, result["cases"].items(), strict=False):
        bands(panel, {kind: case["curve"] for kind, case in cases.items()})
        panel.set(xlabel="step", ylabel="training error (%)")
        panel.set_title(depth, fontsize=10)
    panels[1].sharey(panels[0])
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3)
    short = {FIRST: "post", MOVED: "first", PRE: "pre"}
    groups = {
        f"{short[kind]}\n{depth.split()[0]}": case["test_error"]
        for depth, cases in result["cases"].items()
        for kind, case in cases.items()
    }
    dots(panels[2], groups)
    panels[2].tick_params(axis="x", labelsize=8)
    panels[2].set(ylabel="test error (%)")
    panels[2].set_title("at the end, by depth", fontsize=10)
    figure.suptitle(
        f"Residual blocks, CIFAR-10, width {result['width']}: mean and range of {len(result['seeds'])} seeds",
        fontsize=11,
    )


FULL = {"depths": (110, 164), "width": 16, "image_size": (32, 32), "batch_size": 128, "steps": 64_000}

if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={"depths": (8, 14), "width": 2, "steps": 6, "seeds": 2},
        full=FULL,
    )
