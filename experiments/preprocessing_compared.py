"""Preprocessing: what it does to the input's conditioning, to a linear classifier and to a small CNN.

    python experiments/preprocessing_compared.py --data-dir DIR

Claim     inputs of mean 0, equal variance and without correlation make gradient descent converge faster, since its pace
          is set by the condition number of the input's second moments; but rotations onto principal axes take the
          neighbourhoods away that a CNN is built on, and ZCA, which rotates back, does not
Source    LeCun et al. 1998, "Efficient BackProp", section 4.3; Krizhevsky 2009, "Learning Multiple Layers of Features
          from Tiny Images" (ZCA)
Data      CIFAR-10 at 16 pixels, 10,000 training images
Recipe    the eight kinds of the package, fitted on the training images; condition number: largest over smallest
          eigenvalue of E[(x, 1)(x, 1)^T], the 1 for the biases, which a linear classifier's curvature is proportional
          to. Linear: one dense layer, SGD without momentum. CNN: two stages of 3x3 convolution (8 and 16 maps), ReLU
          and max-pooling, one dense layer; He's initial weights; SGD with momentum 0.9. Batch 128, constant rates; for
          every kind and model the one of five (CNN: three) rates that has the least training loss at the end, with a
          seed of its own, because scale alone moves the best rate
Cost      5 minutes
Expected  linear: training loss falls with the condition number, none highest, whiten and zca lowest and equal (one is
          the other rotated), though not their test accuracy, as whitening raises the noise of fine detail; CNN: pca and
          whiten behind all others, zca not
Measured  condition numbers: none 7.2e+07, scale 5.4e+06, channel_mean 5.3e+06, mean_image 5.3e+06, standardize 5.1e+06,
          pca 5.3e+06, whiten 54, zca 54. Training loss and test accuracy after 200 steps, each at its best rate;
          linear: none 1.99 and 28.4 %, scale 1.79 and 36.0 %, channel_mean 1.79 and 36.2 %, mean_image 1.78 and 36.3 %,
          standardize 1.81 and 34.9 %, pca 1.78 and 36.3 %, whiten 1.59 and 34.7 %, zca 1.59 and 34.8 %; against
          mean_image with the same seed, points: pca +0.0 +- 0.4, whiten -1.6 +- 0.4, zca -1.5 +- 0.9. CNN: none 1.73
          and 35.9 %, scale 1.55 and 42.0 %, channel_mean 1.52 and 42.7 %, mean_image 1.53 and 42.4 %, standardize 1.58
          and 41.8 %, pca 1.84 and 31.5 %, whiten 2.28 and 12.5 %, zca 1.86 and 31.5 %; against mean_image with the same
          seed, points: pca -10.9 +- 2.7, whiten -29.9 +- 4.0, zca -10.8 +- 15.9 (means of n = 5 seeds, 95 % intervals)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn import models
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.data import preprocess
from jaxcnn.figures import Bench, run_figure
from jaxcnn.plots import BLUE, GREEN, ORANGE
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread

KINDS = ("none", "scale", "channel_mean", "mean_image", "standardize", "pca", "whiten", "zca")
NETS = ("linear", "CNN")
PLAIN = "mean_image"
"""What pca rotates."""


@dataclass(frozen=True)
class Settings:
    kinds: tuple[str, ...] = KINDS
    image_size: tuple[int, int] = (16, 16)
    train: int = 10_000
    """Training images."""
    width: int = 8
    """Maps of the CNN's first stage."""
    linear_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    cnn_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    steps: int = 200
    seeds: int = 5


def network(settings: Settings, name: str) -> nn.Module:
    if name == "linear":
        return models.create("linear", num_classes=10)
    return models.create("vanilla_cnn", num_classes=10, stages=2, dense_layers=1, width=settings.width)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    return {
        "seeds": list(range(settings.seeds)),
        "steps": settings.steps,
        "condition": {kind: condition(settings, bench, kind) for kind in settings.kinds},
        "nets": {name: {kind: _case(settings, bench, name, kind) for kind in settings.kinds} for name in NETS},
    }


def condition(settings: Settings, bench: Bench, kind: str) -> float:
    """Of E[(x, 1)(x, 1)^T] over the training images x, preprocessed and flattened; infinite where it is singular."""
    images = bench.splits(_experiment(settings, "linear", kind, rate=1.0), train=settings.train).train.images
    ready = np.asarray(preprocess.fit(kind, images)(preprocess.to_float(images)), np.float64)
    x = np.concatenate([ready.reshape(len(ready), -1), np.ones((len(ready), 1))], 1)
    least, *_, largest = np.linalg.eigvalsh(x.T @ x / len(x))
    return float(largest / least) if least > 1e-12 * largest else float("inf")


def _case(settings: Settings, bench: Bench, name: str, kind: str) -> dict[str, Any]:
    train = partial(_train, settings, bench, name, kind)
    rates = settings.linear_rates if name == "linear" else settings.cnn_rates
    rate, losses = bench.best_rate(train, rates, seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    return {
        "rate": rate,
        "trial_loss": losses,
        "loss": found.curve("loss")[1][-1],
        "accuracy": 100 * found.test["accuracy"],
        "skipped": found.skipped,
    }


def _experiment(settings: Settings, name: str, kind: str, *, rate: float) -> Experiment:
    return Experiment(
        name="preprocessing",
        model=Model("vanilla_cnn"),
        data=Data("cifar10", batch_size=128, image_size=settings.image_size, preprocessing=kind),
        optim=Optim("sgd", learning_rate=rate, options={"momentum": 0.9} if name == "CNN" else {}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // 10)),
    )


def _train(settings: Settings, bench: Bench, name: str, kind: str, rate: float, seeds: Sequence[int]) -> SeedsResult:
    experiment, net = _experiment(settings, name, kind, rate=rate), network(settings, name)
    return bench.train(experiment, seeds=seeds, module=net, train=settings.train, test=5000, quiet=True)


def say(result: dict[str, Any]) -> str:
    numbers = [f"{kind} {_number(value)}" for kind, value in result["condition"].items()]
    nets = []
    for name, cases in result["nets"].items():
        each, apart, plain = [], [], np.array(cases[PLAIN]["accuracy"])
        for kind, case in cases.items():
            each.append(f"{kind} {np.mean(np.array(case['loss'], float)):.2f} and {np.mean(case['accuracy']):.1f} %")
            if kind in ("pca", "whiten", "zca"):
                gap = spread((np.array(case["accuracy"]) - plain).tolist())
                apart.append(f"{kind} {gap:+.1f}")
        nets.append(f"{name}: {', '.join(each)}; against {PLAIN} with the same seed, points: {', '.join(apart)}")
    return (
        f"condition numbers: {', '.join(numbers)}. Training loss and test accuracy after {result['steps']} steps, each"
        f" at its best rate; {'. '.join(nets)} (means of n = {len(result['seeds'])} seeds, 95 % intervals)"
    )


def _number(value: float | None) -> str:
    return "singular" if value is None else f"{value:.2g}"


def draw(result: dict[str, Any], figure: Any) -> None:
    left, *others = figure.subplots(1, 3, sharey=True)
    kinds = list(result["condition"])
    values = np.array(list(result["condition"].values()), float)
    left.plot(values, range(len(kinds)), "s", color=GREEN, markersize=6)
    left.set_yticks(range(len(kinds)), kinds)
    left.invert_yaxis()
    left.set(
        xscale="log" if np.isfinite(values).any() else "linear", xlabel="condition number", title="input with bias"
    )
    for axes, key, label in zip(
        others, ("loss", "accuracy"), ("training loss (nats)", "test accuracy (%)"), strict=True
    ):
        for (name, cases), colour, marker, shift in zip(
            result["nets"].items(), (BLUE, ORANGE), "oD", (-0.12, 0.12), strict=True
        ):
            for row, case in enumerate(cases.values()):
                seeds = np.array(case[key], float)
                label_once = {"label": name} if row == 0 else {}
                axes.plot(seeds, np.full(len(seeds), row + shift), marker, color=colour, markersize=4, **label_once)
        axes.set(xlabel=label, title=f"after {result['steps']} steps")
    for axes in (left, *others):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    figure.legend(*others[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"Preprocessing, each at its best learning rate: {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {
        "kinds": ("mean_image", "zca"),
        "image_size": (8, 8),
        "width": 2,
        "linear_rates": (0.03,),
        "cnn_rates": (0.03,),
        "steps": 4,
        "seeds": 1,
    }
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
