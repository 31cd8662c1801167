"""Dropout before BatchNorm: in training the norms learn another variance than the one they meet in the test.

    python experiments/dropout_variance_shift.py --data-dir DIR

Claim     dropout in front of a norm raises the variance that the norm learns, and in the test it is off: test over
          learnt variance is below 1. Nothing shifts where dropout comes after the last norm, and uniform dropout
          shifts less. For inputs of mean 0 the ratio is the keep rate p of dropout, 3 / (3 + beta^2) of uniform dropout
Source    Li et al. 2018, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift"
Data      Fashion-MNIST, reduced to 14 x 14 pixels, standardised
Recipe    four 3x3 convolutions (16, 16, 32, 32), each with BatchNorm, ReLU and the dropout, then the mean over
          positions and a dense layer; rate 0.5, or beta = 1, the most that uniform dropout can be; SGD with momentum
          0.9, rate 0.05 with a cosine schedule for all, batch 64. Variances over 4,000 training images without
          dropout; recalibrated: the norms get the statistics of those images, layer by layer. Closed forms: N(0, 1)
          through dropout into a norm, 100,000 examples of 16 channels
Cost      5 minutes
Expected  ratios of 1 without dropout and with dropout after the last norm, below 1 in every norm behind dropout and
          nearer to 1 with uniform dropout (after a ReLU the mean is not 0, and the ratio can fall below p);
          recalibration gives accuracy back where there was a shift
Measured  test over learnt variance in the norms behind the first one: no dropout 0.992 to 1.018, dropout before norms
          0.279 to 0.808, uniform before norms 0.491 to 0.903, dropout after the last 0.991 to 1.019; closed forms met
          within 0.0004; test accuracy: no dropout 85.1 +- 0.4 %, recalibrated +0.03 +- 0.10; dropout before norms 60.6
          +- 6.7 %, recalibrated +14.65 +- 6.73; uniform before norms 74.6 +- 3.3 %, recalibrated +5.47 +- 3.35; dropout
          after the last 84.7 +- 0.4 %, recalibrated -0.07 +- 0.03 (n = 5 seeds, 95 % intervals)
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcnn.analysis.batchnorm import drift, recalibrate
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.figures.bench import accuracy_on
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.dropout import Dropout, UniformDropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.plots import BLACK, BLUE, COLOURS, LINES, ORANGE
from jaxcnn.spread import spread
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    data: str = "fashion_mnist"
    rate: float = 0.5
    beta: float = 1.0
    steps: int = 1000
    measured: int = 4000
    """Training images over which the variances are taken."""
    drawn: int = 100_000
    """Examples of N(0, 1) for the closed forms."""
    seeds: int = 5


WIDTHS = (16, 16, 32, 32)
WAYS = ("no dropout", "dropout before norms", "uniform before norms", "dropout after the last")
KEEP, BETAS = (0.8, 0.5, 0.3), (0.4, 0.7, 1.0)


class Net(nn.Module):
    """(b, 14, 14, 1) -> logits (b, num_classes); `way` is one of WAYS."""

    way: str
    rate: float
    beta: float
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, width in enumerate(WIDTHS, 1):
            x = Conv(width, 3, padding=1, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(name=f"bn{i}")(x, train=train))
            last = i == len(WIDTHS)
            if self.way == "uniform before norms" and not last:
                x = UniformDropout(self.beta)(x, train=train)
            if self.way == ("dropout after the last" if last else "dropout before norms"):
                x = Dropout(self.rate)(x, train=train)
            if i == 2:
                x = max_pool(x, window=2)
        return nn.Dense(self.num_classes, name="fc")(global_avg_pool(x))


class Bare(nn.Module):
    """(b, c) -> (b, c): a kind of dropout and the norm behind it."""

    drop: nn.Module

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return BatchNorm(name="bn")(self.drop(x, train=train), train=train)


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    seeds = range(settings.seeds)
    closed = {
        "dropout": [_closed(Dropout(1 - keep), settings.drawn) for keep in KEEP],
        "uniform": [_closed(UniformDropout(beta), settings.drawn) for beta in BETAS],
    }
    ways = {way: _way(settings, bench, way) for way in WAYS}
    return {"seeds": list(seeds), "rate": settings.rate, "beta": settings.beta, "closed": closed, "ways": ways}


def _closed(drop: nn.Module, examples: int) -> float:
    """Test over learnt variance for inputs N(0, 1)."""
    net = Bare(drop)
    x = np.random.default_rng(0).standard_normal((examples, 16), np.float32)
    start = net.init(jax.random.key(0), x[:1], train=False)
    learnt = recalibrate(net, start, x, mode="one_pass", batch_size=examples)
    return drift(net, learnt.variables, x, batch_size=examples)[0].ratio


def _way(settings: Settings, bench: Bench, way: str) -> dict[str, Any]:
    experiment = Experiment(
        name="dropout",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, batch_size=64, image_size=(14, 14)),
        optim=Optim("sgd", learning_rate=0.05, schedule="cosine", options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=settings.steps),
    )
    net = Net(way, settings.rate, settings.beta)
    found = bench.train(experiment, seeds=range(settings.seeds), module=net, quiet=True)
    data = bench.prepared(experiment)
    images = data.train.images[: settings.measured]
    ratios, recalibrated = [], []
    for variables in found.each():
        ratios.append([one.ratio for one in drift(net, variables, images)])
        again = recalibrate(net, variables, images, mode="exact").variables
        recalibrated.append(accuracy_on(net, again, data.test))
    return {
        "ratio": np.transpose(ratios),  # (norms, seeds)
        "accuracy": found.test["accuracy"],
        "recalibrated": recalibrated,
        "train_loss": found.curve("loss")[1][-1],
    }


def say(result: dict[str, Any]) -> str:
    ways, n = result["ways"], len(result["seeds"])
    behind = {way: np.array(case["ratio"])[1:] for way, case in ways.items()}  # no dropout stands before the first norm
    ratios = {way: f"{values.min():.3f} to {values.max():.3f}" for way, values in behind.items()}
    accuracy = []
    for way, case in ways.items():
        before, gain = spread(case["accuracy"]), spread(np.subtract(case["recalibrated"], case["accuracy"]))
        accuracy.append(
            f"{way} {100 * before.mean:.1f} +- {100 * before.half:.1f} %, recalibrated"
            f" {100 * gain.mean:+.2f} +- {100 * gain.half:.2f}"
        )
    off = [abs(value - right) for value, right in _pairs(result)]
    return (
        "test over learnt variance in the norms behind the first one: "
        + ", ".join(f"{way} {text}" for way, text in ratios.items())
        + f"; closed forms met within {max(off):.4f}; test accuracy: "
        + "; ".join(accuracy)
        + f" (n = {n} seeds, 95 % intervals)"
    )


def _pairs(result: dict[str, Any]) -> list[tuple[float, float]]:
    """The measured ratio and the closed form, for each strength of the noise."""
    dropout = list(zip(result["closed"]["dropout"], KEEP, strict=True))
    return dropout + [(ratio, 3 / (3 + b**2)) for ratio, b in zip(result["closed"]["uniform"], BETAS, strict=True)]


def draw(result: dict[str, Any], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.25, 1.25))
    pairs = _pairs(result)
    left.plot([0, 1], [0, 1], color=BLACK, linewidth=1)
    for name, part, colour, mark in (
        ("dropout: p", pairs[: len(KEEP)], BLUE, "o"),
        ("uniform: 3/(3 + β²)", pairs[len(KEEP) :], ORANGE, "^"),
    ):
        left.plot([right for _, right in part], [value for value, _ in part], mark, color=colour, label=name)
    left.set(xlabel="closed form", ylabel="test over learnt variance, measured", xlim=(0, 1.05), ylim=(0, 1.05))
    left.set_title("inputs of mean 0", fontsize=10)
    left.legend(fontsize=8, loc="lower right", handlelength=1)
    left.grid(alpha=0.3)
    for i, (way, case) in enumerate(result["ways"].items()):
        ratio = np.array(case["ratio"])
        at = np.arange(1, len(ratio) + 1)
        middle.plot(at, ratio.mean(1), color=COLOURS[i], linestyle=LINES[i], marker="o", markersize=4, label=way)
        middle.fill_between(at, ratio.min(1), ratio.max(1), color=COLOURS[i], alpha=0.2, linewidth=0)
        for key, mark, shift in (("accuracy", "o", -0.15), ("recalibrated", "s", 0.15)):
            values = 100 * np.array(case[key])
            right.plot(np.full(len(values), i + shift), values, mark, color=COLOURS[i], markersize=4, alpha=0.7)
            right.hlines(values.mean(), i + shift - 0.13, i + shift + 0.13, color=BLACK, linewidth=1)
    middle.set(xlabel="norm, from the input", ylabel="test over learnt variance", xticks=at)
    middle.set_title("in a trained network", fontsize=10)
    middle.grid(alpha=0.3)
    right.set_xticks(range(len(WAYS)), ["none", "dropout", "uniform", "after\nthe last"], fontsize=8)
    right.set(ylabel="test accuracy (%)")
    right.set_title("○ as trained, □ recalibrated", fontsize=10)
    right.grid(axis="y", alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"Variance shift by dropout, {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {"steps": 10, "measured": 200, "drawn": 2000, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
