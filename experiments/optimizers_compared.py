"""SGD, momentum, Nesterov, Adagrad, RMSProp, Adam, AdamW and Alrao: tuned and by default.

    python experiments/optimizers_compared.py --data-dir DIR

Claim     tuned, optimisers differ less than at their default rates; adaptive ones bring the training loss down sooner,
          and tuned SGD generalises as well
Source    Kingma & Ba 2015, figures 1 to 3; Wilson et al. 2017, "The marginal value of adaptive gradient methods"; Blier
          et al. 2018, "Learning with Random Learning Rates"
Data      Fashion-MNIST at 14x14 pixels, standardised, without augmentation
Recipe    two convolutions with BatchNorm and two dense layers, batch 128, constant rates; each optimiser at the rate of
          five, a factor of about 3 apart, with the least training loss at the end, in a trial with a seed of its own,
          and at PyTorch's default rate; Alrao once, with the paper's range 1e-5 to 10, ten copies of the output layer
          and rates drawn anew for every seed
Cost      5 minutes
Expected  the range of test accuracies over the optimisers is smaller tuned than by default; the adaptive ones reach the
          last loss of tuned SGD earlier; tuned SGD is within their intervals in test accuracy; Alrao is a little below
Measured  tuned, the optimisers differ less than by default: 3.3 +- 1.3 against 38.6 +- 1.3 points of test accuracy from
          best to worst. Rate, test accuracy after 300 steps and when the last training loss of tuned SGD is reached:
          SGD 0.3 80.4 +- 1.4 %, at step 262; momentum 0.03 82.4 +- 0.6 %, at step 206; Nesterov 0.03 83.2 +- 1.0 %, at
          step 182; Adagrad 0.03 82.2 +- 0.2 %, at step 224; RMSProp 0.003 82.1 +- 0.6 %, at step 218; Adam 0.01 82.9 +-
          0.7 %, at step 162; AdamW 0.01 83.3 +- 0.5 %, at step 162. 2 of 4 adaptive ones are there before Nesterov; the
          best of them in accuracy, AdamW, less tuned SGD is 2.9 +- 1.8 points; Alrao, untuned, is at 78.3 +- 2.8 % (n =
          5 seeds, 95 % intervals)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxcnn.alrao import averaged_cross_entropy
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.recipes import small_cnn
from jaxcnn.plots import BLACK, COLOURS, band, bands
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread


@dataclass(frozen=True)
class Settings:
    optimizers: tuple[str, ...] = ("SGD", "momentum", "Nesterov", "Adagrad", "RMSProp", "Adam", "AdamW")
    """With SGD and an adaptive one."""
    data: str = "fashion_mnist"
    image_size: tuple[int, int] = (14, 14)
    width: int = 8
    hidden: int = 64
    trials: int = 5
    """Rates tried for each optimiser, from the largest on."""
    steps: int = 300
    test: int = 5000
    seeds: int = 5


class Way(NamedTuple):
    """`optim` has the default rate of torch.optim; `rates` are tried."""

    optim: Optim
    rates: tuple[float, ...]


WAYS = {
    "SGD": Way(Optim("sgd", 0.001), (1.0, 0.3, 0.1, 0.03, 0.01)),
    "momentum": Way(Optim("sgd", 0.001, options={"momentum": 0.9}), (0.3, 0.1, 0.03, 0.01, 0.003)),
    "Nesterov": Way(Optim("sgd", 0.001, options={"momentum": 0.9, "nesterov": True}), (0.3, 0.1, 0.03, 0.01, 0.003)),
    "Adagrad": Way(Optim("adagrad", 0.01, options={"initial_accumulator_value": 0.0}), (0.3, 0.1, 0.03, 0.01, 0.003)),
    "RMSProp": Way(Optim("rmsprop", 0.01, options={"decay": 0.99}), (0.1, 0.03, 0.01, 0.003, 0.001)),
    "Adam": Way(Optim("adam", 0.001), (0.1, 0.03, 0.01, 0.003, 0.001)),
    "AdamW": Way(Optim("adamw", 0.001, weight_decay=0.01), (0.1, 0.03, 0.01, 0.003, 0.001)),
}
ADAPTIVE = ("Adagrad", "RMSProp", "Adam", "AdamW")
ALRAO = "Alrao"
LOGGED = 30


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    ways = {}
    for name in settings.optimizers:
        way = WAYS[name]
        train = partial(_train, settings, bench, way.optim)
        rate, losses = bench.best_rate(train, way.rates[: settings.trials], seed=settings.seeds)
        default = way.optim.learning_rate
        ways[name] = {
            "trial_loss": losses,
            "tuned": {"rate": rate} | _case([train(rate, range(settings.seeds))]),
            "default": {"rate": default} | _case([train(default, range(settings.seeds))]),
        }
    alrao = [_alrao(settings, bench, seed) for seed in range(settings.seeds)]
    return {"seeds": list(range(settings.seeds)), "steps": settings.steps, "ways": ways, ALRAO: _case(alrao)}


def _case(found: Sequence[SeedsResult]) -> dict[str, Any]:
    steps = found[0].curve("loss")[0]
    loss = np.concatenate([one.curve("loss")[1] for one in found], 1)
    return {
        "loss": band(steps, loss),
        "each": loss.T,
        "accuracy": 100 * np.concatenate([one.test["accuracy"] for one in found]),
        "skipped": np.concatenate([one.skipped for one in found]),
    }


def _train(settings: Settings, bench: Bench, optim: Optim, rate: float, seeds: Sequence[int]) -> SeedsResult:
    net = small_cnn(width=settings.width, hidden=settings.hidden)
    experiment = _experiment(settings, replace(optim, learning_rate=rate))
    return bench.train(experiment, seeds=seeds, module=net, test=settings.test, quiet=True)


def _alrao(settings: Settings, bench: Bench, seed: int) -> SeedsResult:
    net = small_cnn(width=settings.width, hidden=settings.hidden, copies=10)
    experiment = _experiment(settings, Optim("alrao", 1.0, options={"seed": seed}))
    options = {"test": settings.test, "loss_fn": averaged_cross_entropy, "quiet": True}
    return bench.train(experiment, seeds=[seed], module=net, **options)


def _experiment(settings: Settings, optim: Optim) -> Experiment:
    return Experiment(
        name="optimizers",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, image_size=settings.image_size),
        optim=optim,
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // LOGGED)),
    )


def _mean(values: Sequence[float], digits: int = 1) -> str:
    return f"{spread(values):.{digits}f}"


def _range(ways: dict[str, Any], how: str) -> list[float]:
    """Of the test accuracies over the optimisers, for every seed."""
    accuracy = np.array([way[how]["accuracy"] for way in ways.values()])
    return (accuracy.max(0) - accuracy.min(0)).tolist()


def _reached(ways: dict[str, Any], name: str) -> list[float]:
    """For every seed, the first logged step at which the loss is the last one of tuned SGD or less."""
    last = np.array(ways["SGD"]["tuned"]["each"], float)[:, -1:]
    there = np.array(ways[name]["tuned"]["each"], float) <= last
    steps = np.array(ways[name]["tuned"]["loss"]["x"], float)
    return [float(steps[np.argmax(row)]) for row in there if row.any()]


def say(result: dict[str, Any]) -> str:
    ways, n = result["ways"], len(result["seeds"])
    tuned, default = _range(ways, "tuned"), _range(ways, "default")
    less = "less" if np.mean(tuned) < np.mean(default) else "not less"
    each = []
    for name, way in ways.items():
        reached = _reached(ways, name)
        when = f"at step {np.mean(reached):.0f}" if reached else "never"
        missing = f" in {len(reached)} of {n}" if 0 < len(reached) < n else ""
        each.append(f"{name} {way['tuned']['rate']:g} {_mean(way['tuned']['accuracy'])} %, {when}{missing}")
    adaptive = [name for name in ways if name in ADAPTIVE]
    first = {name: np.mean(_reached(ways, name) or np.inf) for name in ways}
    soonest = min((name for name in ways if name not in ADAPTIVE), key=lambda name: first[name])
    sooner = sum(first[name] < first[soonest] for name in adaptive)
    best = max(adaptive, key=lambda name: np.mean(ways[name]["tuned"]["accuracy"]))
    ahead = np.subtract(ways[best]["tuned"]["accuracy"], ways["SGD"]["tuned"]["accuracy"]).tolist()
    return (
        f"tuned, the optimisers differ {less} than by default: {_mean(tuned)} against {_mean(default)} points of test"
        f" accuracy from best to worst. Rate, test accuracy after {result['steps']} steps and when the last training"
        f" loss of tuned SGD is reached: {'; '.join(each)}. {sooner} of {len(adaptive)} adaptive ones are there before"
        f" {soonest}; the best of them in accuracy, {best}, less tuned SGD is {_mean(ahead)} points; Alrao, untuned, is"
        f" at {_mean(result[ALRAO]['accuracy'])} % (n = {n} seeds, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    ways, alrao, grey = result["ways"], result[ALRAO], "0.55"
    bands(left, {f"{name}, {way['tuned']['rate']:g}": way["tuned"]["loss"] for name, way in ways.items()})
    curve = alrao["loss"]
    left.plot(curve["x"], curve["mean"], color=grey, linewidth=2.5, label=f"{ALRAO}, 1e-5 to 10")
    left.fill_between(curve["x"], curve["low"], curve["high"], color=grey, alpha=0.2, linewidth=0)
    lows = [min(case["loss"]["low"]) for case in (alrao, *(way["tuned"] for way in ways.values()))]
    left.set(xlabel="step", ylabel="training loss (nats)", yscale="log", ylim=(0.9 * min(lows), 3))
    left.set_yticks([0.3, 0.5, 1, 2, 3], ["0.3", "0.5", "1", "2", "3"])
    left.minorticks_off()
    left.set_title("each at its best rate", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    looks = {"tuned": (-0.14, "full"), "default": (0.14, "none")}
    for i, way in enumerate(ways.values()):
        for how, (offset, fill) in looks.items():
            values = way[how]["accuracy"]
            at = np.full(len(values), i + offset)
            right.plot(at, values, "o", color=COLOURS[i], fillstyle=fill, markersize=5)
    right.plot([len(ways)] * len(alrao["accuracy"]), alrao["accuracy"], "o", color=grey, markersize=5)
    for how, (_, fill) in looks.items():
        right.plot([], [], "o", color=BLACK, fillstyle=fill, markersize=5, label=f"{how} rate")
    right.set_xticks(range(len(ways) + 1), [*ways, ALRAO], rotation=40, ha="right", fontsize=9)
    right.set(ylabel="test accuracy (%)")
    right.set_title(f"after {result['steps']} steps, every seed", fontsize=10)
    right.legend(fontsize=8)
    right.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Optimisers: mean and range of {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {"optimizers": ("SGD", "Adam"), "trials": 1, "width": 4, "hidden": 8, "steps": 4, "test": 100, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
