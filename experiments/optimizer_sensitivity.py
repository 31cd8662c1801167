"""How much the learning rate matters: Adam, SGD and Alrao over five decades of it, with and without a schedule.

    python experiments/optimizer_sensitivity.py --data-dir DIR

Claim     Adam's useful rates span more decades than those of SGD with momentum, a schedule with warm-up widens the
          range of both, and Alrao, whose rates cover the whole range at once, comes close to the best without tuning
Source    Kingma & Ba 2015; Goyal et al. 2017, section 2.2 (warm-up); Blier et al. 2018, "Learning with Random Learning
          Rates", figures 1 to 3
Data      Fashion-MNIST at 14x14 pixels, standardised, without augmentation
Recipe    two convolutions with BatchNorm and two dense layers, batch 128; eleven rates from 1e-4 to 10, constant, or
          half a cosine after a warm-up over a tenth of the run; momentum 0.9; Alrao draws its rates from 1e-5 to 10,
          anew for every seed, with ten copies of the output layer; the useful range of a way and seed is where its
          accuracy, joined by lines over the logarithm of the rate, is within 2 points of its best
Cost      6 minutes
Expected  useful ranges of 1 to 2.5 decades, Adam's wider than SGD's, with a schedule wider than without; Alrao below
          the best tuned rate, by more than the paper's 1 to 2 points, as these runs are short
Measured  decades of the learning rate within 2 points of the best test accuracy after 200 steps: Adam, constant 1.3 +-
          0.3 (best 81.8 +- 1.6 % at 0.01); SGD, constant 1.1 +- 0.4 (best 80.9 +- 1.2 % at 0.1), 7 runs not finite,
          from rate 3.2 on; Adam, cosine 1.3 +- 0.2 (best 82.7 +- 0.2 % at 0.032); SGD, cosine 1.1 +- 0.1 (best 80.8 +-
          1.0 % at 0.1), 2 runs not finite, from rate 3.2 on. Adam's constant range against SGD's: not clearly another
          (+0.2 +- 0.4); with the schedule Adam's is not clearly another (+0.0 +- 0.4), SGD's not clearly another (-0.0
          +- 0.3). Alrao, untuned, is at 76.1 +- 3.7 % (constant) and 77.7 +- 2.0 % (cosine), 7.0 +- 3.3 and 5.4 +- 1.5
          points below each seed's best tuned run (n = 5 seeds, 95 % intervals)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxcnn.alrao import averaged_cross_entropy
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.recipes import small_cnn
from jaxcnn.plots import AMBER, BLACK, COLOURS, SKY, band, bands
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    data: str = "fashion_mnist"
    image_size: tuple[int, int] = (14, 14)
    width: int = 8
    hidden: int = 64
    rates: int = 11
    """Evenly spread in logarithm from 1e-4 to 10."""
    steps: int = 200
    test: int = 5000
    seeds: int = 5


OPTIMIZERS = {"Adam": ("adam", {}), "SGD": ("sgd", {"momentum": 0.9})}
SCHEDULES = {"constant": ("constant", 0.0), "cosine": ("cosine", 0.1)}
LOWEST, HIGHEST = 1e-4, 10.0
ALRAO = {"low": 1e-5, "high": 10.0}
"""The range of the paper."""
WITHIN = 2.0
"""Points of test accuracy."""
CHANCE = 10.0


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    rates = [float(f"{rate:.3g}") for rate in np.geomspace(LOWEST, HIGHEST, settings.rates)]
    seeds = list(range(settings.seeds))
    ways, alrao = {}, {}
    for schedule in SCHEDULES:
        for name in OPTIMIZERS:
            case = _stacked([_train(settings, bench, name, schedule, rate, seeds) for rate in rates])
            useful = [useful_range(rates, one) for one in case["accuracy"].T]
            ways[f"{name}, {schedule}"] = case | {"useful": useful}
        found = _stacked([_alrao(settings, bench, schedule, seed) for seed in seeds])
        alrao[schedule] = {key: values[:, 0] for key, values in found.items()}
    return {"seeds": seeds, "steps": settings.steps, "rates": rates, "ways": ways, "alrao": alrao}


def _stacked(found: Sequence[SeedsResult]) -> dict[str, np.ndarray]:
    """A row for each run: the last training loss, NaN where no step near the end was finite, which is chance."""
    loss = np.array([one.curve("loss")[1][-1] for one in found])
    accuracy = 100 * np.array([one.test["accuracy"] for one in found])
    return {"loss": loss, "accuracy": np.where(np.isfinite(loss), accuracy, CHANCE)}


def useful_range(rates: Sequence[float], accuracy: ArrayLike) -> tuple[float, float]:
    """The rates about the best one where accuracy (t,), linear between log rates, stays within 2 points of it."""
    x, y = np.log10(rates), np.asarray(accuracy, float)
    top, level = int(np.argmax(y)), np.max(y) - WITHIN

    def edge(way: int) -> float:
        i = top
        while 0 <= i + way < len(y) and y[i + way] >= level:
            i += way
        if not 0 <= i + way < len(y):
            return x[i]
        return x[i] + (x[i + way] - x[i]) * (y[i] - level) / (y[i] - y[i + way])

    return float(10 ** edge(-1)), float(10 ** edge(1))


def _train(
    settings: Settings, bench: Bench, name: str, schedule: str, rate: float, seeds: Sequence[int]
) -> SeedsResult:
    kind, options = OPTIMIZERS[name]
    net = small_cnn(width=settings.width, hidden=settings.hidden)
    experiment = _experiment(settings, schedule, kind, rate, options)
    return bench.train(experiment, seeds=seeds, module=net, test=settings.test, quiet=True)


def _alrao(settings: Settings, bench: Bench, schedule: str, seed: int) -> SeedsResult:
    net = small_cnn(width=settings.width, hidden=settings.hidden, copies=10)
    experiment = _experiment(settings, schedule, "alrao", 1.0, ALRAO | {"seed": seed})
    options = {"test": settings.test, "loss_fn": averaged_cross_entropy, "quiet": True}
    return bench.train(experiment, seeds=[seed], module=net, **options)


def _experiment(settings: Settings, schedule: str, kind: str, rate: float, options: dict[str, Any]) -> Experiment:
    shape, warmup = SCHEDULES[schedule]
    return Experiment(
        name="sensitivity",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, image_size=settings.image_size),
        optim=Optim(kind, rate, schedule=shape, warmup=warmup, options=options),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 10)),
    )


def _mean(values: ArrayLike) -> str:
    return f"{spread(np.asarray(values, float).tolist()):.1f}"


def _change(values: ArrayLike) -> str:
    """In decades, and whether its interval is on one side of 0."""
    found = spread(np.asarray(values, float).tolist())
    clear = "wider" if found.mean > found.half else "narrower" if -found.mean > found.half else "not clearly another"
    return f"{clear} ({found:+.1f})"


def _decades(case: dict[str, Any]) -> np.ndarray:
    """Of the useful range, for every seed."""
    low, high = np.log10(case["useful"]).T
    return high - low


def _diverged(case: dict[str, Any]) -> np.ndarray:
    """How many seeds were not finite near the end, for every rate."""
    return np.isnan(np.array(case["loss"], float)).sum(1)


def say(result: dict[str, Any]) -> str:
    ways, rates, n = result["ways"], result["rates"], len(result["seeds"])
    parts, best = [], np.max([np.max(case["accuracy"], 0) for case in ways.values()], 0)
    for name, case in ways.items():
        accuracy, diverged = np.array(case["accuracy"]), _diverged(case)
        top = int(np.argmax(accuracy.mean(1)))
        parts.append(f"{name} {_mean(_decades(case))} (best {_mean(accuracy[top])} % at {rates[top]:.2g})")
        if diverged.any():
            parts[-1] += f", {diverged.sum()} runs not finite, from rate {rates[int(np.argmax(diverged > 0))]:.2g} on"
    width = {name: _decades(case) for name, case in ways.items()}
    wider = width["Adam, constant"] - width["SGD, constant"]
    widened = {name: width[f"{name}, cosine"] - width[f"{name}, constant"] for name in OPTIMIZERS}
    at = " and ".join(f"{_mean(case['accuracy'])} % ({schedule})" for schedule, case in result["alrao"].items())
    below = " and ".join(_mean(best - np.array(case["accuracy"])) for case in result["alrao"].values())
    return (
        f"decades of the learning rate within {WITHIN:g} points of the best test accuracy after {result['steps']}"
        f" steps: {'; '.join(parts)}. Adam's constant range against SGD's: {_change(wider)}; with the schedule Adam's"
        f" is {_change(widened['Adam'])}, SGD's {_change(widened['SGD'])}. Alrao, untuned, is at {at}, {below} points"
        f" below each seed's best tuned run (n = {n} seeds, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    rates, ways = result["rates"], result["ways"]
    bands(left, {name: band(rates, case["accuracy"]) for name, case in ways.items()}, marker="o", markersize=3)
    for (schedule, case), colour in zip(result["alrao"].items(), (AMBER, SKY), strict=True):
        left.axhspan(min(case["accuracy"]), max(case["accuracy"]), color=colour, alpha=0.2, linewidth=0)
        left.axhline(np.mean(case["accuracy"]), color=colour, linewidth=2, label=f"Alrao, {schedule}")
    gone = [(rate, CHANCE) for case in ways.values() for rate, lost in zip(rates, _diverged(case), strict=True) if lost]
    if gone:
        left.plot(*zip(*gone, strict=True), "x", color=BLACK, label="diverged, at chance")
    left.set(xscale="log", xlabel="learning rate (peak)", ylabel="test accuracy (%)", ylim=(0, 100))
    left.set_title(f"after {result['steps']} steps: mean and range", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    for i, case in enumerate(ways.values()):
        for j, (low, high) in enumerate(case["useful"]):
            at = i + 0.1 * (j - (len(case["useful"]) - 1) / 2)
            right.plot([at, at], [low, high], color=COLOURS[i], linewidth=2.5, solid_capstyle="butt")
    right.set_xticks(range(len(ways)), [name.replace(", ", "\n") for name in ways], fontsize=8)
    right.set(yscale="log", ylabel="learning rate", ylim=(rates[0] / 2, rates[-1] * 2), xlim=(-0.6, len(ways) - 0.4))
    right.set_title(f"within {WITHIN:g} points of the best", fontsize=10)
    right.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Sensitivity to the learning rate, {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {"rates": 1, "width": 4, "hidden": 8, "steps": 4, "test": 100, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
