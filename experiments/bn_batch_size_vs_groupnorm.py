"""BatchNorm fails on small batches, and GroupNorm does not.

    python experiments/bn_batch_size_vs_groupnorm.py --data-dir DIR

Claim     the error of BatchNorm rises as fewer images share its statistics, that of GroupNorm hardly; with 2 images
          BatchNorm loses to GroupNorm
Source    Wu & He 2018, "Group Normalization", figures 1 and 5
Data      Fashion-MNIST, reduced to 14 x 14 pixels, standardised
Recipe    as in the paper 8 workers of b images each: batch 8b, BatchNorm's statistics over groups of b images
          ("ghost" batches), GroupNorm with 4 channels a group; four 3x3 convolutions (16, 32, 64, 64) on 14, 7, 3 and 3
          pixels; equal numbers of examples seen; SGD with momentum 0.9 and a cosine schedule; for each norm and b the
          rate is b / 32 times the one of three that has the least training loss at the end, with a seed of its own
Cost      10 minutes
Expected  a lower error of GroupNorm at b = 2 in every seed; nearly equal errors at b = 32 (in the paper, ImageNet:
          34.7 against 24.1 % at b = 2, 23.6 against 24.1 % at b = 32)
Measured  nothing yet
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.norm import BatchNorm, GroupNorm
from jaxcnn.layers.pool import global_avg_pool, max_pool
from jaxcnn.plots import band, bands
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    data: str = "fashion_mnist"
    images: tuple[int, ...] = (2, 4, 8, 16, 32)
    """A worker's."""
    workers: int = 8
    examples: int = 49_152
    """Seen in training, by every network."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Tried, for 32 images a worker; in proportion for others."""
    seeds: int = 5


NORMS = ("BatchNorm", "GroupNorm")
WIDTHS = (16, 32, 64, 64)
LOGGED = 12


class Net(nn.Module):
    """(b, 14, 14, 1) -> logits (b, num_classes); BatchNorm's statistics are those of `images` images each."""

    norm: str
    images: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, width in enumerate(WIDTHS, 1):
            x = Conv(width, 3, padding=1, use_bias=False, name=f"conv{i}")(x)
            norm = BatchNorm(statistics=self.images) if self.norm == "BatchNorm" else GroupNorm(groups=width // 4)
            x = nn.relu(norm(x, train=train))
            if i <= 2:
                x = max_pool(x, window=2)
        return nn.Dense(self.num_classes, name="fc")(global_avg_pool(x))


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {"seeds": list(range(settings.seeds)), "images": settings.images, "norms": {}}
    for norm in NORMS:
        cases = [_case(settings, bench, norm, n) for n in settings.images]
        result["norms"][norm] = {key: [case[key] for case in cases] for key in cases[0]}
    return result


def _case(settings: Settings, bench: Bench, norm: str, n: int) -> dict[str, Any]:
    train = partial(_train, settings, bench, norm, n)
    rate, _ = bench.best_rate(train, [rate * n / 32 for rate in settings.rates], seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    steps, accuracy = found.curve("accuracy")
    return {
        "rate": rate * 32 / n,
        "error": 100 * (1 - found.test["accuracy"]),
        "training": band(steps * settings.workers * n / 1000, 100 * (1 - accuracy)),
        "training_end": 100 * (1 - accuracy[-1]),
        "skipped": found.skipped,
    }


def _train(settings: Settings, bench: Bench, norm: str, n: int, rate: float, seeds: Any) -> SeedsResult:
    size = settings.workers * n
    steps = max(1, settings.examples // size)
    experiment = Experiment(
        name="batch_size",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, batch_size=size, image_size=(14, 14)),
        optim=Optim("sgd", learning_rate=rate, schedule="cosine", options={"momentum": 0.9}),
        train=Train(steps=steps, log_every=max(1, steps // LOGGED)),
    )
    return bench.train(experiment, seeds=seeds, module=Net(norm, n), quiet=True)


def say(result: dict[str, Any]) -> str:
    errors = {norm: np.array(case["error"]) for norm, case in result["norms"].items()}
    n = len(result["seeds"])
    parts = []
    for i, images in enumerate(result["images"]):
        both = [spread(errors[norm][i]) for norm in NORMS]
        parts.append(f"b = {images}: " + " and ".join(f"{one.mean:.2f} +- {one.half:.2f}" for one in both))
    gap = spread(errors["BatchNorm"][0] - errors["GroupNorm"][0])
    lost = int((errors["BatchNorm"][0] > errors["GroupNorm"][0]).sum())
    first = [spread(np.array(case["training_end"][0], float).tolist()) for case in result["norms"].values()]
    return (
        f"test error (%) of BatchNorm and GroupNorm with b images a worker: {'; '.join(parts)}; at b ="
        f" {result['images'][0]} BatchNorm's test error is the higher one in {lost} of {n} seeds, by {gap.mean:+.2f} +-"
        f" {gap.half:.2f} points, and the training errors there are {first[0].mean:.2f} +- {first[0].half:.2f} and"
        f" {first[1].mean:.2f} +- {first[1].half:.2f} (n = {n} seeds, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    images = result["images"]
    bands(left, {norm: band(images, case["error"]) for norm, case in result["norms"].items()}, marker="o")
    left.set_xscale("log", base=2)
    left.set_xticks(images, [f"{n}" for n in images])
    left.set(xlabel="b, images a worker (share statistics)", ylabel="test error (%)")
    left.legend(fontsize=8)
    curves = {
        f"{norm}, b = {images[i]}": case["training"][i] for norm, case in result["norms"].items() for i in (0, -1)
    }
    bands(right, curves)
    right.set(xlabel="examples seen (thousands)", ylabel="training error (%)", ylim=(0, None))
    right.legend(fontsize=8)
    figure.suptitle(
        f"Errors after equal numbers of examples: mean and range of {len(result['seeds'])} seeds", fontsize=11
    )


if __name__ == "__main__":
    small = {"images": (2, 4), "examples": 256, "rates": (0.1,), "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
