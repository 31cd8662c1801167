"""Degradation: depth harms plain networks more than residual ones.

    python experiments/degradation_plain_vs_residual.py --data-dir DIR

Claim     a deeper plain network has a higher training error, and so a higher test error, than a shallower one; with
          shortcuts that have no parameters it has not
Source    He et al. 2016, section 4.2 and figure 6
Data      CIFAR-10 at 16 pixels (--full: 32), standardised, shifted by up to 2 pixels (4) and mirrored
Recipe    the paper's networks, of 14 and 44 layers and width 4 (--full: 20 and 56, width 16), with BatchNorm and 2/n;
          SGD with momentum 0.9 and weight decay 1e-4, the paper's rate of 0.1 for all, reached over the first twentieth
          of the run, divided by 10 after 1/2 and 3/4 of the run; batch 64 (128), 800 steps (64,000); the training error
          is that of the last tenth of the run, on the shifted images and with each batch's statistics
Cost      12 minutes
Expected  deep less shallow, in training error: above 0 for plain nets, and more than for residual ones, whose gap is
          near 0 or below (full scale, test error: plain about 9 to 13 %, residual 8.75 to 6.97 %)
Measured  n = 5 seeds, width 4, 800 steps; 44 layers less 14 layers, in points: in training error plain +16.0, residual
          +6.5; plain more by 9.5 (95 % interval 5.3 to 13.7); in test error plain +18.3, residual +7.2; plain more by
          11.2 (95 % interval 7.1 to 15.2)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcnn import models
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.recipes import errors, residual
from jaxcnn.plots import BLACK, bands, dots
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, int] = (14, 44)
    width: int = 4
    image_size: tuple[int, int] = (16, 16)
    batch_size: int = 64
    steps: int = 800
    seeds: int = 5


KINDS = {"plain": "none", "residual": "A"}
LOGGED = 20
WARMUP = 0.05


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    cases = {
        kind: {f"{depth} layers": _case(settings, bench, depth, shortcut) for depth in settings.depths}
        for kind, shortcut in KINDS.items()
    }
    return {"seeds": list(range(settings.seeds)), "steps": settings.steps, "width": settings.width, "cases": cases}


def _case(settings: Settings, bench: Bench, depth: int, shortcut: str) -> dict[str, Any]:
    experiment = residual(
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        steps=settings.steps,
        logged=LOGGED,
        warmup=WARMUP,
    )
    net = models.create("cifar_resnet20", depth=depth, width=settings.width, shortcut=shortcut)
    return errors(bench.train(experiment, seeds=range(settings.seeds), module=net))


def gaps(result: dict[str, Any], kind: str, error: str) -> np.ndarray:
    """Error of the deeper network less that of the shallower one, of each seed, in points of a percent."""
    shallow, deep = result["cases"][kind].values()
    return np.array(deep[error], float) - np.array(shallow[error], float)


def say(result: dict[str, Any]) -> str:
    parts = []
    for name, error in (("training", "training_error"), ("test", "test_error")):
        each = {kind: gaps(result, kind, error) for kind in KINDS}
        more = spread(list(each["plain"] - each["residual"]))
        middles = ", ".join(f"{kind} {values.mean():+.1f}" for kind, values in each.items())
        parts.append(
            f"in {name} error {middles}; plain more by {more.mean:.1f} (95 % interval {more.interval[0]:.1f} to"
            f" {more.interval[1]:.1f})"
        )
        if not more.interval[0] > 0:
            parts[-1] += ", which is not shown at this budget"
    shallow, deep = result["cases"]["plain"]
    return (
        f"n = {len(result['seeds'])} seeds, width {result['width']}, {result['steps']} steps; {deep} less"
        f" {shallow}, in points: {'; '.join(parts)}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    for panel, (kind, cases) in zip((left, middle), result["cases"].items(), strict=True):
        bands(panel, {name: case["curve"] for name, case in cases.items()})
        panel.set(xlabel="step", ylabel="training error (%)")
        panel.set_title(kind, fontsize=10)
    middle.sharey(left)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=2)
    dots(
        right,
        {
            f"{kind}\n{name}": gaps(result, kind, f"{error}_error").tolist()
            for name, error in (("train", "training"), ("test", "test"))
            for kind in KINDS
        },
    )
    right.axhline(0, color=BLACK, linewidth=0.8, linestyle=":")
    right.tick_params(axis="x", labelsize=8)
    right.set(ylabel="error, deep less shallow (points)")
    right.set_title("gap", fontsize=10)
    figure.suptitle(f"CIFAR-10, width {result['width']}: mean and range of {len(result['seeds'])} seeds", fontsize=11)


FULL = {"depths": (20, 56), "width": 16, "image_size": (32, 32), "batch_size": 128, "steps": 64_000}

if __name__ == "__main__":
    run_figure(
        Settings(),
        measure=measure,
        say=say,
        draw=draw,
        smoke={"depths": (8, 14), "steps": 6, "seeds": 2},
        full=FULL,
    )
