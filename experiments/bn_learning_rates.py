"""BatchNorm reaches the accuracy of the net without it in fewer steps, and stands higher learning rates.

    python experiments/bn_learning_rates.py --data-dir DIR

Claim     with BatchNorm a network reaches the best accuracy of the baseline without it in fewer steps at the same
          learning rate, in still fewer at 5 times the rate, and it trains at 30 times the rate and with sigmoids
Source    Ioffe & Szegedy 2015, "Batch Normalization", figures 2 and 3 (Inception, ImageNet: 31.0 million steps
          without, 13.3 with, 2.1 at 5 times and 2.7 at 30 times the rate)
Data      Fashion-MNIST, reduced to 14 x 14 pixels, standardised (--full: CIFAR-10)
Recipe    eight 3x3 convolutions in two stages (16, 32 channels; --full: three stages of two, from 64 channels), biases,
          He's initial weights, one dense layer; SGD with momentum 0.9 at a constant rate, batch 32 (--full: 128). The
          baseline's rate is the one of four at which it has the least training loss at the end, with a seed of its
          own, and all other rates are multiples of it. Steps: the first evaluation at or above the best one of the
          baseline with the same seed
Cost      8 minutes
Expected  fewer steps with BatchNorm at the baseline's rate in every seed; BatchNorm with sigmoids learns. At 5 and 30
          times the rate the advantage depends on what bounds the baseline's rate: here it is the best of its grid,
          which the noise of small batches bounds too
Measured  the baseline's best test accuracy, at its own best rate 0.01, is reached by no norm after 1122 steps (1050 to
          1170), best 84.0 %; BN after 828 steps (540 to 1020), best 85.2 %; BN x5 after 690 steps (690 to 690) in 1 of
          5 seeds, best 83.5 %; BN x30 in none of 5 seeds, best 48.8 %; BN x5 sigmoid in none of 5 seeds, best 83.0 %
          (means and ranges of n = 5 seeds)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxcnn import models
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import BLACK, band, bands
from jaxcnn.seeds import SeedsResult


@dataclass(frozen=True)
class Settings:
    data: str = "fashion_mnist"
    image_size: tuple[int, int] | None = (14, 14)
    stages: int = 2
    convs: int = 4
    """In a stage."""
    width: int = 16
    batch_size: int = 32
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    """Tried by the baseline."""
    steps: int = 1200
    eval_every: int = 30
    test: int | None = 2000
    """Test images, or all."""
    seeds: int = 5


WAYS = {
    "no norm": ("none", "relu", 1),
    "BN": ("batch", "relu", 1),
    "BN x5": ("batch", "relu", 5),
    "BN x30": ("batch", "relu", 30),
    "BN x5 sigmoid": ("batch", "sigmoid", 5),
}
BASE = "no norm"


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    rate, losses = bench.best_rate(
        partial(_train, settings, bench, "none", "relu"), settings.rates, seed=settings.seeds
    )
    result: dict[str, Any] = {
        "seeds": list(range(settings.seeds)),
        "rate": rate,
        "trial_loss": losses,
        "ways": {},
    }
    best = np.zeros(settings.seeds)
    for way, (norm, act, factor) in WAYS.items():
        found = _train(settings, bench, norm, act, factor * rate, range(settings.seeds))
        steps, accuracy = found.curve("test_accuracy")
        if way == BASE:
            best = accuracy.max(0)
        there = accuracy >= best.reshape(1, -1)
        result["ways"][way] = {
            "accuracy": band(steps, 100 * accuracy),
            "best": 100 * accuracy.max(0),
            "reached": [int(steps[np.argmax(one)]) if one.any() else None for one in there.T],
            "skipped": found.skipped,
        }
    return result


def _train(settings: Settings, bench: Bench, norm: str, act: str, rate: float, seeds: Any) -> SeedsResult:
    experiment = Experiment(
        name="rates",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, batch_size=settings.batch_size, image_size=settings.image_size),
        optim=Optim("sgd", learning_rate=rate, options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 10), eval_every=settings.eval_every),
    )
    net = models.create(
        "vanilla_cnn",
        num_classes=10,
        stages=settings.stages,
        convs=settings.convs,
        width=settings.width,
        dense_layers=1,
        norm=norm,
        act=act,
    )
    return bench.train(experiment, seeds=seeds, module=net, test=settings.test, quiet=True)


def say(result: dict[str, Any]) -> str:
    n, parts = len(result["seeds"]), []
    for way, case in result["ways"].items():
        reached = [step for step in case["reached"] if step is not None]
        best = np.array(case["best"])
        text = f"{way} "
        if reached:
            text += f"after {np.mean(reached):.0f} steps ({min(reached)} to {max(reached)})"
            text += "" if len(reached) == n else f" in {len(reached)} of {n} seeds"
        else:
            text += f"in none of {n} seeds"
        parts.append(f"{text}, best {best.mean():.1f} %")
    return (
        f"the baseline's best test accuracy, at its own best rate {result['rate']:g}, is reached by {'; '.join(parts)}"
        f" (means and ranges of n = {n} seeds)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    ways = result["ways"]
    bands(left, {way: case["accuracy"] for way, case in ways.items()})
    best = np.mean(ways[BASE]["best"])
    low = min(min(case["accuracy"]["mean"]) for case in ways.values())
    left.axhline(best, color=BLACK, linewidth=1)
    left.set(xlabel="step", ylabel="test accuracy (%)", ylim=(max(0, min(low, best - 25)), 100))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    left.set_title("line: the best one without norm", fontsize=10)
    for i, case in enumerate(ways.values()):
        reached = [step for step in case["reached"] if step is not None]
        at = i + np.linspace(-0.12, 0.12, len(reached)) if len(reached) > 1 else [i] * len(reached)
        right.plot(at, reached, "o", color=left.lines[i].get_color(), markersize=5)
        if len(reached) < len(case["reached"]):
            missed = f"{len(case['reached']) - len(reached)} never"
            right.text(i, 0.03, missed, ha="center", fontsize=8, transform=right.get_xaxis_transform())
    right.set_xticks(range(len(ways)), [way.replace(" ", "\n") for way in ways], fontsize=8)
    right.set(ylabel="steps to that accuracy", ylim=(0, None), xlim=(-0.6, len(ways) - 0.4))
    right.grid(axis="y", alpha=0.3)
    right.set_title("each seed", fontsize=10)
    figure.suptitle(
        f"Batch normalisation and learning rate: rate {result['rate']:g} times 1, 5, 30;"
        f" mean and range of {len(result['seeds'])} seeds",
        fontsize=11,
    )


FULL = {
    "data": "cifar10",
    "image_size": None,
    "stages": 3,
    "convs": 2,
    "width": 64,
    "batch_size": 128,
    "steps": 15_000,
    "eval_every": 250,
    "test": None,
}

if __name__ == "__main__":
    small = {"convs": 1, "width": 4, "rates": (0.01,), "steps": 8, "eval_every": 4, "test": 100, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small, full=FULL)
