"""BatchNorm fails on small batches, and GroupNorm does not.

    python experiments/bn_batch_size_vs_groupnorm.py --data-dir DIR

Claim     the error of BatchNorm rises as fewer images share its statistics, and GroupNorm has no such statistics; with
          2 images BatchNorm loses to GroupNorm
Source    Wu & He 2018, "Group Normalization", figures 1 and 5
Data      Fashion-MNIST, reduced to 14 x 14 pixels, standardised
Recipe    four 3x3 convolutions (16, 32, 64, 64) on 14, 7, 3 and 1 pixels, so that the last norm has b values of a
          channel, as few as there are images; GroupNorm with 16 channels a group. Batch 64 for all, BatchNorm's
          statistics over groups of b images ("ghost" batches), as on 64 / b workers: nothing but the statistics
          differs, whereas the paper's batch and rate grow with b. 800 steps of SGD with momentum 0.9 and a cosine
          schedule, each at the rate of three that has the least training loss at the end, with a seed of its own
Cost      6 minutes
Expected  BatchNorm's error falls with b, is above GroupNorm's at b = 2 in every seed, and at or below it at b = 32 (in
          the paper, ImageNet: 34.7 against 24.1 % at b = 2, 23.6 against 24.1 % at b = 32)
Measured  test error (%): BatchNorm 38.00 +- 1.23 (b = 2), 14.99 +- 0.28 (b = 4), 13.68 +- 0.11 (b = 8), 13.22 +- 0.11
          (b = 16), 12.90 +- 0.22 (b = 32), 13.00 +- 0.17 (b = 64); GroupNorm 14.93 +- 0.56; with b = 2 BatchNorm's is
          the higher one in 5 of 5 seeds, by 23.07 +- 1.76 points; with b = 64 BatchNorm's is the higher one in 0 of 5
          seeds, by -1.93 +- 0.64 points; training errors at b = 2: 52.11 +- 2.08 against 14.61 +- 2.23 (n = 5 seeds, 95
          % intervals)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.figures import Bench, run_figure
from jaxcnn.layers.conv import Conv
from jaxcnn.layers.norm import BatchNorm, GroupNorm
from jaxcnn.layers.pool import max_pool
from jaxcnn.plots import COLOURS, band, bands
from jaxcnn.seeds import SeedsResult
from jaxcnn.spread import spread
from jaxcnn.types import Array


@dataclass(frozen=True)
class Settings:
    data: str = "fashion_mnist"
    images: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """That share BatchNorm's statistics."""
    batch_size: int = 64
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    steps: int = 800
    seeds: int = 5


WIDTHS = (16, 32, 64, 64)
LOGGED = 12


class Net(nn.Module):
    """(b, 14, 14, 1) -> logits (b, num_classes); BatchNorm over `images` images each, or GroupNorm if None."""

    images: int | None
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, width in enumerate(WIDTHS, 1):
            x = x if i == 1 else max_pool(x, window=2)
            x = Conv(width, 3, padding=1, use_bias=False, name=f"conv{i}")(x)
            norm = GroupNorm(groups=width // 16) if self.images is None else BatchNorm(statistics=self.images)
            x = nn.relu(norm(x, train=train))
        return nn.Dense(self.num_classes, name="fc")(x.reshape(x.shape[0], -1))


def measure(settings: Settings, bench: Bench) -> dict[str, Any]:
    return {
        "seeds": list(range(settings.seeds)),
        "images": settings.images,
        "BatchNorm": [_case(settings, bench, n) for n in settings.images],
        "GroupNorm": _case(settings, bench, None),
    }


def _case(settings: Settings, bench: Bench, images: int | None) -> dict[str, Any]:
    train = partial(_train, settings, bench, images)
    rate, losses = bench.best_rate(train, settings.rates, seed=settings.seeds)
    found = train(rate, range(settings.seeds))
    steps, accuracy = found.curve("accuracy")
    return {
        "rate": rate,
        "trial_loss": losses,
        "error": 100 * (1 - found.test["accuracy"]),
        "training": band(steps, 100 * (1 - accuracy)),
        "training_end": 100 * (1 - accuracy[-1]),
        "skipped": found.skipped,
    }


def _train(settings: Settings, bench: Bench, images: int | None, rate: float, seeds: Sequence[int]) -> SeedsResult:
    experiment = Experiment(
        name="batch_size",
        model=Model("vanilla_cnn"),
        data=Data(settings.data, batch_size=settings.batch_size, image_size=(14, 14)),
        optim=Optim("sgd", learning_rate=rate, schedule="cosine", options={"momentum": 0.9}),
        train=Train(steps=settings.steps, log_every=max(1, settings.steps // LOGGED)),
    )
    return bench.train(experiment, seeds=seeds, module=Net(images), quiet=True)


def _mean(values: Sequence[float] | np.ndarray) -> str:
    return f"{spread(np.asarray(values, float).tolist()):.2f}"


def say(result: dict[str, Any]) -> str:
    n, group, batch = len(result["seeds"]), result["GroupNorm"], result["BatchNorm"]
    each = ", ".join(f"{_mean(case['error'])} (b = {b})" for b, case in zip(result["images"], batch, strict=True))
    parts = []
    for i in (0, -1):
        gap = np.subtract(batch[i]["error"], group["error"])
        parts.append(
            f"with b = {result['images'][i]} BatchNorm's is the higher one in {int((gap > 0).sum())} of {n} seeds,"
            f" by {_mean(gap)} points"
        )
    return (
        f"test error (%): BatchNorm {each}; GroupNorm {_mean(group['error'])}; {'; '.join(parts)}; training errors at b"
        f" = {result['images'][0]}: {_mean(batch[0]['training_end'])} against {_mean(group['training_end'])} (n = {n}"
        " seeds, 95 % intervals)"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    images, group, batch = result["images"], result["GroupNorm"], result["BatchNorm"]
    same = [group["error"]] * len(images)
    cases = {"GroupNorm": same, "BatchNorm": [case["error"] for case in batch]}
    bands(left, {name: band(images, errors) for name, errors in cases.items()})
    for i, case in enumerate(batch):
        left.plot([images[i]] * len(case["error"]), case["error"], "o", color=COLOURS[1], markersize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(images, [f"{n}" for n in images])
    left.set(xlabel="b, images that share BatchNorm's statistics", ylabel="test error (%)", ylim=(0, None))
    left.legend(fontsize=8)
    curves = {f"BatchNorm, b = {images[i]}": batch[i]["training"] for i in (0, 1, -1)}
    bands(right, {"GroupNorm": group["training"]} | curves)
    right.set(xlabel="step", ylabel="training error (%)", ylim=(0, None))
    right.legend(fontsize=8)
    figure.suptitle(f"Statistics over fewer images: mean and range of {len(result['seeds'])} seeds", fontsize=11)


if __name__ == "__main__":
    small = {"images": (2, 4), "batch_size": 16, "rates": (0.1,), "steps": 6, "seeds": 1}
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke=small)
